from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import msgspec
import numpy as np
import onnxruntime
import psutil
import pytest

from parnet_bench.measuring.latency import harness_overhead_ns
from parnet_bench.measuring.measure import measure
from parnet_bench.results.procedure import Procedure
from parnet_bench.stats.statistics import ratio_of_medians
from parnet_bench.workers.job import Job
from parnet_bench.workers.row_process import RowFailedError, RowProcess
from parnet_bench.workers.turn import Turn, TurnRequest
from parnet_engines.clock import MonotonicClock
from parnet_engines.schedule import program_file
from parnet_engines.schedule import recording as recording_file
from parnet_engines.schedule.program import Run
from parnet_export.samples import make_samples


@pytest.fixture
def job(forked_bundle):
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Job(str(forked_bundle.path), plan="whole", devices="cpu", cores=cores, sizes={})


def process_of(row):
    return psutil.Process(row._process.pid)


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("plan", ["whole", "streams"])
def test_a_turn_returns_one_latency_for_each_run(job, plan):
    with RowProcess("row", replace(job, plan=plan)) as row:
        start = time.perf_counter_ns()
        latencies_ns = row.take_turn(TurnRequest(20)).latencies_ns
        elapsed_ns = time.perf_counter_ns() - start
    assert len(latencies_ns) == 20
    assert all(latency > 0 for latency in latencies_ns)
    assert sum(latencies_ns) < elapsed_ns


def test_open_dimensions_take_the_sizes_of_the_job(job, dynamic_bundle):
    path = str(dynamic_bundle.path)
    (batch,) = (size for size in dynamic_bundle.manifest.inputs[0].shape if isinstance(size, str))
    with (
        RowProcess("one", replace(job, bundle=path, sizes={batch: 1})) as one,
        RowProcess("many", replace(job, bundle=path, sizes={batch: 32})) as many,
    ):
        assert min(many.take_turn(TurnRequest(5)).latencies_ns) > 4 * min(
            one.take_turn(TurnRequest(5)).latencies_ns
        )


def test_a_row_uses_no_processor_time_between_its_turns(job):
    with RowProcess("row", job) as row:
        row.take_turn(TurnRequest(3))
        process = process_of(row)
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
        before = process.cpu_times()
        time.sleep(0.3)
        assert process.cpu_times() == before
        assert len(row.take_turn(TurnRequest(3)).latencies_ns) == 3


def test_a_row_keeps_to_its_cores(job):
    with RowProcess("row", replace(job, cores=job.cores[:1])) as row:
        assert process_of(row).cpu_affinity() == list(job.cores[:1])


def test_ctrl_c_at_the_terminal_does_not_reach_a_row(job):
    with RowProcess("row", job) as row:
        assert os.getsid(process_of(row).pid) != os.getsid(0)


def test_closing_ends_the_process_and_twice_does_no_harm(job):
    row = RowProcess("row", job)
    pid = row._process.pid
    row.close()
    row.close()
    assert not psutil.pid_exists(pid)


def test_a_row_that_cannot_be_loaded_says_why(job, tmp_path):
    with pytest.raises(RowFailedError, match=r"my row: .*absent.*does not exist") as caught:
        RowProcess("my row", replace(job, bundle=str(tmp_path / "absent")))
    assert caught.value.exit_code == 2


def test_a_process_that_is_killed_is_reported_by_row_and_signal(job):
    with RowProcess("my row", job) as row:
        killed = process_of(row)
        killed.kill()
        wait_until(lambda: killed.status() == psutil.STATUS_ZOMBIE)
        with pytest.raises(RowFailedError, match="my row: its process was ended by SIGKILL"):
            row.take_turn(TurnRequest(1))


def test_a_worker_that_ends_by_a_bug_fails_its_row_and_prints_why(job, capfd):
    with pytest.raises(RowFailedError, match="my row: its process ended with exit code 1"):
        RowProcess("my row", replace(job, plan=3))
    assert "Traceback" in capfd.readouterr().err


