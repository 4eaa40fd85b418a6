from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from parnet_engines.engine import NullEngine
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program_file import encode
from parnet_engines.session import SegmentFailedError, SegmentHungError, Session
from parnet_export.bundle import Bundle, Provenance
from parnet_export.errors import CheckFailedError, InputError, MissingBackendError
from parnet_export.pack import write_bundle
from parnet_export.splitting.split import SplitOptions, split_model
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

NO_COST = Cost(parameters=0, macs=0, weight_bytes=0, activation_bytes=0, nodes=0, depth=0)
SHAPE = ("batch", 2)


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", SHAPE)


def graph_of(edges: Mapping[str, Sequence[str]], outputs: Sequence[str]) -> StreamGraph:
    """Make a stream graph in which every segment produces the tensor of its own name."""
    return StreamGraph(
        (tensor("x"),),
        tuple(map(tensor, outputs)),
        tuple(
            Segment(name, tuple(map(tensor, reads)), (tensor(name),), NO_COST)
            for name, reads in edges.items()
        ),
    )


FORK = graph_of(
    {"stem": ["x"], "left": ["stem"], "right": ["stem"], "head": ["left", "right"]}, ["head"]
)


FORK_ORDER = [segment.name for segment in FORK.segments]


class FakeEngine(NullEngine):
    """Computes `function` of what the segment reads, in the segment's order."""

    def __init__(self, segment: Segment, function: Callable[..., NDArray[Any]]) -> None:
        super().__init__(segment)
        self.function = function
        self.runs = 0
        self.closed = 0

    def bind(self, inputs, outputs):
        def run() -> None:
            self.runs += 1
            outputs[0][...] = self.function(*inputs)

        return run

    def close(self) -> None:
        self.closed += 1


def weighted_sum(*values: NDArray[Any]) -> NDArray[Any]:
    """A sum in which the order of the operands matters."""
    total = np.ones_like(values[0])
    for factor, value in enumerate(values, 2):
        total = total + factor * value
    return total.astype(np.float32)


def fakes(graph: StreamGraph, **functions: Callable[..., NDArray[Any]]) -> dict[str, FakeEngine]:
    return {
        segment.name: FakeEngine(segment, functions.get(segment.name, weighted_sum))
        for segment in graph.segments
    }


def session_of(
    graph: StreamGraph,
    engines: Mapping[str, FakeEngine],
    *,
    lanes: int,
    on: Mapping[str, int] | None = None,
    in_flight: int = 1,
    **options: Any,
) -> Session:
    """Make a session with segments on `lanes` in turn, or `on` the lanes that are given."""
    places = on or {segment.name: i % lanes for i, segment in enumerate(graph.segments)}
    placement = Placement(
        tuple(Lane(f"lane{i}", "cpu") for i in range(lanes)),
        tuple(Assignment(s.name, f"lane{places[s.name]}") for s in graph.segments),
    )
    program = checked(lower(graph, placement, in_flight), graph)
    placed = {(name, f"lane{places[name]}"): engine for name, engine in engines.items()}
    return Session(program, placed, **options)


def image(rows: int = 1, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)


def lane_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("parnet-lane")]


# ------------------------------------------------------------------------ any interleaving


@st.composite
def graphs_with_delays(draw):
    count = draw(st.integers(1, 8))
    edges = {}
    for index in range(count):
        reads = [f"s{other}" for other in range(index) if draw(st.booleans())]
        edges[f"s{index}"] = reads or ["x"]
    delays_ms = {name: draw(st.sampled_from([0.0, 0.0, 0.5, 1.5])) for name in edges}
    return edges, delays_ms, *(draw(st.integers(1, most)) for most in (4, 3, 3))


@settings(deadline=None, max_examples=150)
@given(graphs_with_delays())
def test_the_result_is_that_of_running_the_segments_one_after_another(drawn):
    edges, delays_ms, lanes, callers, in_flight = drawn
    graph = graph_of(edges, list(edges))

    def delayed(name: str) -> Callable[..., NDArray[Any]]:
        def function(*values: NDArray[Any]) -> NDArray[Any]:
            time.sleep(delays_ms[name] / 1000)
            return weighted_sum(*values)

        return function

    engines = fakes(graph, **{n: delayed(n) for n in edges})
    with session_of(graph, engines, lanes=lanes, in_flight=in_flight) as session:
        inputs = [image(rows, seed=rows) for rows in range(1, callers + 1)]
        with ThreadPoolExecutor(callers) as pool:
            results = list(pool.map(lambda x: session.run({"x": x}), inputs))
    for x, result in zip(inputs, results, strict=True):
        expected = {"x": x}
        for name, reads in edges.items():
            expected[name] = weighted_sum(*(expected[read] for read in reads))
        assert set(result) == set(edges)
        for name in edges:
            np.testing.assert_array_equal(result[name], expected[name])


