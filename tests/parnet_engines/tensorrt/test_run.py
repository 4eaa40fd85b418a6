"""The TensorRT engine against a module that records what is asked of it: nothing here has a GPU.

The fake has what NVIDIA's manuals say of `tensorrt` 10 and 11, and what `tensorrt_rtx` has.
"""

from __future__ import annotations

import gc
import hashlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from parnet_engines.cuda.engine import CudaEngine, DeviceTensor
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.tensorrt import engine_cache, engine_finder
from parnet_engines.tensorrt import run as tensorrt_run
from parnet_engines.tensorrt.engine_cache import recipe_of, sidecar_path, store
from parnet_engines.tensorrt.engine_sidecar import (
    SCHEMA_VERSION,
    EngineTensor,
    Sidecar,
    read_sidecar,
)
from parnet_engines.tensorrt.log import logger_of, recording, take_error
from parnet_engines.tensorrt.module import TensorRt
from parnet_engines.tensorrt.options import EngineOptions, SizeRange, Target, target_of
from parnet_engines.tensorrt.run import EnqueueRefusedError, TensorRtEngine, load_engines
from parnet_export.bundle import open_bundle
from parnet_export.errors import InputError

VERSIONS = {"tensorrt": "10.9.0.34", "tensorrt-rtx": "1.7.1.116"}
STREAM = 4096


class Named:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


class FakeTensorRt:
    """A TensorRT module; `answers` replaces what a call returns."""

    def __init__(self, driver, *, rtx=False, oldest=False, layouts=None, answers=None):
        self.calls = []
        self.contexts = []
        self.released_on = []
        self.driver = driver
        self.layouts = layouts or {}
        self.answers = answers or {}
        self.output_shapes = {}
        module = self

        def note(verb, *operands, default=None):
            module.calls.append((verb, *operands))
            assert module.driver.current() == module.driver.wanted, verb
            return module.answers.get(verb, default)

        class ILogger:
            VERBOSE, INFO, ERROR, INTERNAL_ERROR = map(
                Named, ("VERBOSE", "INFO", "ERROR", "INTERNAL_ERROR")
            )

        class Context:
            def __init__(self):
                self.nvtx_verbosity = "DETAILED"  # as the engine was built
                module.contexts.append(weakref.ref(self))

            def __del__(self):
                module.released_on.append(module.driver.current())

            def set_input_shape(self, name, shape):
                return note("set_input_shape", name, shape, default=True)

            def get_tensor_shape(self, name):
                return note("get_tensor_shape", name, default=module.output_shapes.get(name))

            def set_tensor_address(self, name, address):
                return note("set_tensor_address", name, address, default=True)

            def execute_async_v3(self, stream_handle):
                assert self.nvtx_verbosity.name == "LAYER_NAMES_ONLY"  # or it takes longer
                answer = note("execute_async_v3", stream_handle, default=True)
                if not answer:
                    logger_of(module).log(ILogger.ERROR, "Error Code 3: not stream\ncapturable.")
                return answer

        class Cache:
            def deserialize(self, blob):
                return note("deserialize_cache", bytes(blob), default=True)

            def serialize(self):
                return note("serialize_cache", default=b"kernels")

        class Config:
            def __init__(self):
                self.cuda_graph_strategy = None
                self.dynamic_shapes_kernel_specialization_strategy = "LAZY"  # as the manual says

            def create_runtime_cache(self):
                note("create_runtime_cache")
                return Cache()

            def set_runtime_cache(self, _):
                return note("set_runtime_cache", default=True)

        class Engine:
            num_aux_streams = 2
            device_memory_size = 1111

            def get_tensor_format(self, name):
                return Named(module.layouts.get(name, "LINEAR"))

            def create_execution_context(self, *arguments):
                strategies = [
                    (
                        str(a.cuda_graph_strategy),
                        str(a.dynamic_shapes_kernel_specialization_strategy),
                    )
                    for a in arguments
                ]
                made = note("create_execution_context", *strategies, default=Context)
                return made and made()

        if not oldest:
            Engine.device_memory_size_v2 = 2222
        if rtx:
            Engine.create_runtime_config = lambda _: Config()
            self.CudaGraphStrategy = SimpleNamespace(DISABLED=Named("DISABLED"))
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=Named("EAGER"))

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, plan):
                made = note("deserialize", plan, self.engine_host_code_allowed, default=Engine)
                if made is None:
                    self.logger.log(ILogger.ERROR, "Error Code 1: Serialization (magic tag)")
                return made and made()

        self.ILogger, self.Runtime = ILogger, Runtime
        self.ProfilingVerbosity = SimpleNamespace(LAYER_NAMES_ONLY=Named("LAYER_NAMES_ONLY"))


