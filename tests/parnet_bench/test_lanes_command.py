"""What is claimed of lanes, checked in a small way, and the commands that check it in full."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import typer

from parnet_bench import lanes_command
from parnet_bench.lanes import comparison as lane_comparison
from parnet_bench.lanes import networks as lane_networks
from parnet_bench.lanes import overhead as lane_overhead
from parnet_bench.lanes.comparison import DEFAULT_SPEEDUP, Comparison, compare
from parnet_bench.lanes.networks import RESOLUTIONS, SMALL, lane_bundle
from parnet_bench.lanes.overhead import Memory, Overhead, measure_memory, measure_overhead, spread
from parnet_bench.lanes.simulator_check import SimulatorCheck, check_delays, check_engines
from parnet_engines.clock import MonotonicClock
from parnet_engines.planning import cost_measure
from parnet_engines.planning.rounds import Ratio
from parnet_engines.schedule.program import Run
from parnet_export import console
from parnet_export.bundle import open_bundle

CLOCK = MonotonicClock()


class HastyClock(MonotonicClock):
    """Makes time seem to pass so fast that budgets are spent at once."""

    def now_ns(self) -> int:
        return 1000 * super().now_ns()

    def sleep_until(self, deadline_ns: int) -> None:
        pass


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(cost_measure, "BUDGET_S", 0.0)
    hasty = partial(lane_comparison.decide, clock=HastyClock())
    monkeypatch.setattr(lane_comparison, "decide", hasty)


@pytest.fixture
def bundle(forked_bundle, tmp_path):
    """A bundle of its own, since costs and decisions are kept in it."""
    return open_bundle(shutil.copytree(forked_bundle.path, tmp_path / "forked"))


@pytest.fixture
def run(capsys, monkeypatch, bundle):
    """Run a command on the small bundle and return exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(lane_networks, "lane_bundle", lambda _: bundle)
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    lanes_command.register(app)

    def call(*arguments):
        code = console.run(app, ["lanes", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    console.stdout.cache_clear()
    console.stderr.cache_clear()


# --------------------------------------------------------------------------------- claims


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_streams_are_spread_over_lanes_and_the_origin_has_the_rest(bundle, lanes):
    program = spread(bundle, lanes).program
    lane_of = {step.segment: step.lane for step in program.steps if isinstance(step, Run)}
    assert len(program.lanes) == lanes
    branches = {name for name in lane_of if name.startswith("stream")}
    assert len(branches) == 2
    assert len({lane_of[name] for name in branches}) == min(lanes, 2)
    assert {lane_of[name] for name in lane_of if name not in branches} == {"lane0"}


def test_a_session_adds_little_time_and_no_memory(bundle):
    program = spread(bundle, 3)
    overhead = measure_overhead(bundle, program, 300, CLOCK)
    assert (overhead.lanes, overhead.segments) == (3, len(bundle.stream_graph.segments))
    assert 0 < overhead.median_us <= overhead.p90_us
    assert overhead.median_us < 5000  # the limit itself is for a machine that is idle
    assert measure_memory(bundle, program, 3000).passed


def test_the_limits_are_limits():
    overhead = Overhead("n", 7, 3, True, 149.0, 200.0, 10)
    assert overhead.passed
    assert not replace(overhead, median_us=151.0).passed
    assert Memory("n", 10**8, 10**8 + 10**6, 5).passed
    assert not Memory("n", 10**8, 10**8 + 2 * 10**6, 5).passed
    check = SimulatorCheck("n", "onnxruntime", 2, (10.0, 20.0), (9.0, 18.2), (5.0, 10.0), 0, 0.1)
    assert check.error == pytest.approx(-0.095)
    assert check.error_alone == pytest.approx(-0.5)
    assert check.passed
    assert not replace(check, predicted_ms=(8.0, 16.0)).passed
    ratio = Ratio(1.05, 1.0, 1.1, 20)
    latencies_ms = {"auto": 1.0, "1 thread": 1.05, "2 threads": 2.0}
    found = Comparison("n", "whole", latencies_ms, {"1 thread": ratio}, "1 thread", 1.1)
    assert not found.passed
    assert replace(found, least_speedup=DEFAULT_SPEEDUP).passed


def test_delays_take_what_is_predicted(bundle):
    check = check_delays(bundle, 2, inferences=5, clock=CLOCK, total_ms=40.0)
    (measured_ms,), (predicted_ms,) = check.measured_ms, check.predicted_ms
    assert predicted_ms <= measured_ms < 2 * predicted_ms


def test_real_engines_are_predicted_from_what_they_take(bundle):
    check = check_engines(bundle, 1, repetitions=2, inferences=5, clock=CLOCK)
    assert len(check.measured_ms) == len(check.predicted_ms) == len(check.alone_ms) == 2
    assert min(check.predicted_ms) > check.overhead_ms > 0
    assert check.predicted_ms == check.alone_ms  # nobody else is there on one lane


def test_auto_is_held_against_four_forms_of_onnx_runtime(bundle):
    found = compare(SMALL, bundle, budget_s=0.1, clock=CLOCK)
    assert list(found.against) == [
        "1 thread",
        "2 threads",
        "parallel, 1 thread each",
        "parallel, 2 threads each",
    ]
    assert all(ratio.rounds >= 20 for ratio in found.against.values())
    assert found.best in {"1 thread", "2 threads"}
    assert found.least_speedup == 1.1


# ------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["overhead", "memory"])
def test_results_are_shown_and_written_with_the_environment(run, tmp_path, command):
    output = tmp_path / "result.json"
    code, out, err = run(command, "--inferences", 100, "--output", output)
    result = json.loads(output.read_text())
    assert result["environment"]["cpu_model"]
    assert [found["inferences"] for found in result["results"]] == [100]
    passed = "  as claimed" in out
    assert code == (0 if passed else 1)
    assert bool(err) == (not passed)


def test_what_is_not_as_claimed_fails(run, monkeypatch):
    monkeypatch.setattr(lane_overhead, "OVERHEAD_LIMIT_US", 0.0)
    code, out, err = run("overhead", "--inferences", 20)
    assert code == 1
    assert "NOT AS CLAIMED" in out
    assert "1 of 1 results are not as claimed. Repeat it on a machine" in err


def test_predictions_are_told_with_their_errors(run, monkeypatch):
    quick = partial(check_delays, total_ms=12.0)
    monkeypatch.setattr("parnet_bench.lanes.simulator_check.check_delays", quick)
    arguments = ("--network", SMALL, "--repetitions", 1, "--inferences", 3, "--lanes", 1)
    code, out, _ = run("simulator", *arguments)
    assert code in {0, 1}
    assert out.count("delays on") == 3
    assert "from what segments take alone" in out


def test_comparisons_are_told_with_their_intervals(run, monkeypatch):
    def compared(name, _bundle, **_):
        against = {"1 thread": Ratio(1.25, 1.2, 1.3, 40), "2 threads": Ratio(2, 1.9, 2.1, 40)}
        latencies_ms = {"auto": 2.0, "1 thread": 2.5, "2 threads": 4.0}
        return Comparison(name, "streams", latencies_ms, against, "1 thread", 1.1)

    monkeypatch.setattr(lane_comparison, "compare", compared)
    code, out, err = run("auto", "--network", SMALL)
    assert (code, err) == (0, "")
    assert f"{SMALL}: auto takes streams, 2.000 ms" in out
    assert "2.500 ms, 1.250 times auto (1.200 to 1.300, 40 rounds), the best" in out
    assert out.count(", the best") == 1
    assert "limit: the best of 1 and 2 threads, 1.100 times auto" in out


def test_an_unknown_network_is_refused_before_anything_is_measured(run):
    for command in ("auto", "simulator"):
        code, out, err = run(command, "--network", "parnet-z")
        assert (code, out) == (2, "")
        assert f"Use {', '.join(RESOLUTIONS)}" in err


def test_the_small_parnet_has_seven_segments(monkeypatch, tmp_path):
    monkeypatch.setenv("PARNET_EXPORT_CACHE", str(tmp_path))
    bundle = lane_bundle(SMALL)
    assert len(bundle.stream_graph.segments) == 7
    assert spread(bundle, 3).program.lanes[2].name == "lane2"
    assert lane_bundle(SMALL).path == bundle.path