def test_independent_segments_run_at_the_same_time():
    both_are_running = threading.Barrier(2)

    def meet(value: NDArray[Any]) -> NDArray[Any]:
        both_are_running.wait(timeout=10)
        return value

    with session_of(FORK, fakes(FORK, left=meet, right=meet), lanes=2) as session:
        session.run({"x": image()})


def test_a_segment_starts_as_soon_as_its_own_inputs_are_there():
    graph = graph_of({"slow": ["x"], "a": ["x"], "b": ["a"], "end": ["slow", "b"]}, ["end"])
    b_has_run = threading.Event()

    def wait_for_b(value: NDArray[Any]) -> NDArray[Any]:
        assert b_has_run.wait(timeout=10)
        return value

    def b(value: NDArray[Any]) -> NDArray[Any]:
        b_has_run.set()
        return value

    on = {"slow": 0, "a": 1, "b": 1, "end": 0}
    with session_of(graph, fakes(graph, slow=wait_for_b, b=b), lanes=2, on=on) as session:
        session.run({"x": image()})


def test_a_network_output_may_be_an_inner_tensor_or_an_input():
    graph = graph_of({"a": ["x"], "b": ["a"]}, ["b", "a", "x"])
    x = image()
    with session_of(graph, fakes(graph), lanes=1) as session:
        outputs = session.run({"x": x})
    assert list(outputs) == ["b", "a", "x"]
    np.testing.assert_array_equal(outputs["a"], weighted_sum(x))


# ---------------------------------------------------------------------------------- errors


def fail(*_: object) -> NDArray[Any]:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("name", ["stem", "left", "head"])
def test_an_error_in_a_segment_reaches_the_caller_with_its_name(name):
    engines = fakes(FORK, **{name: fail})
    with session_of(FORK, engines, lanes=2) as session:
        with pytest.raises(
            SegmentFailedError, match=f"segment '{name}' failed: RuntimeError: out of luck"
        ) as caught:
            session.run({"x": image()})
        assert caught.value.segment == name
        assert isinstance(caught.value.__cause__, RuntimeError)
        engines[name].function = weighted_sum
        assert set(session.run({"x": image()})) == {"head"}


def test_after_an_error_nothing_more_starts_and_what_runs_ends_first():
    right_runs = threading.Event()
    ended = []

    def fail_first(*_: object) -> NDArray[Any]:
        assert right_runs.wait(timeout=10)
        raise RuntimeError("out of luck")

    def end_later(value: NDArray[Any]) -> NDArray[Any]:
        right_runs.set()
        time.sleep(0.02)
        ended.append("right")
        return value

    graph = graph_of(
        {"left": ["x"], "right": ["x"], "queued": ["x"], "after": ["right"]}, ["after"]
    )
    engines = fakes(graph, left=fail_first, right=end_later)
    engines["queued"].function = lambda value: time.sleep(0.1) or value
    with session_of(graph, engines, lanes=2) as session:
        with pytest.raises(SegmentFailedError):
            session.run({"x": image()})
        assert ended == ["right"]
        runs = engines["queued"].runs
        time.sleep(0.05)
        assert engines["queued"].runs == runs
    assert engines["after"].runs == 0


