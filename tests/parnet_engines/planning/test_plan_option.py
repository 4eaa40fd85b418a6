"""`choose`: every plan a session can be opened with runs, and says what is known of it."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_engines import session
from parnet_engines.planning import auto_plan, bundle_costs, cost_measure, devices, plan_option
from parnet_engines.planning.bundle_costs import add_bundle_costs
from parnet_engines.planning.cost_table import SegmentCost
from parnet_engines.planning.layouts import place_authors, place_whole
from parnet_engines.planning.plan_option import Choice, choose
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Copy, Run
from parnet_engines.session import Session
from parnet_export.bundle import Provenance
from parnet_export.errors import InputError
from parnet_export.pack import write_bundle
from parnet_export.splitting.split import SplitOptions, split_model

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_export.bundle import Bundle

CORES = (0, 1, 2, 3)
THREE = "cpu:0,cpu:1,cpu:2"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of a stem, three branches of different work, and a sum."""
    rng = np.random.default_rng(0)

    def conv(source: str, weight: str, target: str) -> Any:
        return helper.make_node("Conv", [source, weight], [target], pads=[1, 1, 1, 1])

    branches = {"left": 2, "middle": 3, "right": 4}
    nodes = [conv("image", "w", "stem")]
    shapes = {"w": (64, 3, 3, 3)}
    for name, depth in branches.items():
        tensors = ["stem", *(f"{name}{n}" for n in range(1, depth)), name]
        for n, (source, target) in enumerate(itertools.pairwise(tensors)):
            shapes[f"{name}.w{n}"] = (64, 64, 3, 3)
            nodes.append(conv(source, f"{name}.w{n}", target))
    nodes.append(helper.make_node("Sum", list(branches), ["sum"]))
    graph = helper.make_graph(
        nodes,
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
    assert len(split.stream_graph.segments) == 5
    provenance = Provenance("branches", "test", weights="random", seed=0)
    return write_bundle(split, tmp_path / "b", precision="fp32", provenance=provenance)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """Four cores, whatever the machine has: threads are not pinned."""
    monkeypatch.setattr(devices, "usable_cores", lambda: CORES)
    monkeypatch.setattr(plan_option, "usable_cores", lambda: CORES)
    monkeypatch.setattr(session, "can_pin", lambda: False)
    monkeypatch.setattr(cost_measure, "BUDGET_S", 0.0)
    monkeypatch.setattr(cost_measure, "MIN_ROUNDS", 1)


def chosen(bundle: Bundle, plan: str | Path, named: str = "cpu", **options: Any) -> Choice:
    load = partial(Session.load, bundle)
    return choose(bundle, named, plan, open_program=load, **options)


def run(bundle: Bundle, choice: Choice) -> np.ndarray:
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    with Session.load(bundle, choice.program) as opened:
        return opened.run({"image": image})["sum"]


def segments_on(choice: Choice) -> dict[str, list[str]]:
    program = choice.program.program
    return {
        lane.name: [s.segment for s in program.steps if isinstance(s, Run) and s.lane == lane.name]
        for lane in program.lanes
    }


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("streams", {}),
        ("streams", {"lanes": 2, "threads": 3}),
        ("streams", {"named": "cpu:0-1,cpu:2"}),
        ("streams", {"named": THREE}),
        ("authors", {"named": THREE}),
    ],
)
def test_every_plan_computes_what_the_whole_graph_does(bundle, plan, options, objective):
    expected = run(bundle, chosen(bundle, "whole"))
    choice = chosen(bundle, plan, objective=objective, **options)
    np.testing.assert_allclose(
        run(bundle, choice), expected, atol=1e-5 * np.abs(expected).max(), rtol=0
    )
    program = choice.program.program
    assert program.lanes == choice.plan.placement.lanes
    lanes = len(program.lanes)
    assert program.inferences_in_flight == (1 if objective == "latency" else lanes)
    assert choice.plan.lower_bound_ms <= choice.plan.objective_ms
    assert f"{choice.plan.lower_bound_ms:.3f} ms" in str(choice)
    assert str(choice).startswith(f"{plan} on {lanes} lane")


def test_the_whole_graph_has_one_lane_with_all_cores_of_the_first_device(bundle):
    choice = chosen(bundle, "whole", "cpu:0-1,cpu:2", in_flight=2)
    program = choice.program.program
    assert program.lanes == (Lane("lane0", "cpu:0-1", (0, 1)),)
    assert program.inferences_in_flight == 2
    assert choice.plan.placement == place_whole(program.lanes[0])


def test_the_authors_layout_copies_streams_and_no_stem(bundle):
    choice = chosen(bundle, "authors", THREE)
    on = segments_on(choice)
    assert [len(on[lane]) for lane in ("lane0", "lane1", "lane2")] == [3, 2, 2]
    assert len({names[0] for names in on.values()}) == 1  # the stem, on each of them
    program = choice.program.program
    copied = [
        program.buffers_by_name[s.target].tensor.name for s in program.steps if isinstance(s, Copy)
    ]
    assert sorted(copied) == ["image", "image", "middle", "right"]


