"""The self-test and the comparison of engines, as far as a machine without a GPU goes."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from parnet_bench.selftest import checks as selftest
from parnet_bench.selftest import engine_rows
from parnet_bench.selftest.engine_comparison import (
    Limits,
    Request,
    findings,
    measure_in_turns,
    measure_peaks,
    summarise,
)
from parnet_bench.selftest.engine_rows import SPLIT, SPLIT_BY_VECTORS, EngineRow, PathFigures
from parnet_engines.clock import FakeClock
from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.boundary import choose_layouts
from parnet_engines.cuda.hosted_engine import HostedEngine
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.proof.accuracy import LIMITS, Accuracy
from parnet_engines.proof.device_proof import DeviceProof
from parnet_engines.runtimes import ort_cuda
from parnet_engines.runtimes.ort import OrtEngine
from parnet_engines.tensorrt.bundle_engines import segment_of
from parnet_engines.tensorrt.engine_cache import onnx_path
from parnet_export.errors import InputError
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network


def test_the_selftest_tries_everything_on_the_cpu(run_cli, tmp_path):
    output = tmp_path / "result.json"
    done = run_cli("parnet-bench", "selftest", "--devices", "cpu", "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["passed"]
    assert [check["name"] for check in found["checks"]] == [
        "engines against float32",
        "lanes on one device",
        "copies between devices",
        "recording and overlap",
        "latency",
    ]
    assert all(check["name"] in done.stdout for check in found["checks"])


@pytest.mark.parametrize("command", ["selftest", "engines"])
def test_gpus_that_are_not_there_give_one_sentence_and_exit_code_two(run_cli, tmp_path, command):
    output = tmp_path / "result.json"
    done = run_cli("parnet-bench", command, "--devices", "0,1,99", "--output", output)
    assert done.returncode == 2
    assert done.stderr.startswith("error: devices '0,1,99': this machine has")
    assert not output.exists()


def test_a_check_that_fails_is_a_row_and_the_others_are_made(monkeypatch):
    bad = Accuracy("stream1", 0.5, 1.0, None, LIMITS["fp32"], "is outside the limits")
    monkeypatch.setattr(selftest, "prove_on_devices", lambda *_, **__: DeviceProof((bad,), 2))

    def refuse(*_):
        raise InputError("lanes", "are broken", "Mend them")

    monkeypatch.setattr(selftest, "_same_as_whole", refuse)
    found = selftest.run_selftest(selftest.Request("cpu"), lambda _: None)
    assert not found.passed
    assert [check.passed for check in found.checks] == [False, False, False, True, True]
    assert "outside the limits: stream1" in found.checks[0].detail
    assert found.checks[1].detail == "lanes: are broken. Mend them."


def row(name: str, clock: FakeClock | None = None, ms: float = 0.0, network: str = "net"):
    run = None if clock is None else lambda: clock.advance_ms(ms)
    return EngineRow(network, name, run, "torch", "eager", "" if clock else "is not here")


def test_rows_take_turns_and_are_compared_within_rounds():
    clock = FakeClock()
    rows = [
        row("whole engine", clock, 3.0),
        row("split streams", clock, 2.0),
        row("whole engine, aux streams"),
        row("whole engine", clock, 1.0, "other"),
    ]
    request = Request(("net",), ("other",), rounds=9, runs=40)
    measured = summarise(rows, measure_in_turns(rows, request, clock))
    assert [r.median_ms for r in measured] == [3.0, 2.0, None, 1.0]
    assert measured[1].against_whole.value == 1.5
    assert (measured[1].against_whole.low, measured[1].against_whole.high) == (1.5, 1.5)
    assert [len(one) for one in measured[0].samples_ms] == [40] * 9
    assert measured[0].p99_ms is None  # 360 samples do not reach that far
    assert (measured[2].samples_ms, measured[2].reason) == ((), "is not here")


@pytest.mark.parametrize(("split_ms", "missed"), [(1.0, False), (2.5, True)])
def test_a_missed_aim_says_where_the_time_goes(split_ms, missed):
    clock = FakeClock()
    rows = [row("whole engine", clock, 3.0), row("split streams", clock, split_ms)]
    measured = summarise(rows, measure_in_turns(rows, Request(("net",), (), rounds=9), clock))
    path = PathFigures({"stem": 0.5, "stream3": 1.25}, 1.75, 0.4, "one stream dominates")
    (text,) = findings(measured, [Limits("net", 0.1, 0.2, path)])
    assert text.startswith(f"net: split streams are {3 / split_ms:.2f}x as fast as the whole")
    assert ("critical path takes 1.750 ms (stream3 1.250 ms, stem 0.500 ms)" in text) == missed
    assert ("overlap 40% of the time: one stream dominates" in text) == missed


def test_the_better_boundary_is_compared_with_the_aim_and_with_the_other():
    clock = FakeClock()
    rows = [
        row("whole engine", clock, 3.0),
        row(SPLIT, clock, 2.0),
        row(SPLIT_BY_VECTORS, clock, 1.0),
    ]
    measured = summarise(rows, measure_in_turns(rows, Request(("net",), (), rounds=9), clock))
    gain, aim = findings(measured, [Limits("net", 0.1, 0.2, PathFigures())])
    assert gain.startswith("net: with vectors between engines split streams are 2.00x (2.00")
    assert aim == f"net: {SPLIT_BY_VECTORS} are 3.00x as fast as the whole engine"


@pytest.mark.parametrize(
    ("precision", "devices", "wanted"),
    [
        ("fp16", "0", {SPLIT: "linear", SPLIT_BY_VECTORS: "vector"}),
        ("fp32", "0", {SPLIT: None}),
        ("fp16", "cpu", {SPLIT: None}),
    ],
)
def test_both_boundaries_have_a_row_where_there_are_two(monkeypatch, precision, devices, wanted):
    asked = []

    def note(*_, plan="whole", boundary=None, **__):
        if plan == "streams":
            asked.append(boundary)
        raise InputError("it", "is not here", "Wait")

    monkeypatch.setattr(engine_rows.Session, "open", note)
    monkeypatch.setattr(engine_rows.CudaSession, "open_on_gpus", note)
    monkeypatch.setattr(engine_rows, "_open_with_aux_streams", note)
    bundle = SimpleNamespace(manifest=SimpleNamespace(precision=precision))
    with contextlib.ExitStack() as stack:
        rows = engine_rows.session_rows(stack, "net", bundle, devices, "torch")
        names = [found.name for found in rows if found.name.startswith("split")]
    assert dict(zip(names, asked, strict=True)) == wanted


@pytest.fixture(scope="module")
def exported():
    return export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch=1)


@pytest.fixture
def recorder(monkeypatch, exported):
    """A machine with three recorders for GPUs, whose engines compute on the CPU."""
    found = RecordingDriver(3)
    monkeypatch.setattr(selftest, "export_graph", lambda *_, **__: exported)

    def load(bundle, names, driver, device, *, boundary=None):
        return {
            name: HostedEngine(
                OrtEngine(segment_of(bundle, name), onnx_path(bundle, name), threads=1),
                found,
                device,
                layouts_between(bundle, name, boundary or "linear"),
            )
            for name in names
        }

    monkeypatch.setattr(ort_cuda, "load_engines", load)
    for module in (selftest, cuda_session):
        monkeypatch.setattr(module, "open_driver", lambda _: found)
    return found


def layouts_between(bundle, name, boundary):
    segment, graph = segment_of(bundle, name), bundle.stream_graph
    outside = [spec.name for spec in (*graph.inputs, *graph.outputs)]
    return choose_layouts((*segment.inputs, *segment.outputs), boundary, outside)


def test_the_selftest_of_gpus_makes_every_check(recorder):
    found = selftest.run_selftest(selftest.Request("0,1,2", "onnxruntime"), lambda _: None)
    assert found.passed, found.checks
    details = {check.name: check.detail for check in found.checks}
    assert list(details) == [
        "engines against float32",
        "lanes on one device",
        "copies between devices",
        "with and without a CUDA graph",
        "recording and overlap",
        "latency",
    ]
    assert (
        "devices 0,1,2, 12 copies, one CUDA graph, copies from GPU to GPU"
        in (details["copies between devices"])
    )
    assert details["with and without a CUDA graph"].endswith("; relative error 0.0e+00")
    assert found.hardware[2] == "2: Recorder 2, compute capability 9.0, 80 GiB"
    assert recorder.open_resources == {}


def test_the_selftest_in_half_precision_compares_boundaries(recorder, monkeypatch):
    asked = []

    def prove(*_, boundary=None, **__):
        asked.append(boundary)
        return DeviceProof((Accuracy("split", 1.0, 1e-4, None, LIMITS["fp16"]),), 2)

    monkeypatch.setattr(selftest, "prove_on_devices", prove)
    request = selftest.Request("0", "onnxruntime", precision="fp16")
    found = selftest.run_selftest(request, lambda _: None)
    assert asked == [None, "linear", "vector"]
    (check,) = [c for c in found.checks if c.name == "linear tensors and vectors between engines"]
    assert check.passed
    assert check.detail == "linear: relative error 1.0e-04, vector: relative error 1.0e-04"


def test_every_way_to_run_a_bundle_on_gpus_is_a_row(recorder, exported, monkeypatch, tmp_path):
    bundle, _ = make_bundle(*exported, tmp_path / "b", precision="fp16", prove=False)
    image = np.zeros((1, 3, 32, 32), bundle.stream_graph.inputs[0].dtype)

    def on_numpy(session):
        return lambda: session.run({"image": image})

    monkeypatch.setattr(engine_rows, "_runner", on_numpy)
    with contextlib.ExitStack() as stack:
        rows = list(engine_rows.session_rows(stack, "net", bundle, "0", "onnxruntime"))
        assert {row.name: bool(row.run) for row in rows} == {
            "whole engine": True,
            "whole engine, no CUDA graph": True,
            "whole engine, aux streams": False,
            SPLIT: True,
            SPLIT_BY_VECTORS: True,
            "authors' layout": True,
        }
        by_name = {row.name: row for row in rows}
        assert by_name["whole engine"].execution == "one CUDA graph"
        assert by_name["whole engine, no CUDA graph"].execution.startswith("step by step")
        wanted = "one CUDA graph, copies within one memory"
        assert by_name["authors' layout"].execution == wanted
        assert by_name["whole engine, aux streams"].reason
        for row in rows:
            if row.run:
                row.run()
    assert recorder.open_resources == {}
    figures = engine_rows.path_figures(bundle, "0", "onnxruntime")
    assert set(figures.segments_ms) == {s.name for s in bundle.stream_graph.segments}
    assert 0 < figures.critical_path_ms <= sum(figures.segments_ms.values())


@pytest.mark.slow
def test_engines_are_compared_on_the_cpu(run_cli, tmp_path):
    output = tmp_path / "result.json"
    sizes = ("--resolution", 32, "--rounds", 3, "--runs", 3, "--precision", "fp32")
    done = run_cli(
        *("parnet-bench", "engines", "parnet-cifar-1.3m", "--devices", "cpu", "--output", output),
        *("--baseline", "resnet18", *sizes),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert [(r["network"], r["name"]) for r in found["rows"]] == [
        ("parnet-cifar-1.3m", "torch, unfused"),
        ("parnet-cifar-1.3m", "torch, fused"),
        ("parnet-cifar-1.3m", "whole engine"),
        ("parnet-cifar-1.3m", "split streams"),
        ("resnet18", "whole engine"),
    ]
    assert all(r["median_ms"] > 0 for r in found["rows"])
    (limits,) = found["limits"]
    assert 0 < limits["path"]["critical_path_ms"] <= sum(limits["path"]["segments_ms"].values())


def test_peaks_are_positive_and_finite():
    import torch

    bandwidth, flops_per_s = measure_peaks(torch.device("cpu"))
    assert 1e8 < bandwidth < 1e13
    assert 1e8 < flops_per_s < 1e15
