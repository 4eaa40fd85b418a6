"""Sessions on a recording driver: arrays and streams of other libraries, refusals, slots."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from parnet_engines.cuda import bindings as cuda_bindings
from parnet_engines.cuda import device_array, gpu_plan
from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.bindings import BindingsDriver
from parnet_engines.cuda.device_array import as_device_array
from parnet_engines.cuda.devices import (
    lanes_on,
    names_gpus,
    open_driver,
    ordinal_of,
    parse_gpus,
    require_gpus,
)
from parnet_engines.cuda.driver import CudaError
from parnet_engines.cuda.engine import EngineFile
from parnet_engines.cuda.engines import CUDA_ENGINES, load_engines
from parnet_engines.cuda.hosted_engine import HostedEngine
from parnet_engines.cuda.memory import array_at
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.cuda.session import CudaSession
from parnet_engines.engine import NullEngine
from parnet_engines.runtimes import ort_cuda
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Run
from parnet_engines.session import Session
from parnet_export.errors import InputError, MissingBackendError
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NO_COST = Cost(0, 0, 0, 0, 0, 0)
IMAGE, HIDDEN, LOGITS = (TensorSpec(n, "float32", ("batch", 4)) for n in ("image", "h", "logits"))
GRAPH = StreamGraph(
    (IMAGE,),
    (LOGITS,),
    (
        Segment("stem", (IMAGE,), (HIDDEN,), NO_COST),
        Segment("head", (HIDDEN,), (LOGITS,), NO_COST),
    ),
)


class Square(NullEngine):
    def bind(self, inputs, outputs):
        return lambda: np.add(inputs[0] ** 2, len(self.name), out=outputs[0])


def expected(image):
    return (image**2 + 4) ** 2 + 4


def open_session(driver: RecordingDriver, device: int = 0, **options) -> CudaSession:
    lanes = tuple(Lane(f"lane{i}", f"cuda:{device}") for i in range(2))
    placement = Placement(lanes, (Assignment("stem", "lane0"), Assignment("head", "lane1")))
    in_flight = options.pop("in_flight", 1)
    program = checked(lower(GRAPH, placement, in_flight), GRAPH)
    engines = {
        (step.segment, step.lane): HostedEngine(Square(GRAPH[step.segment]), driver, device)
        for step in program.program.steps
        if isinstance(step, Run)
    }
    return CudaSession(program, engines, driver, **options)


@pytest.fixture
def driver():
    found = RecordingDriver(2)
    for device in range(2):
        found.retain_context(device)
    return found


class OnDevice:
    """An array in a recorder's GPU, as CuPy, torch and PyCUDA show theirs."""

    def __init__(self, driver, array, device=0, strides=None, stream=None):
        address = driver.allocate(device, array.nbytes)
        self.array = array_at(address, array.shape, array.dtype.name)
        self.array[...] = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (address, False),
            "strides": strides,
            "version": 3,
        } | ({"stream": stream} if stream else {})


class Allocation:
    """PyCUDA's ``DeviceAllocation``: something that converts to an address."""

    def __init__(self, address):
        self.address = address

    def __int__(self):
        return self.address


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_numpy_arrays_go_in_and_come_out(driver):
    with open_session(driver) as session:
        found = session.run({"image": X})["logits"]
        np.testing.assert_array_equal(found, expected(X))
        assert session.run({"image": X[:1]})["logits"].shape == (1, 4)
        np.testing.assert_array_equal(found, expected(X))  # it shares memory with nothing
        assert str(session.execution) == "one CUDA graph"
    assert driver.open_resources == {"contexts": 2}


def test_how_it_runs_is_unknown_before_it_has_run(driver):
    with open_session(driver) as session, pytest.raises(ValueError, match="nothing has run yet"):
        _ = session.execution


def test_an_array_in_the_gpu_is_not_copied(driver):
    with open_session(driver) as session:
        source = OnDevice(driver, X)
        session.run({"image": source})
        before = len(driver.calls)
        source.array[...] = X + 1
        found = session.run({"image": source})["logits"]
        np.testing.assert_array_equal(found, expected(X + 1))
        copies = [c.verb for c in driver.calls[before:] if c.verb.startswith("copy")]
        assert copies == ["copy_to_host"]


