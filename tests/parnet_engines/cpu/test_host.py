from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.clock import FakeClock, MonotonicClock
from parnet_engines.cpu.buffers import allocate, find_shapes
from parnet_engines.cpu.host import Host
from parnet_engines.engine import NullEngine
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Buffer, Program, Record, Wait
from parnet_engines.segment_errors import SegmentFailedError, SegmentHungError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

NO_COST = Cost(0, 0, 0, 0, 0, 0)
CORES = sorted(os.sched_getaffinity(0))


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float64", shape or (3,))


def segment(name: str, reads: str, writes: str) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, NO_COST)


FORK = StreamGraph(
    (tensor("image"),),
    (tensor("y"),),
    (
        segment("stem", "image", "x"),
        segment("left", "x", "l"),
        segment("right", "x", "r"),
        segment("head", "l r", "y"),
    ),
)


def placement(devices: str, assignments: str, cores: Sequence[tuple[int, ...]] = ()) -> Placement:
    """Lanes on the given devices, and assignments such as ``stem:0 head:1``."""
    names = devices.split()
    lanes = tuple(
        Lane(f"lane{i}", device, own)
        for i, (device, own) in enumerate(zip(names, cores or [()] * len(names), strict=True))
    )
    pairs = (entry.split(":") for entry in assignments.split())
    return Placement(lanes, tuple(Assignment(name, f"lane{lane}") for name, lane in pairs))


TWO_LANES = placement("cpu cpu", "stem:0 left:0 right:1 head:0")


class FakeEngine(NullEngine):
    """Computes `function` from arrays to arrays, in the order of the segment."""

    def __init__(self, segment: Segment, function: Callable[..., Any]) -> None:
        super().__init__(segment)
        self.function = function
        self.runs = 0

    def run(self, inputs):
        found = self.function(*(inputs[spec.name] for spec in self.inputs))
        return {spec.name: value for spec, value in zip(self.outputs, found, strict=True)}

    def bind(self, inputs, outputs):
        def run() -> None:
            self.runs += 1
            found = self.function(*inputs)
            for output, value in zip(outputs, found, strict=True):
                output[...] = value

        return run


def weighted_sums(segment: Segment) -> Callable[..., list[NDArray[Any]]]:
    """Functions that differ between segments and outputs, and in the order of operands."""

    def function(*values: NDArray[Any]) -> list[NDArray[Any]]:
        seed = sum(map(ord, segment.name)) % 7
        total = sum((factor * value for factor, value in enumerate(values, 2 + seed)), 1.0)
        return [np.cos(total + number) for number in range(len(segment.outputs))]

    return function


def host_of(
    graph: StreamGraph, placed: Placement, options: Any = None, **functions: Callable[..., Any]
) -> tuple[Host, dict[tuple[str, str], FakeEngine]]:
    program = checked(lower(graph, placed), graph)
    engines = {
        (a.segment, a.lane): FakeEngine(
            graph[a.segment], functions.get(a.segment) or weighted_sums(graph[a.segment])
        )
        for a in placed.assignments
    }
    inputs = [np.zeros(spec.resolve()) for spec in graph.inputs]
    shapes = find_shapes(program.program, engines, inputs)
    return Host(program, engines, shapes, **(options or {})), engines