def test_an_error_of_one_caller_does_not_disturb_another():
    def fail_on_three_rows(value: NDArray[Any]) -> NDArray[Any]:
        if len(value) == 3:
            raise RuntimeError("three rows")
        return weighted_sum(value)

    with session_of(FORK, fakes(FORK, left=fail_on_three_rows), lanes=2) as session:

        def outcome(rows: int) -> str:
            try:
                return str(session.run({"x": image(rows)})["head"].shape)
            except SegmentFailedError as error:
                return str(error.__cause__)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(outcome, [1, 3, 2, 3] * 10))
    assert found == ["(1, 2)", "three rows", "(2, 2)", "three rows"] * 10


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input 'x': is missing. The network takes x float32 \[batch, 2\]\."),
        ({"x": 0, "y": 0}, r"input 'y': is not an input of the network\. The network takes x"),
        ({"x": np.zeros((1, 2))}, r"input 'x': was given as float64 \[1, 2\]\. The network takes"),
        ({"x": np.zeros((1, 3), np.float32)}, r"was given as float32 \[1, 3\]"),
        ({"x": np.zeros(2, np.float32)}, r"was given as float32 \[2\]"),
        ({"x": np.zeros((0, 2), np.float32)}, r"was given as float32 \[0, 2\]"),
        ({"x": "image.png"}, r"input 'x': was given as"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_is_expected(inputs, message):
    with (
        session_of(FORK, fakes(FORK), lanes=2) as session,
        pytest.raises(InputError, match=message),
    ):
        session.run(inputs)


def test_a_symbolic_dimension_has_one_size_in_all_inputs():
    graph = StreamGraph(
        (tensor("x"), tensor("y")),
        (tensor("s"),),
        (Segment("s", (tensor("x"), tensor("y")), (tensor("s"),), NO_COST),),
    )
    with session_of(graph, fakes(graph), lanes=1) as session:
        session.run({"x": image(3), "y": image(3)})
        with pytest.raises(InputError, match=r"input 'y': was given as float32 \[2, 2\]"):
            session.run({"x": image(3), "y": image(2)})


def test_a_session_needs_an_engine_for_every_segment():
    with pytest.raises(ValueError, match=r"no engine for \['head'\]"):
        session_of(FORK, {k: v for k, v in fakes(FORK).items() if k != "head"}, lanes=1)


def test_a_session_refuses_a_program_that_is_not_proven():
    placement = Placement(
        (Lane("lane0", "cpu"),), tuple(Assignment(s, "lane0") for s in FORK_ORDER)
    )
    engines = {(name, "lane0"): engine for name, engine in fakes(FORK).items()}
    program = lower(FORK, placement)
    with pytest.raises(TypeError, match="a session runs a CheckedProgram"):
        Session(program, engines)
    Session(checked(program), engines).close()


@pytest.mark.parametrize("limit_s", [0, -1, float("nan")])
def test_a_time_limit_is_positive(limit_s):
    with pytest.raises(InputError, match=r"time limit .* is not positive"):
        session_of(FORK, fakes(FORK), lanes=1, timeout_s=limit_s)


# ------------------------------------------------------------------------- several at once


def test_eight_threads_get_their_own_results():
    def slow(value: NDArray[Any]) -> NDArray[Any]:
        time.sleep(0.0005)
        return weighted_sum(value)

    for in_flight in (1, 3):
        with (
            session_of(FORK, fakes(FORK, left=slow), lanes=2, in_flight=in_flight) as session,
            ThreadPoolExecutor(8) as pool,
        ):
            inputs = [image(seed=seed) for seed in range(120)]
            results = list(pool.map(lambda x: session.run({"x": x})["head"], inputs))
        for x, result in zip(inputs, results, strict=True):
            stem = weighted_sum(x)
            expected = weighted_sum(weighted_sum(stem), weighted_sum(stem))
            np.testing.assert_array_equal(result, expected)


def test_as_many_inferences_are_under_way_as_the_program_has_in_flight():
    meeting = threading.Barrier(3)

    def meet(value: NDArray[Any]) -> NDArray[Any]:
        meeting.wait(timeout=10)
        return value

    with (
        session_of(FORK, fakes(FORK, right=meet), lanes=2, in_flight=3) as session,
        ThreadPoolExecutor(3) as pool,
    ):
        list(pool.map(lambda _: session.run({"x": image()}), range(6)))


def test_outputs_belong_to_the_caller():
    with session_of(FORK, fakes(FORK), lanes=2) as session:
        first = session.run({"x": image(seed=1)})["head"]
        kept = first.copy()
        session.run({"x": image(seed=2)})
        np.testing.assert_array_equal(first, kept)
        first[...] = 0  # may be written to
        assert session.run({"x": image(seed=1)})["head"].any()


def test_inputs_may_change_after_the_call_and_need_not_be_contiguous():
    with session_of(FORK, fakes(FORK), lanes=2) as session:
        x = np.asfortranarray(image(3))
        first = session.run({"x": x})["head"]
        x[...] = 0
        np.testing.assert_array_equal(session.run({"x": image(3)})["head"], first)


def test_many_shapes_take_the_memory_and_threads_of_few():
    with session_of(FORK, fakes(FORK), lanes=2) as session:
        for rows in [*range(1, 20), 1, 19, 2]:
            expected = weighted_sum(*[weighted_sum(weighted_sum(image(rows)))] * 2)
            np.testing.assert_array_equal(session.run({"x": image(rows)})["head"], expected)
        assert len(lane_threads()) <= 4
    assert lane_threads() == []


def test_a_session_that_hangs_says_so_to_everyone_and_closes():
    let_go = threading.Event()

    def hang(value: NDArray[Any]) -> NDArray[Any]:
        let_go.wait()
        return value

    engines = fakes(FORK, right=hang)
    session = session_of(FORK, engines, lanes=2, timeout_s=0.05, in_flight=2)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(session.run, {"x": image()}) for _ in range(8)]
        errors = [call.exception(timeout=20) for call in calls]
    assert {type(error) for error in errors} == {SegmentHungError}
    assert all(str(error).startswith("segment 'right' had not ended") for error in errors)
    session.close()
    session.close()
    assert {name: engine.closed for name, engine in engines.items()} == {
        "stem": 1,
        "left": 1,
        "right": 0,  # it still runs
        "head": 1,
    }
    let_go.set()


