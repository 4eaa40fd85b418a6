"""Engines that run on a GPU by TensorRT or TensorRT-RTX."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any

from parnet_engines.cuda.driver import CudaError, on_device
from parnet_engines.cuda.engine import CudaSegmentEngine, EngineFile
from parnet_engines.tensorrt.build import FORMATS
from parnet_engines.tensorrt.bundle_engines import segment_of
from parnet_engines.tensorrt.engine_cache import build_command, require_plan
from parnet_engines.tensorrt.engine_finder import backend_of, find_engine
from parnet_engines.tensorrt.engine_sidecar import read_sidecar
from parnet_engines.tensorrt.log import recording, take_error
from parnet_engines.tensorrt.module import import_tensorrt
from parnet_engines.tensorrt.options import EngineOptions
from parnet_export import files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Literal

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.cuda.driver import CudaDriver, Gpu
    from parnet_engines.cuda.engine import DeviceTensor
    from parnet_engines.tensorrt.engine_sidecar import Sidecar
    from parnet_engines.tensorrt.log import LogRecording
    from parnet_engines.tensorrt.module import Backend, TensorRt
    from parnet_export.bundle import Bundle
    from parnet_export.stream_graph import Segment, TensorSpec

_CACHE_SUFFIX = ".kernels"
_DEFAULT_STREAMS = frozenset({0, 1, 2})
"""Handles of CUDA's default streams, the legacy one and the one per thread."""


class EnqueueRefusedError(RuntimeError):
    """TensorRT has refused to enqueue an engine, for example while a CUDA graph is captured."""