def expected(graph: StreamGraph, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    tensors = {spec.name: value for spec, value in zip(graph.inputs, inputs, strict=True)}
    for part in graph.segments:
        found = weighted_sums(part)(*(tensors[spec.name] for spec in part.inputs))
        tensors |= {spec.name: value for spec, value in zip(part.outputs, found, strict=True)}
    return [tensors[spec.name] for spec in graph.outputs]


def lane_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("parnet-lane")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert condition()


@pytest.fixture
def hang():
    """A function that does not return before the end of the test."""
    let_go = threading.Event()

    def function(value: NDArray[Any]) -> list[NDArray[Any]]:
        let_go.wait()
        return [value]

    yield function
    let_go.set()
    wait_for(lambda: not lane_threads())


@pytest.fixture(autouse=True)
def no_thread_and_no_affinity_is_left():
    yield
    wait_for(lambda: not lane_threads())
    assert sorted(os.sched_getaffinity(0)) == CORES


# ------------------------------------------------------------------------- any program


@st.composite
def placed_graphs(draw):
    """A stream graph of up to 8 segments on 1 to 5 lanes of 1 to 3 devices, some recomputed."""
    known = [tensor(f"in{i}") for i in range(draw(st.integers(1, 2)))]
    inputs = tuple(known)
    segments = []
    for index in range(draw(st.integers(1, 8))):
        reads = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        writes = tuple(tensor(f"t{index}.{i}") for i in range(draw(st.integers(1, 2))))
        segments.append(Segment(f"s{index}", tuple(reads), writes, NO_COST))
        known += writes
    outputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    graph = StreamGraph(inputs, tuple(outputs), tuple(segments))
    lanes = tuple(
        Lane(f"lane{i}", f"cpu:{draw(st.integers(0, 2))}") for i in range(draw(st.integers(1, 5)))
    )
    assignments = []
    for part in segments:
        on = draw(st.lists(st.sampled_from(lanes), min_size=1, max_size=2))
        by_device = {lane.device: lane for lane in on}
        assignments += [Assignment(part.name, lane.name) for lane in by_device.values()]
    pauses_ms = {s.name: draw(st.sampled_from([0, 0, 0, 0.05, 0.3])) for s in segments}
    return graph, Placement(lanes, tuple(assignments)), pauses_ms


@settings(deadline=None, max_examples=120)
@given(placed_graphs(), st.booleans())
def test_threads_compute_what_the_segments_compute_one_after_another(drawn, limited):
    graph, placed, pauses_ms = drawn

    def paused(part: Segment) -> Callable[..., list[NDArray[Any]]]:
        def function(*values: NDArray[Any]) -> list[NDArray[Any]]:
            time.sleep(pauses_ms[part.name] / 1000)
            return weighted_sums(part)(*values)

        return function

    functions = {part.name: paused(part) for part in graph.segments}
    host, _ = host_of(graph, placed, {"timeout_s": 60 if limited else None}, **functions)
    rng = np.random.default_rng(0)
    for _ in range(3):
        inputs = [rng.standard_normal(spec.resolve()) for spec in graph.inputs]
        for buffer, value in zip(host.inputs, inputs, strict=True):
            buffer[...] = value
        host.run()
        for output, value in zip(host.outputs, expected(graph, inputs), strict=True):
            np.testing.assert_array_equal(output, value)
    host.close()


def test_lanes_work_at_the_same_time():
    meeting = threading.Barrier(2)

    def meet(value: NDArray[Any]) -> list[NDArray[Any]]:
        meeting.wait(timeout=10)
        return [value]

    host, _ = host_of(FORK, TWO_LANES, left=meet, right=meet)
    host.run()
    host.close()


def test_a_lane_without_steps_gets_no_thread():
    host, _ = host_of(FORK, placement("cpu cpu cpu", "stem:0 left:2 right:0 head:0"))
    host.run()
    assert lane_threads() == ["parnet-lane lane2"]
    host.close()


# ------------------------------------------------------------------------------- memory


def test_every_buffer_has_memory_of_its_own_and_those_of_one_storage_share_it():
    buffers = (
        Buffer("a", tensor("a", 5), "cpu"),
        Buffer("b", TensorSpec("b", "float16", (2, 3)), "cpu", storage="a"),
        Buffer("c", tensor("c", 0), "cpu"),
        Buffer("d", TensorSpec("d", "int8", ()), "cpu"),
    )
    program = Program((Lane("lane0", "cpu"),), buffers, ("a",), ("d",), ())
    arrays = allocate(program, {b.name: b.tensor.resolve() for b in buffers})
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "a": ((5,), "float64"),
        "b": ((2, 3), "float16"),
        "c": ((0,), "float64"),
        "d": ((), "int8"),
    }
    assert all(arrays[name].ctypes.data % 64 == 0 for name in "abd")
    assert all(array.flags.c_contiguous for array in arrays.values())
    assert np.shares_memory(arrays["a"], arrays["b"])
    assert not np.shares_memory(arrays["a"], arrays["d"])


def test_tensors_are_copied_from_device_to_device():
    seen = {}

    def look(name: str) -> Callable[..., list[NDArray[Any]]]:
        def function(*values: NDArray[Any]) -> list[NDArray[Any]]:
            seen[name] = values[0].ctypes.data
            return [values[0] + 1]

        return function

    parts = {name: look(name) for name in ("left", "right")}
    host, _ = host_of(FORK, placement("cpu:0 cpu:1", "stem:0 left:0 right:1 head:0"), **parts)
    host.run()
    assert seen["left"] != seen["right"]
    host.close()


