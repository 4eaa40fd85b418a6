"""What is read off recordings: overlap, critical path, gaps, verdicts and trace files."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.planning.cost_table import CostTable, SegmentCost
from parnet_engines.planning.links import FREE_LINK, Link
from parnet_engines.planning.simulate import simulate
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Copy, Run
from parnet_engines.schedule.recording import Recording, Span, span_of
from parnet_engines.timeline.analysis import Gap, WallTime, analyse
from parnet_engines.timeline.critical_path import Dependencies, critical_path
from parnet_engines.timeline.trace_file import encode_trace
from parnet_engines.timeline.verdict import Verdict, VerdictKind
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NO_COST = Cost(0, 0, 0, 0, 0, 0)
MB_LINK = Link("test", 0.0, 1.0)
MS = 1_000_000


def tensor(name: str, megabytes: float = 1.0) -> TensorSpec:
    return TensorSpec(name, "int8", (int(megabytes * 1e6),))


def segment(name: str, reads: str, writes: str) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, NO_COST)


def placement(devices: str, assignments: str, cores: str = "") -> Placement:
    pinned = [tuple(map(int, group)) for group in cores.split()] or [()] * len(devices.split())
    lanes = tuple(Lane(f"lane{i}", device, pinned[i]) for i, device in enumerate(devices.split()))
    pairs = (entry.split(":") for entry in assignments.split())
    return Placement(lanes, tuple(Assignment(name, f"lane{lane}") for name, lane in pairs))


def table(latencies_ms: dict[str, float], kind: str = "cuda", slowdown: float = 1.0) -> CostTable:
    """Latencies alone, and with two busy lanes."""
    return CostTable(
        tuple(
            SegmentCost(name, kind, 1, busy, latency_ms * scale, "measured", "a test")
            for name, latency_ms in latencies_ms.items()
            for busy, scale in ((1, 1.0), (2, slowdown))
        )
    )


FORK = StreamGraph(
    inputs=(tensor("image"),),
    outputs=(tensor("y"),),
    segments=(
        segment("stem", "image", "x"),
        segment("left", "x", "l"),
        segment("right", "x", "r"),
        segment("head", "l r", "y"),
    ),
)
COSTS_MS = {"stem": 1.0, "left": 4.0, "right": 3.0, "head": 2.0}
TWO_LANES = placement("cuda:0 cuda:0", "stem:0 left:1 right:0 head:0")


def play(graph, placed, costs_ms, link=FREE_LINK, **keywords):
    program = lower(graph, placed)
    return program, simulate(program, table(costs_ms), link, **keywords).recording


def path_of(program, recording):
    return [(part.span.label, part.cause) for part in critical_path(program, recording)]


# --- Worked by hand -----------------------------------------------------------------------


def test_every_moment_is_counted_once():
    program, recording = play(FORK, TWO_LANES, COSTS_MS)
    analysis = analyse(program, recording)
    # stem 0 to 1, left 1 to 5 beside right 1 to 4, head 5 to 7.
    assert analysis.wall == WallTime(
        together_ns=3 * MS,
        repeated_ns=0,
        alone_ns=1 * MS,
        serial_ns=3 * MS,
        copying_ns=0,
        idle_ns=0,
    )
    assert analysis.overlap == pytest.approx(3 / 7)
    assert analysis.parallel_gain == pytest.approx(10 / 7)
    assert [use.utilisation for use in analysis.lanes] == [
        pytest.approx(6 / 7),
        pytest.approx(4 / 7),
    ]
    assert analysis.gaps == (Gap("lane0", 4 * MS, 5 * MS, "head"), Gap("lane1", 0, 1 * MS, "left"))
    assert analysis.bottleneck.name == "left"
    assert analysis.bottleneck.share == pytest.approx(4 / 7)
    assert analysis.verdict.kind is VerdictKind.OVERLAP
    assert "42.9 % of the time" in analysis.verdict.sentence
    assert analysis.slowdown is None


def test_the_critical_path_follows_events_from_lane_to_lane():
    program, recording = play(FORK, TWO_LANES, COSTS_MS)
    assert path_of(program, recording) == [("stem", "start"), ("left", "data"), ("head", "data")]


def test_the_critical_path_follows_the_order_of_a_lane():
    two_heads = placement("cuda:0", "stem:0 left:0 right:0 head:0")
    program, recording = play(FORK, two_heads, COSTS_MS)
    assert path_of(program, recording) == [
        ("stem", "start"),
        ("left", "lane"),
        ("right", "lane"),
        ("head", "lane"),
    ]


def test_the_critical_path_goes_through_copies_and_waits_for_links():
    graph = StreamGraph(
        inputs=(tensor("image"),),
        outputs=(tensor("y"),),
        segments=(
            segment("s", "image", "u v"),
            segment("a", "u", "p"),
            segment("b", "v", "q"),
            segment("c", "p q", "y"),
        ),
    )
    placed = placement("cuda:0 cuda:1 cuda:1", "s:0 a:1 b:2 c:1")
    program, recording = play(graph, placed, dict.fromkeys("sabc", 1.0), MB_LINK)
    # u goes 1 to 2, v over the same link 2 to 3, b 3 to 4, c 4 to 5, y back 5 to 6.
    assert path_of(program, recording) == [
        ("s", "start"),
        ("u@cuda:1", "data"),
        ("v@cuda:1", "link"),
        ("b", "lane"),
        ("c", "data"),
        ("y@cuda:0", "data"),
    ]
    analysis = analyse(program, recording)
    assert analysis.bottleneck.kind == "copies"
    assert analysis.bottleneck.share == pytest.approx(3 / 6)


def test_the_critical_path_leads_from_one_inference_of_a_slot_to_the_next():
    program = lower(FORK, TWO_LANES)
    recording = simulate(program, table(COSTS_MS), FREE_LINK, inferences=2).recording
    path = critical_path(program, recording)
    assert [(part.span.inference, part.span.label) for part in path] == [
        (inference, name) for inference in (0, 1) for name in ("stem", "left", "head")
    ]
    assert path_of(program, recording.only(1)) == [
        ("stem", "start"),
        ("left", "data"),
        ("head", "data"),
    ]


def test_delays_of_a_session_are_part_of_the_critical_path():
    program = lower(FORK, placement("cpu:0 cpu:0", "stem:0 left:1 right:0 head:0"))
    runs = {step.segment: i for i, step in enumerate(program.steps) if isinstance(step, Run)}
    moments = {"stem": (0, 10), "right": (11, 41), "left": (15, 55), "head": (60, 80)}
    spans = [span_of(program, runs[name], *times) for name, times in moments.items()]
    recording = Recording(program.lanes, tuple(spans))
    path = critical_path(program, recording)
    assert [(p.span.label, p.cause, p.delay_ns) for p in path] == [
        ("stem", "start", 0),
        ("left", "data", 5),
        ("head", "data", 5),
    ]
    assert analyse(program, recording).wall.idle_ns == 1 + 5


def test_recomputed_segments_are_no_overlap_that_gains_anything():
    placed = placement("cuda:0 cuda:1", "stem:0 stem:1 left:1 right:0 head:0")
    program, recording = play(FORK, placed, COSTS_MS | {"stem": 6.0})
    analysis = analyse(program, recording)
    assert analysis.wall.repeated_ns == 6 * MS
    # stem 6 and the longer branch 4 and head 2 in a row, against 15 one after another.
    assert analysis.parallel_gain == pytest.approx(15 / 12)


# --- Verdicts -----------------------------------------------------------------------------


def verdict(placed, costs_ms, link=FREE_LINK, *, kind="cuda", slowdown=1.0, graph=FORK):
    program = lower(graph, placed)
    costs = table(costs_ms, kind, slowdown)
    recording = simulate(program, costs, link).recording
    return analyse(program, recording, costs if slowdown != 1.0 else None).verdict


def test_one_lane_is_said_to_be_the_reason():
    found = verdict(placement("cuda:0", "stem:0 left:0 right:0 head:0"), COSTS_MS)
    assert found.kind is VerdictKind.ONE_LANE
    assert "All steps are on lane0" in found.sentence


def test_a_chain_has_no_parallel_work():
    chain = StreamGraph(
        (tensor("image"),), (tensor("y"),), (segment("a", "image", "x"), segment("b", "x", "y"))
    )
    found = verdict(placement("cuda:0 cuda:0", "a:0 b:1"), {"a": 1, "b": 1}, graph=chain)
    assert found.kind is VerdictKind.CHAIN
    assert "Every segment waits for the one before" in found.sentence


def test_one_stream_may_dominate():
    found = verdict(TWO_LANES, {"stem": 0.1, "left": 9.0, "right": 0.5, "head": 0.1})
    assert found.kind is VerdictKind.DOMINANT
    assert "left runs for 8.50 ms of 9.20 ms by itself" in found.sentence


def test_stem_and_head_may_dominate():
    found = verdict(TWO_LANES, {"stem": 5.0, "left": 1.0, "right": 1.0, "head": 4.0})
    assert found.kind is VerdictKind.CHAIN
    assert "for 9.00 ms of 10.0 ms only segments run that nothing can run beside" in found.sentence


def test_copies_may_dominate():
    placed = placement("cuda:0 cuda:1", "stem:0 left:1 right:0 head:0")
    found = verdict(placed, dict.fromkeys(COSTS_MS, 0.1), Link("slow", 1000.0, 1.0))
    assert found.kind is VerdictKind.COPIES
    assert "copies are 4.00 ms of 4.30 ms on the critical path" in found.sentence


def test_lanes_may_share_cores():
    placed = placement("cpu:0 cpu:0", "stem:0 left:1 right:0 head:0", cores="0 0")
    found = verdict(placed, COSTS_MS, kind="cpu")
    assert found.kind is VerdictKind.SHARED_CORES
    assert "lane0 and lane1 are pinned to the same cores" in found.sentence
    slowed = verdict(placed, COSTS_MS, kind="cpu", slowdown=2.0)
    assert slowed.kind is VerdictKind.SHARED_CORES
    assert "2.00x as long in company as alone" in slowed.sentence


def test_lanes_with_cores_of_their_own_do_not_share_them():
    placed = placement("cpu:0 cpu:0", "stem:0 left:1 right:0 head:0", cores="0 1")
    assert verdict(placed, COSTS_MS, kind="cpu").kind is VerdictKind.OVERLAP


def test_a_device_may_be_full_already():
    found = verdict(TWO_LANES, COSTS_MS, slowdown=1.9)
    assert found.kind is VerdictKind.FULL_DEVICE
    assert "1.90x as long in company as alone: cuda:0 is full already" in found.sentence


def test_a_little_slowdown_does_not_hide_that_lanes_overlap():
    assert verdict(TWO_LANES, COSTS_MS, slowdown=1.1).kind is VerdictKind.OVERLAP


def test_handing_over_may_dominate():
    program = lower(FORK, placement("cpu:0 cpu:0", "stem:0 left:1 right:0 head:0"))
    runs = {step.segment: i for i, step in enumerate(program.steps) if isinstance(step, Run)}
    moments = {"stem": (0, 10), "right": (50, 60), "left": (100, 110), "head": (150, 160)}
    spans = [span_of(program, runs[name], *times) for name, times in moments.items()]
    found = analyse(program, Recording(program.lanes, tuple(spans))).verdict
    assert found.kind is VerdictKind.HAND_OVER
    assert "no lane works" in found.sentence


def test_only_lanes_that_overlap_need_no_remedy():
    remedies = {kind: Verdict(kind, "").remedy for kind in VerdictKind}
    assert [kind for kind, remedy in remedies.items() if not remedy] == [VerdictKind.OVERLAP]
    assert all(remedy.endswith(".") for remedy in remedies.values() if remedy)


def test_a_recording_without_runs_is_refused():
    program = lower(FORK, TWO_LANES)
    with pytest.raises(ValueError, match="neither a run nor a copy"):
        analyse(program, Recording(program.lanes, ()))


# --- Random recordings --------------------------------------------------------------------


def random_recording(rng: random.Random, in_flight: int = 1):
    tensors = [tensor("image", 0.5)]
    segments = []
    for number in range(rng.randint(1, 7)):
        reads = tuple(rng.sample(tensors, rng.randint(1, min(3, len(tensors)))))
        writes = (tensor(f"t{number}", rng.choice([0.25, 1.0])),)
        segments.append(Segment(f"s{number}", reads, writes, NO_COST))
        tensors += writes
    graph = StreamGraph((tensors[0],), (tensors[-1],), tuple(segments))
    lanes = tuple(Lane(f"lane{i}", f"cuda:{rng.randrange(3)}") for i in range(rng.randint(1, 4)))
    assignments = []
    for part in segments:
        chosen = {lane.device: lane for lane in rng.sample(lanes, rng.randint(1, len(lanes)))}
        assignments += [Assignment(part.name, lane.name) for lane in chosen.values()]
    program = lower(graph, Placement(lanes, tuple(assignments)), in_flight)
    costs = table({s.name: rng.choice([0.25, 1.0, rng.random() + 0.01]) for s in segments})
    return program, simulate(program, costs, MB_LINK, inferences=2 * in_flight).recording


@settings(deadline=None, max_examples=150)
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=2))
def test_the_critical_path_of_a_prediction_has_no_hole_and_starts_at_the_beginning(seed, in_flight):
    program, recording = random_recording(random.Random(seed), in_flight)
    path = critical_path(program, recording)
    assert path[0].cause == "start"
    assert path[0].span.begin_ns == recording.begin_ns
    assert path[-1].span.end_ns == recording.end_ns
    assert all(part.delay_ns == 0 for part in path)
    assert sum(part.span.duration_ns for part in path) == recording.end_ns - recording.begin_ns


@settings(deadline=None, max_examples=100)
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=2))
def test_moments_are_counted_as_a_stopwatch_would(seed, in_flight):
    program, recording = random_recording(random.Random(seed), in_flight)
    analysis = analyse(program, recording)
    wall = analysis.wall
    assert wall.total_ns == recording.end_ns - recording.begin_ns
    # Look at the middle of every stretch between two of the recording's moments.
    moments = sorted({t for s in recording.spans for t in (s.begin_ns, s.end_ns)})
    counted = defaultdict(int)
    for begin, end in pairwise(moments):
        middle = (begin + end) / 2
        working = {s.lane for s in recording.spans if s.is_busy and s.begin_ns < middle < s.end_ns}
        counted[min(2, len(working))] += end - begin
    assert wall.together_ns + wall.repeated_ns == counted[2]
    assert wall.alone_ns + wall.serial_ns + wall.copying_ns == counted[1]
    assert wall.idle_ns == counted[0]
    assert analysis.verdict.sentence.endswith(".")


@settings(deadline=None, max_examples=100)
@given(st.integers(min_value=0))
def test_what_steps_wait_for_on_other_lanes_is_never_more_than_their_data_and_the_start(seed):
    program, _ = random_recording(random.Random(seed))
    writers = {}
    needed = {}
    for index, step in enumerate(program.steps):
        needed[index] = {writers[name] for name in step.reads if name in writers}
        writers.update(dict.fromkeys(step.writes, index))
    across = Dependencies(program).across_lanes
    assert set(across) == {i for i, s in enumerate(program.steps) if isinstance(s, Run | Copy)}
    for index, found in across.items():
        lane = program.steps[index].lane
        assert all(program.steps[other].lane != lane and other < index for other in found)
        for other in found:  # a copy's source or a run's input, for itself or to pass on
            assert any(other in needed[later] for later in range(index, len(program.steps)))


# --- Trace files --------------------------------------------------------------------------


def events_of(program, recording):
    document = json.loads(encode_trace(program, recording, "a test"))
    assert document["displayTimeUnit"] in {"ms", "ns"}
    assert document["otherData"] == {"title": "a test", "source": recording.source}
    return document["traceEvents"]


def test_devices_are_processes_and_lanes_are_threads():
    placed = placement("cuda:0 cuda:1 cuda:1", "stem:0 left:1 right:2 head:0")
    events = events_of(*play(FORK, placed, COSTS_MS, MB_LINK))
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event["name"] in {"process_name", "thread_name"}
    }
    assert names == {
        (1, None): "cuda:0",
        (2, None): "cuda:1",
        (1, 1): "lane0",
        (2, 2): "lane1",
        (2, 3): "lane2",
    }


@settings(deadline=None, max_examples=60)
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=3))
def test_a_trace_keeps_to_the_trace_event_format(seed, in_flight):
    program, recording = random_recording(random.Random(seed), in_flight)
    events = events_of(program, recording)
    slices, flows = defaultdict(list), defaultdict(dict)
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in {"M", "X", "s", "f"}
        assert isinstance(event["pid"], int)
        if event["ph"] != "M":
            assert (event["pid"], event["tid"]) in threads
            assert event["ts"] >= 0
        if event["ph"] == "X":
            begin, duration = round(event["ts"] * 1000), round(event["dur"] * 1000)
            slices[event["pid"], event["tid"]].append((begin, begin + duration))
        if event["ph"] in {"s", "f"}:
            assert event["ph"] not in flows[event["id"]]
            flows[event["id"]][event["ph"]] = event
    # Slices of a thread do not overlap, so that they nest trivially.
    for found in slices.values():
        found.sort()
        for (_, end), (begin, _) in pairwise(found):
            assert begin >= end
    # Every arrow leaves and arrives inside a slice, and does not go back in time.
    for pair in flows.values():
        start, finish = pair["s"], pair["f"]
        assert finish["bp"] == "e"
        assert (start["name"], start["cat"]) == (finish["name"], finish["cat"])
        assert start["ts"] <= finish["ts"]
        for event in (start, finish):
            moment = round(event["ts"] * 1000)
            enclosing = slices[event["pid"], event["tid"]]
            assert any(begin <= moment < end for begin, end in enclosing)
    busy = [e for e in events if e["ph"] == "X" and "critical" in e["args"]]
    assert len(busy) == sum(span.is_busy for span in recording.spans)
    critical = [e for e in busy if e["args"]["critical"]]
    assert len(critical) == len(critical_path(program, recording))


def test_arrows_lead_from_lane_to_lane():
    program, recording = play(FORK, TWO_LANES, COSTS_MS)
    events = events_of(program, recording)
    arrows = [(e["ph"], e["name"], e["tid"], e["ts"]) for e in events if e["ph"] in {"s", "f"}]
    assert arrows == [
        ("s", "stem", 1, 999.999),
        ("f", "stem", 2, 1000.0),
        ("s", "left", 2, 4999.999),
        ("f", "left", 1, 5000.0),
    ]


def test_inferences_that_overlap_on_a_lane_get_threads_of_their_own():
    program = lower(FORK, placement("cuda:0", "stem:0 left:0 right:0 head:0"), 2)
    runs = {step.segment: i for i, step in enumerate(program.steps)}
    spans = [
        Span(
            "lane0",
            runs["stem"],
            "run",
            "stem",
            1000 * inference,
            1000 * inference + 1500,
            inference,
        )
        for inference in range(3)
    ]
    events = events_of(program, Recording(program.lanes, tuple(spans)))
    assert [e["tid"] for e in events if e["ph"] == "X"] == [1, 2, 1]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["lane0 (1)", "lane0 (2)"]
