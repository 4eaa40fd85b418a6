"""The checker against brute force.

The explorer below knows nothing of vector clocks. It plays two consecutive inferences of
one slot in every interleaving: data steps are intervals with a begin and an end, a write
leaves its memory undefined in between, and each read compares what it finds with the
writer it is meant to find, which is known from the steps one by one in issue order.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from parnet_engines.schedule.check import find_faults
from parnet_engines.schedule.fault import FaultKind
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Buffer, Copy, Program, Record, Run, Step, Wait
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_PROGRAMS = 12_000
MAX_STATES = 200_000
RACES = {
    FaultKind.UNORDERED,
    FaultKind.UNORDERED_NEXT,
    FaultKind.ONE_STEP,
    FaultKind.WRONG_CONTENT,
    FaultKind.MISSING_OUTPUT,
}
NO_COST = Cost(0, 0, 0, 0, 0, 0)
UNDEFINED = None


# --- The explorer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A step (or the caller) that uses memory for some time."""

    reads: tuple[tuple[int, object], ...]
    writes: tuple[tuple[int, object], ...]
    reads_mask: int
    writes_mask: int


@dataclass(frozen=True)
class After:
    """A wait: go on once `thread` has passed `position`."""

    thread: int
    position: int


MARK = "mark"
Operation = Data | After | str


def data_of_each_point(program: Program) -> dict[object, tuple[list, list]]:
    """What every point reads, with the writer it is meant to find, and what it writes.

    Memory is a storage or an engine; a value is known by the buffer and point that wrote it.
    """
    storages = {buffer.name: buffer.storage for buffer in program.buffers}
    devices = {lane.name: lane.device for lane in program.lanes}
    latest: dict[object, tuple[str, object]] = {}
    found = {}

    def visit(point, reads, writes, engine=None):
        expected = []
        for name in reads:
            buffer, writer = latest.get(storages[name], ("", "nobody"))
            expected.append((storages[name], (name, writer if buffer == name else "nobody")))
        for name in writes:
            latest[storages[name]] = (name, point)
        written = [(storages[name], (name, point)) for name in writes]
        found[point] = (expected, written + ([(engine, ("engine", point))] if engine else []))

    visit("start", (), program.inputs)
    for index, step in enumerate(program.steps):
        engine = (step.segment, devices[step.lane]) if isinstance(step, Run) else None
        visit(index, step.reads, step.writes, engine)
    visit("end", program.outputs, ())
    return found


def unroll(program: Program) -> list[list[Operation]]:
    """Two consecutive inferences as threads: one for the origin, two for every other lane."""
    data = data_of_each_point(program)
    memory = {place: i for i, place in enumerate({p for r, w in data.values() for p, _ in r + w})}
    names = [lane.name for lane in program.lanes]
    threads: list[list[Operation]] = [[] for _ in range(2 * len(names) - 1)]

    def use(point: object, inference: int) -> Data:
        reads = tuple((memory[p], (*value, inference)) for p, value in data[point][0])
        writes = tuple((memory[p], (*value, inference)) for p, value in data[point][1])
        masks = [sum(1 << m for m in {m for m, _ in pairs}) for pairs in (reads, writes)]
        return Data(reads, writes, *masks)

    for inference in range(2):
        threads[0].append(use("start", inference))
        recorded: dict[str, After] = {}
        for index, step in enumerate(program.steps):
            lane = names.index(step.lane)
            thread = lane + (len(names) - 1) * inference if lane else 0
            if isinstance(step, Record):
                recorded[step.event] = After(thread, len(threads[thread]))
                threads[thread].append(MARK)
            elif isinstance(step, Wait):
                if step.event in recorded:
                    threads[thread].append(recorded[step.event])
            else:
                threads[thread].append(use(index, inference))
        threads[0].append(use("end", inference))
    return threads


State = tuple[tuple[int, ...], int, tuple[object, ...]]