class Driver(RecordingDriver):
    """Three GPUs of one kind, and one that TensorRT must find current."""

    def __init__(self, wanted=1):
        super().__init__(3)
        self.wanted = wanted

    def current(self):
        return self._stack[-1] if self._stack else None


@pytest.fixture
def driver():
    return Driver()


def install(bundle, name, driver, *, backend="tensorrt", options=None, layouts=None, **changes):
    """Store an engine for a segment as `build` does, with any bytes for a plan."""
    options = options or EngineOptions()
    target = changes.pop("target", None) or target_of(backend, driver.gpus()[1])
    recipe = recipe_of(bundle, name, target, options, VERSIONS[backend])
    segment = bundle.stream_graph[name] if name != WHOLE else bundle.stream_graph
    tensors = tuple(
        EngineTensor(
            spec.name,
            spec.dtype,
            spec.shape,
            "input" if spec in segment.inputs else "output",
            (layouts or {}).get(spec.name, TensorLayout.LINEAR).label,
            0,
        )
        for spec in (*segment.inputs, *segment.outputs)
    )
    path = sidecar_path(bundle, target, name, options)
    sidecar = Sidecar(
        SCHEMA_VERSION, replace(recipe, **changes), "", "", 0, tensors, 1.0, "2026-01-01"
    )
    store(path, b"the plan of " + name.encode(), sidecar)
    return path


def tensors_of(engine, device=1, batch=1):
    """Return device tensors for all that an engine reads and writes, at made-up addresses."""
    made = [
        DeviceTensor(
            spec.name,
            spec.dtype,
            spec.resolve({"batch": batch}),
            1000 + 100 * index,
            device,
            engine.layout(spec.name),
        )
        for index, spec in enumerate((*engine.inputs, *engine.outputs))
    ]
    count = len(engine.inputs)
    return made[:count], made[count:]


def load(bundle, name, driver, module, backend="tensorrt", **options):
    path = install(bundle, name, driver, backend=backend, **options)
    trt = TensorRt(backend, module, VERSIONS[backend])
    return TensorRtEngine(trt, bundle.stream_graph[name], path, driver, 1)


@pytest.fixture
def bundle(make_two_streams, tmp_path):
    return make_two_streams(tmp_path)


# ------------------------------------------------------------------------- the call sequence


def test_an_engine_is_bound_once_and_enqueued_often(bundle, driver):
    module = FakeTensorRt(driver)
    engine: CudaEngine = load(bundle, "head", driver, module)
    enqueue = engine.bind(*tensors_of(engine))
    driver.push_context(1)  # as the interpreter does
    enqueue(STREAM)
    enqueue(STREAM + 8)
    driver.pop_context()
    assert module.calls == [
        ("deserialize", b"the plan of head", False),
        ("create_execution_context",),
        ("set_tensor_address", "a1", 1000),
        ("set_tensor_address", "b1", 1100),
        ("set_tensor_address", "logits", 1200),
        ("execute_async_v3", STREAM),
        ("execute_async_v3", STREAM + 8),
    ]
    engine.close()
    assert driver.open_resources == {}
    segment = bundle.stream_graph["head"]
    assert (engine.name, engine.device) == ("head", 1)
    assert (engine.inputs, engine.outputs) == (segment.inputs, segment.outputs)


