"""The self-test and the comparison of engines, as far as a machine without a GPU goes."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest

from parnet_bench import engine_rows, selftest
from parnet_bench.engine_comparison import (
    Limits,
    Request,
    findings,
    measure_in_turns,
    measure_peaks,
    summarise,
)
from parnet_bench.engine_rows import SPLIT, SPLIT_BY_VECTORS, EngineRow, PathFigures
from parnet_engines.accuracy import LIMITS, Accuracy
from parnet_engines.clock import FakeClock
from parnet_engines.device_proof import DeviceProof
from parnet_export.errors import InputError


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
