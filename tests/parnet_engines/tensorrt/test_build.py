"""Building one engine: what `tensorrt` 10 and 11 are asked, by a fake; failing, by the real one."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import threading
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress

from parnet_engines.cuda.boundary import choose_layouts
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.tensorrt import build_place
from parnet_engines.tensorrt import module as tensorrt_module
from parnet_engines.tensorrt.build import BuildCancelledError, BuildRequest, build_engine
from parnet_engines.tensorrt.build_place import BuildDevice, choose_places
from parnet_engines.tensorrt.build_progress import TerminalProgress
from parnet_engines.tensorrt.engine_cache import onnx_path
from parnet_engines.tensorrt.engine_sidecar import Audit
from parnet_engines.tensorrt.module import TensorRt, choose_backend, import_tensorrt
from parnet_engines.tensorrt.options import EngineOptions, SizeRange, Target
from parnet_export.errors import CheckFailedError, InputError, MissingBackendError

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
pytestmark = pytest.mark.tensorrt


class Named:
    def __init__(self, name, value=0):
        self.name, self.value = name, value

    def __int__(self):
        return self.value

    def __repr__(self):
        return self.name


class Attributes:
    """Notes every attribute that is set and every method that is called."""

    def __init__(self, calls, **answers):
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_answers", answers)

    def __setattr__(self, name, value):
        self._calls.append((name, value))

    def __getattr__(self, name):
        def call(*arguments, **options):
            self._calls.append((name, *arguments, *options.values()))
            return self._answers.get(name)

        return call


class FakeTensorRt:
    """As much of `tensorrt` as building needs; version 11 has no flag for strong typing."""

    def __init__(self, segment, *, major=10, plan=b"plan", timings=True, layers=None):
        self.calls = calls = []
        self.refusals = refusals = []
        flags = {"STRONGLY_TYPED": 3} if major == 10 else {}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**flags)
        self.BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
        self.TensorFormat = SimpleNamespace(LINEAR=0, HWC8=2)
        self.LayerInformationFormat = SimpleNamespace(JSON="JSON")
        names = {"float32": "FLOAT", "float16": "HALF"}

        def tensors(specs):
            return [SimpleNamespace(name=s.name, dtype=Named(names[s.dtype])) for s in specs]

        self.inputs, self.outputs = tensors(segment.inputs), tensors(segment.outputs)
        network = SimpleNamespace(
            num_inputs=len(self.inputs),
            num_outputs=len(self.outputs),
            get_input=self.inputs.__getitem__,
            get_output=self.outputs.__getitem__,
        )
        cache = SimpleNamespace(serialize=lambda: b"timings after")
        config = Attributes(
            calls, create_timing_cache=cache, set_timing_cache=timings, add_optimization_profile=0
        )

        class ILogger:
            VERBOSE, ERROR, INTERNAL_ERROR = map(Named, ("VERBOSE", "ERROR", "INTERNAL_ERROR"))

        class IProgressMonitor:
            pass

        class Builder:
            def __init__(self, logger):
                self.logger = logger

            def create_network(self, given):
                calls.append(("create_network", given))
                return network

            def create_builder_config(self):
                return config

            def create_optimization_profile(self):
                return Attributes(calls)

            def build_serialized_network(self, *_):
                calls.append(("build_serialized_network",))
                for flag, message in refusals:
                    if calls.count(("set_flag", flag)) > calls.count(("clear_flag", flag)):
                        self.logger.log(ILogger.ERROR, message)
                        return None
                if plan is None:
                    self.logger.log(ILogger.ERROR, "Error Code 10: no implementation for node X.")
                    self.logger.log(ILogger.ERROR, "a later error")
                return plan

        class Runtime:
            def __init__(self, logger):
                pass

            def deserialize_cuda_engine(self, _):
                inspector = SimpleNamespace(get_engine_information=lambda _: layers)
                context = Attributes(calls, set_input_shape=True)

                def contextual(name):
                    assert name == "JSON"
                    if getattr(inspector, "execution_context", None) is not context:
                        return layers.replace("Float", "N/A due to dynamic shapes")
                    return layers

                if segment.inputs[0].is_dynamic:
                    inspector.get_engine_information = contextual
                return layers and SimpleNamespace(
                    create_engine_inspector=lambda: inspector,
                    create_execution_context=lambda: context,
                )

        self.ILogger, self.IProgressMonitor = ILogger, IProgressMonitor
        self.Builder, self.Runtime = Builder, Runtime
        self.OnnxParser = lambda *_: SimpleNamespace(parse_from_file=lambda _: True)


def request_for(bundle, name, tmp_path, **changes):
    segment = bundle.stream_graph[name]
    outside = [t.name for t in (*bundle.stream_graph.inputs, *bundle.stream_graph.outputs)]
    request = BuildRequest(
        segment,
        onnx_path(bundle, name),
        bundle.manifest.precision,
        EngineOptions(max_aux_streams=0),
        choose_layouts((*segment.inputs, *segment.outputs), "linear", outside),
        Target("tensorrt", ("9.0",), "Recorder 0"),
        tmp_path / "logs" / "build.log",
    )
    return replace(request, **changes)


@pytest.fixture
def bundle(make_two_streams, tmp_path):
    return make_two_streams(tmp_path)


def build_with_fake(bundle, name, tmp_path, *, major=10, timings=True, plan=b"plan", **changes):
    request = request_for(bundle, name, tmp_path, **changes)
    module = FakeTensorRt(request.segment, major=major, timings=timings, plan=plan)
    built = build_engine(TensorRt("tensorrt", module, f"{major}.0.0"), request)
    return module, built


# -------------------------------------------------------------------- tensorrt 10 and 11


@pytest.mark.parametrize(("major", "flags"), [(10, 1 << 3), (11, 0)])
def test_networks_are_strongly_typed_in_every_version(bundle, tmp_path, major, flags):
    module, built = build_with_fake(bundle, "stem", tmp_path, major=major)
    assert module.calls == [
        ("create_network", flags),
        ("profiling_verbosity", "DETAILED"),
        ("set_flag", "TF32"),
        ("clear_flag", "VERSION_COMPATIBLE"),
        ("max_aux_streams", 0),
        ("build_serialized_network",),
    ]
    assert [t.allowed_formats for t in (*module.inputs, *module.outputs)] == [1, 1]
    assert (built.plan, built.audit) == (b"plan", None)


def test_every_option_reaches_tensorrt(make_two_streams, tmp_path):
    bundle = make_two_streams(tmp_path, batch="batch")
    options = EngineOptions(
        tf32=False,
        sizes={"batch": SizeRange(1, 2, 4)},
        max_aux_streams=3,
        optimization_level=5,
        workspace_mib=64,
        version_compatible=True,
    )
    (tmp_path / "timings").write_bytes(b"timings before")
    module, _ = build_with_fake(
        bundle, "stem", tmp_path, options=options, timing_cache=tmp_path / "timings"
    )
    cache = next(call for call in module.calls if call[0] == "set_timing_cache")[1]
    assert module.calls[1:] == [
        ("profiling_verbosity", "DETAILED"),
        ("clear_flag", "TF32"),
        ("set_flag", "VERSION_COMPATIBLE"),
        ("max_aux_streams", 3),
        ("builder_optimization_level", 5),
        ("set_memory_pool_limit", "WORKSPACE", 64 << 20),
        ("create_timing_cache", b"timings before"),
        ("set_timing_cache", cache, False),
        ("set_shape", "image", (1, 3, 64, 64), (2, 3, 64, 64), (4, 3, 64, 64)),
        ("add_optimization_profile", next(c for c in module.calls if "add_" in c[0])[1]),
        ("build_serialized_network",),
    ]
    assert (tmp_path / "timings").read_bytes() == b"timings after"


def test_a_timing_cache_of_another_gpu_is_refused_and_kept(bundle, tmp_path):
    (tmp_path / "timings").write_bytes(b"of another GPU")
    with pytest.raises(InputError, match="timings: is no timing cache of TensorRT 10"):
        build_with_fake(bundle, "stem", tmp_path, timings=False, timing_cache=tmp_path / "timings")
    assert (tmp_path / "timings").read_bytes() == b"of another GPU"


def test_a_failed_build_gives_the_first_error_and_the_log(bundle, tmp_path):
    with pytest.raises(InputError) as caught:
        build_with_fake(bundle, "stem", tmp_path, plan=None)
    log = tmp_path / "logs" / "build.log"
    assert str(caught.value) == (
        f"segment 'stem' ({bundle.segment_path('stem').name}): cannot be built by TensorRT 10.0.0 "
        f"(Error Code 10: no implementation for node X). TensorRT's log is in {log}."
    )
    assert log.read_text() == (
        "ERROR Error Code 10: no implementation for node X.\nERROR a later error\n"
    )


def test_a_type_that_is_not_the_bundles_is_refused(bundle, tmp_path):
    request = request_for(bundle, "stem", tmp_path)
    module = FakeTensorRt(request.segment)
    module.outputs[0].dtype = Named("HALF")
    with pytest.raises(CheckFailedError, match=r"makes tensor 'stem' float16, .* has it float32"):
        build_engine(TensorRt("tensorrt", module, "10.0.0"), request)
    module.outputs[0].name = "renamed"
    with pytest.raises(CheckFailedError, match=r"reads and writes \['image', 'renamed'\]"):
        build_engine(TensorRt("tensorrt", module, "10.0.0"), request)


@pytest.mark.parametrize(
    ("layers", "audit"),
    [
        (
            {"Layers": [{"Name": "stem/conv", "Outputs": [{"Format/Datatype": "Float"}]}]},
            Audit({"fp32": 1}, ("stem/conv",)),
        ),
        ({"Layers": ["stem/conv"]}, None),
        (None, None),  # the engine does not load
    ],
)
def test_a_gpu_of_the_target_audits_the_engine(make_two_streams, tmp_path, layers, audit):
    """An fp16 build that yields float32 layers does not go unnoticed."""
    bundle = make_two_streams(tmp_path, precision="fp16")
    driver = RecordingDriver(2)
    request = request_for(bundle, "stem", tmp_path, device=BuildDevice(driver, driver.gpus()[1]))
    module = FakeTensorRt(request.segment, layers=layers and json.dumps(layers))
    built = build_engine(TensorRt("tensorrt", module, "10.0.0"), request)
    assert built.audit == audit
    verbs = ("retain_context", "push_context", "pop_context", "release_context")
    assert tuple(call.verb for call in driver.calls) == verbs
    assert {call.device for call in driver.calls if call.verb != "pop_context"} == {1}
    assert driver.open_resources == {}


def test_an_engine_of_a_dynamic_batch_is_audited_at_the_size_it_is_tuned_for(
    make_two_streams, tmp_path
):
    bundle = make_two_streams(tmp_path, precision="fp16", batch="batch")
    driver = RecordingDriver(1)
    options = EngineOptions(max_aux_streams=0, sizes={"batch": SizeRange(1, 2, 4)})
    device = BuildDevice(driver, driver.gpus()[0])
    request = request_for(bundle, "stem", tmp_path, device=device, options=options)
    layers = {"Layers": [{"Name": "stem/conv", "Outputs": [{"Format/Datatype": "Float"}]}]}
    module = FakeTensorRt(request.segment, layers=json.dumps(layers))
    built = build_engine(TensorRt("tensorrt", module, "10.0.0"), request)
    assert module.calls[-1] == ("set_input_shape", "image", (2, 3, 64, 64))
    assert built.audit == Audit({"fp32": 1}, ("stem/conv",))


# --------------------------------------------------------- memory that graphs can capture


@pytest.mark.parametrize("needs_memory", [False, True])
def test_engines_allocate_nothing_while_they_run_unless_they_must(bundle, tmp_path, needs_memory):
    request = request_for(bundle, "stem", tmp_path, target=Target("tensorrt-rtx"))
    module = FakeTensorRt(request.segment)
    module.BuilderFlag.REQUIRE_USER_ALLOCATION = "STATIC"
    if needs_memory:
        refusal = "BuilderFlag::kREQUIRE_USER_ALLOCATION is not compatible with networks that"
        module.refusals.append(("STATIC", refusal))
    built = build_engine(TensorRt("tensorrt-rtx", module, "1.7.0"), request)
    assert built.plan == b"plan"
    build = ("build_serialized_network",)
    again = [("clear_flag", "STATIC"), build] if needs_memory else []
    assert module.calls[-2 - len(again) :] == [("set_flag", "STATIC"), build, *again]


@needs_rtx
def test_tensorrt_rtx_has_the_flag_and_the_strategies_that_capturing_needs():
    import tensorrt_rtx

    assert hasattr(tensorrt_rtx.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    assert hasattr(tensorrt_rtx.DynamicShapesKernelSpecializationStrategy, "EAGER")
    config = tensorrt_rtx.IRuntimeConfig
    assert hasattr(config, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(config, "cuda_graph_strategy")


# ------------------------------------------------------------------- the real TensorRT-RTX


@needs_rtx
def test_what_the_builder_itself_refuses_names_the_segment(bundle, tmp_path):
    """TensorRT-RTX brings no runtime for other versions, which only building shows."""
    options = EngineOptions(max_aux_streams=0, version_compatible=True)
    target = Target("tensorrt-rtx")
    request = request_for(bundle, "head", tmp_path, options=options, target=target)
    with pytest.raises(InputError, match=r"segment 'head' .* cannot be built by TensorRT-RTX"):
        build_engine(import_tensorrt("tensorrt-rtx"), request)
    assert "ERROR" in request.log_path.read_text()


@needs_rtx
def test_a_dimension_without_a_range_is_named(make_two_streams, tmp_path):
    bundle = make_two_streams(tmp_path, batch="batch")
    request = request_for(bundle, "head", tmp_path, target=Target("tensorrt-rtx"))
    with pytest.raises(InputError, match=r"tensor 'a1' has the dimension 'batch' of unknown size"):
        build_engine(import_tensorrt("tensorrt-rtx"), request)


class Watcher:
    """Notes phases; may cancel at a step."""

    def __init__(self, cancelled=None, at=0):
        self.open, self.phases, self.steps = [], [], 0
        self.cancelled, self.at = cancelled, at

    def phase_start(self, phase, parent, _):
        assert parent is None or parent in self.open
        self.open.append(phase)
        self.phases.append(phase)

    def step_complete(self, phase, _):
        assert phase in self.open
        self.steps += 1
        if self.steps == self.at:
            self.cancelled.set()

    def phase_finish(self, phase):
        self.open.remove(phase)


@needs_rtx
def test_progress_is_tensorrts_own(bundle, tmp_path):
    watcher = Watcher()
    request = request_for(bundle, "stem", tmp_path, target=Target("tensorrt-rtx"))
    build_engine(import_tensorrt("tensorrt-rtx"), request, progress=watcher)
    assert watcher.open == []
    assert watcher.phases[0] == "Building engine"
    assert watcher.steps > 10


@needs_rtx
@pytest.mark.parametrize("at", [1, 5])
def test_an_event_cancels_a_build_at_its_next_step(bundle, tmp_path, at):
    cancelled = threading.Event()
    watcher = Watcher(cancelled, at)
    request = request_for(bundle, "stem", tmp_path, target=Target("tensorrt-rtx"))
    trt = import_tensorrt("tensorrt-rtx")
    with pytest.raises(BuildCancelledError, match="segment 'stem'") as caught:
        build_engine(trt, request, progress=watcher, cancelled=cancelled)
    assert caught.value.exit_code == 130
    assert watcher.steps == at
    assert not request.log_path.parent.exists()
    # The next build is not disturbed by it.
    assert build_engine(trt, request).plan


# ------------------------------------------------------------------ backends and places


def installed(monkeypatch, *modules):
    monkeypatch.setattr(
        tensorrt_module.importlib.util, "find_spec", lambda name: name if name in modules else None
    )


def test_auto_takes_tensorrt_unless_the_gpu_is_not_here(monkeypatch):
    installed(monkeypatch, "tensorrt", "tensorrt_rtx")
    assert choose_backend("auto") == "tensorrt"
    assert choose_backend("auto", other_gpus=True) == "tensorrt-rtx"
    installed(monkeypatch, "tensorrt_rtx")
    assert choose_backend("auto") == "tensorrt-rtx"
    with pytest.raises(MissingBackendError, match=r"'tensorrt'.*'parnet-export\[gpu\]'"):
        choose_backend("tensorrt")
    installed(monkeypatch)
    with pytest.raises(MissingBackendError, match=r"'tensorrt_rtx'.*'parnet-export\[rtx\]'"):
        choose_backend("auto")


def test_an_absent_module_is_missing_and_a_broken_one_is_not(monkeypatch):
    monkeypatch.setattr(tensorrt_module, "_DISTRIBUTIONS", {"tensorrt": ()})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingBackendError, match="TensorRT needs the Python module 'tensorrt'"):
        import_tensorrt("tensorrt")

    def broken(name):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(tensorrt_module.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numpy") as caught:
        import_tensorrt("tensorrt")
    assert not isinstance(caught.value, MissingBackendError)


@pytest.mark.parametrize(("version", "fits"), [("8.6.1", False), ("10.0.1", True), ("11.4", True)])
def test_versions_before_10_are_too_old(monkeypatch, version, fits):
    monkeypatch.setattr(tensorrt_module, "_DISTRIBUTIONS", {"tensorrt": ()})
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    if fits:
        assert import_tensorrt("tensorrt").label == f"TensorRT {version}"
    else:
        with pytest.raises(InputError, match=r"tensorrt 8\.6\.1: is older than 10"):
            import_tensorrt("tensorrt")


def test_plugins_are_registered_before_anything_is_parsed(monkeypatch):
    registered = []

    class Module(ModuleType):
        __version__ = "10.9.0.34"

        class ILogger:
            pass

        @staticmethod
        def init_libnvinfer_plugins(logger, namespace):
            registered.append((isinstance(logger, Module.ILogger), namespace))
            return True

    monkeypatch.setattr(tensorrt_module, "_DISTRIBUTIONS", {"tensorrt": ()})
    monkeypatch.setitem(sys.modules, "tensorrt", Module("tensorrt"))
    import_tensorrt("tensorrt")
    assert registered == [(True, "")]


@needs_rtx
def test_a_tensorrt_that_has_no_builder_here_is_a_sentence(bundle, tmp_path, monkeypatch):
    trt = import_tensorrt("tensorrt-rtx")
    without = SimpleNamespace(
        Builder=lambda _: trt.module.Builder(None), ILogger=trt.module.ILogger
    )
    monkeypatch.setattr(tensorrt_module, "logger_of", lambda _: None)
    with pytest.raises(InputError, match=r"TensorRT 10\.9: does not start here"):
        build_engine(TensorRt("tensorrt", without, "10.9"), request_for(bundle, "stem", tmp_path))


def test_gpus_of_one_kind_share_their_engines(monkeypatch):
    installed(monkeypatch, "tensorrt", "tensorrt_rtx")
    driver = RecordingDriver(3)
    kinds = [replace(gpu, name="Same") for gpu in driver.gpus()]
    kinds[2] = replace(kinds[2], name="Other", compute_capability=(8, 9))
    monkeypatch.setattr(driver, "_gpus", tuple(kinds))
    monkeypatch.setattr(build_place, "open_driver", lambda _: driver)
    places = choose_places("auto", "0,1,2,0", None)
    assert [str(place.target) for place in places] == [
        "Same (compute capability 9.0)",
        "Other (compute capability 8.9)",
    ]
    assert [place.device.gpu.ordinal for place in places] == [0, 2]
    (default,) = choose_places("tensorrt", None, None)
    assert default.device.gpu.ordinal == 0
    (by_rtx,) = choose_places("tensorrt-rtx", "2", None)
    assert by_rtx.target == Target("tensorrt-rtx", ("8.9",))
    with pytest.raises(InputError, match="TensorRT builds for the GPU that it runs on"):
        choose_places("tensorrt", None, "8.9")


# ---------------------------------------------------------------------------- the terminal


def test_phases_are_shown_below_their_engine_and_go_with_it():
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console=screen) as display:
        progress = TerminalProgress(display, engines=2)
        progress.engine_start(f"{WHOLE} for compute capability 8.9")
        progress.phase_start("Building engine", None, 6)
        progress.phase_start("Optimizing", "Building engine", 30)
        progress.phase_start("Timing", "Optimizing", 5)
        progress.phase_start("too deep to show", "Timing", 5)
        progress.step_complete("Optimizing", 9)
        progress.step_complete("too deep to show", 1)
        shown = {task.description: task.completed for task in display.tasks}
        assert shown == {
            "whole for compute capability 8.9": 0,
            "  Building engine": 0,
            "    Optimizing": 10,
            "      Timing": 0,
        }
        progress.phase_finish("too deep to show")
        progress.phase_finish("Timing")
        assert len(display.tasks) == 3
        progress.engine_finish()  # a refused build leaves phases open
        assert [task.completed for task in display.tasks] == [1]
        progress.phase_finish("unknown")
