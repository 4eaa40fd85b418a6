"""Lowered programs: their text, their soundness, and what they compute.

Run with the environment variable UPDATE_GOLDEN=1 to rewrite the expected programs in
tests/golden, and read the difference before you keep it.
"""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.schedule.check import find_faults
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Copy, Program, Record, Run, Wait
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

GOLDEN = Path(__file__).parents[2] / "golden"
NO_COST = Cost(0, 0, 0, 0, 0, 0)
PRIME = 1_000_003


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape or (1,))


def segment(name: str, reads: str, writes: str) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, NO_COST)


def placement(devices: str, assignments: str) -> Placement:
    """Lanes on the given devices, and assignments such as ``stem:0 head:1``."""
    lanes = tuple(Lane(f"lane{i}", device) for i, device in enumerate(devices.split()))
    pairs = (entry.split(":") for entry in assignments.split())
    return Placement(lanes, tuple(Assignment(name, f"lane{lane}") for name, lane in pairs))


# --- ParNet, read by people ---------------------------------------------------------------


def parnet() -> StreamGraph:
    """ParNet-L's seven segments at 224 pixels."""
    image = tensor("image", "batch", 3, 224, 224)
    stem1, stem2 = tensor("stem1_y", "batch", 160, 56, 56), tensor("stem2_y", "batch", 320, 28, 28)
    stream1, stream2 = (tensor(f"stream{i}_y", "batch", 320, 28, 28) for i in (1, 2))
    stream3, fusion = (tensor(f"{name}_y", "batch", 640, 14, 14) for name in ("stream3", "fusion"))
    logits = tensor("logits", "batch", 1000)
    return StreamGraph(
        inputs=(image,),
        outputs=(logits,),
        segments=(
            Segment("stem1", (image,), (stem1,), NO_COST),
            Segment("stem2", (stem1,), (stem2,), NO_COST),
            Segment("stream1", (stem1,), (stream1,), NO_COST),
            Segment("stream2", (stem2,), (stream2,), NO_COST),
            Segment("stream3", (stem2,), (stream3,), NO_COST),
            Segment("fusion", (stream1, stream2), (fusion,), NO_COST),
            Segment("head", (fusion, stream3), (logits,), NO_COST),
        ),
    )


WHOLE = placement("cuda:0", "stem1:0 stem2:0 stream1:0 stream2:0 stream3:0 fusion:0 head:0")
STREAMS = placement(
    "cuda:0 cuda:0 cuda:0", "stem1:0 stream1:1 stem2:0 stream2:2 stream3:0 fusion:1 head:0"
)
AUTHORS = placement(
    "cuda:0 cuda:1 cuda:2",
    "stem1:0 stem1:1 stem1:2 stem2:1 stem2:2 stream1:0 stream2:1 stream3:2 fusion:0 head:0",
)


@pytest.mark.parametrize(
    ("name", "placed", "inferences_in_flight"),
    [
        ("program-one-lane", WHOLE, 1),
        ("program-three-lanes", STREAMS, 1),
        ("program-three-devices", AUTHORS, 2),
    ],
)
def test_the_program_of_parnet_is_the_one_that_was_read_and_approved(
    name, placed, inferences_in_flight
):
    program = lower(parnet(), placed, inferences_in_flight)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(str(program), encoding="utf-8")
    assert str(program) == path.read_text(encoding="utf-8")
    assert find_faults(program, parnet()) == ()


# --- Single rules -------------------------------------------------------------------------

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


def texts(program: Program) -> list[str]:
    return [f"{step.lane} {step}" for step in program.steps]


def test_one_lane_needs_no_events():
    program = lower(FORK, placement("a", "stem:0 left:0 right:0 head:0"))
    assert texts(program) == [
        "lane0 run stem",
        "lane0 run left",
        "lane0 run right",
        "lane0 run head",
    ]