def test_tensorrt_rtx_makes_no_graphs_of_its_own_and_keeps_its_kernels(bundle, driver):
    """Nor may it go on with kernels of the first run that a graph would keep for good."""
    module = FakeTensorRt(driver, rtx=True)
    engine = load(bundle, "stem", driver, module, "tensorrt-rtx")
    for _ in range(2):
        engine.bind(*tensors_of(engine))
    engine.close()
    assert [
        call[-1] if call[0] == "create_execution_context" else call[0] for call in module.calls
    ] == [
        "deserialize",
        "create_runtime_cache",
        "set_runtime_cache",
        ("DISABLED", "EAGER"),
        "set_tensor_address",
        "set_tensor_address",
        ("DISABLED", "EAGER"),
        "set_tensor_address",
        "set_tensor_address",
        "serialize_cache",
    ]
    kernels = engine.path.with_suffix(".kernels")
    assert kernels.read_bytes() == b"kernels"
    again = FakeTensorRt(driver, rtx=True, answers={"deserialize_cache": False})
    trt = TensorRt("tensorrt-rtx", again, VERSIONS["tensorrt-rtx"])
    second = TensorRtEngine(trt, bundle.stream_graph["stem"], engine.path, driver, 1)
    second.bind(*tensors_of(second))
    # Kernels of another GPU are refused, which is no error.
    assert ("deserialize_cache", b"kernels") in again.calls
    second.close()


def test_an_engine_that_was_never_bound_writes_no_kernels(bundle, driver):
    engine = load(bundle, "stem", driver, FakeTensorRt(driver, rtx=True), "tensorrt-rtx")
    engine.close()
    assert not engine.path.with_suffix(".kernels").exists()


def test_a_dynamic_batch_gets_its_shapes_before_its_addresses(make_two_streams, tmp_path, driver):
    bundle = make_two_streams(tmp_path, batch="batch")
    module = FakeTensorRt(driver)
    options = EngineOptions(sizes={"batch": SizeRange(1, 2, 4)})
    engine = load(bundle, "head", driver, module, options=options)
    module.output_shapes["logits"] = [3, 12]
    engine.bind(*tensors_of(engine, batch=3))
    assert module.calls[1:] == [
        ("create_execution_context",),
        ("set_input_shape", "a1", (3, 12, 64, 64)),
        ("set_input_shape", "b1", (3, 12, 64, 64)),
        ("get_tensor_shape", "logits"),
        ("set_tensor_address", "a1", 1000),
        ("set_tensor_address", "b1", 1100),
        ("set_tensor_address", "logits", 1200),
    ]
    module.output_shapes["logits"] = [2, 12]
    with pytest.raises(ValueError, match=r"of shape \(2, 12\), and there is memory for \(3, 12\)"):
        engine.bind(*tensors_of(engine, batch=3))
    module.answers["set_input_shape"] = False
    with pytest.raises(InputError, match=r"refuses shape \(9, 12, 64, 64\) of tensor 'a1'"):
        engine.bind(*tensors_of(engine, batch=9))
    engine.close()


def test_each_binding_has_a_context_and_closing_releases_all(bundle, driver):
    module = FakeTensorRt(driver)
    engine = load(bundle, "stem", driver, module)
    first, second = (engine.bind(*tensors_of(engine)) for _ in range(2))
    gc.collect()
    assert [context() is not None for context in module.contexts] == [True, True]
    assert first.context.native is not second.context.native
    engine.close()
    engine.close()
    gc.collect()
    # The bindings are still there; their memory on the GPU is not.
    assert [context() for context in module.contexts] == [None, None]
    assert driver.open_resources == {}
    for closed in (lambda: first(STREAM), lambda: engine.bind(*tensors_of(engine))):
        with pytest.raises(ValueError, match="engine 'stem' is closed"):
            closed()


