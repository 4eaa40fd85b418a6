"""TensorRT as a Python module: ``tensorrt`` 10 and 11, or ``tensorrt_rtx``, which share an API.

All that differs between them stands here; everywhere else they are the same:

- Version 11 knows strongly typed networks only; 10 must be asked for them.
- ``tensorrt`` builds for the GPU that it runs on. ``tensorrt_rtx`` needs none, and can be told
  which compute capabilities to build for.
- ``tensorrt_rtx`` has neither timing caches nor engines for other versions of itself. It
  compiles kernels when an engine first runs, and has a runtime cache for them.
- Engines of ``tensorrt_rtx`` may allocate memory while they run, unless they were built not to.
- The memory that a context takes has another name before version 10.1.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from parnet_engines.tensorrt.log import logger_of
from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.tensorrt.log import LogRecording

Backend = Literal["tensorrt", "tensorrt-rtx"]

OLDEST_MAJOR = 10
"""The first version of ``tensorrt`` whose networks can be strongly typed throughout."""

RTX_OLDEST_CAPABILITY = (8, 0)
"""TensorRT-RTX builds for this compute capability and later ones by default (its manual)."""

LABELS: dict[Backend, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
"""How people call the backends."""

_STATIC_MEMORY = "REQUIRE_USER_ALLOCATION"
"""The builder flag of engines that allocate nothing while they run."""

_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS: dict[Backend, str] = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
_DISTRIBUTIONS: dict[Backend, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}


@dataclass(frozen=True, slots=True)
class TensorRt:
    """An imported TensorRT.

    Parameters
    ----------
    backend
        Which of the two it is.
    module
        The Python module.
    version
        As `installed_version` tells it.
    """

    backend: Backend
    module: Any
    version: str

    @property
    def label(self) -> str:
        """Name and version, for people."""
        return f"{LABELS[self.backend]} {self.version}"

    def builder(self, log: LogRecording) -> Any:
        """Return a new builder; raises `InputError` where TensorRT does not start."""
        return self._start("Builder", log)

    def runtime(self, log: LogRecording) -> Any:
        """Return a new runtime; raises `InputError` where TensorRT does not start."""
        return self._start("Runtime", log)

    def _start(self, kind: str, log: LogRecording) -> Any:
        try:
            return getattr(self.module, kind)(logger_of(self.module))
        except TypeError as error:  # of its bindings: TensorRT has returned no object
            remedy = "Upgrade the NVIDIA driver, or install a TensorRT for its version of CUDA"
            raise InputError(self.label, f"does not start here ({log.reason})", remedy) from error

    def network_flags(self) -> int:
        """Return the flags of a network whose tensors have the types that the graph gives them."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def set_compute_capabilities(self, config: Any, capabilities: Sequence[str]) -> None:
        """Choose the GPUs that an engine is built for, where the backend lets one choose.

        Raises
        ------
        InputError
            When TensorRT-RTX cannot build for one of them.
        """
        if self.backend == "tensorrt" or not capabilities:
            return
        known = self.module.ComputeCapability
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            value = getattr(known, f"SM{capability.replace('.', '')}", None)
            if value is None or not config.set_compute_capability(value, index):
                names = sorted(
                    (name for name in dir(known) if name.startswith("SM")),
                    key=lambda name: int(name[2:]),
                )
                choices = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in names)
                problem = f"{self.label} cannot build for it, only for {choices}"
                remedy = "Choose one of these, or use --backend tensorrt on a machine with that GPU"
                raise InputError(f"compute capability {capability}", problem, remedy)

    def forbid_memory_at_run_time(self, config: Any) -> bool:
        """Have engines work in what a context allocates at first, so that graphs can capture them.

        Returns
        -------
        bool
            Whether there was anything to forbid. TensorRT-RTX then refuses networks that cannot
            do without: those with sizes that depend on data, or very large ones.
        """
        flag = getattr(self.module.BuilderFlag, _STATIC_MEMORY, None)  # TensorRT-RTX since 1.2
        if flag is None:
            return False
        config.set_flag(flag)
        return True

    def allow_memory_at_run_time(self, config: Any) -> None:
        """Undo `forbid_memory_at_run_time`."""
        config.clear_flag(getattr(self.module.BuilderFlag, _STATIC_MEMORY))

    def context_memory_bytes(self, engine: Any) -> int:
        """Return the GPU memory that each execution context of an engine takes."""
        if hasattr(engine, "device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        return int(engine.device_memory_size)

    def runtime_config(self, engine: Any) -> Any | None:
        """Return how contexts of an engine are to run; None where that cannot be configured.

        Whole programs are captured into CUDA graphs here, so that TensorRT-RTX must make
        none of its own. By default it first runs a sizes-agnostic kernel for dynamic shapes
        while it compiles a better one in the background, and a graph that was captured
        meanwhile would keep the slow one for good: it has to wait for the better one.
        """
        if self.backend == "tensorrt":
            return None
        config = engine.create_runtime_config()
        if hasattr(config, "cuda_graph_strategy"):  # since 1.3
            config.cuda_graph_strategy = self.module.CudaGraphStrategy.DISABLED
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            strategies = self.module.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config


def installed_backends() -> tuple[Backend, ...]:
    """Return the backends that are installed, TensorRT first. Nothing is imported."""
    return tuple(
        backend
        for backend, module in _MODULES.items()
        if importlib.util.find_spec(module) is not None
    )


def choose_backend(wanted: Backend | Literal["auto"], *, other_gpus: bool = False) -> Backend:
    """Return the backend that ``auto`` stands for. Nothing is imported.

    Parameters
    ----------
    wanted
        A backend stays what it is. ``"auto"`` is TensorRT where it is installed, else
        TensorRT-RTX.
    other_gpus
        Whether engines are for GPUs that may not be in this machine, which only
        TensorRT-RTX can build for.

    Raises
    ------
    MissingBackendError
        When it is not installed; for ``"auto"``, when none is.
    """
    choices: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")
    if wanted != "auto":
        choices = (wanted,)
    elif other_gpus:
        choices = ("tensorrt-rtx",)
    installed = installed_backends()
    for backend in choices:
        if backend in installed:
            return backend
    last = choices[-1]
    raise MissingBackendError(_MODULES[last], "Building TensorRT engines", _install(last))


def installed_version(backend: Backend) -> str:
    """Return the version of an installed backend, without importing it if possible.

    Raises
    ------
    MissingBackendError
        When it is not installed.
    """
    for name in _DISTRIBUTIONS[backend]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return str(_import(backend).__version__)  # installed by a system's package manager


def import_tensorrt(backend: Backend) -> TensorRt:
    """Import a backend.

    Raises
    ------
    MissingBackendError
        When it is not installed. One that is installed and broken raises what it raises.
    InputError
        When it is too old.
    """
    module = _import(backend)
    version = installed_version(backend)
    if backend == "tensorrt" and int(version.partition(".")[0]) < OLDEST_MAJOR:
        remedy = f"Upgrade it: {_install(backend)}"
        raise InputError(f"tensorrt {version}", f"is older than {OLDEST_MAJOR}", remedy)
    if hasattr(module, "init_libnvinfer_plugins"):
        # Some operators are plugins, and the parser finds only those that are registered.
        module.init_libnvinfer_plugins(logger_of(module), "")
    return TensorRt(backend, module, version)


def _import(backend: Backend) -> Any:
    name = _MODULES[backend]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingBackendError(name, f"{LABELS[backend]}", _install(backend)) from error


def _install(backend: Backend) -> str:
    return f"pip install 'parnet-export[{_EXTRAS[backend]}]'"