def test_a_tensor_is_copied_once_per_device_and_later_readers_there_wait_for_the_copy():
    program = lower(FORK, placement("a b b", "stem:0 left:1 right:2 head:1"))
    assert texts(program) == [
        "lane0 run stem",
        "lane0 record lane0/stem",
        "lane1 wait lane0/stem",
        "lane1 copy x@a -> x@b",
        "lane1 record lane1/x@b",
        "lane1 run left",
        "lane2 wait lane1/x@b",
        "lane2 run right",
        "lane2 record lane2/right",
        "lane1 wait lane2/right",
        "lane1 run head",
        "lane1 record lane1/head",
        "lane0 wait lane1/head",
        "lane0 copy y@b -> y@a",
    ]


def test_a_recomputed_segment_feeds_the_readers_of_its_own_device():
    program = lower(FORK, placement("a b", "stem:0 stem:1 left:0 right:1 head:0"))
    copies = [str(step) for step in program.steps if isinstance(step, Copy)]
    assert copies == ["copy image@a -> image@b", "copy r@b -> r@a"]


def test_a_segment_recomputed_after_its_tensor_was_copied_gets_a_buffer_of_its_own():
    program = lower(FORK, placement("a b", "stem:0 left:1 stem:1 right:1 head:0"))
    runs = {str(step): step for step in program.steps if isinstance(step, Run)}
    assert runs["run left"].inputs == ("x@b",)
    assert runs["run right"].inputs == ("x@b#2",)
    assert find_faults(program, FORK) == ()


def test_a_network_input_may_be_a_network_output_too():
    graph = StreamGraph((tensor("image"),), (tensor("image"),), ())
    program = lower(graph, placement("a", ""))
    assert program.inputs == program.outputs == ("image@a",)
    assert find_faults(program, graph) == ()


def test_an_unused_lane_has_no_steps():
    program = lower(FORK, placement("a b c", "stem:0 left:0 right:0 head:0"))
    assert {step.lane for step in program.steps} == {"lane0"}
    assert len(program.lanes) == 3


def test_an_idle_origin_starts_and_joins_the_others():
    graph = StreamGraph((tensor("image"),), (tensor("x"),), (segment("stem", "image", "x"),))
    program = lower(graph, placement("a a", "stem:1"))
    assert texts(program) == [
        "lane0 record start",
        "lane1 wait start",
        "lane1 run stem",
        "lane1 record lane1/stem",
        "lane0 wait lane1/stem",
    ]


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        ("stem:0 left:0 right:0 head:0 tail:0", "runs the unknown segment 'tail'"),
        ("stem:0 left:0 right:0", "runs segment 'head' nowhere"),
        ("stem:0 left:0 head:0 right:0", "runs segment 'head' before the one that produces 'r'"),
    ],
)
def test_a_placement_of_another_graph_is_refused(assignments, problem):
    with pytest.raises(ValueError, match=problem):
        lower(FORK, placement("a", assignments))


# --- Random graphs, placements, lanes and inferences in flight ----------------------------


@st.composite
def cases(draw) -> tuple[StreamGraph, Placement, int]:
    inputs = [tensor(f"in{i}") for i in range(draw(st.integers(1, 2)))]
    known, segments = list(inputs), []
    for i in range(draw(st.integers(1, 8))):
        reads = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
        writes = [tensor(f"t{i}.{j}") for j in range(draw(st.integers(1, 2)))]
        segments.append(Segment(f"s{i}", tuple(reads), tuple(writes), NO_COST))
        known += writes
    outputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    devices = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=5))
    lanes = tuple(Lane(f"lane{i}", device) for i, device in enumerate(devices))
    places = st.lists(
        st.sampled_from(lanes), min_size=1, max_size=2, unique_by=lambda lane: lane.device
    )
    placed = [(each.name, draw(places)) for each in segments]
    assignments = [Assignment(name, lanes_of[0].name) for name, lanes_of in placed]
    for name, lanes_of in placed:
        for lane in lanes_of[1:]:  # recomputed at any time after the first
            first = assignments.index(Assignment(name, lanes_of[0].name))
            index = draw(st.integers(first + 1, len(assignments)))
            assignments.insert(index, Assignment(name, lane.name))
    graph = StreamGraph(tuple(inputs), tuple(outputs), tuple(segments))
    return graph, Placement(lanes, tuple(assignments)), draw(st.integers(1, 3))


