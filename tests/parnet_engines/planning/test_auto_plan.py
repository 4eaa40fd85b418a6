from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_engines.clock import FakeClock
from parnet_engines.planning import auto_plan, cost_measure, engine_cores
from parnet_engines.planning.auto_plan import decide
from parnet_engines.planning.bundle_costs import add_bundle_costs, load_bundle_costs
from parnet_engines.planning.cost_table import WHOLE, SegmentCost
from parnet_engines.planning.decision import DECISIONS_NAME, Decision, Trial
from parnet_engines.planning.devices import Device, parse_devices
from parnet_engines.planning.layouts import place_whole
from parnet_engines.planning.machine import describe_machine
from parnet_engines.planning.plan_option import choose
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Run
from parnet_engines.schedule.recording import Recording, span_of
from parnet_engines.session import Session
from parnet_export.bundle import Bundle, Provenance, open_bundle
from parnet_export.errors import InputError
from parnet_export.pack import write_bundle
from parnet_export.splitting.split import SplitOptions, split_model

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_engines.schedule.check import CheckedProgram

CPU = (Device("cpu", (0, 1, 2)),)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of a stem, two convolution branches and a head."""
    rng = np.random.default_rng(0)

    def conv(source: str, weight: str, target: str) -> Any:
        return helper.make_node("Conv", [source, weight], [target], pads=[1, 1, 1, 1])

    shapes = {"w0": (64, 3, 3, 3)} | {f"w{i}": (64, 64, 3, 3) for i in range(1, 5)}
    graph = helper.make_graph(
        [
            conv("image", "w0", "stem"),
            conv("stem", "w1", "left1"),
            conv("left1", "w2", "left2"),
            conv("stem", "w3", "right1"),
            conv("right1", "w4", "right2"),
            helper.make_node("Add", ["left2", "right2"], ["sum"]),
        ],
        "branches",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, 16, 16))],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, (1, 64, 16, 16))],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 16, name)
            for name, shape in shapes.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    split = split_model(ir.from_proto(model), SplitOptions(min_gain=0.0))
    assert len(split.stream_graph.segments) > 2
    provenance = Provenance("branches", "test", weights="random", seed=0)
    return write_bundle(split, tmp_path / "b", precision="fp32", provenance=provenance)


class FakeMachine:
    """Opens sessions whose inferences take a known time on a fake clock.

    Parameters
    ----------
    whole_ms
        By number of threads.
    lanes_ms
        By number of lanes, or by their numbers of threads.
    """

    def __init__(self, whole_ms: dict[int, float], lanes_ms: dict[Any, float]) -> None:
        self.clock = FakeClock()
        self.whole_ms = whole_ms
        self.lanes_ms = lanes_ms
        self.opened: list[tuple[str, int]] = []
        self.under_way = 0

    def __call__(
        self, program: CheckedProgram, *, record: bool = False, beside_others: bool = False
    ) -> Any:
        lanes = program.program.lanes
        runs = [step for step in program.program.steps if isinstance(step, Run)]
        if runs[0].segment == WHOLE:
            self.opened.append(("whole", len(lanes[0].cores)))
            latency_ms = self.whole_ms[len(lanes[0].cores)]
        else:
            self.opened.append(("costs" if record else "streams", len(lanes)))
            widths = tuple(len(lane.cores) for lane in lanes)
            known = widths if widths in self.lanes_ms else len(lanes)
            latency_ms = 1.0 if record else self.lanes_ms[known]
            assert beside_others is record
        machine = self

        class FakeSession:
            def __enter__(self) -> Self:
                machine.under_way += 1
                return self

            def __exit__(self, *_: object) -> None:
                machine.under_way -= 1

            def run(self, inputs: dict[str, Any]) -> None:
                assert [(n, v.shape) for n, v in inputs.items()] == [("image", (1, 3, 16, 16))]
                machine.clock.advance_ms(latency_ms)

            def take_recording(self) -> Recording:
                index = [i for i, s in enumerate(program.program.steps) if isinstance(s, Run)]
                spans = (span_of(program.program, i, 0, 1_000_000) for i in index)
                return Recording(lanes, tuple(spans))

        return FakeSession()

    def decide(self, bundle: Bundle, devices=CPU, lanes=None, **options: Any) -> Decision:
        return decide(bundle, devices, lanes, open_program=self, clock=self.clock, **options)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(cost_measure, "BUDGET_S", 0.0)
    monkeypatch.setattr(engine_cores, "WORTH_SHARING_MS", 0.0)


WHOLE_MS = {1: 12.0, 2: 9.0, 3: 8.0}


def test_the_segments_are_taken_if_that_pays_and_the_numbers_are_kept(bundle):
    machine = FakeMachine(WHOLE_MS, {2: 6.4})
    decision = machine.decide(bundle)
    assert machine.under_way == 0
    assert decision.chosen.name == "streams, 2+1 threads"
    assert [lane.cores for lane in decision.chosen.placement.lanes] == [(0, 1), (2,)]
    assert {t.name: t.median_ms for t in decision.trials} == {
        "whole graph, 1 thread": 12.0,
        "whole graph, 2 threads": 9.0,
        "whole graph, 3 threads": 8.0,
        "streams, 2+1 threads": 6.4,
    }
    assert (decision.ratio.value, decision.ratio.low) == (1.25, 1.25)
    lines = str(decision).splitlines()
    assert lines[0] == "auto: streams, 2+1 threads"
    assert lines[1].split() == ["whole", "graph,", "1", "thread", "12.000", "ms"]
    assert lines[-1].startswith(
        "  streams, 2+1 threads against whole graph, 3 threads: 1.250 times as fast "
        "(95 % interval 1.250 to 1.250, "
    )


@pytest.mark.parametrize(
    ("lanes_ms", "has_final"), [(8.0, True), (8.5, True), (9.3, False), (50.0, False)]
)
def test_the_whole_graph_stays_if_the_segments_do_not_pay(bundle, lanes_ms, has_final):
    decision = FakeMachine(WHOLE_MS, {2: lanes_ms}).decide(bundle)
    assert decision.chosen.name == "whole graph, 3 threads"
    assert decision.chosen.placement == place_whole(Lane("lane0", "cpu", (0, 1, 2)))
    assert bool(decision.final) is has_final
    assert (decision.ratio is None) is not has_final


def test_the_best_number_of_threads_need_not_be_the_highest(bundle):
    decision = FakeMachine({1: 3.0, 2: 2.0, 3: 2.5}, {2: 9.0}).decide(bundle)
    assert decision.chosen.name == "whole graph, 2 threads"
    assert decision.chosen.placement.lanes[0].cores == (0, 1)


def trial(name: str, latencies_ms: list[float], segment: str = WHOLE) -> Trial:
    placement = Placement((Lane("lane0", "cpu", (0,)),), (Assignment(segment, "lane0"),))
    return Trial(name, placement, rounds_ms=tuple(latencies_ms))


@pytest.mark.parametrize(
    ("segments_ms", "chosen"),
    [
        ([9.0] * 20, "segments"),
        ([9.0] * 16 + [11.0] * 4, "segments"),
        ([9.0] * 12 + [11.0] * 8, "whole"),  # quicker in most rounds, but not surely
        ([10.0] * 20, "whole"),
        ([5.0] * 5, "whole"),  # much quicker, in too few rounds to be sure
        ([5.0] * 6, "segments"),
    ],
)
def test_only_a_sure_gain_leaves_the_whole_graph(segments_ms, chosen):
    whole = trial("whole", [10.0] * len(segments_ms))
    segments = trial("segments", segments_ms, "stem")
    decision = Decision("n", "m", CPU, None, (whole, segments), (whole, segments))
    assert decision.chosen.name == chosen


def test_a_decision_is_made_once_for_the_same_question(bundle):
    machine = FakeMachine(WHOLE_MS, {2: 6.4, 3: 6.0})
    first = machine.decide(bundle)
    opened = len(machine.opened)
    assert machine.decide(open_bundle(bundle.path)) == first
    assert len(machine.opened) == opened
    assert machine.decide(bundle, lanes=3).chosen.name == "streams, 2+1 threads"
    assert len(machine.opened) > opened
    machine.lanes_ms = {2: 20.0, 3: 20.0}
    assert machine.decide(bundle) == first
    assert machine.decide(bundle, again=True).chosen.is_whole
    assert machine.decide(bundle).chosen.is_whole
    assert machine.decide(bundle, lanes=3).chosen.name == "streams, 2+1 threads"
    stored = json.loads((bundle.path / DECISIONS_NAME).read_bytes())
    assert len(stored["decisions"]) == 2


@pytest.mark.parametrize("change", ["machine", "devices", "bundle"])
def test_a_decision_holds_for_its_machine_devices_and_bundle(bundle, monkeypatch, change):
    machine = FakeMachine(WHOLE_MS, {2: 6.4})
    machine.decide(bundle)
    opened = len(machine.opened)
    devices = CPU
    if change == "machine":
        monkeypatch.setattr(auto_plan, "describe_machine", lambda: "another one")
    elif change == "devices":
        devices = (Device("cpu", (0, 1)),)
    else:
        bundle = replace(bundle, manifest=replace(bundle.manifest, manifest_sha256="1" * 64))
    machine.decide(bundle, devices)
    assert len(machine.opened) > opened


def test_costs_are_measured_once(bundle):
    machine = FakeMachine(WHOLE_MS, {2: 6.4})
    machine.decide(bundle)
    assert ("costs", 1) in machine.opened
    assert {(c.threads, c.busy_lanes) for c in load_bundle_costs(bundle).entries} == {
        (1, 1),
        (2, 1),
        (1, 2),
        (2, 2),
        (3, 1),
    }
    machine.opened.clear()
    machine.decide(bundle, again=True)
    assert ("costs", 1) not in machine.opened


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 99, "decisions": []}'])
def test_a_file_of_decisions_that_is_not_understood_is_made_again(bundle, content):
    machine = FakeMachine(WHOLE_MS, {2: 6.4})
    (bundle.path / DECISIONS_NAME).write_bytes(content)
    first = machine.decide(bundle)
    machine.opened.clear()
    assert machine.decide(bundle) == first
    assert machine.opened == []


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(bundle, monkeypatch):
    def refuse(path: Path, _: bytes) -> None:
        raise InputError(path, "cannot be written (Read-only file system)", "Choose another place")

    monkeypatch.setattr("parnet_export.files.write_bytes", refuse)
    machine = FakeMachine(WHOLE_MS, {2: 6.4})
    assert machine.decide(bundle).chosen.name == "streams, 2+1 threads"
    assert sorted(path.name for path in bundle.path.iterdir() if path.suffix == ".json") == [
        "bundle.json"
    ]


def test_uneven_divisions_of_the_cores_are_measured_too(bundle):
    machine = FakeMachine({1: 12.0, 2: 9.0, 4: 8.0}, {(2, 2): 7.0, (3, 1): 6.0})
    decision = machine.decide(bundle, (Device("cpu", (0, 1, 2, 3)),))
    assert {t.name: t.median_ms for t in decision.trials if not t.is_whole} == {
        "streams, 2+2 threads": 7.0,
        "streams, 3+1 threads": 6.0,
    }
    assert decision.chosen.name == "streams, 3+1 threads"


def test_lanes_are_measured_even_if_costs_speak_for_a_single_one(bundle):
    # Measured at a bad moment, say: in company everything seems to take ten times as long.
    names = [segment.name for segment in bundle.stream_graph.segments]
    add_bundle_costs(
        bundle,
        [
            SegmentCost(name, "cpu", threads, busy, 10.0**busy, "measured", describe_machine())
            for name in names
            for threads in (1, 2, 3)
            for busy in (1, 2)
        ],
    )
    decision = FakeMachine(WHOLE_MS, {2: 6.4}).decide(bundle)
    assert decision.chosen.name == "streams, 2+1 threads"
    assert len({run.lane for run in decision.chosen.placement.assignments}) == 2


def test_what_was_predicted_is_shown_beside_what_was_measured(bundle):
    decision = FakeMachine(WHOLE_MS, {2: 6.4}).decide(bundle)
    (streams,) = (trial for trial in decision.trials if not trial.is_whole)
    # Every segment takes 1 ms: stem, one of the branches, and the sum.
    assert (streams.predicted_ms, streams.lower_bound_ms) == (3.0, 3.0)
    (line,) = (line for line in str(decision).splitlines() if "6.400" in line)
    assert line.endswith("6.400 ms  (predicted 3.000, not below 3.000)")


def test_throughput_is_the_time_from_one_inference_to_the_next(bundle):
    machine = FakeMachine(WHOLE_MS, {2: 6.4})
    decision = machine.decide(bundle, objective="throughput")
    flights = {t.name: t.inferences_in_flight for t in decision.trials}
    assert flights["whole graph, 3 threads"] == 1
    assert flights["streams, 2+1 threads"] == 2
    # On the fake clock inferences follow one another, whoever asks for them.
    assert decision.chosen.name == "streams, 2+1 threads"
    assert decision.chosen.median_ms == pytest.approx(6.4)
    assert "from one inference to the next" in str(decision)
    latency = machine.decide(bundle)
    assert latency.objective == "latency"
    more = machine.decide(bundle, objective="throughput", in_flight=4)
    assert {t.inferences_in_flight for t in more.trials} == {4}
    stored = json.loads((bundle.path / DECISIONS_NAME).read_bytes())
    assert len(stored["decisions"]) == 3


@pytest.mark.parametrize("lanes", [0, 4])
def test_lanes_that_cannot_be_are_refused_before_anything_is_measured(bundle, lanes):
    machine = FakeMachine(WHOLE_MS, {})
    with pytest.raises(InputError, match=f"lanes {lanes}: "):
        machine.decide(bundle, lanes=lanes)
    assert machine.opened == []


def test_one_core_has_only_the_whole_graph_to_offer(bundle):
    machine = FakeMachine({1: 5.0}, {})
    decision = machine.decide(bundle, (Device("cpu:1", (1,)),))
    assert decision.chosen.name == "whole graph, 1 thread"
    assert machine.opened == [("whole", 1)]


def test_several_devices_have_a_lane_each(bundle):
    devices = (Device("cpu:0-1", (0, 1)), Device("cpu:2", (2,)))
    decision = FakeMachine(WHOLE_MS, {2: 1.0}).decide(bundle, devices)
    assert [lane.device for lane in decision.chosen.placement.lanes] == ["cpu:0-1", "cpu:2"]


def test_auto_runs_with_real_engines_and_opens_quickly_the_next_time(bundle, monkeypatch):
    quick = SimpleNamespace(calls=0)
    run_rounds = auto_plan.run_rounds

    def few_rounds(*args: Any, **options: Any) -> Any:
        quick.calls += 1
        return run_rounds(*args, **options | {"min_rounds": 2, "max_rounds": 2})

    monkeypatch.setattr(auto_plan, "run_rounds", few_rounds)
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    with Session.open(bundle, plan="whole") as session:
        expected = session.run({"image": image})["sum"]
    for _ in range(2):
        with Session.open(bundle.path, plan="auto") as session:
            found = session.run({"image": image})["sum"]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert quick.calls in {1, 2}
    load = partial(Session.load, bundle)
    decision = decide(bundle, parse_devices("cpu"), open_program=load)
    choice = choose(bundle, "cpu", "auto", open_program=load)
    assert session.program == choice.program
    assert choice.decision == decision
    assert str(choice) == str(decision)
    assert decision.chosen.placement.lanes == session.program.program.lanes


def test_the_bundle_stays_valid(bundle):
    FakeMachine(WHOLE_MS, {2: 6.4}).decide(bundle)
    assert open_bundle(bundle.path).manifest == bundle.manifest