def test_a_forked_process_is_told_to_open_its_own_session():
    with session_of(FORK, fakes(FORK), lanes=2) as session:
        session.run({"x": image()})
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                session.run({"x": image()})
            except InputError as error:
                session.close()
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            message = pipe.read()
        os.waitpid(child, 0)
        assert message.startswith("session: was opened before this process was forked")
        assert message.endswith("Open a session in each process, after the fork.")
        session.run({"x": image()})  # the parent goes on


def test_threads_of_a_session_that_nobody_has_any_more_end():
    session = session_of(FORK, fakes(FORK), lanes=3)
    session.run({"x": image()})
    assert lane_threads()
    del session
    gc.collect()
    deadline_s = time.monotonic() + 5
    while lane_threads() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert lane_threads() == []


def test_a_recording_holds_every_step_of_every_inference_once():
    with session_of(FORK, fakes(FORK), lanes=2, in_flight=2, record=True) as session:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: session.run({"x": image()}), range(20)))
        recording = session.take_recording()
        steps = range(len(session.program.program.steps))
        assert recording.lanes == session.program.program.lanes
        assert sorted((span.inference, span.step) for span in recording.spans) == [
            (inference, step) for inference in range(20) for step in steps
        ]
        assert session.take_recording().spans == ()
    with session_of(FORK, fakes(FORK), lanes=2) as session:
        session.run({"x": image()})
        assert session.take_recording().spans == ()


# --------------------------------------------------------------------------------- closing


def test_closing_twice_closes_every_engine_and_leaves_no_thread():
    engines = fakes(FORK)
    session = session_of(FORK, engines, lanes=3)
    session.run({"x": image()})
    assert lane_threads()
    session.close()
    session.close()
    assert lane_threads() == []
    assert all(engine.closed for engine in engines.values())
    with pytest.raises(ValueError, match="the session is closed"):
        session.run({"x": image()})