def test_a_binding_that_is_dropped_gives_its_memory_back(make_two_streams, tmp_path, driver):
    """A session that meets many sizes of batches drops those it has not seen for long."""
    bundle = make_two_streams(tmp_path, batch="batch")
    module = FakeTensorRt(driver)
    options = EngineOptions(sizes={"batch": SizeRange(1, 2, 8)})
    engine = load(bundle, "stem", driver, module, options=options)
    for batch in range(1, 9):
        module.output_shapes["stem"] = [batch, 12, 64, 64]
        enqueue = engine.bind(*tensors_of(engine, batch=batch))
    alive = [context() is not None for context in module.contexts]
    assert alive == [False] * 7 + [True]
    assert module.released_on == [1] * 7  # where the engine's device was current
    module.answers["set_tensor_address"] = False
    with pytest.raises(InputError, match="refuses the address"):
        engine.bind(*tensors_of(engine, batch=8))
    gc.collect()
    assert [context() is not None for context in module.contexts][7:] == [True, False]
    engine.close()
    del enqueue
    assert module.released_on == [1] * 9
    assert driver.open_resources == {}


def test_memory_and_streams_are_told(bundle, driver):
    engine = load(bundle, "stem", driver, FakeTensorRt(driver))
    assert (engine.context_memory_bytes, engine.aux_streams) == (2222, 2)
    oldest = FakeTensorRt(driver, oldest=True)
    assert load(bundle, "stem", driver, oldest).context_memory_bytes == 1111


def test_the_file_is_the_plan_that_the_sidecar_names(bundle, driver):
    engine = load(bundle, "stem", driver, FakeTensorRt(driver))
    assert engine.file.path.read_bytes() == b"the plan of stem"
    assert engine.file.size_bytes == engine.file.path.stat().st_size


def test_a_version_compatible_plan_may_bring_its_runtime(bundle, driver):
    module = FakeTensorRt(driver)
    options = EngineOptions(version_compatible=True)
    load(bundle, "stem", driver, module, options=options)
    assert module.calls == [("deserialize", b"the plan of stem", True)]


# --------------------------------------------------------------------------------- refusals


def test_a_refused_enqueue_is_an_error_of_its_own(bundle, driver):
    module = FakeTensorRt(driver, answers={"execute_async_v3": False})
    engine = load(bundle, "stem", driver, module)
    enqueue = engine.bind(*tensors_of(engine))
    driver.push_context(1)
    refused = r"refused to enqueue engine 'stem' \(Error Code 3: not stream capturable\)"
    with pytest.raises(EnqueueRefusedError, match=refused):
        enqueue(STREAM)
    assert take_error() == ""  # no later refusal is put down to it


def test_what_another_thread_records_is_not_taken_for_the_reason(bundle, driver):
    module = FakeTensorRt(driver)
    logger = logger_of(module)
    with ThreadPoolExecutor(1) as pool, recording() as record:
        error = pool.submit(logger.log, module.ILogger.ERROR, "of the other thread")
        error.result()
        assert pool.submit(take_error).result() == "of the other thread"
    assert record.errors == ["of the other thread"]  # nobody else was recording
    assert take_error() == ""


def test_a_context_may_be_released_wherever_the_collector_interrupts_a_message(driver):
    """Releasing one records what TensorRT says, in whatever thread is running."""
    module = FakeTensorRt(driver)

    class Interrupted(list):
        def append(self, line):
            with recording():
                super().append(line)

    def log() -> list[str]:
        with recording() as record:
            record.lines = Interrupted()
            logger_of(module).log(module.ILogger.ERROR, "an error")
        return record.lines

    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(log()), daemon=True)
    thread.start()
    thread.join(10)
    assert found == ["ERROR an error"]


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_no_engine_runs_on_a_default_stream(bundle, driver, stream):
    module = FakeTensorRt(driver)
    engine = load(bundle, "stem", driver, module)
    enqueue = engine.bind(*tensors_of(engine))
    with pytest.raises(ValueError, match="no default CUDA stream"):
        enqueue(stream)
    assert "execute_async_v3" not in [call[0] for call in module.calls]