@pytest.mark.parametrize("limit_s", [None, 60])
def test_an_inference_allocates_no_arrays(limit_s):
    shape = (1 << 18,)  # 2 MiB
    graph = StreamGraph(
        tuple(replace(spec, shape=shape) for spec in FORK.inputs),
        tuple(replace(spec, shape=shape) for spec in FORK.outputs),
        tuple(
            replace(
                part,
                inputs=tuple(replace(spec, shape=shape) for spec in part.inputs),
                outputs=tuple(replace(spec, shape=shape) for spec in part.outputs),
            )
            for part in FORK.segments
        ),
    )
    placed = placement("cpu:0 cpu:1", "stem:0 left:0 right:1 head:0")
    program = checked(lower(graph, placed), graph)
    engines = {(a.segment, a.lane): NullEngine(graph[a.segment]) for a in placed.assignments}
    shapes = find_shapes(program.program, engines, [np.zeros(shape)])
    host = Host(program, engines, shapes, timeout_s=limit_s)
    host.run()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            host.run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 50_000
    host.close()


def test_symbolic_dimensions_take_the_sizes_of_the_inputs():
    graph = StreamGraph(
        (tensor("x", "batch", 2),),
        (tensor("y", "batch", 5),),
        (Segment("s", (tensor("x", "batch", 2),), (tensor("y", "batch", 5),), NO_COST),),
    )
    program = lower(graph, placement("cpu", "s:0"))
    found = find_shapes(program, {}, [np.zeros((7, 2))])
    assert found == {"x@cpu": (7, 2), "y@cpu": (7, 5)}


def test_a_dimension_that_no_input_has_is_found_by_running_once():
    graph = StreamGraph(
        (tensor("x", "batch"),),
        (tensor("z", "twice"),),
        (
            Segment("double", (tensor("x", "batch"),), (tensor("y", "twice"),), NO_COST),
            Segment("negate", (tensor("y", "twice"),), (tensor("z", "twice"),), NO_COST),
        ),
    )
    program = checked(lower(graph, placement("cpu:0 cpu:1", "double:0 negate:1")), graph)
    engines = {
        ("double", "lane0"): FakeEngine(graph["double"], lambda x: [np.concatenate([x, x])]),
        ("negate", "lane1"): FakeEngine(graph["negate"], lambda y: [-y]),
    }
    shapes = find_shapes(program.program, engines, [np.zeros(3)])
    assert set(shapes.values()) == {(3,), (6,)}
    host = Host(program, engines, shapes)
    host.inputs[0][...] = [1, 2, 3]
    host.run()
    assert host.outputs[0].tolist() == [-1, -2, -3, -1, -2, -3]
    host.close()


def test_a_segment_that_fails_while_shapes_are_found_is_named():
    graph = StreamGraph(
        (tensor("x", "batch"),),
        (tensor("y", "other"),),
        (Segment("s", (tensor("x", "batch"),), (tensor("y", "other"),), NO_COST),),
    )
    program = lower(graph, placement("cpu", "s:0"))
    with pytest.raises(SegmentFailedError, match="segment 's' failed: RuntimeError: no luck"):
        find_shapes(program, {("s", "lane0"): FakeEngine(graph["s"], fail)}, [np.zeros(3)])


# ------------------------------------------------------------------------------ failures


def fail(*_: object) -> list[NDArray[Any]]:
    raise RuntimeError("no luck")


@pytest.mark.parametrize("limit_s", [None, 60])
@pytest.mark.parametrize("name", ["stem", "left", "right", "head"])
def test_a_lane_that_fails_names_its_segment_and_the_host_stays_usable(name, limit_s):
    host, engines = host_of(FORK, TWO_LANES, {"timeout_s": limit_s}, **{name: fail})
    (engine,) = (engine for (part, _), engine in engines.items() if part == name)
    for _ in range(3):
        with pytest.raises(SegmentFailedError, match=f"'{name}' failed: RuntimeError: no l") as e:
            host.run()
        assert e.value.segment == name
        assert isinstance(e.value.__cause__, RuntimeError)
        assert lane_threads() == []
    engine.function = weighted_sums(FORK[name])
    image = np.arange(3.0)
    host.inputs[0][...] = image
    host.run()
    np.testing.assert_array_equal(host.outputs[0], expected(FORK, [image])[0])
    host.close()