def test_closing_waits_for_calls_under_way():
    under_way, go_on = threading.Event(), threading.Event()

    def wait_for_permission(value: NDArray[Any]) -> NDArray[Any]:
        under_way.set()
        assert go_on.wait(timeout=10)
        return value

    closed_before_the_end = []

    def look(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
        time.sleep(0.02)
        closed_before_the_end.append(engines["stem"].closed)
        return left + right

    engines = fakes(FORK, left=wait_for_permission, head=look)
    session = session_of(FORK, engines, lanes=2)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(session.run, {"x": image()})
        assert under_way.wait(timeout=10)
        closing = pool.submit(session.close)
        time.sleep(0.02)
        assert not closing.done()
        go_on.set()
        assert set(running.result(timeout=10)) == {"head"}
        closing.result(timeout=10)
    assert closed_before_the_end == [0]
    assert engines["stem"].closed == 1
    assert lane_threads() == []


def test_closing_leaves_a_call_under_way_its_engines_for_a_shape_that_is_new():
    with ThreadPoolExecutor(1) as pool:
        session = session_of(FORK, fakes(FORK), lanes=2)
        new_host, closing = session._new_host, []

        def close_meanwhile(arrays):
            closing.append(pool.submit(session.close))
            time.sleep(0.02)
            assert session._closed
            return new_host(arrays)

        session._new_host = close_meanwhile
        assert set(session.run({"x": image()})) == {"head"}
        closing[0].result(timeout=10)
    assert lane_threads() == []


def test_an_error_in_the_with_block_closes_the_session():
    engines = fakes(FORK)
    with pytest.raises(KeyError), session_of(FORK, engines, lanes=2) as session:
        session.run({"x": image()})["no such output"]
    assert lane_threads() == []
    assert engines["stem"].closed == 1


def test_two_sessions_side_by_side_do_not_meet():
    with (
        session_of(FORK, fakes(FORK), lanes=2) as one,
        session_of(FORK, fakes(FORK, head=lambda a, b: a - b), lanes=2) as two,
    ):
        x = image()
        first, second = one.run({"x": x})["head"], two.run({"x": x})["head"]
    assert not np.array_equal(first, second)


# --------------------------------------------------------------------------- real bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """A bundle of a stem, two convolution branches and a head, on 16 px images."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(value.astype(np.float32), name)

    def conv(source: str, weight: str, target: str) -> Any:
        return helper.make_node("Conv", [source, weight], [target], pads=[1, 1, 1, 1])

    graph = helper.make_graph(
        [
            conv("image", "w0", "stem"),
            conv("stem", "w1", "left1"),
            conv("left1", "w2", "left2"),
            conv("stem", "w3", "right1"),
            conv("right1", "w4", "right2"),
            helper.make_node("Add", ["left2", "right2"], ["sum"]),
            helper.make_node("GlobalAveragePool", ["sum"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ],
        "branches",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch", 3, 16, 16))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", 64))],
        [weight("w0", 64, 3, 3, 3), *(weight(f"w{i}", 64, 64, 3, 3) for i in range(1, 5))],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )
    split = split_model(model, SplitOptions(min_gain=0.0))
    return write_bundle(
        split,
        tmp_path_factory.mktemp("bundle") / "b",
        precision="fp32",
        provenance=Provenance("branches", "test", weights="random", seed=0),
    )