class TensorRtEngine(CudaSegmentEngine):
    """An engine on one GPU; see `parnet_engines.cuda.engine.CudaEngine`.

    What `bind` returns runs in the CUDA context that is current in the calling thread, which
    must be the primary one of the engine's device. The engine keeps that context alive.

    Parameters
    ----------
    trt
        The TensorRT that runs it.
    segment
        Name and tensors of what it computes.
    path
        Its sidecar.
    driver
        The driver of the GPU.
    device
        CUDA ordinal of the GPU.

    Raises
    ------
    InputError
        When the engine is damaged, or TensorRT refuses to load it.
    """

    def __init__(
        self, trt: TensorRt, segment: Segment, path: Path, driver: CudaDriver, device: int
    ) -> None:
        self._sidecar = read_sidecar(path)
        layouts = {t.name: t.tensor_layout for t in self._sidecar.tensors}
        super().__init__(segment, device, layouts)
        self._trt = trt
        self._driver = driver
        self._path = path
        self._contexts: set[_Context] = set()  # those in use
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._kernels: Any = None
        plan = require_plan(path, self._sidecar)
        driver.retain_context(device)
        try:
            with self._on_device() as log:
                self._load(plan, log)
        except BaseException:
            driver.release_context(device)
            raise

    @property
    def path(self) -> Path:
        """Its sidecar's path."""
        return self._path

    @property
    def sidecar(self) -> Sidecar:
        """What is known about the engine."""
        return self._sidecar

    @property
    def file(self) -> EngineFile:
        """Its plan."""
        return EngineFile(self._path.with_name(self._sidecar.plan), self._sidecar.plan_bytes)

    @property
    def gpu(self) -> Gpu:
        """The GPU that it runs on."""
        return self._driver.gpus()[self._device]

    @property
    def aux_streams(self) -> int:
        """How many CUDA streams it uses besides the one it is enqueued on."""
        return int(self._open_engine().num_aux_streams)

    @property
    def context_memory_bytes(self) -> int:
        """The GPU memory that each binding takes besides the tensors."""
        return self._trt.context_memory_bytes(self._open_engine())

    def bind(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]
    ) -> Callable[[int], None]:
        """Fix the memory to work on; see `CudaEngine.bind`.

        What it returns raises `EnqueueRefusedError` when TensorRT refuses, and ValueError when
        the engine is closed or the CUDA stream is a default one.

        Raises
        ------
        ValueError
            When the engine is closed, or a tensor is not the one that is expected.
        InputError
            When TensorRT has no memory for another context, or refuses the shapes.
        """
        engine = self._open_engine()
        for spec, tensor in zip((*self.inputs, *self.outputs), (*inputs, *outputs), strict=True):
            self._require_same(spec, tensor)
        with self._on_device() as log:
            context = _Context(self._new_context(engine, log))
            self._contexts.add(context)
            binding = _Binding(self.name, context)
            # Sessions bind anew for each size of a batch, and drop what they no longer need.
            weakref.finalize(binding, self._release, context).atexit = False
            self._set_shapes(context.native, inputs, outputs, log)
            for tensor in (*inputs, *outputs):
                if not context.native.set_tensor_address(tensor.name, tensor.pointer):
                    raise self._refusal(f"the address of tensor {tensor.name!r}", log)
        return binding

    def close(self) -> None:
        """Release contexts and memory. Closing twice does no harm; running afterwards does."""
        if self._engine is None:
            return
        with self._on_device():
            self._save_kernels()
            for context in tuple(self._contexts):  # Python's collector may release some meanwhile
                context.native = None
            self._contexts.clear()
            # Contexts, engine and runtime must go in this order.
            self._kernels = self._config = None
            self._engine = None
            self._runtime = None
        self._driver.release_context(self._device)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[LogRecording]:
        """Have the engine's device current meanwhile, and record what TensorRT logs."""
        with on_device(self._driver, self._device), recording() as log:
            yield log

    def _load(self, plan: bytes, log: LogRecording) -> None:
        runtime = self._trt.runtime(log)
        if self._sidecar.recipe.options.version_compatible:
            runtime.engine_host_code_allowed = True  # such a plan brings its own runtime along
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            problem = f"device {self._device} cannot load it ({log.reason})"
            raise InputError(
                self._path.with_name(self._sidecar.plan),
                f"{self._sidecar.built_for}, and {problem}",
                self._remedy,
            )
        for name, layout in self._layouts.items():
            found = engine.get_tensor_format(name).name
            if found != FORMATS[layout]:
                problem = f"tensor {name!r} is {found}, and {FORMATS[layout]} in the sidecar"
                raise InputError(self._path, problem, self._remedy)
        self._runtime, self._engine = runtime, engine

    @property
    def _remedy(self) -> str:
        recipe = self._sidecar.recipe
        command = build_command(
            self._path.parents[2], self.name, recipe.target.backend, self._device, recipe.options
        )
        return f"Build it again: {command}"

    def _new_context(self, engine: Any, log: LogRecording) -> Any:
        """Return a new execution context of TensorRT, with memory of its own."""
        if self._config is None:
            self._config = self._trt.runtime_config(engine)
            self._load_kernels()
        context = (
            engine.create_execution_context()
            if self._config is None
            else engine.create_execution_context(self._config)
        )
        if context is None:
            raise self._refusal("another execution context", log)
        # Engines are built to tell everything to the audit; enqueuing need not pay for that.
        context.nvtx_verbosity = self._trt.module.ProfilingVerbosity.LAYER_NAMES_ONLY
        return context

    def _release(self, context: _Context) -> None:
        """Give back the memory of a context that nothing can enqueue any more."""
        if context in self._contexts:  # or the engine is closed
            self._contexts.discard(context)
            with contextlib.suppress(CudaError), self._on_device():
                context.native = None

    def _set_shapes(
        self,
        context: Any,
        inputs: Sequence[DeviceTensor],
        outputs: Sequence[DeviceTensor],
        log: LogRecording,
    ) -> None:
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            if spec.is_dynamic and not context.set_input_shape(tensor.name, tensor.shape):
                raise self._refusal(f"shape {tensor.shape} of tensor {tensor.name!r}", log)
        for spec, tensor in zip(self.outputs, outputs, strict=True):
            if spec.is_dynamic:
                found = tuple(context.get_tensor_shape(tensor.name))
                if found != tensor.shape:
                    raise ValueError(
                        f"engine {self.name!r} makes tensor {tensor.name!r} of shape {found}, "
                        f"and there is memory for {tensor.shape}"
                    )

    def _require_same(self, spec: TensorSpec, tensor: DeviceTensor) -> None:
        fits = len(spec.shape) == len(tensor.shape) and all(
            isinstance(wanted, str) or wanted == given
            for wanted, given in zip(spec.shape, tensor.shape, strict=True)
        )
        wanted = (spec.name, spec.dtype, self._device, self._layouts[spec.name])
        if not fits or wanted != (tensor.name, tensor.dtype, tensor.device, tensor.layout):
            raise ValueError(f"engine {self.name!r} wants {spec} in {wanted[3]}, not {tensor}")

    def _refusal(self, what: str, log: LogRecording) -> InputError:
        problem = f"{self._trt.label} refuses {what} on device {self._device} ({log.reason})"
        return InputError(
            f"engine {self.name!r}", problem, "Free GPU memory, or build for other --shapes"
        )

    def _open_engine(self) -> Any:
        if self._engine is None:
            raise ValueError(f"engine {self.name!r} is closed")
        return self._engine

    def _load_kernels(self) -> None:
        """Take kernels that TensorRT-RTX compiled in an earlier process, if they suit this GPU."""
        if self._config is None:
            return
        self._kernels = self._config.create_runtime_cache()
        with contextlib.suppress(OSError):
            # One of another GPU, driver or version is refused, and replaced on closing.
            self._kernels.deserialize(self._path.with_suffix(_CACHE_SUFFIX).read_bytes())
        self._config.set_runtime_cache(self._kernels)

    def _save_kernels(self) -> None:
        if self._kernels is None:
            return
        content = self._kernels.serialize()
        if content is not None:
            with contextlib.suppress(InputError):  # a bundle may lie where nobody writes
                files.write_bytes(self._path.with_suffix(_CACHE_SUFFIX), bytes(content))