def test_an_output_may_stay_in_the_gpu(driver):
    with open_session(driver) as session:
        target = OnDevice(driver, np.zeros_like(X))
        found = session.run({"image": X}, outputs={"logits": target})
        assert found["logits"] is target
        np.testing.assert_array_equal(target.array, expected(X))


@pytest.mark.parametrize("stream", [None, 77])
def test_the_stream_that_an_array_was_written_on_comes_first(driver, stream):
    with open_session(driver) as session:
        if stream:
            stream = driver.create_stream(0, 0)
        source = OnDevice(driver, X, stream=stream)
        session.run({"image": source})
        before = len(driver.calls)
        session.run({"image": source})
        record = next(c for c in driver.calls[before:] if c.verb == "record_event")
        assert record.operands[0] == (stream or 1)


def recorded_on(calls):
    """The streams that the inference comes after: events are recorded there at its start."""
    launch = next(number for number, call in enumerate(calls) if call.verb == "launch")
    return {call.operands[0] for call in calls[:launch] if call.verb == "record_event"}


def test_what_is_still_under_way_in_an_output_comes_first(driver):
    with open_session(driver) as session:
        target = OnDevice(driver, np.zeros_like(X))
        session.run({"image": X}, outputs={"logits": target})
        before = len(driver.calls)
        session.run({"image": X}, outputs={"logits": target})
        assert recorded_on(driver.calls[before:]) == {1}


def test_streams_that_arrays_name_come_first_besides_the_one_that_is_given(driver):
    with open_session(driver) as session:
        given, own = (driver.create_stream(0, 0) for _ in range(2))
        source, target = OnDevice(driver, X, stream=own), OnDevice(driver, X)
        run = {"outputs": {"logits": target}, "stream": given}
        session.run({"image": source}, **run)
        before = len(driver.calls)
        session.run({"image": source}, **run)
        assert recorded_on(driver.calls[before:]) == {given, own}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda handle: handle,
        lambda handle: SimpleNamespace(__cuda_stream__=lambda: (0, handle)),
        lambda handle: SimpleNamespace(__cuda_stream__=(0, handle)),
        lambda handle: SimpleNamespace(cuda_stream=handle),
        lambda handle: SimpleNamespace(handle=handle),
    ],
    ids=["handle", "cuda.core", "older cuda.core", "torch", "PyCUDA"],
)
def test_streams_of_every_library_are_taken(driver, wrap):
    with open_session(driver) as session:
        handle = driver.create_stream(0, 0)
        source, target = OnDevice(driver, X), OnDevice(driver, X)
        run = {"outputs": {"logits": target}, "stream": wrap(handle)}
        session.run({"image": source}, **run)
        before = len(driver.calls)
        session.run({"image": source}, **run)
        calls = driver.calls[before:]
        assert next(c.operands[0] for c in calls if c.verb == "record_event") == handle
        assert [c.operands[0] for c in calls if c.verb == "wait_event"][-1] == handle
        np.testing.assert_array_equal(target.array, expected(X))


def test_what_is_no_stream_or_another_gpus_is_refused(driver):
    with open_session(driver) as session:
        with pytest.raises(InputError, match="is no CUDA stream"):
            session.run({"image": X}, stream="fast")
        other = driver.create_stream(1, 0)
        with pytest.raises(InputError, match="belongs to another GPU or context"):
            session.run({"image": X}, stream=other)


def test_an_array_of_another_context_is_refused_in_a_sentence(driver, monkeypatch):
    with open_session(driver) as session:
        source = OnDevice(driver, X)
        locate = driver.locate
        monkeypatch.setattr(
            driver, "locate", lambda address: type(locate(address))(0, is_primary=False)
        )
        with pytest.raises(InputError) as caught:
            session.run({"image": source})
        assert str(caught.value) == (
            "input 'image': belongs to another CUDA context than the primary one of GPU 0. Make "
            "it in the primary context (in PyCUDA, pycuda.autoprimaryctx in place of "
            "pycuda.autoinit)."
        )