def test_two_lanes_that_fail_together_give_one_error():
    meeting = threading.Barrier(2)

    def fail_together(_: object) -> list[NDArray[Any]]:
        meeting.wait(timeout=10)
        raise RuntimeError("no luck")

    host, _ = host_of(FORK, TWO_LANES, left=fail_together, right=fail_together)
    for _ in range(20):
        with pytest.raises(SegmentFailedError, match=r"'(left|right)' failed"):
            host.run()
    host.close()


def test_after_a_failure_nothing_starts_and_what_runs_ends_first():
    right_runs, ended = threading.Event(), []

    def fail_meanwhile(_: object) -> list[NDArray[Any]]:
        assert right_runs.wait(timeout=10)
        raise RuntimeError("no luck")

    def end_later(value: NDArray[Any]) -> list[NDArray[Any]]:
        right_runs.set()
        time.sleep(0.02)
        ended.append("right")
        return [value]

    graph = StreamGraph(
        FORK.inputs,
        (tensor("z"),),
        (*FORK.segments[:3], segment("after", "r", "a"), segment("end", "a l", "z")),
    )
    placed = placement("cpu cpu", "stem:0 left:0 right:1 after:1 end:0")
    host, engines = host_of(graph, placed, left=fail_meanwhile, right=end_later)
    with pytest.raises(SegmentFailedError, match="'left'"):
        host.run()
    assert ended == ["right"]
    assert engines["after", "lane1"].runs == 0
    host.close()


def test_a_thread_that_dies_is_no_deadlock(monkeypatch):
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    class NoError(BaseException):
        pass

    def die(_: object) -> list[NDArray[Any]]:
        raise NoError

    host, _ = host_of(FORK, TWO_LANES, right=die)
    with pytest.raises(RuntimeError, match="a lane's thread has ended"):
        host.run()
    assert [hook.exc_type for hook in died] == [NoError]
    host.close()


@pytest.mark.parametrize("name", ["stem", "right"])
def test_a_segment_that_hangs_is_named_when_the_time_is_over(name, hang):
    host, _ = host_of(FORK, TWO_LANES, {"timeout_s": 0.05}, **{name: hang})
    with pytest.raises(SegmentHungError, match=rf"^segment '{name}' had not ended .* 0\.05 s") as e:
        host.run()
    assert e.value.segments == (name,)
    with pytest.raises(SegmentHungError, match=name):
        host.run()
    begin_s = time.monotonic()
    host.close()
    host.close()
    assert time.monotonic() - begin_s < 2
    assert host.running == (name,)
    wait_for(lambda: len(lane_threads()) == 1)


def test_all_segments_that_hang_are_named(hang):
    host, _ = host_of(FORK, TWO_LANES, {"timeout_s": 0.2}, left=hang, right=hang)
    with pytest.raises(SegmentHungError, match=r"^segments 'left' and 'right' had not ended"):
        host.run()
    host.close()


def test_a_lane_that_hangs_after_another_one_failed_does_not_hold_up_the_error(hang):
    right_runs = threading.Event()

    def hang_at_once(value: NDArray[Any]) -> list[NDArray[Any]]:
        right_runs.set()
        return hang(value)

    def fail_meanwhile(_: object) -> list[NDArray[Any]]:
        assert right_runs.wait(timeout=10)
        raise RuntimeError("no luck")

    options = {"timeout_s": 0.2}
    host, _ = host_of(FORK, TWO_LANES, options, left=fail_meanwhile, right=hang_at_once)
    with pytest.raises(SegmentFailedError, match="'left' failed"):
        host.run()
    with pytest.raises(SegmentHungError, match="'right'"):
        host.run()
    host.close()


@pytest.mark.parametrize("limit_s", [None, 60])
@pytest.mark.parametrize("name", ["left", "right"])
def test_ctrl_c_ends_an_inference_and_the_host_stays_usable(name, limit_s):
    interrupt = True

    def be_interrupted(value: NDArray[Any]) -> list[NDArray[Any]]:
        if interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return weighted_sums(FORK[name])(value)

    host, _ = host_of(FORK, TWO_LANES, {"timeout_s": limit_s}, **{name: be_interrupted})
    for _ in range(3):
        # What an engine of the caller's own thread raises has a segment's name.
        with pytest.raises((KeyboardInterrupt, SegmentFailedError)):
            host.run()
    interrupt = False
    image = np.arange(3.0)
    host.inputs[0][...] = image
    host.run()
    np.testing.assert_array_equal(host.outputs[0], expected(FORK, [image])[0])
    host.close()


