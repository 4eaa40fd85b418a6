"""The CUDA interpreter on the recording driver: results, calls, refusals, releases."""

from __future__ import annotations

import functools
import gc
import os
import re
import threading
import time
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.clock import FakeClock
from parnet_engines.cuda import parts as cuda_parts
from parnet_engines.cuda.devices import ordinal_of
from parnet_engines.cuda.driver import CudaError
from parnet_engines.cuda.host import CudaHost
from parnet_engines.cuda.hosted_engine import HostedEngine
from parnet_engines.cuda.memory import array_at, resolve_shapes
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.engine import NullEngine
from parnet_engines.schedule.check import checked, find_faults
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Copy, Program, Record, Run, Wait
from parnet_engines.segment_errors import SegmentFailedError, SegmentHungError
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", ("batch", 3))


def segment(name: str, reads: str, writes: str, macs: int = 1_000_000) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, Cost(1, macs, 1, 1, 1, 1))


STREAMS = StreamGraph(
    (tensor("image"),),
    (tensor("logits"),),
    (
        segment("stem", "image", "a b"),
        segment("stream1", "a", "x"),
        segment("stream2", "a b", "y", 50_000_000),
        segment("stream3", "b", "z", 900_000_000),
        segment("fusion", "x y", "f"),
        segment("head", "f z", "logits"),
    ),
)
"""ParNet's shape: a stem, three streams, and a fusion that not all of them feed."""

ONE_LANE = "stem:0 stream1:0 stream2:0 stream3:0 fusion:0 head:0"
THREE_LANES = "stem:0 stream3:0 stream1:1 stream2:2 fusion:1 head:0"
LAYOUTS = {
    "one lane": ("cuda:0", ONE_LANE),
    "three lanes": ("cuda:0 cuda:0 cuda:0", THREE_LANES),
    "three devices": ("cuda:0 cuda:1 cuda:2", THREE_LANES),
    "three times one device": ("cuda:0 cuda:0#1 cuda:0#2", THREE_LANES),
    "two lanes and one device": ("cuda:0 cuda:0 cuda:1", THREE_LANES),
}


class LinearEngine(NullEngine):
    """Computes sums of its inputs, weighted so that every segment and input matters."""

    def bind(self, inputs, outputs):
        factor = 1 + len(self.name) / 7 + ord(self.name[-1]) / 100

        def run() -> None:
            total = sum((i + 1) * factor * array for i, array in enumerate(inputs))
            for position, output in enumerate(outputs):
                output[...] = np.tanh(total) + position

        return run


@functools.cache
def make_program(layout: str) -> Any:
    return place(*LAYOUTS[layout])


def place(devices: str, assignments: str) -> Any:
    lanes = tuple(Lane(f"lane{i}", device) for i, device in enumerate(devices.split()))
    pairs = (entry.split(":") for entry in assignments.split())
    placement = Placement(lanes, tuple(Assignment(name, f"lane{lane}") for name, lane in pairs))
    return checked(lower(STREAMS, placement), STREAMS)


def make_host(
    driver: RecordingDriver, layout: str, engine_type: type = HostedEngine, **options: Any
) -> CudaHost:
    return host_of(make_program(layout), driver, engine_type, **options)


def host_of(
    program: Any, driver: RecordingDriver, engine_type: type = HostedEngine, **options: Any
) -> CudaHost:
    engines = {
        (step.segment, step.lane): engine_type(
            LinearEngine(STREAMS[step.segment]),
            driver,
            ordinal_of(program.program.lanes_by_name[step.lane].device),
        )
        for step in program.program.steps
        if isinstance(step, Run)
    }
    return CudaHost(program, engines, resolve_shapes(program.program, [(2, 3)]), driver, **options)


def expected_logits(image: np.ndarray) -> np.ndarray:
    """What the engines compute, one after another."""
    tensors = {"image": image}
    for part in STREAMS.segments:
        outputs = [np.empty_like(image) for _ in part.outputs]
        LinearEngine(part).bind([tensors[t.name] for t in part.inputs], outputs)()
        tensors |= {t.name: array for t, array in zip(part.outputs, outputs, strict=True)}
    return tensors["logits"]


def images(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((2, 3)).astype(np.float32) for _ in range(count)]