def test_an_engine_that_does_not_load_says_what_it_is_and_how_to_rebuild_it(bundle, driver):
    module = FakeTensorRt(driver, answers={"deserialize": None})
    with pytest.raises(InputError) as caught:
        load(bundle, "stem", driver, module)
    text = str(caught.value)
    assert "built for Recorder 1 (compute capability 9.0) by TensorRT 10.9.0.34" in text
    assert "device 1 cannot load it (Error Code 1: Serialization (magic tag))" in text
    assert f"parnet-export build {bundle.path} --backend tensorrt --devices 1." in text
    assert driver.open_resources == {}


def test_a_tensorrt_that_does_not_start_is_a_sentence(bundle, driver):
    """Its bindings raise TypeError where the driver is too old for its CUDA."""
    module = FakeTensorRt(driver)

    class Runtime:
        def __init__(self, logger):
            logger.log(module.ILogger.ERROR, "CUDA initialization failure with error: 35.")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    module.Runtime = Runtime
    with pytest.raises(InputError) as caught:
        load(bundle, "stem", driver, module)
    assert str(caught.value) == (
        "TensorRT 10.9.0.34: does not start here (CUDA initialization failure with error: 35). "
        "Upgrade the NVIDIA driver, or install a TensorRT for its version of CUDA."
    )
    assert driver.open_resources == {}


def test_a_plan_with_a_flipped_byte_never_reaches_tensorrt(bundle, driver):
    path = install(bundle, "stem", driver)
    plan = path.with_name(read_sidecar(path).plan)
    plan.write_bytes(b"The plan of stem")
    module = FakeTensorRt(driver)
    trt = TensorRt("tensorrt", module, VERSIONS["tensorrt"])
    with pytest.raises(InputError, match="its digest differs"):
        TensorRtEngine(trt, bundle.stream_graph["stem"], path, driver, 1)
    assert module.calls == driver.calls == []
    plan.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        TensorRtEngine(trt, bundle.stream_graph["stem"], path, driver, 1)


def test_a_layout_that_the_sidecar_does_not_know_is_refused(bundle, driver):
    module = FakeTensorRt(driver, layouts={"stem": "CHW32"})
    with pytest.raises(InputError, match="tensor 'stem' is CHW32, and LINEAR in the sidecar"):
        load(bundle, "stem", driver, module)
    assert driver.open_resources == {}


def test_vectors_of_channels_are_bound_as_such(make_two_streams, tmp_path, driver):
    bundle = make_two_streams(tmp_path, precision="fp16")
    module = FakeTensorRt(driver, layouts={"stem": "HWC8"})
    layouts = {"stem": TensorLayout.HWC8}
    options = EngineOptions(boundary="vector")
    engine = load(bundle, "stem", driver, module, options=options, layouts=layouts)
    inputs, outputs = tensors_of(engine)
    assert outputs[0].layout is TensorLayout.HWC8
    assert outputs[0].size_bytes == 16 * 64 * 64 * 2
    engine.bind(inputs, outputs)
    with pytest.raises(ValueError, match=r"wants .* in TensorLayout\.HWC8"):
        engine.bind(inputs, [replace(outputs[0], layout=TensorLayout.LINEAR)])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"dtype": "float16"},
        {"device": 0},
        {"shape": (1, 3, 64, 32)},
        {"shape": (1, 3, 64)},
    ],
)
def test_memory_that_is_not_what_an_engine_reads_is_refused(bundle, driver, change):
    module = FakeTensorRt(driver)
    engine = load(bundle, "stem", driver, module)
    inputs, outputs = tensors_of(engine)
    with pytest.raises(ValueError, match="engine 'stem' wants"):
        engine.bind([replace(inputs[0], **change)], outputs)
    assert [call[0] for call in module.calls] == ["deserialize"]