def test_an_array_of_another_gpu_is_refused(driver):
    with open_session(driver, device=1) as session:
        with pytest.raises(InputError, match="'image': lies in GPU 0, and the network runs on GPU"):
            session.run({"image": OnDevice(driver, X)})
        elsewhere = OnDevice(driver, X, 1)
        elsewhere.__cuda_array_interface__["data"] = (64, False)
        with pytest.raises(InputError, match="'image': does not lie in a GPU's memory"):
            session.run({"image": elsewhere})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: OnDevice(d, X, strides=(4, 8)), "is not row-major"),
        (lambda d: OnDevice(d, X.astype(np.float64)), "was given as float64"),
        (lambda d: OnDevice(d, X[:, :2].copy()), r"was given as float32 \[2, 2\]"),
        (lambda _: Allocation(64), "does not say its free dimensions"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(driver, change, message):
    with open_session(driver) as session, pytest.raises(InputError, match=message):
        session.run({"image": change(driver)})


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("other", lambda d: OnDevice(d, X), "'other': is not an output"),
        ("logits", lambda _: X, "'logits': does not lie in a GPU"),
        ("logits", lambda d: OnDevice(d, X[:1]), r"was given as float32 \[1, 4\]"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(driver, name, make, message):
    with open_session(driver) as session, pytest.raises(InputError, match=message):
        session.run({"image": X}, outputs={name: make(driver)})


class OnlyDlpack:
    """An array in a recorder's GPU that speaks DLPack, as JAX's do."""

    def __init__(self, driver, array):
        self.array = OnDevice(driver, array).array
        self.streams = []

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.array.__dlpack__(**options)


def test_arrays_that_speak_only_dlpack_are_taken_in_their_order(driver):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    with open_session(driver) as session:
        source, target = OnlyDlpack(driver, X), OnDevice(driver, X)
        stream = driver.create_stream(0, 0)
        run = {"outputs": {"logits": target}, "stream": stream}
        session.run({"image": source}, **run)
        before = len(driver.calls)
        session.run({"image": source}, **run)
        np.testing.assert_array_equal(target.array, expected(X))
        # Its owner was told CUDA's default stream, so that the inference has to follow it.
        assert source.streams == [1, 1]
        assert recorded_on(driver.calls[before:]) == {1, stream}
        source.array = source.array.T
        with pytest.raises(InputError, match="is not row-major"):
            session.run({"image": source})


def test_views_of_every_version_of_cuda_core_are_taken(driver, monkeypatch):
    made = []

    class View:  # before 0.5
        def __init__(self, value, stream_ptr):
            made.append((value, stream_ptr))
            self.ptr, self.shape, self.strides, self.dtype = 4096, (2, 4), None, np.float16

    def load(name):
        if name == "cuda.core.utils":
            raise ModuleNotFoundError(name, name=name)
        return SimpleNamespace(StridedMemoryView=View)

    monkeypatch.setattr(device_array.importlib, "import_module", load)
    source = OnlyDlpack(driver, X)
    found = as_device_array(source, TensorSpec("image", "float16", (2, 4)), "it")
    assert made == [(source, 1)]
    assert (found.pointer, found.shape, found.dtype, found.stream) == (4096, (2, 4), "float16", 1)

    def fail(name, missing):
        raise ModuleNotFoundError(name, name=missing)

    monkeypatch.setattr(
        device_array.importlib, "import_module", lambda name: fail(name, "cuda.core")
    )
    with pytest.raises(MissingBackendError, match="cuda"):
        as_device_array(source, IMAGE, "it")
    monkeypatch.setattr(
        device_array.importlib, "import_module", lambda name: fail(name, "broken_inside")
    )
    with pytest.raises(ModuleNotFoundError, match="cuda"):
        as_device_array(source, IMAGE, "it")


def test_an_address_is_taken_for_what_the_network_takes():
    fixed = TensorSpec("image", "float16", (2, 4))
    found = as_device_array(Allocation(4096), fixed, "it")
    assert (found.pointer, found.shape, found.dtype) == (4096, (2, 4), "float16")
    assert as_device_array(4096, fixed, "it") == found


@pytest.mark.parametrize(
    "value", [X, X[0, 0], 1.5, True, [[1.0]], torch.zeros(2, 4), "text"], ids=repr
)
def test_what_lies_in_the_host_is_left_to_numpy(value):
    assert as_device_array(value, TensorSpec("image", "float32", (2, 4)), "it") is None


def test_slots_have_streams_and_memory_of_their_own(driver):
    with open_session(driver, in_flight=2) as session:
        for step in range(4):
            np.testing.assert_array_equal(
                session.run({"image": X + step})["logits"], expected(X + step)
            )
        assert sum(call.verb == "instantiate" for call in driver.calls) == 2


def test_a_session_records(driver):
    with open_session(driver, record=True) as session:
        session.run({"image": X})
        session.run({"image": X})
        recording = session.take_recording()
    assert [span.label for span in recording.only(1).spans] == ["stem", "head"]


def test_a_session_nobody_has_any_more_releases_everything(driver):
    session = open_session(driver)
    session.run({"image": X})
    del session
    assert driver.open_resources == {"contexts": 2}


# Devices.


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0", ("cuda:0",)),
        ("cuda", ("cuda:0",)),
        ("0,1,2", ("cuda:0", "cuda:1", "cuda:2")),
        (" 2, cuda:1", ("cuda:2", "cuda:1")),
        ("0,0,1,0", ("cuda:0", "cuda:0#1", "cuda:1", "cuda:0#2")),
    ],
)
def test_gpus_are_named_by_ordinals(text, names):
    assert names_gpus(text)
    assert parse_gpus(text) == names
    digits = text.replace("cuda:", "").replace("cuda", "0")
    assert [ordinal_of(name) for name in names] == [int(part) for part in digits.split(",")]


