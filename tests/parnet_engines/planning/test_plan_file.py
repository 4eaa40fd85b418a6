"""Files of plans: what is written comes back, and what is no plan is refused with its reason."""

from __future__ import annotations

import json

import pytest

from parnet_engines.planning.cost_table import WHOLE, CostTable, SegmentCost
from parnet_engines.planning.layouts import place_authors, whole_graph
from parnet_engines.planning.links import Link
from parnet_engines.planning.plan import evaluate_placement, plan_authors, plan_streams, plan_whole
from parnet_engines.planning.plan_file import read_plan, save_plan
from parnet_engines.planning.scenario import Scenario
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Lane
from parnet_engines.schedule.program_file import encode
from parnet_export.errors import CheckFailedError, InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "int8", (1_000_000,))


def segment(name: str, reads: str, writes: str, gmacs: int) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, Cost(0, gmacs * 10**9, 0, 0, 1, 1))


GRAPH = StreamGraph(
    (tensor("image"),),
    (tensor("logits"),),
    (
        segment("stem", "image", "x", 1),
        segment("left", "x", "y", 8),
        segment("right", "x", "z", 9),
        segment("head", "y z", "logits", 2),
    ),
)
COSTS = CostTable(
    tuple(
        SegmentCost(s.name, "cuda", 1, 1, s.cost.macs / 1e9, "measured", "m")
        for s in GRAPH.segments
    )
)
SCENARIO = Scenario(GRAPH, COSTS, Link("l", 0.0, 1.0))
LANES = (Lane("lane0", "cuda:0"), Lane("lane1", "cuda:1"))


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("make", [plan_streams, plan_authors, plan_whole])
def test_a_plan_comes_back_as_the_program_that_it_stands_for(tmp_path, make, objective):
    path = tmp_path / "plan.json"
    plan = make(SCENARIO, LANES[0] if make is plan_whole else LANES, objective)
    save_plan(path, plan)
    graph = whole_graph(GRAPH) if make is plan_whole else GRAPH
    for in_flight, expected in ((None, 1), (3, 3)):
        found = read_plan(path, GRAPH, inferences_in_flight=in_flight)
        assert found == checked(lower(graph, plan.placement, expected), graph)
    again = tmp_path / "again.json"
    save_plan(again, plan)
    assert again.read_bytes() == path.read_bytes()


def test_what_was_predicted_is_in_the_file_for_people(tmp_path):
    plan = plan_streams(SCENARIO, LANES)
    save_plan(tmp_path / "plan.json", plan)
    content = json.loads((tmp_path / "plan.json").read_text())
    # stem 1, right 9 (beside it a copy of the image or of x, and left 8), a copy of y, head 2
    assert content["latency_ms"] == plan.latency_ms == 13.0
    assert content["lower_bound_ms"] == 12.0
    assert content["is_optimal"] is True
    assert (content["kind"], content["objective"]) == ("streams", "latency")
    assert content["critical_path"][-2:] == ["y", "head"]
    assert {span["name"] for span in content["timeline"]} >= {"stem", "left", "right", "head"}


def test_a_placement_by_hand_is_enough(tmp_path):
    path = tmp_path / "plan.json"
    lanes = [{"name": "only", "device": "cpu"}]
    runs = [{"segment": s.name, "lane": "only"} for s in GRAPH.segments]
    path.write_text(json.dumps({"placement": {"lanes": lanes, "assignments": runs}}))
    assert read_plan(path, GRAPH).program.lanes == (Lane("only", "cpu"),)


def test_the_whole_network_has_the_cost_that_it_is_given(tmp_path):
    path = tmp_path / "plan.json"
    save_plan(path, plan_whole(SCENARIO, LANES[0]))
    cost = Cost(1, 2, 3, 4, 5, 6)
    assert read_plan(path, GRAPH, whole=cost).graph[WHOLE].cost == cost


def test_a_program_is_taken_as_it_is_unless_another_number_is_in_flight(tmp_path):
    path = tmp_path / "program.json"
    program = lower(GRAPH, place_authors(GRAPH, LANES), 2)
    path.write_bytes(encode(program))
    assert read_plan(path, GRAPH).program == program
    assert read_plan(path, GRAPH, inferences_in_flight=4).program.inferences_in_flight == 4


def saved(tmp_path):
    path = tmp_path / "plan.json"
    plan = evaluate_placement("authors", SCENARIO, place_authors(GRAPH, LANES))
    save_plan(path, plan)
    return path, json.loads(path.read_text())


def run(placement, number, **change):
    placement["assignments"][number] |= change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: run(p, 0, segment="other"), "the network has no segment 'other'"),
        (lambda p: run(p, 0, lane="other"), "segment 'stem' is on no lane of the placement"),
        (lambda p: p["assignments"].reverse(), "is issued before"),
        (lambda p: p["assignments"].pop(), "no lane runs segment 'head'"),
        (lambda p: p["assignments"].append(p["assignments"][0]), "runs twice on device 'cuda:0'"),
        (lambda p: p["assignments"].clear(), "no lane runs segment 'stem'"),
        (lambda p: p["lanes"].clear(), "there must be at least one"),
        (lambda p: p["lanes"][1].update(name="lane0"), "lanes need unique names"),
        (lambda p: [x.update(cores=[3]) for x in p["lanes"]], "share core 3"),
        (lambda p: p["lanes"][0].update(cores="all"), "Expected `array`, got `str`"),
        (lambda p: p.pop("lanes"), "missing required field `lanes`"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(tmp_path, change, problem):
    path, content = saved(tmp_path)
    change(content["placement"])
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_plan(path, GRAPH)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert "Make the plan again for this network and machine" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no valid program"),
        ("{", "is no valid program"),
        ("[]", "is no valid program"),
        ("{}", "is no valid program"),
        ('{"placement": 7}', "is no plan (Expected `object`, got `int` - at `$.placement`)"),
        ('{"placement": {}, "schema_version": 2}', "has schema version 2; this version reads"),
        ('{"placement": {}, "schema_version": "1"}', "is no plan"),
    ],
)
def test_other_files_are_refused(tmp_path, content, problem):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_plan(path, GRAPH)
    assert problem in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_the_plans_that_need_none(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read.*auto, whole, streams and authors"):
        read_plan(tmp_path / "no.json", GRAPH)


def test_a_faulty_program_fails_the_check_with_its_file(tmp_path):
    path = tmp_path / "program.json"
    content = json.loads(encode(lower(GRAPH, place_authors(GRAPH, LANES))))
    content["steps"] = [step for step in content["steps"] if step["kind"] != "wait"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckFailedError) as caught:
        read_plan(path, GRAPH)
    assert str(caught.value).startswith(f"{path}: The program must not run")
    assert str(caught.value).endswith("Make the plan again for this network and machine.")


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InputError):
        save_plan(tmp_path / "no" / "folder" / "plan.json", plan_whole(SCENARIO, LANES[0]))
    assert list(tmp_path.iterdir()) == []
