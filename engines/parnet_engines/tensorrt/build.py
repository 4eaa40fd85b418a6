"""Build the TensorRT engine of one ONNX graph."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.tensorrt.engine_audit import audit_layers, full_precision_nodes
from parnet_engines.tensorrt.engine_sidecar import EngineTensor
from parnet_engines.tensorrt.log import logger_of, recording
from parnet_export import files
from parnet_export.errors import CheckFailedError, InputError, ParnetError

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping
    from pathlib import Path

    from parnet_engines.tensorrt.build_place import BuildDevice
    from parnet_engines.tensorrt.engine_sidecar import Audit
    from parnet_engines.tensorrt.log import LogRecording
    from parnet_engines.tensorrt.module import TensorRt
    from parnet_engines.tensorrt.options import EngineOptions, Target
    from parnet_export.bundle import Precision
    from parnet_export.stream_graph import Segment, TensorSpec

FORMATS = {
    TensorLayout.LINEAR: "LINEAR",
    TensorLayout.HWC8: "HWC8",
    TensorLayout.CHW32: "CHW32",
}
"""TensorRT's names of the layouts."""

_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}
_MIB = 1 << 20


class BuildCancelledError(ParnetError):
    """A build was cancelled; nothing was written."""

    exit_code = 130


class BuildProgress(Protocol):
    """Who is told how far a build is: the methods of TensorRT's own progress monitor.

    TensorRT calls them from threads of its own.
    """

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin a phase of so many steps, within another one."""

    def step_complete(self, phase: str, step: int) -> None:
        """Finish a step, counted from 0."""

    def phase_finish(self, phase: str) -> None:
        """End a phase, perhaps before all its steps are done."""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One engine to build.

    Parameters
    ----------
    segment
        Name and tensors of what the graph computes.
    onnx_path
        The graph.
    precision
        The bundle's.
    options
        With nothing left to the kind of graph.
    layouts
        How each tensor of the segment lies in memory.
    target
        The GPUs that it is for.
    log_path
        The file that gets TensorRT's log lines when the build fails. Otherwise they come with
        the engine, so that whoever drops a finished engine leaves no log of it behind.
    device
        A GPU of the target in this machine, which builds and audits the engine; if None, the
        engine is not audited.
    timing_cache
        A file with timings of kernels, which is read if it exists, and then replaced.
    """

    segment: Segment
    onnx_path: Path
    precision: Precision
    options: EngineOptions
    layouts: Mapping[str, TensorLayout]
    target: Target
    log_path: Path
    device: BuildDevice | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine, not yet written.

    Parameters
    ----------
    plan
        The serialised engine.
    tensors
        What it reads and writes.
    build_s
        Seconds that parsing and building took.
    audit
        None if it was not audited.
    log
        TensorRT's log lines.
    """

    plan: bytes
    tensors: tuple[EngineTensor, ...]
    build_s: float
    audit: Audit | None
    log: str


def build_engine(
    trt: TensorRt,
    request: BuildRequest,
    *,
    progress: BuildProgress | None = None,
    cancelled: threading.Event | None = None,
) -> BuiltEngine:
    """Build an engine of exactly the types that its graph has.

    Parameters
    ----------
    trt
        The TensorRT that builds it.
    request
        What to build.
    progress
        Who is told how far it is.
    cancelled
        Setting this event from another thread ends the build at its next step.

    Raises
    ------
    InputError
        When TensorRT cannot parse or build the graph, or has not what an option asks for.
    BuildCancelledError
        When it was cancelled.
    """
    device = request.device
    with recording() as log, contextlib.nullcontext() if device is None else device.current():
        try:
            return _Build(trt, request, log).run(progress, cancelled)
        except BuildCancelledError:
            raise
        except Exception:
            files.make_directory(request.log_path.parent)
            files.write_text(request.log_path, log.text)
            raise


class _Build:
    """The state of one build. TensorRT's objects refer to each other and die together."""

    def __init__(self, trt: TensorRt, request: BuildRequest, log: LogRecording) -> None:
        self._trt = trt
        self._module = trt.module
        self._request = request
        self._log = log
        self._builder = trt.builder(log)
        self._timings: Any = None

    def run(self, progress: BuildProgress | None, cancelled: threading.Event | None) -> BuiltEngine:
        start_s = time.perf_counter()
        network, parser = self._parse()
        config = self._configure(network)
        if progress is not None or cancelled is not None:
            config.progress_monitor = _monitor(self._module, progress, cancelled)
        is_restricted = self._trt.forbid_memory_at_run_time(config)
        plan = self._serialize(network, config, cancelled)
        if plan is None and is_restricted:
            # If that was the reason, it runs all the same, and no CUDA graph will capture it.
            self._trt.allow_memory_at_run_time(config)
            plan = self._serialize(network, config, cancelled)
        if plan is None:
            raise self._refusal(f"cannot be built by {self._trt.label} ({self._log.reason})")
        del parser  # it owns what the network refers to
        self._save_timings()
        content = bytes(plan)
        build_s = time.perf_counter() - start_s
        audit = self._audit(content)
        return BuiltEngine(content, self._tensors(), build_s, audit, self._log.text)

    def _serialize(self, network: Any, config: Any, cancelled: threading.Event | None) -> Any:
        plan = self._builder.build_serialized_network(network, config)
        if cancelled is not None and cancelled.is_set():
            raise BuildCancelledError(f"{self._subject}: the build was cancelled.")
        return plan

    @property
    def _subject(self) -> str:
        return f"segment {self._request.segment.name!r} ({self._request.onnx_path.name})"

    def _refusal(self, problem: str) -> InputError:
        remedy = f"TensorRT's log is in {self._request.log_path}"
        return InputError(self._subject, problem, remedy)

    def _parse(self) -> tuple[Any, Any]:
        network = self._builder.create_network(self._trt.network_flags())
        parser = self._module.OnnxParser(network, logger_of(self._module))
        if parser.parse_from_file(str(self._request.onnx_path)):
            return network, parser
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        if not errors:
            raise self._refusal(f"cannot be parsed by {self._trt.label} ({self._log.reason})")
        first = errors[0]
        what = " ".join(first.desc().split()).rstrip(".")
        node = f"node {first.node_name()!r} ({first.node_operator()})"
        where = node if first.node_operator() else "the graph"
        raise self._refusal(f"{self._trt.label} does not accept {where}: {what}")

    def _configure(self, network: Any) -> Any:
        module, options = self._module, self._request.options
        config = self._builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # the audit needs it
        for flag, wanted in (
            ("TF32", options.tf32),
            ("VERSION_COMPATIBLE", options.version_compatible),
        ):
            change = config.set_flag if wanted else config.clear_flag
            change(getattr(module.BuilderFlag, flag))
        if options.max_aux_streams is not None:
            config.max_aux_streams = options.max_aux_streams
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace_mib is not None:
            limit_bytes = options.workspace_mib * _MIB
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, limit_bytes)
        self._trt.set_compute_capabilities(config, self._request.target.compute_capabilities)
        self._load_timings(config)
        self._fix_tensors(network)
        self._add_profile(config)
        return config

    def _fix_tensors(self, network: Any) -> None:
        """Give each tensor its layout, having compared its type with the bundle's."""
        segment = self._request.segment
        parsed = [
            *(network.get_input(index) for index in range(network.num_inputs)),
            *(network.get_output(index) for index in range(network.num_outputs)),
        ]
        specs = {spec.name: spec for spec in (*segment.inputs, *segment.outputs)}
        if {tensor.name for tensor in parsed} != set(specs):
            raise CheckFailedError(
                f"{self._subject}: {self._trt.label} reads and writes "
                f"{sorted(tensor.name for tensor in parsed)}, the bundle {sorted(specs)}."
            )
        for tensor in parsed:
            found, wanted = _DTYPES.get(tensor.dtype.name), specs[tensor.name].dtype
            if found != wanted:
                raise CheckFailedError(
                    f"{self._subject}: {self._trt.label} makes tensor {tensor.name!r} {found}, "
                    f"and the bundle has it {wanted}."
                )
            layout = self._request.layouts[tensor.name]
            tensor.allowed_formats = 1 << int(getattr(self._module.TensorFormat, FORMATS[layout]))

    def _add_profile(self, config: Any) -> None:
        dynamic = [spec for spec in self._request.segment.inputs if spec.is_dynamic]
        if not dynamic:
            return
        profile = self._builder.create_optimization_profile()
        for spec in dynamic:
            shapes = self._sized(spec, "smallest", "optimal", "largest")
            profile.set_shape(spec.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise self._refusal(f"{self._trt.label} refuses its shapes ({self._log.reason})")

    def _sized(self, spec: TensorSpec, *which: str) -> tuple[tuple[int, ...], ...]:
        """Return the shape of a tensor at some of the sizes that the engine accepts."""
        sizes = self._request.options.sizes
        unknown = [d for d in spec.shape if isinstance(d, str) and d not in sizes]
        if unknown:
            problem = f"tensor {spec.name!r} has the dimension {unknown[0]!r} of unknown size"
            raise InputError(self._subject, problem, "Give its range with --shapes")
        return tuple(
            spec.resolve({name: getattr(known, end) for name, known in sizes.items()})
            for end in which
        )

    def _load_timings(self, config: Any) -> None:
        path = self._request.timing_cache
        if path is None:
            return
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            problem = f"is no timing cache of {self._trt.label} on this GPU ({self._log.reason})"
            raise InputError(path, problem, "Give the name of a new file")
        self._timings = cache  # it must live until the engine is built

    def _save_timings(self) -> None:
        path = self._request.timing_cache
        if path is not None:
            files.write_bytes(path, bytes(self._timings.serialize()))

    def _tensors(self) -> tuple[EngineTensor, ...]:
        segment = self._request.segment
        return tuple(
            EngineTensor(
                name=spec.name,
                dtype=spec.dtype,
                shape=spec.shape,
                direction="input" if spec in segment.inputs else "output",
                layout=self._request.layouts[spec.name].label,
                size_bytes=self._request.layouts[spec.name].size_bytes(
                    self._largest(spec), spec.dtype
                ),
            )
            for spec in (*segment.inputs, *segment.outputs)
        )

    def _largest(self, spec: TensorSpec) -> tuple[int, ...]:
        return self._sized(spec, "largest")[0]

    def _audit(self, plan: bytes) -> Audit | None:
        if self._request.device is None:
            return None
        runtime = self._trt.runtime(self._log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        dynamic = [spec for spec in self._request.segment.inputs if spec.is_dynamic]
        if dynamic:
            # Without sizes, TensorRT 10 tells no tensor's type.
            context = engine.create_execution_context()
            if context is not None:
                for spec in dynamic:
                    context.set_input_shape(spec.name, self._sized(spec, "optimal")[0])
                inspector.execution_context = context
        text = inspector.get_engine_information(self._module.LayerInformationFormat.JSON)
        is_half = self._request.precision == "fp16"
        return audit_layers(
            text, full_precision_nodes(self._request.onnx_path) if is_half else None
        )


def _monitor(module: Any, progress: BuildProgress | None, cancelled: threading.Event | None) -> Any:
    """Return TensorRT's progress monitor; the last word it has is whether to go on."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if progress is not None:
                progress.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None:
                progress.step_complete(phase_name, step)
            return cancelled is None or not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if progress is not None:
                progress.phase_finish(phase_name)

    return Monitor()