@pytest.mark.parametrize("text", ["cpu", "cpu:0,cpu:1", "", "tpu:0", "cpu:0-3"])
def test_other_devices_are_not_gpus(text):
    assert not names_gpus(text)


@pytest.mark.parametrize(
    ("text", "entry"), [("0,cpu", "'cpu'"), ("0,,1", "missing"), ("0,-1", "'-1'")]
)
def test_entries_that_are_no_gpus_are_named(text, entry):
    with pytest.raises(InputError, match=entry):
        parse_gpus(text)


def test_lanes_are_spread_evenly_over_devices():
    lanes = lanes_on(("cuda:0", "cuda:1"), 3)
    assert lanes == (Lane("lane0", "cuda:0"), Lane("lane1", "cuda:0"), Lane("lane2", "cuda:1"))
    with pytest.raises(InputError, match="lanes 1: every device has a lane, and there are 2"):
        lanes_on(("cuda:0", "cuda:1"), 1)


@pytest.mark.parametrize(
    ("ordinals", "available", "message"),
    [
        (
            [0, 1, 2],
            1,
            "this machine has 1 GPU, number 0. Use '0,0,0', which runs",
        ),
        (
            [0, 1, 2],
            2,
            "this machine has 2 GPUs, 0 to 1. Use '0,1,0', which runs",
        ),
        ([3], 2, "this machine has 2 GPUs, 0 to 1. Use '0'."),
        ([0], 0, "this machine has no GPU. Use 'cpu'."),
    ],
)
def test_gpus_that_are_not_there_give_a_sentence(ordinals, available, message):
    with pytest.raises(InputError) as caught:
        require_gpus(ordinals, available)
    subject = f"devices '{','.join(map(str, ordinals))}': "
    assert str(caught.value).startswith(subject + message)
    assert caught.value.exit_code == 2


def has_driver() -> bool:
    try:
        BindingsDriver()
    except CudaError:
        return False
    return True


@pytest.mark.skipif("has_driver()", reason="this machine has an NVIDIA driver")
def test_without_a_driver_there_is_a_sentence_and_exit_code_two():
    with pytest.raises(InputError) as caught:
        open_driver(parse_gpus("0,1,2"))
    assert str(caught.value).startswith(
        "devices '0,1,2': this machine has no NVIDIA driver that works ("
    )
    assert "Use 'cpu', or 'cpu:0,cpu:1,cpu:2' for a program of several" in str(caught.value)
    assert caught.value.exit_code == 2


# Inputs that stay in the GPU, and the parts of an inference.


def launches_and_copies(driver, before):
    verbs = [call.verb for call in driver.calls[before:]]
    return [verb for verb in verbs if verb == "launch" or verb.startswith("copy")]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_resident_inputs_are_copied_once_and_then_nothing_is(driver, in_flight):
    with open_session(driver, in_flight=in_flight) as session:
        session.upload({"image": X})
        before = len(driver.calls)
        for _ in range(2 * in_flight):
            session.run_resident()
        assert launches_and_copies(driver, before) == ["launch"] * 2 * in_flight
        for slot in session._slots:
            (host,) = slot.hosts.values()
            (output,) = host._program.outputs
            np.testing.assert_array_equal(host.read(output), expected(X))
        np.testing.assert_array_equal(session.run({"image": X + 1})["logits"], expected(X + 1))
    assert driver.open_resources == {"contexts": 2}