def compute(name: str, output: str, values: list[int]) -> int:
    """Stand in for an engine: depends on the segment, and on every input and its position."""
    total = zlib.crc32(f"{name}/{output}".encode())
    for position, value in enumerate(values):
        total += (2 * position + 3) * value * (value + 1)
    return total % PRIME


def expected_outputs(graph: StreamGraph, inputs: dict[str, int]) -> list[int]:
    """The network, one segment after another, without any program."""
    values = dict(inputs)
    for each in graph.segments:
        given_values = [values[t.name] for t in each.inputs]
        values |= {t.name: compute(each.name, t.name, given_values) for t in each.outputs}
    return [values[t.name] for t in graph.outputs]


class Interleaving:
    """Plays inferences of a program in a random order that honours only lanes and waits.

    A run or copy takes a while: it reads at its begin or at its end, by chance, and its
    targets hold rubbish in between. Memory keeps its content from inference to inference.
    Only the origin is tied to the inference before in the slot.
    """

    def __init__(self, program: Program, graph: StreamGraph, rng: random.Random) -> None:
        self.program, self.rng = program, rng
        self.outputs_of = {s.name: [t.name for t in s.outputs] for s in graph.segments}
        self.memory = [{} for _ in range(program.inferences_in_flight)]
        self.rubbish = count(-1, -1)
        self.inputs: list[list[int]] = []
        self.results: dict[int, list[int]] = {}
        self.started: set[int] = set()
        self.recorded: set[tuple[int, str]] = set()
        self.begun: dict[tuple[int, str], list[int] | None] = {}
        self.position: dict[tuple[int, str], int] = {}

    def play(self, inputs: list[list[int]]) -> list[list[int]]:
        self.inputs = inputs
        lanes = [lane.name for lane in self.program.lanes]
        self.position = {(i, lane): 0 for i in range(len(inputs)) for lane in lanes}
        waiting = list(self.position)
        while waiting:
            choice = self.rng.randrange(len(waiting))
            if self.move(*waiting[choice]):
                waiting = list(self.position)
            else:
                waiting.pop(choice)
        return [self.results[i] for i in range(len(inputs))]

    def move(self, i: int, lane: str) -> bool:
        """Let one lane of one inference go on by half a step, if it can."""
        steps = self.program.steps_by_lane[lane]
        is_origin = lane == self.program.origin.name
        if is_origin and i not in self.started:
            return self.start(i)
        if self.position[i, lane] == len(steps):
            return is_origin and self.end(i)
        step = self.program.steps[steps[self.position[i, lane]]]
        if isinstance(step, Wait) and (i, step.event) not in self.recorded:
            return False
        if isinstance(step, Record):
            self.recorded.add((i, step.event))
        if isinstance(step, Wait | Record) or self.work(i, step):
            self.position[i, lane] += 1
        return True

    def start(self, i: int) -> bool:
        slots = self.program.inferences_in_flight
        if i >= slots and i - slots not in self.results:
            return False
        self.memory[i % slots].update(zip(self.program.inputs, self.inputs[i], strict=True))
        self.started.add(i)
        return True

    def end(self, i: int) -> bool:
        if i in self.results:
            return False
        memory = self.memory[i % self.program.inferences_in_flight]
        self.results[i] = [memory[name] for name in self.program.outputs]
        return True

    def work(self, i: int, step: Run | Copy) -> bool:
        """Begin a step, or end it: then return true."""
        memory = self.memory[i % self.program.inferences_in_flight]
        if (i, step.lane) not in self.begun:
            early = self.rng.random() < 0.5
            self.begun[i, step.lane] = self.read(memory, step) if early else None
            memory.update((name, next(self.rubbish)) for name in step.writes)
            return False
        early_values = self.begun.pop((i, step.lane))
        values = self.read(memory, step) if early_values is None else early_values
        if isinstance(step, Copy):
            memory[step.target] = values[0]
        else:
            for name, what in zip(step.outputs, self.outputs_of[step.segment], strict=True):
                memory[name] = compute(step.segment, what, values)
        return True

    def read(self, memory: dict[str, int], step: Run | Copy) -> list[int]:
        return [memory.get(name, next(self.rubbish)) for name in step.reads]