def photo(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_streams_and_whole_agree_from_path_and_from_bundle(bundle, threads):
    assert len(bundle.stream_graph.segments) > 2
    with (
        Session.open(bundle, threads=threads) as streams,
        Session.open(str(bundle.path), "cpu", plan="whole", threads=threads) as whole,
    ):
        assert streams.inputs == whole.inputs == bundle.stream_graph.inputs
        assert streams.outputs == whole.outputs == bundle.stream_graph.outputs
        for batch in (1, 2, 7):
            split, one = (s.run({"image": photo(batch)})["logits"] for s in (streams, whole))
            assert split.shape == (batch, 64)
            np.testing.assert_allclose(split, one, atol=1e-6 * np.abs(one).max())


def test_many_threads_may_run_one_session(bundle):
    with Session.open(bundle) as session, ThreadPoolExecutor(8) as pool:
        batches = list(itertools.islice(itertools.cycle([1, 2, 3]), 24))
        expected = {n: session.run({"image": photo(n)})["logits"] for n in (1, 2, 3)}
        for batch, result in zip(
            batches, pool.map(lambda n: session.run({"image": photo(n)}), batches), strict=True
        ):
            np.testing.assert_allclose(result["logits"], expected[batch], rtol=1e-5, atol=1e-6)


def test_a_closed_session_of_a_bundle_leaves_no_thread(bundle, watch_threads):
    threads = watch_threads()
    session = Session.open(bundle, threads=4)
    session.run({"image": photo(1)})
    assert threads.new
    session.close()
    assert threads.all_end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "0,1,2"}, "devices '0,1,2': this machine has no NVIDIA driver that works"),
        ({"devices": "0", "engine": "openvino"}, "engine 'openvino': is none for GPUs. Use auto,"),
        ({"devices": "0", "threads": 2}, "threads 2: is a number of CPU threads"),
        ({"engine": "tensorrt"}, "engine 'tensorrt': is unknown. Use one of onnxruntime"),
        ({"devices": ""}, "devices '': it names no device"),
        ({"plan": "best"}, "plan 'best': is unknown. Use auto, whole, streams, authors, or"),
        ({"threads": 0}, "threads 0: is less than one"),
        ({"lanes": 99}, "lanes 99: every lane needs a core"),
        ({"lanes": 0}, "lanes 0: "),
        ({"plan": "whole", "lanes": 2}, "lanes 2: the whole graph runs on one lane"),
        ({"plan": Path("no.json")}, "no.json: cannot be read (No such file or directory)"),
        ({"timeout_s": 0}, "time limit 0: is not positive"),
    ],
)
def test_options_that_cannot_be_used_are_one_message_with_exit_code_two(bundle, options, message):
    with pytest.raises(InputError) as caught:
        Session.open(bundle, **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_program_from_a_file_is_run(bundle, tmp_path):
    names = [segment.name for segment in bundle.stream_graph.segments]
    lanes = (Lane("only", "cpu"),)
    placement = Placement(lanes, tuple(Assignment(name, "only") for name in names))
    path = tmp_path / "plan.json"
    path.write_bytes(encode(lower(bundle.stream_graph, placement)))
    with Session.open(bundle, plan=path) as session, Session.open(bundle, plan="whole") as whole:
        assert session.program.program.lanes == lanes
        found, wanted = (s.run({"image": photo(1)})["logits"] for s in (session, whole))
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda _: "{", InputError, "is no valid program"),
        (lambda text: text.replace('"cpu"', '"cuda:0"'), InputError, "uses cuda:0"),
        (
            lambda text: text.replace('"cores": []', '"cores": [4096]'),
            InputError,
            "uses core 4096, which this process cannot",
        ),
        (
            lambda text: (
                text.replace('"segment": "trunk"', '"segment": "other"', 1)
                .replace('"segment": "stem"', '"segment": "other"', 1)
                .replace('"segment": "head"', '"segment": "other"', 1)
            ),
            CheckFailedError,
            "The program must not run: step 0",
        ),
    ],
)
def test_a_program_that_does_not_fit_is_refused_with_its_file(
    bundle, tmp_path, change, error, message
):
    names = [segment.name for segment in bundle.stream_graph.segments]
    placement = Placement((Lane("only", "cpu"),), tuple(Assignment(name, "only") for name in names))
    path = tmp_path / "plan.json"
    path.write_text(change(encode(lower(bundle.stream_graph, placement)).decode()))
    with pytest.raises(error) as caught:
        Session.open(bundle, plan=path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("engines", [("onnxruntime", "onnxruntime"), ("onnxruntime", "openvino")])
def test_two_sessions_run_at_the_same_time_on_the_same_cores(bundle, engines):
    if "openvino" in engines:
        pytest.importorskip("openvino")
    batches = [1, 2, 3] * 8
    with Session.open(bundle, plan="whole") as alone:
        expected = {n: alone.run({"image": photo(n)})["logits"] for n in (1, 2, 3)}
    with (
        Session.open(bundle, engine=engines[0]) as one,
        Session.open(bundle, engine=engines[1], timeout_s=60) as two,
        ThreadPoolExecutor(8) as pool,
    ):
        calls = [
            (n, pool.submit(session.run, {"image": photo(n)}))
            for n in batches
            for session in (one, two)
        ]
        for n, call in calls:
            found = call.result(timeout=60)["logits"]
            np.testing.assert_allclose(found, expected[n], rtol=1e-4, atol=1e-5)
    assert lane_threads() == []


@pytest.mark.parametrize("limit_s", ["None", "60"])
def test_ctrl_c_ends_a_run_and_the_session_goes_on_or_closes(bundle, limit_s):
    code = """if True:
        import sys, threading, numpy as np
        from parnet_engines.session import Session
        image = {"image": np.ones((4, 3, 16, 16), np.float32)}
        with Session.open(sys.argv[1], timeout_s=eval(sys.argv[2])) as session:
            before = session.run(image)["logits"]
            print("running", flush=True)
            try:
                while True:
                    session.run(image)
            except KeyboardInterrupt:
                print(np.array_equal(session.run(image)["logits"], before))
        print([t.name for t in threading.enumerate() if t.name.startswith("parnet")])
    """
    command = [sys.executable, "-c", code, str(bundle.path), limit_s]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "running\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "True\n[]\n", "")


def test_a_forked_process_may_drop_the_session_of_its_parent(bundle):
    # It leaves as multiprocessing does: ONNX Runtime hangs in sys.exit after any fork.
    code = """if True:
        import gc, os, sys, time, numpy as np
        from parnet_engines.session import Session
        session = Session.open(sys.argv[1], plan="whole")
        session.run({"image": np.zeros((1, 3, 16, 16), np.float32)})
        time.sleep(0.2)  # until the threads sleep, too
        child = os.fork()
        if child == 0:
            session.close()
            session = None
            gc.collect()
            os._exit(7)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    command = [sys.executable, "-c", code, str(bundle.path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stderr) == (7, "")


def test_a_path_that_is_no_bundle_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a bundle"):
        Session.open(tmp_path)


def test_an_absent_runtime_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackendError, match="Running on the CPU needs"):
        Session.open(bundle)