def test_a_resident_run_is_complete_when_it_returns(driver):
    with open_session(driver) as session:
        session.upload({"image": X})
        session.run_resident()
        verbs = [call.verb for call in driver.calls]
        assert "synchronize" in verbs[len(verbs) - verbs[::-1].index("launch") :]


def test_without_an_upload_nothing_is_resident(driver):
    with open_session(driver) as session:
        for run in (session.run_resident, session.time_parts):
            with pytest.raises(ValueError, match="no inputs were uploaded"):
                run()


def test_parts_of_an_inference_with_and_without_transfers(driver):
    with open_session(driver) as session:
        session.time_parts({"image": X})
        before = len(driver.calls)
        parts = session.time_parts({"image": X})
        assert launches_and_copies(driver, before) == ["copy_to_device", "launch", "copy_to_host"]
        # The recorder lets a microsecond pass from event to event, and nothing else takes time.
        assert (parts.host_to_device_ns, parts.device_to_host_ns) == (1000, 1000)
        session.upload({"image": X})
        before = len(driver.calls)
        assert session.time_parts().compute_ns > 0
        assert launches_and_copies(driver, before) == ["launch"]
        with pytest.raises(InputError, match="image"):
            session.time_parts({"image": X[0]})


def test_the_files_of_engines_are_told_once_each(driver):
    file = EngineFile(Path("stem.plan"), 1000)
    with open_session(driver) as session:
        assert session.engine_files == ()
        for engine in session._engines.values():
            engine._file = file
        assert session.engine_files == (file,)


def test_memory_that_is_taken_is_no_longer_free(driver):
    all_bytes = driver.free_bytes(1)
    address = driver.allocate(1, 1000)
    assert driver.free_bytes(1) == all_bytes - 1000
    driver.free(1, address)
    assert driver.free_bytes(1) == all_bytes


def test_what_the_driver_layer_calls_is_there_in_cuda_bindings():
    cuda = importlib.import_module("cuda.bindings.driver")
    source = inspect.getsource(cuda_bindings)
    functions = set(re.findall(r'"(cu[A-Z]\w+)"|_cuda\.(cu[A-Z]\w+)', source))
    names = {name for pair in functions for name in pair if name}
    assert {"cuMemGetInfo", "cuMemsetD8Async", "cuEventElapsedTime"} <= names
    assert [name for name in names if not hasattr(cuda, name)] == []
    members = set(re.findall(r"\b(C[UA]\w+_[A-Z0-9_]{8,})\b", source))
    kinds = [kind for kind in vars(cuda).values() if isinstance(kind, type)]
    known = set(vars(cuda)).union(*(dir(kind) for kind in kinds))
    assert "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE" in members
    assert {name for name in members if not name.startswith("CUDA_ERROR")} <= known


# Opening bundles.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    model, provenance = export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch=1)
    path = tmp_path_factory.mktemp("bundle") / "b"
    return make_bundle(model, provenance, path, prove=False)[0]


@pytest.fixture
def recorder(monkeypatch, bundle):
    """A machine with three recorders for GPUs, and engines that run on the CPU."""
    from parnet_engines.planning.cost_table import WHOLE
    from parnet_engines.planning.layouts import whole_graph
    from parnet_engines.runtimes.ort import OrtEngine

    found = RecordingDriver(3)
    monkeypatch.setattr(gpu_plan, "_BUDGET_S", 0.05)
    monkeypatch.setattr(cuda_session, "open_driver", lambda _: found)

    def load(bundle, names, driver, device, **_):
        graph = bundle.stream_graph
        whole = whole_graph(graph)[WHOLE]
        return {
            name: HostedEngine(
                OrtEngine(
                    whole if name == WHOLE else graph[name],
                    bundle.whole_path if name == WHOLE else bundle.segment_path(name),
                    threads=1,
                ),
                found,
                device,
            )
            for name in names
        }

    monkeypatch.setattr(ort_cuda, "load_engines", load)
    return found