class Explorer:
    """All states that the interleavings of some threads reach.

    A state is the position of each thread, a bit mask of the threads inside their data step,
    and the content of the memory. `collision` tells what went wrong first, if anything did.
    """

    def __init__(self, threads: list[list[Operation]]) -> None:
        self.threads = threads
        uses = [o for thread in threads for o in thread if isinstance(o, Data)]
        size = 1 + max(place for use in uses for place, _ in (*use.reads, *use.writes))
        first: State = (self.settle([0] * len(threads)), 0, (UNDEFINED,) * size)
        self.collision: str | None = None
        seen, agenda = {first}, [first]
        while agenda and not self.collision:
            for state in self.successors(*agenda.pop()):
                if state not in seen:
                    seen.add(state)
                    agenda.append(state)
            assert len(seen) < MAX_STATES, "too many interleavings to explore"

    def settle(self, positions: list[int]) -> tuple[int, ...]:
        """Take marks and waits at once: they use no memory, and disable no other step."""
        moved = True
        while moved:
            moved = False
            for t, thread in enumerate(self.threads):
                while positions[t] < len(thread) and self.passes(thread[positions[t]], positions):
                    positions[t] += 1
                    moved = True
        return tuple(positions)

    @staticmethod
    def passes(operation: Operation, positions: list[int]) -> bool:
        if isinstance(operation, After):
            return positions[operation.thread] > operation.position
        return operation is MARK

    def successors(self, positions, active, content) -> Iterator[State]:
        for t, thread in enumerate(self.threads):
            use = thread[positions[t]] if positions[t] < len(thread) else MARK
            if not isinstance(use, Data):
                continue
            if active >> t & 1:
                moved = [*positions[:t], positions[t] + 1, *positions[t + 1 :]]
                after = filled(content, use.writes)
                yield self.settle(moved), active & ~(1 << t), after
            else:
                self.collision = self.collision or self.clash(use, positions, active, content)
                undefined = filled(content, ((place, UNDEFINED) for place, _ in use.writes))
                yield positions, active | 1 << t, undefined

    def clash(self, use: Data, positions, active, content) -> str | None:
        if len({place for place, _ in use.writes}) < len(use.writes):
            return "one step writes the same memory twice"
        if use.reads_mask & use.writes_mask:
            return "one step reads and writes the same memory"
        for t, thread in enumerate(self.threads):
            if active >> t & 1:
                other = thread[positions[t]]
                if use.writes_mask & (other.reads_mask | other.writes_mask):
                    return "a write begins while the memory is in use"
                if use.reads_mask & other.writes_mask:
                    return "a read begins during a write"
        if any(content[place] != value for place, value in use.reads):
            return "a read does not find its writer"
        return None


def filled(content: tuple[object, ...], writes) -> tuple[object, ...]:
    after = list(content)
    for place, value in writes:
        after[place] = value
    return tuple(after)


def find_race(program: Program) -> str | None:
    return Explorer(unroll(program)).collision


def gets_stuck(program: Program) -> bool:
    """Play the lanes as blocking threads until nothing moves; is a step left over?"""
    done: set[int] = set()
    recorded: set[str] = set()
    moved = True
    while moved:
        moved = False
        for indices in program.steps_by_lane.values():
            for index in indices:
                step = program.steps[index]
                if index in done:
                    continue
                if isinstance(step, Wait) and step.event not in recorded:
                    break
                if isinstance(step, Record):
                    recorded.add(step.event)
                done.add(index)
                moved = True
    return len(done) < len(program.steps)


# --- Random programs ----------------------------------------------------------------------


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (1,))


def lowered_program(rng: random.Random) -> Program:
    """A small random stream graph, placed anyhow, with recomputed segments."""
    tensors, segments = [tensor("image")], []
    for i in range(rng.randint(1, 5)):
        inputs = tuple(rng.sample(tensors, min(len(tensors), rng.randint(1, 2))))
        tensors.append(tensor(f"t{i}"))
        segments.append(Segment(f"s{i}", inputs, (tensors[-1],), NO_COST))
    outputs = rng.sample(tensors[1:], rng.randint(1, min(2, len(segments))))
    lanes = tuple(Lane(f"lane{i}", f"dev{rng.randint(0, 1)}") for i in range(rng.randint(1, 3)))
    assignments = []
    for segment in segments:
        chosen = rng.sample(lanes, 2 if len(lanes) > 1 and rng.random() < 0.2 else 1)
        devices = {lane.device: lane for lane in chosen}
        assignments += [Assignment(segment.name, lane.name) for lane in devices.values()]
    graph = StreamGraph((tensors[0],), tuple(outputs), tuple(segments))
    return lower(graph, Placement(lanes, tuple(assignments)))