class _Context:
    """An execution context of TensorRT, which the engine can take away from its binding."""

    __slots__ = ("native",)

    def __init__(self, native: Any) -> None:
        self.native = native


class _Binding:
    """One execution context of an engine, ready to be enqueued."""

    __slots__ = ("__weakref__", "context", "name")

    def __init__(self, name: str, context: _Context) -> None:
        self.name = name
        self.context = context

    def __call__(self, stream: int) -> None:
        if stream in _DEFAULT_STREAMS:
            raise ValueError(f"engine {self.name!r} runs on no default CUDA stream")
        native = self.context.native
        if native is None:
            raise ValueError(f"engine {self.name!r} is closed")
        if not native.execute_async_v3(stream):
            reason = take_error() or "no reason given"
            raise EnqueueRefusedError(
                f"TensorRT refused to enqueue engine {self.name!r} ({reason})"
            )


def load_engines(
    bundle: Bundle,
    names: Iterable[str],
    driver: CudaDriver,
    device: int,
    *,
    backend: Backend | Literal["auto"] = "auto",
    boundary: Boundary | None = None,
    max_aux_streams: int | None = None,
) -> dict[str, TensorRtEngine]:
    """Load engines that `parnet-export build` has built.

    Parameters
    ----------
    bundle
        The bundle that holds them.
    names
        Segments, or the whole graph by the name `WHOLE`.
    driver, device
        The GPU, and its driver.
    backend
        Whose engines; ``"auto"``: of what is installed, the first that the bundle has any of.
    max_aux_streams
        Which engines; see `EngineOptions`.
    boundary
        Which ones, too; None: those that are built unless asked otherwise, ``"linear"``.

    Raises
    ------
    InputError
        When one was not built for this GPU, graph or version of TensorRT, or is damaged.
    MissingBackendError
        When the backend is not installed.
    """
    chosen = backend_of(bundle, backend)
    gpu = driver.gpus()[device]
    trt = import_tensorrt(chosen)
    options = EngineOptions(boundary=boundary or "linear", max_aux_streams=max_aux_streams)
    paths = {name: find_engine(bundle, name, trt, gpu, options) for name in names}
    with contextlib.ExitStack() as undo:
        engines = {}
        for name, path in paths.items():
            engines[name] = TensorRtEngine(trt, segment_of(bundle, name), path, driver, device)
            undo.callback(engines[name].close)
        undo.pop_all()
    return engines