@pytest.mark.parametrize("named", ["cpu", "cpu:0,cpu:1", "cpu:0,cpu:1,cpu:2,cpu:3"])
def test_the_authors_layout_needs_as_many_devices_as_streams(bundle, named):
    count = len(named.split(","))
    with pytest.raises(InputError) as caught:
        chosen(bundle, "authors", named)
    assert str(caught.value) == (
        "plan 'authors': runs each of the network's 3 streams on a device of its own, and "
        f"there {'is 1' if count == 1 else f'are {count}'}. "
        "Name as many devices, such as 'cpu:0,cpu:1,cpu:2', or use plan 'streams'."
    )


@pytest.mark.parametrize(
    ("plan", "options", "problem"),
    [
        ("whole", {"lanes": 2}, "lanes 2: the whole graph runs on one lane"),
        ("authors", {"named": THREE, "lanes": 2}, "lanes 2: every device has one lane"),
        ("streams", {"lanes": 5}, "lanes 5: every lane needs a core"),
        ("streams", {"in_flight": 0}, "in flight 0: is less than one"),
        ("fastest", {}, "plan 'fastest': is unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused(bundle, plan, options, problem):
    with pytest.raises(InputError) as caught:
        chosen(bundle, plan, **options)
    assert problem in str(caught.value)


def test_streams_are_planned_for_uneven_divisions_of_the_cores(bundle, monkeypatch):
    monkeypatch.setattr(bundle_costs, "describe_machine", lambda: "here")
    heavy = {"right": 12.0}

    def cost(segment: Any, threads: int) -> SegmentCost:
        work_ms = heavy.get(segment.outputs[0].name, 1.0)
        return SegmentCost(segment.name, "cpu", threads, 2, work_ms / threads, "measured", "here")

    graph = bundle.stream_graph
    add_bundle_costs(bundle, [cost(s, 2) for s in graph.segments])
    even = chosen(bundle, "streams", lanes=2)
    assert [len(lane.cores) for lane in even.plan.placement.lanes] == [2, 2]  # nothing else known
    assert even.plan.latency_ms == pytest.approx(0.5 + 6.0 + 0.5)
    add_bundle_costs(bundle, [cost(s, threads) for s in graph.segments for threads in (1, 3)])
    uneven = chosen(bundle, "streams", lanes=2)
    assert [len(lane.cores) for lane in uneven.plan.placement.lanes] == [3, 1]
    assert uneven.plan.latency_ms == pytest.approx(1 / 3 + 4.0 + 1 / 3)
    assert uneven.plan.is_optimal


def test_a_file_may_hold_a_plan_or_part_of_one(bundle, tmp_path):
    path = tmp_path / "plan.json"
    lanes = tuple(Lane(f"on{n}", f"cpu:{n}") for n in range(3))  # without cores of their own
    placement = place_authors(bundle.stream_graph, lanes)
    path.write_bytes(msgspec.json.encode({"placement": placement}))
    choice = chosen(bundle, path, in_flight=2)
    program = choice.program.program
    assert program.lanes == lanes
    assert program.inferences_in_flight == 2
    assert str(choice) == "a plan from a file"
    expected = run(bundle, chosen(bundle, "whole"))
    found = run(bundle, choice)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("lane", "problem"),
    [
        (Lane("lane0", "cuda:0"), "uses cuda:0"),
        (Lane("lane0", "cpu", (7,)), "uses core 7, which this process cannot"),
    ],
)
def test_a_plan_for_another_machine_is_refused_with_its_file(bundle, tmp_path, lane, problem):
    path = tmp_path / "plan.json"
    runs = tuple(Assignment(s.name, "lane0") for s in bundle.stream_graph.segments)
    path.write_bytes(msgspec.json.encode({"placement": Placement((lane,), runs)}))
    with pytest.raises(InputError, match=problem) as caught:
        chosen(bundle, path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_what_measuring_decides_is_run(bundle, monkeypatch, objective):
    run_rounds = auto_plan.run_rounds
    few = {"min_rounds": 2, "max_rounds": 2}
    monkeypatch.setattr(auto_plan, "run_rounds", lambda *a, **k: run_rounds(*a, **k | few))
    choice = chosen(bundle, "auto", objective=objective)
    assert choice.plan is None
    trial = choice.decision.chosen
    program = choice.program.program
    assert program.lanes == trial.placement.lanes
    assert program.inferences_in_flight == trial.inferences_in_flight
    names = {t.name.split(",")[0] for t in choice.decision.trials}
    assert names == {"whole graph", "streams"}
    expected = run(bundle, chosen(bundle, "whole"))
    found = run(bundle, choice)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_a_session_takes_several_inferences_at_once(bundle):
    with Session.open(bundle, objective="throughput", lanes=3, threads=3) as opened:
        lanes = len(opened.program.program.lanes)
        assert opened.program.program.inferences_in_flight == lanes
    with Session.open(bundle, in_flight=3) as opened:
        assert opened.program.program.inferences_in_flight == 3
