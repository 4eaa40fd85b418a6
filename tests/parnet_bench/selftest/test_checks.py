"""The self-test, as far as a machine without a GPU goes."""

from __future__ import annotations

import json

import pytest

from parnet_bench.selftest import checks as selftest
from parnet_engines.cuda.driver import CudaError
from parnet_engines.proof.accuracy import LIMITS, Accuracy
from parnet_engines.proof.device_proof import DeviceProof
from parnet_engines.runtimes import ort_cuda
from parnet_engines.tensorrt.build_place import BuildPlace
from parnet_engines.tensorrt.options import Target
from parnet_export.errors import InputError

PLACE = BuildPlace(Target("tensorrt", ("9.0",)))


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
    assert found.hardware[2] == "2: Recorder 2, compute capability 9.0, 80 GiB, 0000:07:00.0"
    assert recorder.open_resources == {}


def test_a_check_that_breaks_in_any_way_is_a_row(monkeypatch):
    def break_(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(selftest, "prove_on_devices", break_)
    found = selftest.run_selftest(selftest.Request("cpu"), lambda _: None)
    assert [check.passed for check in found.checks] == [False, True, True, True, True]
    assert found.checks[0].detail == "AssertionError: Torch not compiled with CUDA enabled"


@pytest.mark.parametrize(("engine", "passed"), [("torch", False), ("onnxruntime", True)])
def test_a_capture_that_is_refused_fails_where_it_should_not(recorder, monkeypatch, engine, passed):
    def refuse(_):
        raise CudaError("begin_capture", "CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr(recorder, "begin_capture", refuse)
    monkeypatch.setattr("parnet_engines.runtimes.torch_engine.load_engines", ort_cuda.load_engines)
    found = selftest.run_selftest(selftest.Request("0", engine), lambda _: None)
    (check,) = [c for c in found.checks if c.name == "with and without a CUDA graph"]
    assert check.passed is passed
    assert check.detail.startswith(
        "step by step, without a CUDA graph (one CUDA graph was refused: begin_capture failed"
    )
    assert [c.name for c in found.checks if not c.passed] == [check.name] * (not passed)


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


@pytest.mark.parametrize(
    "problems", [(), ("net: engines with aux streams could not all be built",)]
)
def test_the_selftest_builds_the_engines_that_it_runs(recorder, monkeypatch, problems):
    built = []

    def build(bundle, places, progress, *, timing_cache):
        assert (places, timing_cache.parent) == ((PLACE,), bundle.path.parent)
        built.append(bundle.path)
        progress("engine of whole built in 1.0 s")
        yield from problems

    def load(bundle, *arguments, **options):
        assert bundle.path in built
        return load_on_recorder(bundle, *arguments, **options)

    load_on_recorder = ort_cuda.load_engines
    monkeypatch.setattr(selftest, "choose_build_places", lambda *_: ((PLACE,), ""))
    monkeypatch.setattr(selftest, "build_all", build)
    monkeypatch.setattr("parnet_engines.tensorrt.run.load_engines", load)
    told = []
    found = selftest.run_selftest(selftest.Request("0", "tensorrt"), told.append)
    first, *others = found.checks
    assert all(check.passed for check in others), others
    assert (first.name, first.passed) == ("TensorRT engines", not problems)
    assert first.detail == (problems[0] if problems else f"1 built for {PLACE.target}")
    assert "of tensorrt compared" in others[0].detail
    assert "engine of whole built in 1.0 s" in told


def test_a_selftest_says_why_it_has_no_engines_of_tensorrt(recorder, monkeypatch):
    monkeypatch.setattr(selftest, "choose_build_places", lambda *_: ((), "No TensorRT engines: x"))
    told = []
    found = selftest.run_selftest(selftest.Request("0", "onnxruntime"), told.append)
    assert found.passed
    assert told[0] == "No TensorRT engines: x"