def test_loading_is_timed_from_the_start_of_the_process_to_the_first_result(job):
    start = time.perf_counter_ns()
    with RowProcess("row", job) as row:
        elapsed_ms = (time.perf_counter_ns() - start) / 1e6
        assert 10 < row.load_ms <= elapsed_ms


@pytest.mark.parametrize("plan", ["whole", "streams"])
def test_several_inferences_are_under_way_in_a_pipelined_turn(job, plan):
    with RowProcess("row", replace(job, plan=plan)) as row:
        turn = row.take_turn(TurnRequest(10, lead_in=2, in_flight=2))
        assert len(turn.latencies_ns) == 10
        # The latencies of two that are under way together overlap.
        assert turn.elapsed_ns < sum(turn.latencies_ns)
        assert len(row.take_turn(TurnRequest(3)).latencies_ns) == 3


def test_a_timeline_is_one_inference_of_the_program_that_runs(job):
    with RowProcess("row", replace(job, plan="streams")) as row:
        timeline = row.timeline(3)
    program = program_file.decode(msgspec.json.encode(timeline.program), "row")
    recording = recording_file.decode(msgspec.json.encode(timeline.recording), "row")
    assert len(recording.inferences) == 1
    ran = {span.label for span in recording.spans if span.kind == "run"}
    assert ran == {step.segment for step in program.steps if isinstance(step, Run)}
    assert len(ran) > 2


@pytest.mark.slow  # where caches are large, so is what is written over them
def test_emptying_the_cache_is_not_timed(job):
    with RowProcess("row", job) as row:
        turn = row.take_turn(TurnRequest(1, l2_flush=True))
    assert turn.elapsed_ns > sum(turn.latencies_ns)


def test_the_harness_adds_little_to_a_latency(job):
    overhead_ns = np.array(harness_overhead_ns(job.cores, runs=500))
    assert len(overhead_ns) == 500
    assert 0 < np.median(overhead_ns) < 1_000_000  # a sanity bound; it is about 10 us


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_a_suspended_row_ends_with_the_process_that_started_it(job):
    code = textwrap.dedent(f"""
        import time
        from parnet_bench.workers.job import Job
        from parnet_bench.workers.row_process import RowProcess
        row = RowProcess("row", {job!r})
        print(row._process.pid, flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


class PlainLoop:
    """A loop over ONNX Runtime as anybody writes it, as a worker."""

    load_ms = 0.0

    def __init__(self, path, inputs):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)
        self.inputs = inputs

    def take_turn(self, request):
        latencies_ns = []
        for _ in range(request.lead_in + request.runs):
            start = time.perf_counter_ns()
            self.session.run(None, self.inputs)
            latencies_ns.append(time.perf_counter_ns() - start)
        recorded = tuple(latencies_ns[request.lead_in :])
        return Turn(recorded, sum(recorded))

    def close(self):
        self.session = None


@pytest.mark.slow
def test_a_whole_graph_takes_as_long_as_in_a_plain_loop_of_onnx_runtime(job, dynamic_bundle):
    (batch,) = (size for size in dynamic_bundle.manifest.inputs[0].shape if isinstance(size, str))
    job = replace(job, bundle=str(dynamic_bundle.path), sizes={batch: 16}, cores=job.cores[:1])
    inputs = next(make_samples(dynamic_bundle.manifest.inputs, sizes=job.sizes)).inputs

    def launch(name, _):
        if name == "ours":
            return RowProcess(name, job)
        return PlainLoop(dynamic_bundle.whole_path, inputs)

    procedure = Procedure(max_time_s=90, processes=6, in_flight=1)
    clock = MonotonicClock()
    recordings = measure({"plain": 1, "ours": 1}, launch, procedure, clock).recordings
    ratio = ratio_of_medians(
        *([process.rounds_ns for process in recordings[name]] for name in ("ours", "plain"))
    )
    assert ratio.value == pytest.approx(1, abs=0.02), ratio