@pytest.mark.parametrize("plan", ["whole", "streams", "authors", "auto"])
@pytest.mark.parametrize(("devices", "lanes"), [("0", None), ("0,1,2", None), ("0,0,0", 3)])
def test_a_bundle_runs_on_gpus_as_on_the_cpu(bundle, recorder, devices, lanes, plan):
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    with Session.open(bundle, plan="whole") as session:
        reference = session.run({"image": image})["logits"]
    with Session.open(
        bundle, devices, plan=plan, engine="onnxruntime", lanes=None if plan == "whole" else lanes
    ) as session:
        found = session.run({"image": image})["logits"]
        used = {lane.device for lane in session.program.program.lanes}
        assert used <= set(parse_gpus(devices))
        assert session.execution.mode == "graph"
        assert session.engine == "onnxruntime"
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
    assert recorder.open_resources == {}


def test_the_authors_layout_uses_all_devices(bundle, recorder):
    with Session.open(bundle, "0,1,2", plan="authors", engine="onnxruntime") as session:
        used = {lane.device for lane in session.program.program.lanes}
    assert used == {"cuda:0", "cuda:1", "cuda:2"}


def test_torch_runs_a_bundle_on_the_cpu(bundle):
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    with Session.open(bundle) as session:
        reference = session.run({"image": image})["logits"]
    with Session.open(bundle, engine="torch") as session:
        assert str(session.execution) == "CPU threads"
        found = session.run({"image": image})["logits"]
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)


def test_automatically_the_first_runtime_that_can_is_taken(bundle, monkeypatch):
    tried = []

    def fake(name):
        def load(bundle, names, driver, device, **_):
            tried.append(name)
            if name == "tensorrt":
                raise MissingBackendError("tensorrt", "It", "pip")
            return {n: SimpleNamespace(name=n, close=lambda: None) for n in names}

        return SimpleNamespace(load_engines=load)

    names = {module: name for name, module in CUDA_ENGINES.items()}
    monkeypatch.setattr("importlib.import_module", lambda module: fake(names[module]))
    placement = Placement(
        (Lane("lane0", "cuda:0"),),
        tuple(Assignment(segment.name, "lane0") for segment in bundle.stream_graph.segments),
    )
    program = lower(bundle.stream_graph, placement)
    engines, name = load_engines(bundle, program, RecordingDriver())
    assert (name, tried) == ("torch", ["tensorrt", "torch"])
    assert {segment for segment, _ in engines} == {s.name for s in bundle.stream_graph.segments}


@pytest.mark.skipif("has_driver()", reason="this machine has an NVIDIA driver")
def test_where_no_runtime_can_every_reason_is_given(bundle):
    placement = Placement(
        (Lane("lane0", "cuda:0"),),
        tuple(Assignment(segment.name, "lane0") for segment in bundle.stream_graph.segments),
    )
    program = lower(bundle.stream_graph, placement)
    with pytest.raises(InputError, match=r"torch: GPU 0: this torch was built without CUDA.*onnx"):
        load_engines(bundle, program, RecordingDriver())


# The end.


def fail_once(driver, call):
    """Let the next call of a name fail; return a function that tells whether it has."""
    working, failed = getattr(driver, call), []

    def fail(*arguments):
        if failed:
            return working(*arguments)
        failed.append(call)
        raise CudaError(call, "CUDA_ERROR_ILLEGAL_ADDRESS")

    setattr(driver, call, fail)
    return failed


def test_an_error_at_the_end_keeps_nothing_open():
    driver = RecordingDriver()
    session = open_session(driver, in_flight=2)
    image = np.ones((2, 4), np.float32)
    for _ in range(2):
        session.run({"image": image})
    engines = session.engines
    failed = fail_once(driver, "synchronize")
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        session.close()
    assert failed
    assert driver.open_resources == {}
    assert all(engine.is_closed for engine in engines)


def test_memory_of_a_shape_that_could_not_be_released_is_not_used_again():
    driver = RecordingDriver()
    with open_session(driver) as session:
        images = [np.ones((size, 4), np.float32) for size in range(1, 6)]
        for image in images[:4]:
            session.run({"image": image})
        failed = fail_once(driver, "synchronize")
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            session.run({"image": images[4]})
        assert failed
        for image in images:
            found = session.run({"image": image})["logits"]
            np.testing.assert_array_equal(found, expected(image))
    assert driver.open_resources == {}