@settings(deadline=None, max_examples=300)
@given(case=cases(), rng=st.randoms(use_true_random=True))
def test_every_interleaving_computes_what_one_lane_computes(case, rng):
    graph, placed, inferences_in_flight = case
    program = lower(graph, placed, inferences_in_flight)
    assert find_faults(program, graph) == ()
    inputs = [[rng.randrange(PRIME) for _ in graph.inputs] for _ in range(4)]
    names = [t.name for t in graph.inputs]
    wanted = [expected_outputs(graph, dict(zip(names, row, strict=True))) for row in inputs]
    for _ in range(3):
        assert Interleaving(program, graph, rng).play(inputs) == wanted


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_no_wait_can_be_left_out(case):
    program = lower(*case)
    for index, step in enumerate(program.steps):
        if isinstance(step, Wait):
            steps = program.steps[:index] + program.steps[index + 1 :]
            assert find_faults(replace(program, steps=steps)), f"{index}\n{program}"


def dependent_steps(program: Program) -> list[tuple[int, int]]:
    """Pairs of steps of which the second needs the first."""
    pairs: list[tuple[int, int]] = []
    latest: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        before = last.get(step.lane)
        previous = program.steps[before] if before is not None else None
        needs = {latest[name] for name in step.reads if name in latest}
        follows_work = isinstance(step, Record) and isinstance(previous, Run | Copy)
        if isinstance(step, Wait):
            needs.add(latest[step.event])
        elif follows_work or isinstance(previous, Wait):
            needs.add(before)
        pairs += [(need, index) for need in needs]
        last[step.lane] = index
        latest |= dict.fromkeys(step.writes, index)
        if isinstance(step, Record):
            latest[step.event] = index
    return pairs


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_no_two_dependent_steps_can_be_swapped(case):
    program = lower(*case)
    for first, second in dependent_steps(program):
        steps = list(program.steps)
        steps[first], steps[second] = steps[second], steps[first]
        swapped = replace(program, steps=tuple(steps))
        assert find_faults(swapped), f"{first} and {second}\n{program}"


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_events_are_recorded_only_for_waits_and_copies_are_made_only_once(case):
    program = lower(*case)
    records = [step.event for step in program.steps if isinstance(step, Record)]
    waits = {step.event for step in program.steps if isinstance(step, Wait)}
    assert len(records) == len(set(records))
    assert set(records) == waits
    arrivals = [
        (program.buffers_by_name[step.target].tensor.name, program.lanes_by_name[step.lane].device)
        for step in program.steps
        if isinstance(step, Copy)
    ]
    assert len(arrivals) == len(set(arrivals))


@pytest.mark.parametrize(
    "left_out",
    ["lane1 wait lane0/stem", "lane2 wait lane0/stem", "lane0 wait lane1/left"],
)
def test_some_interleaving_goes_wrong_where_an_order_is_missing(left_out):
    program = lower(FORK, placement("a a a", "stem:0 left:1 right:2 head:0"))
    broken = [step for step in program.steps if f"{step.lane} {step}" != left_out]
    assert len(broken) == len(program.steps) - 1
    program = replace(program, steps=tuple(broken))
    wanted = [expected_outputs(FORK, {"image": image}) for image in (5, 6, 7)]
    rng = random.Random(0)
    played = (Interleaving(program, FORK, rng).play([[5], [6], [7]]) for _ in range(100))
    assert any(outputs != wanted for outputs in played)
