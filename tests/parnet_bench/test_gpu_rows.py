"""Rows on GPUs, on a recording driver: what is timed and what is not, and what else they tell."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from parnet_bench.machine.environment import read_environment
from parnet_bench.measuring import latency
from parnet_bench.measuring.latency import measure_rows
from parnet_bench.report.csv_file import csv_text
from parnet_bench.report.html_page import render_page
from parnet_bench.report.table import render
from parnet_bench.results.comparability import refusals
from parnet_bench.results.cost_columns import HEADINGS, cells_of, costs_of
from parnet_bench.results.procedure import Procedure
from parnet_bench.results.result import RowTimeline, SplitTimes
from parnet_bench.results.result_file import as_dict, decode
from parnet_bench.results.summary import summarise
from parnet_bench.results.used_runtimes import used_runtimes
from parnet_bench.targets import row_devices
from parnet_bench.targets.request import Request
from parnet_bench.targets.rows import plan_rows
from parnet_bench.workers import loaded_row, worker
from parnet_bench.workers.device_figures import DeviceFigures
from parnet_bench.workers.job import Job
from parnet_bench.workers.loaded_row import LoadedRow
from parnet_bench.workers.row_gpus import RowGpus
from parnet_bench.workers.row_process import RowFailedError
from parnet_bench.workers.turn import Turn, TurnRequest, one_at_a_time
from parnet_engines.cuda import engines as cuda_engines
from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.driver import CudaError
from parnet_engines.cuda.engine import EngineFile
from parnet_engines.cuda.hosted_engine import HostedEngine
from parnet_engines.cuda.recording_driver import Call, RecordingDriver
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.planning.layouts import whole_graph
from parnet_engines.runtimes import ort_cuda
from parnet_engines.runtimes.ort import OrtEngine
from parnet_export.console import stdout

PLAN_BYTES = 1000
L2_BYTES = RecordingDriver().gpus()[0].l2_cache_bytes


@pytest.fixture
def driver(monkeypatch):
    """Two recorders for GPUs, with engines that run on the CPU, and clocks that are noted."""
    found = RecordingDriver(2)

    def load(bundle, names, driver, device, boundary):
        graph = bundle.stream_graph
        whole = whole_graph(graph)
        return {
            name: HostedEngine(
                OrtEngine(
                    whole[WHOLE] if name == WHOLE else graph[name],
                    bundle.whole_path if name == WHOLE else bundle.segment_path(name),
                    threads=1,
                ),
                driver,
                device,
                file=EngineFile(Path(f"{name}.plan"), PLAN_BYTES),
            )
            for name in names
        }

    def clock():
        found.calls.append(Call("clock", -1, ()))
        return len(found.calls)

    monkeypatch.setattr(cuda_engines, "CUDA_ENGINES", {"onnxruntime": ort_cuda.__name__})
    monkeypatch.setattr(ort_cuda, "load_engines", load)
    monkeypatch.setattr(cuda_session, "open_driver", lambda _: found)
    monkeypatch.setattr(loaded_row, "open_driver", lambda _: found)
    monkeypatch.setattr(loaded_row, "one_at_a_time", partial(one_at_a_time, clock=clock))
    return found


@pytest.fixture
def job(forked_bundle):
    return Job(str(forked_bundle.path), plan="streams", devices="0", cores=(0,), sizes={})


def timed_intervals(calls):
    """Return what was called while each run was timed, and what between runs."""
    verbs = [call.verb for call in calls if not call.verb.endswith("_context")]
    begin, *marks, end = [index for index, verb in enumerate(verbs) if verb == "clock"]
    assert verbs[-1] == "free_bytes"  # a look at the memory, after the turn
    timed = [verbs[a + 1 : b] for a, b in zip(marks[::2], marks[1::2], strict=True)]
    apart = [verbs[a + 1 : b] for a, b in zip([begin, *marks[1:-1:2]], marks[::2], strict=True)]
    assert verbs[marks[-1] + 1 : end] == []
    return timed, apart


WITH_COPIES = ["copy_to_device", "launch", "copy_to_host", "synchronize"]
WITHOUT = ["launch", "synchronize"]


@pytest.mark.parametrize(("data_transfers", "timed"), [(True, WITH_COPIES), (False, WITHOUT)])
@pytest.mark.parametrize("l2_flush", [False, True])
def test_what_is_timed_is_the_inference_and_nothing_else(
    driver, job, data_transfers, timed, l2_flush
):
    row = LoadedRow(replace(job, data_transfers=data_transfers))
    row.take_turn(TurnRequest(1, l2_flush=l2_flush))  # makes the memory to write over the cache
    before = len(driver.calls)
    turn = row.take_turn(TurnRequest(3, lead_in=2, l2_flush=l2_flush))
    recorded = driver.calls[before:]
    found, apart = timed_intervals(
        recorded[next(index for index, call in enumerate(recorded) if call.verb == "clock") :]
    )
    assert found == [timed] * 3 == [timed] * len(turn.latencies_ns)
    # The flush is complete before the clock is read.
    assert apart == [["clear", "synchronize"] if l2_flush else []] * 3
    row.close()
    assert driver.open_resources == {}


def test_what_is_written_over_a_cache_is_twice_its_size_on_every_gpu(driver):
    gpus = RowGpus(driver, (0, 1))
    gpus.empty_caches()
    before = len(driver.calls)
    gpus.empty_caches()
    calls = [call for call in driver.calls[before:] if not call.verb.endswith("_context")]
    assert [call.verb for call in calls] == ["clear", "clear", "synchronize", "synchronize"]
    assert [call.device for call in calls] == [0, 1, 0, 1]
    assert [call.operands[-1] for call in calls[:2]] == [2 * L2_BYTES] * 2
    streams = [call.operands[0] for call in calls]
    assert streams[:2] == streams[2:]
    gpus.close()
    gpus.close()
    assert driver.open_resources == {}


def test_a_gpu_that_does_not_tell_its_cache_gets_the_size_of_the_largest(driver):
    driver._gpus = tuple(replace(gpu, l2_cache_bytes=0) for gpu in driver.gpus())
    driver.clear = lambda *_: None
    gpus = RowGpus(driver, (1,))
    gpus.empty_caches()
    (size_bytes,) = {call.operands[0] for call in driver.calls if call.verb == "allocate"}
    assert size_bytes >= 2 * 126_000_000  # a B200's
    gpus.close()


def test_the_most_memory_that_was_seen_is_kept_and_what_flushes_take_left_out(driver):
    driver.retain_context(0)
    others = driver.allocate(0, 5000)
    gpus = RowGpus(driver, (0,))
    assert gpus.peak_bytes == 0
    first, second = driver.allocate(0, 1000), driver.allocate(0, 500)
    gpus.look()
    driver.free(0, second)
    gpus.empty_caches()
    gpus.look()
    assert gpus.peak_bytes == 1500
    driver.allocate(0, 700)
    gpus.look()
    assert gpus.peak_bytes == 1700
    gpus.close()
    assert driver.open_resources == {"contexts": 1, "buffers": 3}
    assert driver.locate(first).device == driver.locate(others).device == 0


def test_memory_that_rows_take_which_are_loaded_later_is_not_the_rows(driver, job):
    first = LoadedRow(job)
    second = LoadedRow(job)  # in a process of its own, of which the driver tells as much
    for row in (first, second):
        row.take_turn(TurnRequest(1))
    peaks = [row.device_figures(TurnRequest(1)).peak_device_bytes for row in (first, second)]
    assert peaks[0] == peaks[1] > 0
    second.close()
    first.take_turn(TurnRequest(1))
    assert first.device_figures(TurnRequest(1)).peak_device_bytes == peaks[0]
    first.close()


def test_gpus_that_refuse_leave_nothing_open():
    driver = RecordingDriver(1, fail_at=1)
    with pytest.raises(CudaError):
        RowGpus(driver, (0,))
    driver.fail_at = None
    assert driver.open_resources == {}


@pytest.mark.parametrize("data_transfers", [True, False])
def test_figures_are_those_of_the_memory_the_files_and_the_parts(driver, job, data_transfers):
    row = LoadedRow(replace(job, data_transfers=data_transfers))
    row.take_turn(TurnRequest(2, l2_flush=True))
    before = len(driver.calls)
    figures = row.device_figures(TurnRequest(4, lead_in=1, l2_flush=True))
    verbs = [call.verb for call in driver.calls[before:]]
    assert verbs.count("launch") == verbs.count("clear") == 5
    assert verbs.count("copy_to_device") == verbs.count("copy_to_host") == 5 * data_transfers
    for part in SplitTimes.__slots__:
        (times_ns,) = getattr(figures.split, part)
        assert len(times_ns) == 4
        assert min(times_ns) > 0
    allocated = [call.operands[0] for call in driver.calls if call.verb == "allocate"]
    assert allocated.count(2 * L2_BYTES) == 1
    assert figures.peak_device_bytes == sum(allocated) - 2 * L2_BYTES
    segments = {
        step.segment for step in row._session.program.program.steps if hasattr(step, "segment")
    }
    assert figures.engine_bytes == PLAN_BYTES * len(segments) > PLAN_BYTES
    assert (figures.engine, figures.execution) == ("onnxruntime", "one CUDA graph")
    row.close()
    assert driver.open_resources == {}


def test_figures_need_no_turn_before_them(driver, job):
    row = LoadedRow(replace(job, data_transfers=False))
    figures = row.device_figures(TurnRequest(2))
    assert len(figures.split.compute_ns[0]) == 2
    row.close()


def test_runtimes_without_files_have_no_size_of_engines(driver, job, monkeypatch):
    monkeypatch.setattr(HostedEngine, "file", property(lambda _: None))
    row = LoadedRow(job)
    assert row.device_figures(TurnRequest(1)).engine_bytes is None
    row.close()


def test_resident_inputs_are_uploaded_again_when_the_session_is_another(driver, job, monkeypatch):
    ran = []

    def one_after_the_other(run, request):
        before = len(driver.calls)
        for _ in range(request.runs):
            run()
        ran.extend(c.verb for c in driver.calls[before:] if not c.verb.endswith("_context"))
        return Turn((1,) * request.runs, request.runs)

    monkeypatch.setattr(loaded_row, "several_in_flight", one_after_the_other)
    row = LoadedRow(replace(job, data_transfers=False))
    row.take_turn(TurnRequest(3, in_flight=2))
    assert ran == WITHOUT * 3
    row.close()


def test_rows_on_the_cpu_have_no_figures_of_gpus(forked_bundle):
    cores = tuple(sorted(os.sched_getaffinity(0)))
    row = LoadedRow(Job(str(forked_bundle.path), "whole", "cpu", cores, {}))
    with pytest.raises(TypeError, match="only rows on GPUs"):
        row.device_figures(TurnRequest(1))
    row.close()


def test_a_worker_answers_a_request_for_figures(driver, job, monkeypatch):
    monkeypatch.setattr(worker, "use_cores", lambda _: None)
    asked = [job, worker.Request(TurnRequest(2)), worker.Request(figures=TurnRequest(3))]
    requests = io.BytesIO(b"".join(msgspec.json.encode(one) + b"\n" for one in asked))
    replies = io.BytesIO()
    worker.serve(requests, replies)
    loaded, turned, told = (
        msgspec.json.decode(line, type=worker.Reply) for line in replies.getvalue().splitlines()
    )
    assert loaded == worker.Reply()
    assert len(turned.turn.latencies_ns) == 2
    assert len(told.figures.split.compute_ns[0]) == 3
    assert told.figures.peak_device_bytes > 0


# From the figures of processes to what people see.


class GpuRow:
    """A row of 2 ms on a GPU, whose processes differ in what they take and tell."""

    load_ms = 1.0
    processes = 0

    def __init__(self, name, job, *_):
        self.name, self.pid, self.job = name, os.getpid(), job
        GpuRow.processes += 1
        self.number = GpuRow.processes

    def take_turn(self, request):
        return Turn((2_000_000,) * request.runs, 2_000_000 * request.runs)

    def device_figures(self, request):
        assert request.l2_flush
        count, ms = request.runs, 1_000_000
        split = SplitTimes(
            ((ms // 4,) * count,),
            ((ms + self.number,) * count,),
            ((ms // 8,) * count,),
            ((ms // 2,) * count,),
        )
        memory_bytes = 1_000_000_000 + self.number
        return DeviceFigures(split, memory_bytes, 50_000_000, "torch", "one CUDA graph")

    def timeline(self, _):
        return RowTimeline({}, {})

    def close(self):
        pass


def measured_by(kind, monkeypatch, forked_bundle, tmp_path):
    """Measure the forked network on a GPU that is not there, in two processes."""
    monkeypatch.setattr(latency, "RowProcess", GpuRow)
    monkeypatch.setattr(latency, "_WatchedRow", kind)
    monkeypatch.setattr(latency, "harness_overhead_ns", lambda *_: (1000,))
    monkeypatch.setattr(row_devices, "open_driver", lambda _: RecordingDriver(2))
    monkeypatch.setattr(GpuRow, "processes", 0)
    request = Request(targets=(str(forked_bundle.path),), devices="0", plan="whole")
    rows, _ = plan_rows(request, tmp_path, contextlib.nullcontext)
    procedure = Procedure(processes=2, rounds=3, in_flight=1, l2_flush=True, data_transfers=False)
    return measure_rows(rows, procedure, read_environment())


@pytest.fixture
def on_gpus(monkeypatch, forked_bundle, tmp_path):
    result = measured_by(GpuRow, monkeypatch, forked_bundle, tmp_path)
    return replace(result, rows=tuple(replace(row, timeline=None) for row in result.rows))


def test_every_process_keeps_its_parts_and_a_row_its_largest_memory(on_gpus):
    (row,) = on_gpus.rows
    splits = [process.split for process in row.recording.processes]
    assert [split.compute_ns[0][0] - 1_000_000 for split in splits] == [1, 2]
    assert row.footprint.peak_device_bytes == 1_000_000_002
    assert row.footprint.engine_bytes == 50_000_000
    assert decode(msgspec.json.encode(as_dict(on_gpus)), "it").rows == on_gpus.rows
    assert on_gpus.procedure.data_transfers is False


def test_parts_memory_and_engines_stand_in_table_page_and_csv(on_gpus):
    (summary,) = summarise(on_gpus)
    assert summary.split.compute_ms == pytest.approx(1.0, abs=1e-4)
    with stdout().capture() as capture:
        stdout().print(render(on_gpus), width=160)
    table = capture.get()
    page, lines = render_page(on_gpus), csv_text(on_gpus).splitlines()
    for text in (table, page):
        words = " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())
        for said in ("to device", "enqueue", "0.250", "0.125", "GPU", "50.00 MB", "1.00 GB"):
            assert said in words, said
        assert "Latencies leave out copies between the host and GPUs" in words
        assert "Caches were emptied before each inference" in words
        assert "GPU memory is what the row's process took" in words.replace("&#39;", "'")
        assert "medians by CUDA events" in words
        assert "All rows: torch, one CUDA graph." in words
    cells = dict(zip(HEADINGS, cells_of(costs_of(on_gpus, (summary,))[0]), strict=True))
    assert cells["GPU memory"].text == "1.00 GB"
    figures = dict(zip(*(line.split(",") for line in lines[:2]), strict=True))
    assert figures["peak_device_bytes"] == "1000000002"
    assert figures["engine_bytes"] == "50000000"
    assert float(figures["enqueue_ms"]) == 0.5
    assert np.isclose(float(figures["host_to_device_ms"]), 0.25)


def test_a_row_that_cannot_tell_its_parts_keeps_its_latencies(monkeypatch, forked_bundle, tmp_path):
    class Refusing(GpuRow):
        def device_figures(self, request):
            if self.number == 1:
                raise RowFailedError("it", "events cannot be recorded in a capture", 1)
            return super().device_figures(request)

        def timeline(self, _):
            raise RowFailedError("it", "its process has ended", 1)

    found = measured_by(Refusing, monkeypatch, forked_bundle, tmp_path)
    (row,) = found.rows
    assert found.failed == ()
    assert [process.split is None for process in row.recording.processes] == [True, False]
    assert row.recording.processes[1].split.compute_ns[0][0] == 1_000_002  # of its own process
    assert (row.timeline, row.footprint.peak_device_bytes) == (None, 1_000_000_002)
    (note,) = [note for note in found.notes if "could not tell" in note]
    assert note.endswith("besides its latencies: events cannot be recorded in a capture")


def test_results_of_other_runtimes_or_launches_are_not_compared(on_gpus):
    libraries = {"onnxruntime": "1.31", "tensorrt": "10.13", "torch": "2.11"}
    environment = replace(on_gpus.environment, libraries=libraries)
    before = replace(on_gpus, environment=environment)
    assert used_runtimes(before) == {"torch": "2.11"}
    assert refusals(before, before) == ()
    (row,) = before.rows
    for changes, said in (
        ({"engine": "tensorrt"}, "the runtime is tensorrt instead of torch"),
        ({"execution": "step by step"}, "launch it is step by step instead of one CUDA graph"),
    ):
        after = replace(before, rows=(replace(row, **changes),))
        assert any(said in str(found) for found in refusals(before, after)), said
    old = replace(before, rows=(replace(row, engine="", execution=""),))
    assert used_runtimes(old) == libraries
    assert not any("launch" in str(found) for found in refusals(old, before))


def test_rows_on_the_cpu_say_nothing_of_gpus(make_result):
    result = make_result({"net whole": [[5_000_000] * 4] * 12})
    with stdout().capture() as capture:
        stdout().print(render(result), width=160)
    for text in (capture.get(), render_page(result)):
        for word in ("enqueue", "GPU memory", "Caches were emptied", "leave out copies"):
            assert word not in text
    assert as_dict(result)["rows"][0]["summary"]["split"] is None