@pytest.mark.parametrize(
    ("verb", "answer", "problem"),
    [
        ("create_execution_context", None, "refuses another execution context on device 1"),
        ("set_tensor_address", False, "refuses the address of tensor 'image' on device 1"),
    ],
)
def test_what_tensorrt_refuses_while_binding_is_named(bundle, driver, verb, answer, problem):
    module = FakeTensorRt(driver, answers={verb: answer})
    engine = load(bundle, "stem", driver, module)
    with pytest.raises(InputError, match=problem):
        engine.bind(*tensors_of(engine))
    engine.close()
    assert driver.open_resources == {}


# ---------------------------------------------------------------------- finding and loading


@pytest.fixture
def tensorrt(monkeypatch, driver):
    """Have both backends installed, as fakes."""
    modules = {
        "tensorrt": FakeTensorRt(driver),
        "tensorrt-rtx": FakeTensorRt(driver, rtx=True),
    }
    monkeypatch.setattr(
        engine_finder, "choose_backend", lambda wanted: "tensorrt" if wanted == "auto" else wanted
    )
    monkeypatch.setattr(engine_finder, "installed_backends", lambda: tuple(modules))
    monkeypatch.setattr(
        tensorrt_run, "import_tensorrt", lambda b: TensorRt(b, modules[b], VERSIONS[b])
    )
    return modules


def test_engines_are_loaded_by_segment(bundle, driver, tensorrt):
    names = ["stem", "stream1", WHOLE]
    for name in names:
        install(bundle, name, driver)
    engines = load_engines(bundle, names, driver, 1)
    assert list(engines) == names
    assert [call[1] for call in tensorrt["tensorrt"].calls] == [
        b"the plan of stem",
        b"the plan of stream1",
        b"the plan of whole",
    ]
    assert engines[WHOLE].outputs == bundle.stream_graph.outputs
    for engine in engines.values():
        engine.close()
    assert driver.open_resources == {}


def test_engines_that_were_loaded_before_a_refused_one_are_closed(bundle, driver, tensorrt):
    for name in ("stem", "head"):
        install(bundle, name, driver)
    path = sidecar_path(bundle, target_of("tensorrt", driver.gpus()[1]), "head", EngineOptions())
    path.with_name(read_sidecar(path).plan).write_bytes(b"broken")
    with pytest.raises(InputError, match="its digest differs"):
        load_engines(bundle, ["stem", "head"], driver, 1)
    assert driver.open_resources == {}


def test_the_engine_for_just_this_gpu_is_preferred(bundle, driver, tensorrt):
    general = install(bundle, "stem", driver, backend="tensorrt-rtx", target=Target("tensorrt-rtx"))
    both = Target("tensorrt-rtx", ("8.0", "9.0"))
    several = install(bundle, "stem", driver, backend="tensorrt-rtx", target=both)
    found = []
    for _ in range(2):
        engines = load_engines(bundle, ["stem"], driver, 1, backend="tensorrt-rtx")
        found.append(engines["stem"].path)
        exact = install(bundle, "stem", driver, backend="tensorrt-rtx")
    assert found == [general, exact]
    assert several not in found


def test_automatically_the_engines_that_the_bundle_has_are_run(bundle, driver, tensorrt):
    """Both backends may be installed, and only one of them may have built engines."""
    rtx = install(bundle, "stem", driver, backend="tensorrt-rtx", target=Target("tensorrt-rtx"))
    (engine,) = load_engines(bundle, ["stem"], driver, 1).values()
    assert engine.path == rtx
    ours = install(bundle, "stem", driver)
    (engine,) = load_engines(bundle, ["stem"], driver, 1).values()
    assert engine.path == ours
    with pytest.raises(InputError, match="holds no TensorRT engine of 'head'"):
        load_engines(bundle, ["head"], driver, 1)


