"""The timeline and costs commands, on a bundle whose branches can run in parallel."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from importlib.metadata import version
from statistics import median

import pytest
import typer

from parnet_bench import costs_command, plan_command, timeline_command
from parnet_bench.forecasts import cost_place
from parnet_bench.report.timeline_report import typical
from parnet_bench.targets import row_devices
from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.hosted_engine import HostedEngine
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.planning import cost_measure
from parnet_engines.planning.bundle_costs import (
    add_bundle_costs,
    gpu_costs_for,
    load_bundle_costs,
    load_gpu_costs,
)
from parnet_engines.planning.cost_table import COSTS_NAME, WHOLE, SegmentCost
from parnet_engines.planning.machine import describe_machine
from parnet_engines.runtimes.ort import OrtEngine
from parnet_engines.schedule.placement import Lane
from parnet_engines.schedule.recording import Recording, Span
from parnet_engines.session import Session
from parnet_engines.tensorrt.bundle_engines import segment_of
from parnet_engines.tensorrt.engine_cache import onnx_path
from parnet_export import console

CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process and return exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(cost_measure, "BUDGET_S", 0.0)
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    timeline_command.register(app)
    costs_command.register(app)
    plan_command.register(app)

    def call(*arguments):
        code = console.run(app, [*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    console.stdout.cache_clear()
    console.stderr.cache_clear()


@pytest.fixture
def bundle(unmeasured_bundle):
    """A bundle of its own, to put costs into."""
    return unmeasured_bundle


def names_of(bundle):
    return [segment.name for segment in bundle.stream_graph.segments]


# ------------------------------------------------------------------------------- timeline


def test_a_timeline_is_told_drawn_and_traced(run, bundle, tmp_path):
    svg, trace, output = (tmp_path / name for name in ("t.svg", "t.trace", "t.json"))
    files = ("--svg", svg, "--trace", trace, "--output", output)
    code, out, err = run("timeline", bundle.path, "--inferences", 9, *files)
    assert (code, err) == (0, "")
    result = json.loads(output.read_text())
    assert len(result["latencies_ms"]) == len(result["overlaps"]) == 9
    assert all(0 <= overlap <= 1 for overlap in result["overlaps"])
    (shown,) = result["shown"]
    numbers = sorted({e["args"]["inference"] for e in slices(trace)})
    assert len(numbers) == 9
    total_ms = sum(result["analysis"]["wall"].values()) / 1e6
    assert result["latencies_ms"][numbers.index(shown)] == pytest.approx(total_ms, abs=1e-3)
    assert total_ms == pytest.approx(median(result["latencies_ms"]), abs=1e-3)
    runs = [e["name"] for e in slices(trace) if e["args"]["inference"] == shown]
    assert set(names_of(bundle)) <= set(runs)
    boxes = [e for e in ET.parse(svg).iter() if "data-step" in e.attrib]  # noqa: S314 - ours
    assert len({e.attrib["data-step"] for e in boxes}) == len(names_of(bundle))
    verdict = result["analysis"]["verdict"]
    assert verdict["kind"] in out
    assert " ".join(verdict["sentence"].split()) in " ".join(out.split())
    for word in ("critical path", "lane0", "overlap", "parnet-bench costs"):
        assert word in out


def slices(trace):
    events = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


def test_json_is_the_result_and_one_lane_is_the_reason(run, bundle):
    code, out, _ = run("timeline", bundle.path, "--lanes", 1, "--inferences", 2, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["analysis"]["verdict"]["kind"] == "there is one lane"
    assert result["remedy"] == "Use several lanes, or let plan auto measure whether they pay."
    assert result["overlaps"] == [0.0, 0.0]


def test_inferences_in_flight_overlap(run, bundle):
    arguments = ("--in-flight", 2, "--inferences", 8, "--json", "--engine", "openvino")
    pytest.importorskip("openvino")
    code, out, _ = run("timeline", bundle.path, *arguments)
    result = json.loads(out)
    assert code == 0
    assert len(result["shown"]) == 4
    assert result["engine"] == "openvino"
    assert "openvino 20" in result["machine"]


@pytest.fixture
def recorder(monkeypatch):
    """A machine with two recorders for GPUs, on which torch computes."""
    driver = RecordingDriver(2)

    def load(bundle, names, driver, device, **_):
        return {
            name: HostedEngine(
                OrtEngine(segment_of(bundle, name), onnx_path(bundle, name), threads=1),
                driver,
                device,
            )
            for name in names
        }

    monkeypatch.setattr("parnet_engines.runtimes.torch_engine.load_engines", load)
    for module in (cuda_session, row_devices, cost_place):
        monkeypatch.setattr(module, "open_driver", lambda _: driver)
    return driver


def test_a_timeline_of_gpus_tells_the_gpu_and_the_runtime(run, bundle, recorder):
    arguments = ("--devices", "0,1", "--engine", "torch", "--inferences", 3, "--json")
    code, out, _ = run("timeline", bundle.path, *arguments)
    result = json.loads(out)
    assert code == 0
    assert result["engine"] == "torch"
    assert result["machine"].startswith("Recorder 0, Recorder 1, ")
    assert f"torch {version('torch')}" in result["machine"]
    assert len(result["overlaps"]) == 3
    assert recorder.open_resources == {}
    _, out, _ = run("timeline", bundle.path, *arguments[:-1])
    assert "What segments take alone is not known here" in " ".join(out.split())
    assert "`parnet-bench costs --devices N --engine torch` measures it" in " ".join(out.split())


def test_a_bundle_with_an_open_batch_takes_one(run, dynamic_bundle):
    code, _, err = run("timeline", dynamic_bundle.path, "--batch", 3, "--inferences", 1)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "fast"), "fast: cannot be read"),
        (("--devices", "moon"), "'moon' is no device"),
        (("--svg", "no/such/folder/t.svg"), "no/such/folder"),
        (("--engine", "openvino", "--plan", "auto"), "measures with onnxruntime"),
        (("--engine", "torch"), "which the torch engine does not have"),
        (("--engine", "tensorrt"), "engine 'tensorrt'"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(run, bundle, arguments, message):
    code, out, err = run("timeline", bundle.path, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_typical_inference_is_the_one_of_median_latency():
    lanes = (Lane("lane0", "cpu"),)
    lengths = [5, 1, 9, 3, 7]
    spans = tuple(
        Span("lane0", 0, "run", "s", 100 * n, 100 * n + length, n)
        for n, length in enumerate(lengths)
    )
    assert typical(Recording(lanes, spans), 1).inferences == (0,)
    assert typical(Recording(lanes, spans), 2).inferences == (0, 1, 2, 3)


# ---------------------------------------------------------------------------------- costs


def test_costs_are_measured_shown_and_kept(run, bundle, tmp_path):
    output = tmp_path / "costs.json"
    code, out, err = run("costs", bundle.path, "--output", output)
    assert (code, err) == (0, "")
    kept = load_bundle_costs(bundle)
    assert kept.is_measured
    situations = {(1, 1), (1, 2), (2, 1)} if len(CORES) == 2 else {(1, 1)}
    found = {(e.segment, e.threads, e.busy_lanes) for e in kept.entries}
    assert {(name, *s) for name in names_of(bundle) for s in situations} <= found
    assert (WHOLE, 1, 1) in found
    assert json.loads(output.read_text())["network"] == kept.network
    assert describe_machine() in out
    assert "~" not in out  # all that is shown was measured
    for name in (*names_of(bundle), WHOLE):
        assert any(line.startswith(f" {name} ") for line in out.splitlines())
    # Now that segments are known alone, a timeline says what company does to them.
    code, out, _ = run("timeline", bundle.path, "--inferences", 3)
    assert code == 0
    assert "as long as they do alone" in out


def test_costs_of_a_gpu_are_measured_and_plans_rest_on_them(run, bundle, recorder):
    run("costs", bundle.path)  # on the CPU, which stays beside what a GPU takes
    on_cpu = load_bundle_costs(bundle)
    code, out, err = run("costs", bundle.path, "--devices", "0", "--engine", "torch")
    assert (code, err) == (0, "")
    environment = f"Recorder 0, torch {version('torch')}"
    assert f"Measured on {environment}." in out
    assert "~" not in out
    assert recorder.open_resources == {}
    kept = load_gpu_costs(bundle, "Recorder 0")
    names = names_of(bundle)
    width = max(entry.busy_lanes for entry in kept.entries)
    assert width >= 2
    situations = {(name, busy) for name in names for busy in range(1, width + 1)} | {(WHOLE, 1)}
    assert {(entry.segment, entry.busy_lanes) for entry in kept.entries} == situations
    assert {entry.environment for entry in kept.entries} == {environment}
    assert load_bundle_costs(bundle) == on_cpu
    assert load_gpu_costs(bundle, "Recorder 1").entries == ()
    # A forecast for several GPUs starts from them, and so does a session's plan.
    assert gpu_costs_for(bundle, ["Recorder 0"] * 3, 3) == kept
    assert gpu_costs_for(bundle, ["Recorder 0", "Recorder 1"], 3) != kept
    _, out, _ = run("plan", bundle.path, "--num-devices", 3, "--json")
    assert json.loads(out)["basis"]["environment"] == environment
    _, out, _ = run("timeline", bundle.path, "--devices", "0", "--engine", "torch")
    assert "as long as they do alone" in out


def test_a_plan_on_gpus_goes_by_what_was_measured_there(bundle, recorder):
    def lanes_used(slow_together):
        entries = [
            SegmentCost(name, "cuda", 1, busy, ms, "measured", "Recorder 0, torch 1")
            for name in names_of(bundle)
            for busy, ms in ((1, 1.0), (2, 5.0 if slow_together else 1.0))
        ]
        add_bundle_costs(bundle, entries)
        with Session.open(bundle, "0", engine="torch") as session:
            return len({lane.name for lane in session.program.program.lanes})

    assert lanes_used(slow_together=False) > lanes_used(slow_together=True) == 1


def test_estimates_of_a_gpu_are_shown_and_marked(run, bundle, recorder):
    code, out, _ = run("costs", bundle.path, "--devices", "0", "--show")
    assert code == 0
    assert "~ Estimated for: a100 fp16." in out
    assert not (bundle.path / COSTS_NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "0,1"), "names several GPUs"),
        (("--devices", "0", "--threads", 2), "is a number of CPU threads, and the device is a GPU"),
        (("--engine", "torch"), "is for GPUs here"),
    ],
)
def test_costs_that_cannot_be_measured_are_refused(run, bundle, recorder, arguments, message):
    code, _, err = run("costs", bundle.path, *arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_without_measurements_estimates_are_shown_and_marked(run, bundle):
    code, out, _ = run("costs", bundle.path, "--show")
    assert code == 0
    assert "Measured" not in out
    assert "~ Estimated for: typical CPU core." in out
    rows = [line for line in out.splitlines() if line.startswith(f" {names_of(bundle)[0]} ")]
    assert len(rows) == 1
    assert rows[0].count("~") >= 1
    assert not (bundle.path / COSTS_NAME).exists()


def test_more_lanes_than_cores_are_refused(run, bundle):
    code, _, err = run("costs", bundle.path, "--lanes", 999)
    assert code == 2
    assert "every lane needs a core" in err