def test_ctrl_c_at_any_moment_leaves_a_usable_host():
    host, _ = host_of(FORK, TWO_LANES)
    rng = np.random.default_rng(0)
    image = np.arange(3.0)
    wanted = expected(FORK, [image])[0]
    host.inputs[0][...] = image
    interrupted = 0
    for _ in range(60):
        timer = threading.Timer(rng.uniform(0, 0.003), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                host.run()
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        host.run()
        np.testing.assert_array_equal(host.outputs[0], wanted)
    assert interrupted == 60
    host.close()


# ---------------------------------------------------------------------- cores and waiting


def test_threads_are_pinned_and_the_caller_only_meanwhile():
    if len(CORES) < 2:
        pytest.skip("needs two processors")
    one, two = CORES[:2]
    seen = {}

    def look(name: str) -> Callable[..., list[NDArray[Any]]]:
        def function(*values: NDArray[Any]) -> list[NDArray[Any]]:
            seen[name] = os.sched_getaffinity(0)
            return [values[0]]

        return function

    parts = {name: look(name) for name in ("stem", "left", "right", "head")}
    placed = placement("cpu cpu", "stem:0 left:0 right:1 head:0", [(two,), (one, two)])
    for limit_s in (None, 60):
        for pin in (True, False):
            host, _ = host_of(FORK, placed, {"pin": pin, "timeout_s": limit_s}, **parts)
            host.run()
            assert sorted(os.sched_getaffinity(0)) == CORES
            host.close()
            left, right = ({two}, {one}) if pin else (set(CORES), set(CORES))
            assert seen == {"stem": left, "left": left, "right": right, "head": left}
    host, _ = host_of(FORK, placed, stem=fail)
    with pytest.raises(SegmentFailedError):
        host.run()
    assert sorted(os.sched_getaffinity(0)) == CORES
    host.close()


def test_a_host_without_work_takes_no_processor_time():
    host, _ = host_of(FORK, TWO_LANES)
    host.run()
    time.sleep(0.02)
    before_s = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before_s < 0.05
    host.close()


# ---------------------------------------------------------------------------- recording


@pytest.mark.parametrize("limit_s", [None, 60])
def test_every_step_is_recorded_in_the_order_of_the_program(limit_s):
    options = {"clock": MonotonicClock(), "timeout_s": limit_s}
    host, _ = host_of(FORK, TWO_LANES, options)
    program = lower(FORK, TWO_LANES)
    ended_ns = 0
    for inference in (5, 6, 7):
        begin_ns = time.monotonic_ns()
        spans = {span.step: span for span in host.run(inference)}
        assert sorted(spans) == list(range(len(program.steps)))
        assert {span.inference for span in spans.values()} == {inference}
        assert min(span.begin_ns for span in spans.values()) >= max(begin_ns, ended_ns)
        ended_ns = max(span.end_ns for span in spans.values())
        assert ended_ns <= time.monotonic_ns()
        for index, step in enumerate(program.steps):
            assert (spans[index].lane, spans[index].kind) == (step.lane, step.kind)
            if isinstance(step, Wait):
                (record,) = (
                    spans[i]
                    for i, other in enumerate(program.steps)
                    if isinstance(other, Record) and other.event == step.event
                )
                assert record.begin_ns <= spans[index].end_ns
        for indices in program.steps_by_lane.values():
            for earlier, later in itertools.pairwise(indices):
                assert spans[earlier].end_ns <= spans[later].begin_ns
    host.close()


def test_times_are_those_of_the_clock():
    clock = FakeClock(1000)

    def take_3_ms(value: NDArray[Any]) -> list[NDArray[Any]]:
        clock.advance_ms(3)
        return [value]

    placed = placement("cpu", "stem:0 left:0 right:0 head:0")
    host, _ = host_of(FORK, placed, {"clock": clock}, left=take_3_ms)
    found = [(span.label, span.begin_ns, span.end_ns) for span in host.run()]
    assert found == [
        ("stem", 1000, 1000),
        ("left", 1000, 3_001_000),
        ("right", 3_001_000, 3_001_000),
        ("head", 3_001_000, 3_001_000),
    ]
    host.close()


def test_nothing_is_recorded_without_a_clock():
    host, _ = host_of(FORK, TWO_LANES)
    assert host.run() == ()
    host.close()