def run_host(host: CudaHost, image: np.ndarray) -> np.ndarray:
    host.inputs[0][...] = image
    host.run()
    return host.outputs[0].copy()


DRIVERS = {
    "everything works": {},
    "no peer access": {"peer_access": False},
    "no graph over devices": {"joint_graphs": False},
    "neither": {"peer_access": False, "joint_graphs": False},
}


@pytest.mark.parametrize("driver_options", DRIVERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_the_segments_compute(layout, driver_options):
    driver = RecordingDriver(3, **DRIVERS[driver_options])
    host = make_host(driver, layout)
    for image in images(3):
        np.testing.assert_array_equal(run_host(host, image), expected_logits(image))
    host.close()
    assert driver.open_resources == {}


@pytest.mark.parametrize(
    ("layout", "driver_options", "mode", "copies"),
    [
        ("one lane", "everything works", "graph", "none"),
        ("three lanes", "neither", "graph", "none"),
        ("three devices", "everything works", "graph", "peer"),
        ("three times one device", "neither", "graph", "memory"),
        ("three devices", "no peer access", "graph", "pinned host"),
        ("three devices", "no graph over devices", "device graphs", "peer"),
        ("two lanes and one device", "no graph over devices", "device graphs", "peer"),
        ("three devices", "neither", "enqueue", "pinned host"),
    ],
)
def test_the_result_says_what_was_used(layout, driver_options, mode, copies):
    host = make_host(RecordingDriver(3, **DRIVERS[driver_options]), layout)
    assert (host.execution.mode, host.execution.copies) == (mode, copies)
    assert bool(host.execution.reason) == (mode != "graph")
    if mode != "graph":
        assert "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in str(host.execution)
    host.close()


def test_graphs_can_be_switched_off():
    driver = RecordingDriver()
    host = make_host(driver, "three lanes", use_graphs=False)
    assert host.execution.mode == "enqueue"
    (image,) = images(1)
    np.testing.assert_array_equal(run_host(host, image), expected_logits(image))
    assert not any(call.verb == "begin_capture" for call in driver.calls)


def test_an_inference_is_one_launch_and_nothing_else_but_the_transfers():
    driver = RecordingDriver()
    host = make_host(driver, "three lanes")
    before = len(driver.calls)
    run_host(host, images(1)[0])
    assert [call.verb for call in driver.calls[before:]] == [
        "push_context",
        "copy_to_device",
        "launch",
        "copy_to_host",
        "push_context",
        "synchronize",
        "pop_context",
        "pop_context",
    ]


def test_the_lane_of_the_longest_chain_has_the_greatest_priority():
    driver = RecordingDriver()
    make_host(driver, "three lanes").close()
    priorities = [call.operands[0] for call in driver.calls if call.verb == "create_stream"]
    # stream3 is by far the longest and on lane0; stream2 is longer than stream1.
    assert priorities == [-5, -4, -4]


# The calls of a host, as text.


class Names:
    """Names for handles and addresses, in the order in which they appear."""

    def __init__(self, host: CudaHost, driver: RecordingDriver) -> None:
        self.known = {region.address: name for name, region in host.regions.items()}
        counts: dict[str, int] = defaultdict(int)
        for call in driver.calls:
            kind = {
                "create_stream": "stream",
                "create_event": "event",
                "instantiate": "graph",
                "allocate_pinned": "pinned",
            }.get(call.verb)
            if kind:
                self.known[call.operands[-1]] = f"{kind}{counts[kind]}"
                counts[kind] += 1

    def __call__(self, operand: object) -> str:
        return self.known.get(operand, str(operand)) if isinstance(operand, int) else str(operand)


def describe(driver: RecordingDriver, host: CudaHost) -> str:
    """All calls, one list for each device."""
    name = Names(host, driver)
    found: dict[int, list[str]] = defaultdict(list)
    for call in driver.calls:
        operands = list(call.operands)
        if call.verb in {"end_capture", "instantiate", "destroy_graph"}:
            operands = operands[-1:] if call.verb == "instantiate" else operands[:0]
        found[call.device].append(" ".join([call.verb, *map(name, operands)]))
    return "".join(
        "\n".join([f"device {device}", *(f"  {line}" for line in lines)]) + "\n"
        for device, lines in sorted(found.items())
    )


@pytest.mark.parametrize("layout", ["one lane", "three lanes", "three devices"])
def test_the_calls_are_those_of_the_golden_text(root: Path, layout: str):
    driver = RecordingDriver(3)
    host = make_host(driver, layout)
    run_host(host, images(1)[0])
    host.close()
    golden = root / "tests" / "golden" / f"cuda_calls_{layout.replace(' ', '_')}.txt"
    text = describe(driver, host)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


# The calls of an inference, turned back into a program.


class Reader:
    """Builds a program from calls: every stream is a lane, and in a graph another one."""

    def __init__(self, driver: RecordingDriver, host: CudaHost, program: Program) -> None:
        self.driver, self.host, self.original = driver, host, program
        self.buffers = {region.address: name for name, region in host.regions.items()}
        self.home = {
            call.operands[-1]: call.device for call in driver.calls if call.verb == "create_stream"
        }
        self.graphs: dict[int, list[Any]] = {}
        self.steps: list[Any] = []
        self.lanes: dict[str, str] = {}
        self.recorded: dict[tuple[str, int], str] = {}
        self.runs = {step.segment: step for step in program.steps if isinstance(step, Run)}
        self.copies: dict[tuple[int, int], Copy] = {}

    def read_captures(self) -> None:
        collected: list[Any] | None = None
        for call in self.driver.calls:
            if call.verb == "begin_capture":
                collected = [call]
            elif call.verb == "abort_capture":
                collected = None
            elif call.verb == "instantiate":
                self.graphs[call.operands[-1]] = collected or []
                collected = None
            elif collected is not None and call.verb in {
                *("record_event", "wait_event", "run", "copy_peer", "copy_on_device"),
                *("copy_to_host", "copy_to_device"),
            }:
                collected.append(call)

    def lane(self, scope: str, stream: int) -> str:
        name = f"{scope}s{stream}"
        self.lanes.setdefault(name, f"cuda:{self.home[stream]}")
        return name

    def event(self, scope: str, event: int) -> str:
        generation = len(self.recorded)
        self.recorded[scope, event] = f"{scope}e{event}.{generation}.{len(self.steps)}"
        return self.recorded[scope, event]

    def add(self, call: Any, scope: str = "") -> None:
        stream = call.operands[-1] if call.verb.startswith("copy") else call.operands[0]
        if call.verb not in {"copy_to_device", "copy_to_host"}:
            stream = call.operands[0]
        lane = self.lane(scope, stream)
        match call.verb:
            case "run":
                step = self.runs[call.operands[1]]
                self.steps.append(Run(lane, step.segment, step.inputs, step.outputs))
            case "copy_peer" | "copy_on_device":
                target, source = (self.buffers[address] for address in call.operands[1:3])
                self.steps.append(Copy(lane, source, target))
            case "record_event":
                self.steps.append(Record(lane, self.event(scope, call.operands[1])))
            case "wait_event":
                self.steps.append(Wait(lane, self.recorded[scope, call.operands[1]]))
            case "launch":
                self.launch(call, lane)

    def launch(self, call: Any, lane: str) -> None:
        begin, *nodes = self.graphs[call.operands[1]]
        scope = f"g{call.operands[1]}."
        lead = self.lane(scope, begin.operands[0])
        self.steps += [Record(lane, f"{scope}begin"), Wait(lead, f"{scope}begin")]
        for node in nodes:
            self.add(node, scope)
        self.steps += [Record(lead, f"{scope}end"), Wait(lane, f"{scope}end")]

    def program(self, calls: list[Any]) -> Program:
        self.read_captures()
        first = next(call for call in calls if call.verb == "copy_to_device")
        origin = self.lane("", first.operands[0])
        for call in calls:
            if call.verb in {"record_event", "wait_event", "run", "launch", "copy_peer"} or (
                call.verb == "copy_on_device"
            ):
                self.add(call)
        devices = {buffer.name: buffer.device for buffer in self.original.buffers}
        lanes = tuple(Lane(name, device) for name, device in self.lanes.items())
        assert lanes[0].name == origin
        physical = tuple(
            type(b)(b.name, b.tensor, devices[b.name].split("#")[0], b.storage)
            for b in self.original.buffers
        )
        return Program(
            lanes, physical, self.original.inputs, self.original.outputs, tuple(self.steps)
        )


def work_of(program: Program) -> list[str]:
    return [str(step) for step in program.steps if isinstance(step, Run | Copy)]


@pytest.mark.parametrize("driver_options", ["everything works", "no graph over devices"])
@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize(
    "layout", ["one lane", "three lanes", "three devices", "two lanes and one device"]
)
def test_recorded_calls_are_a_program_without_faults(layout, use_graphs, driver_options):
    driver = RecordingDriver(3, **DRIVERS[driver_options])
    host = make_host(driver, layout, use_graphs=use_graphs)
    before = len(driver.calls)
    run_host(host, images(1)[0])
    original = make_program(layout).program
    found = Reader(driver, host, original).program(driver.calls[before:])
    assert find_faults(found, STREAMS) == ()
    kinds = [
        sorted(str(s) for s in p.steps if isinstance(s, Run | Copy)) for p in (found, original)
    ]
    assert kinds[0] == kinds[1]


@st.composite
def placements(draw):
    """Devices of lanes, and segments on lanes: any of them, streams in any order."""
    devices = draw(
        st.lists(st.sampled_from(["cuda:0", "cuda:1", "cuda:2"]), min_size=1, max_size=4)
    )
    streams = draw(st.permutations(["stream1", "stream2", "stream3"]))
    position = draw(st.integers(0, 3))
    order = ["stem", *streams, "head"]
    order.insert(max(order.index("stream1"), order.index("stream2"), position) + 1, "fusion")
    lanes = [draw(st.integers(0, len(devices) - 1)) for _ in order]
    text = " ".join(f"{name}:{lane}" for name, lane in zip(order, lanes, strict=True))
    return " ".join(devices), text


@settings(deadline=None, max_examples=40)
@given(placements(), st.sampled_from(list(DRIVERS)))
def test_any_placement_computes_the_same_and_its_calls_are_a_program(placement, driver_options):
    program = place(*placement)
    driver = RecordingDriver(3, **DRIVERS[driver_options])
    host = host_of(program, driver)
    before = len(driver.calls)
    (image,) = images(1)
    np.testing.assert_array_equal(run_host(host, image), expected_logits(image))
    if host.execution.copies != "pinned host":  # the reader knows no buffers in the host
        found = Reader(driver, host, program.program).program(driver.calls[before:])
        assert find_faults(found, STREAMS) == ()
        assert sorted(work_of(found)) == sorted(work_of(program.program))
    host.close()
    assert driver.open_resources == {}


def test_the_reader_notices_a_missing_wait():
    driver = RecordingDriver(3)
    host = make_host(driver, "three devices", use_graphs=False)
    before = len(driver.calls)
    run_host(host, images(1)[0])
    calls = driver.calls[before:]
    waits = [i for i, call in enumerate(calls) if call.verb == "wait_event"]
    original = make_program("three devices").program
    for missing in waits:
        kept = [call for i, call in enumerate(calls) if i != missing]
        assert find_faults(Reader(driver, host, original).program(kept), STREAMS)


# Refusals and failures.


class Touchy(HostedEngine):
    """An engine that cannot be captured: it synchronises."""

    def bind(self, inputs, outputs):
        enqueue = super().bind(inputs, outputs)

        def touchy(stream: int) -> None:
            self._driver.synchronize(stream)
            enqueue(stream)

        return touchy


@pytest.mark.parametrize("layout", ["one lane", "three lanes", "three devices"])
def test_an_engine_that_cannot_be_captured_runs_without_a_graph(layout):
    driver = RecordingDriver(3)
    host = make_host(driver, layout, Touchy)
    assert host.execution.mode == "enqueue"
    assert not driver.is_capturing
    (image,) = images(1)
    np.testing.assert_array_equal(run_host(host, image), expected_logits(image))
    host.close()
    assert driver.open_resources == {}


@pytest.mark.parametrize("layout", ["one lane", "three lanes", "three devices"])
def test_a_capture_refused_at_any_point_leaves_none_open_and_falls_back(layout):
    probe = RecordingDriver(3)
    make_host(probe, layout)
    verbs = [call.verb for call in probe.calls]
    begin, end = verbs.index("begin_capture"), verbs.index("destroy_graph")
    assert end - begin > 5
    (image,) = images(1)
    for point in range(begin, end + 1):
        driver = RecordingDriver(3, fail_at=point)
        host = make_host(driver, layout)
        assert host.execution.mode in {"enqueue", "device graphs"}
        assert "made to fail" in host.execution.reason
        assert not driver.is_capturing
        np.testing.assert_array_equal(run_host(host, image), expected_logits(image))
        host.close()
        assert driver.open_resources == {}, f"after {probe.calls[point]} failed"


@pytest.mark.parametrize("driver_options", DRIVERS)
@pytest.mark.parametrize("layout", ["one lane", "three lanes", "three devices"])
def test_an_error_at_any_call_releases_everything(layout, driver_options):
    probe = RecordingDriver(3, **DRIVERS[driver_options])
    host = make_host(probe, layout, clock=FakeClock())
    run_host(host, images(1)[0])
    host.close()
    failures = 0
    for point in range(len(probe.calls)):
        driver = RecordingDriver(3, **DRIVERS[driver_options], fail_at=point)
        host = None
        try:
            host = make_host(driver, layout, clock=FakeClock())
            run_host(host, images(1)[0])
            host.close()
        except CudaError:
            failures += 1
            if host is not None:
                host.give_up()
        assert driver.open_resources == {}, f"after {probe.calls[point]} failed"
    assert failures > len(probe.calls) / 3


def test_closing_twice_releases_once():
    driver = RecordingDriver()
    host = make_host(driver, "three lanes")
    host.close()
    calls = len(driver.calls)
    host.close()
    assert len(driver.calls) == calls


class Broken(HostedEngine):
    def bind(self, inputs, outputs):
        def broken(stream: int) -> None:
            raise RuntimeError("no kernel image is available")

        return broken if self.name == "stream2" else super().bind(inputs, outputs)


def test_an_engine_that_fails_is_named_and_everything_released():
    driver = RecordingDriver()
    with pytest.raises(SegmentFailedError, match="segment 'stream2' failed: RuntimeError: no kern"):
        make_host(driver, "three lanes", Broken)
    assert driver.open_resources == {}


class Choosy(HostedEngine):
    def bind(self, _inputs, _outputs):
        raise InputError(f"engine {self.name!r}", "refuses the shape", "Build for other --shapes")


def test_what_a_user_can_change_about_an_engine_is_told_as_it_is():
    driver = RecordingDriver()
    with pytest.raises(InputError, match=r"^engine '\w+': refuses the shape\. Build for other"):
        make_host(driver, "three lanes", Choosy)
    assert driver.open_resources == {}


# The caller's own memory and streams.


def put(driver: RecordingDriver, array: np.ndarray, device: int = 0, offset: int = 0) -> int:
    address = driver.allocate(device, array.nbytes + offset) + offset
    fetch(address, array.shape)[...] = array
    return address


def fetch(address: int, shape: tuple[int, ...]) -> np.ndarray:
    return array_at(address, shape, "float32")


@pytest.fixture
def caller():
    driver = RecordingDriver()
    driver.retain_context(0)
    return driver


def transfers(driver: RecordingDriver, before: int) -> list[str]:
    return [c.verb for c in driver.calls[before:] if c.verb.startswith("copy")]


@pytest.mark.parametrize("layout", ["one lane", "three lanes", "three times one device"])
def test_tensors_on_the_gpu_are_used_in_put(caller, layout):
    host = make_host(caller, layout)
    first, second = images(2)
    source, target = put(caller, first), put(caller, np.zeros_like(first))
    host.run(inputs=[source], outputs=[target])  # captures for these addresses
    before = len(caller.calls)
    fetch(source, first.shape)[...] = second
    host.run(inputs=[source], outputs=[target])
    np.testing.assert_array_equal(fetch(target, first.shape), expected_logits(second))
    assert transfers(caller, before) == []
    # and the host's own memory still works
    np.testing.assert_array_equal(run_host(host, first), expected_logits(first))


def test_many_addresses_are_copied_instead_of_captured(caller):
    host = make_host(caller, "three lanes")
    for image in images(8):
        source, target = put(caller, image), put(caller, np.zeros_like(image))
        before = len(caller.calls)
        host.run(inputs=[source], outputs=[target])
        np.testing.assert_array_equal(fetch(target, image.shape), expected_logits(image))
    assert transfers(caller, before) == ["copy_on_device", "copy_on_device"]
    assert sum(call.verb == "instantiate" for call in caller.calls) == 5


def test_an_unaligned_address_is_copied(caller):
    host = make_host(caller, "one lane")
    (image,) = images(1)
    address = put(caller, np.append(np.zeros(1, np.float32), image)) + 4
    host.run(inputs=[address])
    np.testing.assert_array_equal(host.outputs[0], expected_logits(image))


@pytest.mark.parametrize("ordered_by", ["stream", "after"])
def test_not_even_a_warm_up_touches_what_is_still_in_use(caller, ordered_by):
    host = make_host(caller, "three lanes")
    foreign = caller.create_stream(0, 0)
    (image,) = images(1)
    source, target = put(caller, image), put(caller, image)
    before = len(caller.calls)
    order = {"stream": foreign} if ordered_by == "stream" else {"after": [foreign]}
    host.run(inputs=[source], outputs=[target], **order)  # new addresses, so it is captured anew
    verbs = [call.verb for call in caller.calls[before:]]
    first = caller.calls[before + verbs.index("record_event")]
    assert first.operands[0] == foreign
    assert verbs.index("wait_event") < verbs.index("run") < verbs.index("begin_capture")


def test_a_foreign_stream_is_ordered_before_and_after(caller):
    host = make_host(caller, "three lanes")
    foreign = caller.create_stream(0, 0)
    (image,) = images(1)
    source, target = put(caller, image), put(caller, image)
    host.run(inputs=[source], outputs=[target], stream=foreign)
    before = len(caller.calls)
    host.run(inputs=[source], outputs=[target], stream=foreign)
    calls = [(c.verb, *c.operands) for c in caller.calls[before:]]
    origin = next(c.operands[0] for c in caller.calls if c.verb == "begin_capture")
    arrived, left = calls[1][2], calls[4][2]
    assert calls[1:3] == [("record_event", foreign, arrived), ("wait_event", origin, arrived)]
    assert calls[3][:2] == ("launch", origin)
    assert calls[4:6] == [("record_event", origin, left), ("wait_event", foreign, left)]
    assert "synchronize" not in [call[0] for call in calls]
    assert host.inputs[0].shape == (2, 3)  # to write it, one has to wait
    assert caller.calls[-2].verb == "synchronize"


# What else can be wrong.


def test_no_thread_runs_engines_for_the_first_time_while_another_captures():
    under_way, most = [], []

    class Waiting(HostedEngine):
        """Gives the other thread time to get in between."""

        def bind(self, inputs, outputs):
            enqueue = super().bind(inputs, outputs)

            def run(stream):
                under_way.append(self)
                time.sleep(0.002)
                most.append(len(under_way))
                under_way.remove(self)
                enqueue(stream)

            return run

    def prepare() -> None:
        make_host(RecordingDriver(), "three lanes", Waiting)

    threads = [threading.Thread(target=prepare) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 3 * 2 * 6  # a warm-up and a capture of six segments each
    assert max(most) == 1


class Hanging(RecordingDriver):
    """Streams never get anywhere once it is told so."""

    hangs = False

    def is_idle(self, stream):
        return super().is_idle(stream) and not self.hangs


def test_memory_that_a_hanging_gpu_uses_is_never_released():
    class Binding:
        def __call__(self, stream):
            pass

    bindings = []

    class Releasing(HostedEngine):
        def bind(self, inputs, outputs):  # noqa: ARG002 - the protocol's signature
            binding = Binding()
            bindings.append(weakref.ref(binding))
            return binding

    driver = Hanging()
    host = make_host(driver, "one lane", Releasing, timeout_s=0.001)
    host.run()
    held = driver.open_resources
    driver.hangs = True
    with pytest.raises(SegmentHungError):
        host.run()
    with pytest.raises(SegmentHungError):
        host.run()
    host.close()
    del host
    gc.collect()
    assert driver.open_resources == held
    assert len(bindings) == 6
    assert all(binding() is not None for binding in bindings)


def test_spans_lie_on_the_clocks_time_scale():
    driver = RecordingDriver(3)
    host = make_host(driver, "three devices", clock=FakeClock(5_000_000))
    host.inputs[0][...] = 1
    spans = host.run(7)
    program = make_program("three devices").program
    busy = [i for i, step in enumerate(program.steps) if isinstance(step, Run | Copy)]
    assert sorted(span.step for span in spans) == busy
    assert all(span.begin_ns > 5_000_000 and span.duration_ns > 0 for span in spans)
    assert {span.inference for span in spans} == {7}


TAKES_MS = {"copy_to_device": 3.0, "launch": 5.0, "copy_to_host": 2.0}


class Slow(RecordingDriver):
    """Transfers and launches take time, on the time scale of its events."""

    def _guarded(self, verb, stream, *operands):
        super()._guarded(verb, stream, *operands)
        self.now_ms += TAKES_MS.get(verb, 0.0)


@pytest.mark.parametrize("layout", ["one lane", "three lanes"])
def test_parts_are_timed_by_events_between_them(layout):
    driver = Slow()
    host = make_host(driver, layout)
    host.inputs[0][...] = 1
    host.run(timed=True)
    before = len(driver.calls)
    host.run(timed=True)
    verbs = [call.verb for call in driver.calls[before:]]
    assert verbs[:9] == [
        "push_context",
        "record_event",
        "copy_to_device",
        "record_event",
        "launch",
        "record_event",
        "copy_to_host",
        "record_event",
        "push_context",
    ]
    assert "elapsed_ms" not in verbs  # which could be asked only when the outputs are there
    parts = host.part_times()
    between_ns = 1000  # the recorder lets a microsecond pass from event to event
    assert parts.host_to_device_ns == 3_000_000 + between_ns
    assert parts.compute_ns == 5_000_000 + between_ns
    assert parts.device_to_host_ns == 2_000_000 + between_ns
    assert 0 < parts.enqueue_ns < 1_000_000_000
    host.close()
    assert driver.open_resources == {}


def test_the_time_to_enqueue_is_that_of_the_launches_and_not_of_the_transfers(monkeypatch):
    driver, clock = RecordingDriver(), FakeClock()
    host = make_host(driver, "three lanes")

    def slow(verb, takes_ms):
        def call(*arguments):
            clock.advance_ms(takes_ms)
            return verb(*arguments)

        return call

    monkeypatch.setattr(cuda_parts.time, "perf_counter_ns", clock.now_ns)
    driver.copy_to_device = slow(driver.copy_to_device, 100)
    driver.copy_to_host = slow(driver.copy_to_host, 30)
    driver.launch = slow(driver.launch, 2)
    host.run(timed=True)
    assert host.part_times().enqueue_ns == 2_000_000


def test_engines_that_disagree_about_a_layout_are_refused():
    class Vectorised(HostedEngine):
        def layout(self, tensor):
            linear = self.name != "stream1" or tensor != "x"
            return TensorLayout.LINEAR if linear else TensorLayout.CHW32

    driver = RecordingDriver()
    with pytest.raises(InputError, match=re.escape("two layouts, chw32 and linear")):
        make_host(driver, "three lanes", Vectorised)
    assert driver.open_resources == {}


def test_layouts_decide_how_much_memory_a_tensor_takes():
    class Vectorised(HostedEngine):
        def layout(self, tensor):
            inner = tensor in {"x", "y"}
            return TensorLayout.CHW32 if inner else TensorLayout.LINEAR

    host = make_host(RecordingDriver(3), "three devices", Vectorised)
    sizes = {name: region.size_bytes for name, region in host.regions.items()}
    assert {sizes[name] for name in sizes if name[0] in "xy"} == {2 * 32 * 4}
    assert {sizes[name] for name in sizes if name[0] not in "xy"} == {2 * 3 * 4}


def test_a_dimension_that_no_input_has_is_named():
    boxes = TensorSpec("boxes", "float32", ("found", 4))
    graph = StreamGraph(
        (tensor("image"),),
        (boxes,),
        (Segment("detect", (tensor("image"),), (boxes,), Cost(*[0] * 6)),),
    )
    placement = Placement((Lane("lane0", "cuda:0"),), (Assignment("detect", "lane0"),))
    with pytest.raises(InputError, match="'boxes': has the dimension 'found'"):
        resolve_shapes(lower(graph, placement), [(1, 3)])