def test_engines_of_the_other_backend_are_none_of_this_one(bundle, driver, tensorrt):
    install(bundle, "stem", driver, backend="tensorrt-rtx")
    with pytest.raises(InputError, match="holds no TensorRT engine of 'stem'"):
        load_engines(bundle, ["stem"], driver, 1, backend="tensorrt")


def test_the_command_that_rebuilds_an_engine_has_the_options_it_was_built_with(
    make_two_streams, tmp_path, driver, tensorrt
):
    bundle = make_two_streams(tmp_path, batch="batch")
    options = EngineOptions(tf32=False, sizes={"batch": SizeRange(1, 2, 4)}, workspace_mib=64)
    install(bundle, "stem", driver, options=options, version="10.8.0.1")
    with pytest.raises(InputError) as caught:
        load_engines(bundle, ["stem"], driver, 1)
    flags = "--no-tf32 --shapes batch=1/2/4 --workspace-mib 64"
    assert caught.value.remedy.endswith(f"--backend tensorrt --devices 1 {flags}")


@pytest.mark.parametrize(
    ("built_by", "fits"), [("10.0.0b6", True), ("10.8.0.43", True), ("10.10.0b1", False)]
)
def test_a_version_compatible_engine_runs_later_also_if_a_preview_has_built_it(
    bundle, driver, tensorrt, built_by, fits
):
    options = EngineOptions(version_compatible=True)
    install(bundle, "stem", driver, options=options, version=built_by)
    if fits:
        assert load_engines(bundle, ["stem"], driver, 1)
    else:
        with pytest.raises(InputError, match=r"and TensorRT 10\.9\.0\.34 is installed here"):
            load_engines(bundle, ["stem"], driver, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"target": Target("tensorrt", ("8.0",), "NVIDIA A100")},
            (
                "for NVIDIA A100 (compute capability 8.0) by TensorRT 10.9.0.34 on {here}, and "
                "device 1 is Recorder 1 (compute capability 9.0)"
            ),
        ),
        ({"version": "10.8.0.1"}, "by TensorRT 10.8.0.1 on {here}, and TensorRT 10.9.0.34 is"),
        ({"platform": "windows-amd64"}, "on windows-amd64, and this is {here}"),
        ({"onnx_sha256": "0" * 64}, "and the bundle's graph has changed since"),
    ],
)
def test_an_engine_that_does_not_fit_says_for_what_it_was_built(
    bundle, driver, tensorrt, changes, reason
):
    install(bundle, "stem", driver, **changes)
    with pytest.raises(InputError) as caught:
        load_engines(bundle, ["stem"], driver, 1)
    assert reason.format(here=engine_cache.this_platform()) in str(caught.value)
    command = f"parnet-export build {bundle.path} --backend tensorrt --devices 1"
    assert caught.value.remedy == f"Build it again: {command}"
    assert driver.open_resources == {}
    assert tensorrt["tensorrt"].calls == []


def test_an_engine_that_is_not_there_names_the_command_that_builds_it(bundle, driver, tensorrt):
    install(bundle, "stem", driver)
    with pytest.raises(
        InputError, match="holds no TensorRT engine of 'stem' for Recorder 1"
    ) as caught:
        load_engines(bundle, ["stem"], driver, 1, boundary="vector", max_aux_streams=3)
    flags = "--devices 1 --max-aux-streams 3 --boundary vector"
    assert caught.value.remedy.endswith(f"--backend tensorrt {flags}")


def test_the_plan_is_the_one_the_sidecar_names(bundle, driver):
    path = install(bundle, "stem", driver)
    digest = hashlib.sha256(b"the plan of stem").hexdigest()
    assert read_sidecar(path).plan_sha256 == digest
    assert open_bundle(bundle.path).manifest == bundle.manifest  # engines are no part of it