def free_program(rng: random.Random) -> Program:
    """Random runs on shared memory, with all, most or some of the events they need."""
    names = ["image", *(f"b{i}" for i in range(rng.randint(1, 3)))]
    storages = [rng.choice(names[1:]) if rng.random() < 0.4 else name for name in names[1:]]
    buffers = [Buffer("image", tensor("image"), "dev0")] + [
        Buffer(name, tensor(name), "dev0", storage)
        for name, storage in zip(names[1:], storages, strict=True)
    ]
    lanes = [Lane(f"lane{i}", "dev0") for i in range(rng.randint(1, 3))]
    written, runs = ["image"], []
    for i in range(rng.randint(2, 5)):
        readable = written if rng.random() < 0.95 else names
        inputs = tuple(rng.choice(readable) for _ in range(rng.randint(0, 2)))
        used = {storages[names.index(name) - 1] for name in inputs if name != "image"}
        fresh = [n for n, s in zip(names[1:], storages, strict=True) if s not in used]
        output = rng.choice(fresh if fresh and rng.random() < 0.95 else names)
        segment = f"s{i}" if rng.random() < 0.9 else "s0"
        runs.append(Run(rng.choice(lanes).name, segment, inputs, (output,)))
        written.append(output)
    diligence = rng.choice([0.5, 0.9, 1.0, 1.0, 1.0])
    steps: list[Step] = [Record("lane0", "start")]
    for j, run in enumerate(runs):
        if run.lane != "lane0" and run.lane not in {r.lane for r in runs[:j]}:
            steps += [Wait(run.lane, "start")] if rng.random() < diligence else []
        for i, earlier in enumerate(runs[:j]):
            needed = earlier.lane != run.lane and related(earlier, run, buffers)
            if needed and rng.random() < diligence:
                steps.append(Wait(run.lane, f"ran{i}"))
        steps += [run, Record(run.lane, f"ran{j}")]
    for lane in lanes[1:]:
        last = max((j for j, run in enumerate(runs) if run.lane == lane.name), default=None)
        if last is not None and rng.random() < diligence:
            steps.append(Wait("lane0", f"ran{last}"))
    outputs = (rng.choice(written if rng.random() < 0.95 else names),)
    return Program(tuple(lanes), tuple(buffers), ("image",), outputs, tuple(steps))


def related(first: Run, second: Run, buffers: list[Buffer]) -> bool:
    storage = {buffer.name: buffer.storage for buffer in buffers}
    uses = [{storage[b] for b in run.reads + run.writes} for run in (first, second)]
    writes = [{storage[b] for b in run.writes} for run in (first, second)]
    return bool(writes[0] & uses[1] | writes[1] & uses[0]) or first.segment == second.segment


# --- Ways to break a program --------------------------------------------------------------


def chosen(steps: list[Step], rng: random.Random, *kinds: type) -> list[int]:
    """The index of one step of these kinds, or nothing if there is none."""
    indices = [i for i, step in enumerate(steps) if isinstance(step, kinds)]
    return [rng.choice(indices)] if indices else []


def delete(kind: type, steps: list[Step], program: Program, rng: random.Random) -> None:
    for index in chosen(steps, rng, kind):
        del steps[index]


def move_step(steps: list[Step], program: Program, rng: random.Random) -> None:
    step = steps.pop(rng.randrange(len(steps)))
    steps.insert(rng.randint(0, len(steps)), step)


def swap_steps(steps: list[Step], program: Program, rng: random.Random) -> None:
    i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
    steps[i], steps[j] = steps[j], steps[i]


def change_lane(steps: list[Step], program: Program, rng: random.Random) -> None:
    for index in chosen(steps, rng, object):
        steps[index] = replace(steps[index], lane=rng.choice(program.lanes).name)


def rename_event(steps: list[Step], program: Program, rng: random.Random) -> None:
    for index in chosen(steps, rng, Record, Wait):
        steps[index] = replace(steps[index], event=rng.choice(program.events))


def rename_buffer(steps: list[Step], program: Program, rng: random.Random) -> None:
    name = rng.choice(program.buffers).name
    for index in chosen(steps, rng, Copy):
        steps[index] = replace(steps[index], **{rng.choice(["source", "target"]): name})
        return
    for index in chosen(steps, rng, Run):
        side = rng.choice(["inputs", "outputs"])
        names = getattr(steps[index], side)
        place = rng.randrange(len(names)) if names else 0
        steps[index] = replace(steps[index], **{side: (*names[:place], name, *names[place + 1 :])})


BREAKERS: list[Callable[[list[Step], Program, random.Random], None]] = [
    partial(delete, object),
    partial(delete, Wait),
    partial(delete, Record),
    move_step,
    swap_steps,
    change_lane,
    rename_event,
    rename_buffer,
]


def share_memory(program: Program, rng: random.Random) -> Program:
    host, guest = rng.choice(program.buffers), rng.choice(program.buffers)
    if guest.device != host.device:
        return program
    shared = replace(guest, storage=host.storage)
    return replace(program, buffers=tuple(shared if b is guest else b for b in program.buffers))


def random_programs(num_programs: int, seed: int) -> Iterator[Program]:
    rng = random.Random(seed)
    for _ in range(num_programs):
        program = rng.choice([lowered_program, free_program])(rng)
        if rng.random() < 0.15:
            program = share_memory(program, rng)
        for _ in range(rng.choice([0, 1, 1, 2])):
            steps = list(program.steps)
            if steps:
                rng.choice(BREAKERS)(steps, program, rng)
                program = replace(program, steps=tuple(steps))
        yield program


# --- The comparison -----------------------------------------------------------------------


def shares_memory(program: Program) -> bool:
    return len({buffer.storage for buffer in program.buffers}) < len(program.buffers)


def test_checker_and_explorer_agree_on_races():
    seen, distinct = Counter(), set()
    for program in random_programs(NUM_PROGRAMS, seed=20260):
        collision = find_race(program)
        kinds = {fault.kind for fault in find_faults(program)} & RACES
        assert bool(collision) == bool(kinds), f"{collision}, {kinds}\n{program}"
        distinct.add(program)
        seen["racy" if collision else "clean"] += 1
        seen["clean with shared memory"] += not collision and shares_memory(program)
        seen["racy with the next inference only"] += kinds == {FaultKind.UNORDERED_NEXT}
        seen["unordered only"] += kinds == {FaultKind.UNORDERED}
        seen["wrong content only"] += kinds == {FaultKind.WRONG_CONTENT}
    assert len(distinct) >= 10_000
    assert min(seen["racy"], seen["clean"]) >= NUM_PROGRAMS // 4
    assert min(seen.values()) >= NUM_PROGRAMS // 100, seen


def test_checker_and_blocking_lanes_agree_on_deadlock():
    seen = Counter()
    for program in random_programs(NUM_PROGRAMS // 2, seed=20261):
        kinds = {fault.kind for fault in find_faults(program)}
        if FaultKind.RECORDED_TWICE in kinds:
            continue  # which record a blocked thread would wait for is not defined
        stuck = gets_stuck(program)
        found = kinds & {FaultKind.DEADLOCK, FaultKind.NEVER_RECORDED}
        assert stuck == bool(found), f"{stuck}, {found}\n{program}"
        seen["stuck" if stuck else "runs"] += 1
        seen["in a cycle"] += found == {FaultKind.DEADLOCK}
    assert min(seen.values()) >= NUM_PROGRAMS // 200, seen


@pytest.mark.parametrize(
    ("left_out", "is_racy"),
    [
        ("", False),
        ("record start", False),  # lane1 starts after lane0/a anyway
        ("wait lane0/a", True),
        ("record lane0/a", True),
        ("wait lane1/b", True),
        ("run a", True),
        ("run b", True),
    ],
)
def test_explorer_sees_what_a_person_sees_in_two_runs(left_out, is_racy):
    steps = (
        Record("lane0", "start"),
        Run("lane0", "a", ("image",), ("x",)),
        Record("lane0", "lane0/a"),
        Wait("lane1", "lane0/a"),
        Run("lane1", "b", ("x",), ("y",)),
        Record("lane1", "lane1/b"),
        Wait("lane0", "lane1/b"),
    )
    program = Program(
        lanes=(Lane("lane0", "dev0"), Lane("lane1", "dev0")),
        buffers=tuple(Buffer(name, tensor(name), "dev0") for name in ("image", "x", "y")),
        inputs=("image",),
        outputs=("y",),
        steps=tuple(step for step in steps if str(step) != left_out),
    )
    assert bool(find_race(program)) == is_racy
