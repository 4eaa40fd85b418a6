"""Engines that run on a GPU by ONNX Runtime's CUDA provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.cuda.engine import CudaSegmentEngine
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.planning.layouts import whole_graph
from parnet_export.errors import InputError
from parnet_export.graphs.onnx_runtime import import_onnxruntime, runtime_failures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.engine import DeviceTensor
    from parnet_export.bundle import Bundle
    from parnet_export.stream_graph import Segment

_PROVIDER = "CUDAExecutionProvider"
_ERRORS_ONLY = 3  # ONNX Runtime's severity, from 0 (verbose) to 4 (fatal)


class OrtCudaEngine(CudaSegmentEngine):
    """An ONNX file, run by ONNX Runtime on a GPU.

    ONNX Runtime fixes the CUDA stream when it loads a graph, so each binding loads its own on
    its first call.

    Parameters
    ----------
    segment
        Name and tensors of what the file computes.
    path
        The ONNX file.
    device
        CUDA ordinal.
    tf32
        Whether convolutions and products of float32 may be rounded to TF32.

    Raises
    ------
    MissingBackendError
        When ONNX Runtime is not installed.
    InputError
        When this ONNX Runtime has no CUDA provider.
    """

    def __init__(
        self, segment: Segment, path: Path, device: int = 0, *, tf32: bool = False
    ) -> None:
        super().__init__(segment, device)
        self._onnxruntime = import_onnxruntime("Running by ONNX Runtime")
        if _PROVIDER not in self._onnxruntime.get_available_providers():
            raise InputError(
                "engine 'onnxruntime'",
                "is installed for the CPU only",
                "Install it for GPUs: pip uninstall onnxruntime; pip install onnxruntime-gpu",
            )
        self._path = path
        self._tf32 = tf32
        self._is_closed = False

    def bind(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]
    ) -> Callable[[int], None]:
        """Fix the memory to work on; see `CudaEngine.bind`.

        Raises
        ------
        ValueError
            When the engine is closed.
        """
        if self._is_closed:
            raise ValueError(f"engine {self.name!r} is closed")
        return _Binding(self, tuple(inputs), tuple(outputs))

    def close(self) -> None:
        """Refuse further bindings; those that are there own what they use."""
        self._is_closed = True

    def open_session(self, stream: int) -> Any:
        """Return an ONNX Runtime session that works on a CUDA stream.

        Raises
        ------
        InputError
            When ONNX Runtime cannot load the file on this GPU.
        """
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        settings = {
            "device_id": str(self._device),
            "user_compute_stream": str(stream),
            "use_tf32": str(int(self._tf32)),
        }
        try:
            session = self._onnxruntime.InferenceSession(
                self._path, options, providers=[(_PROVIDER, settings)]
            )
        except runtime_failures() as error:
            raise InputError(
                self._path,
                f"cannot be loaded by ONNX Runtime on GPU {self._device} ({error})",
                "Upgrade onnxruntime-gpu, or use another engine",
            ) from error
        if _PROVIDER not in session.get_providers():
            raise InputError(
                self._path,
                f"ONNX Runtime found its CUDA provider unusable on GPU {self._device}",
                "Install the versions of CUDA and cuDNN that onnxruntime-gpu asks for",
            )
        return session

    def run_options(self) -> Any:
        """Return options that keep ONNX Runtime from waiting for the GPU after a run."""
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options


class _Binding:
    """A graph, loaded for one CUDA stream and bound to device memory."""

    def __init__(
        self,
        engine: OrtCudaEngine,
        inputs: tuple[DeviceTensor, ...],
        outputs: tuple[DeviceTensor, ...],
    ) -> None:
        self._engine = engine
        self._inputs = inputs
        self._outputs = outputs
        self._options = engine.run_options()
        self._on_stream: dict[int, tuple[Any, Any]] = {}

    def __call__(self, stream: int) -> None:
        """Enqueue one execution on a CUDA stream."""
        if stream not in self._on_stream:
            self._on_stream[stream] = self._bound(stream)
            # The first run finds out what memory a run takes, and the second allocates that.
            self._run(stream)
        self._run(stream)

    def _run(self, stream: int) -> None:
        session, binding = self._on_stream[stream]
        session.run_with_iobinding(binding, self._options)

    def _bound(self, stream: int) -> tuple[Any, Any]:
        session = self._engine.open_session(stream)
        binding = session.io_binding()
        for tensors, bind in (
            (self._inputs, binding.bind_input),
            (self._outputs, binding.bind_output),
        ):
            for tensor in tensors:
                bind(
                    tensor.name,
                    "cuda",
                    tensor.device,
                    np.dtype(tensor.dtype),
                    tensor.shape,
                    tensor.pointer,
                )
        return session, binding


def load_engines(
    bundle: Bundle,
    names: Iterable[str],
    driver: CudaDriver,  # noqa: ARG001 - ONNX Runtime brings its own
    device: int,
    *,
    boundary: Boundary | None = None,
) -> dict[str, OrtCudaEngine]:
    """Load graphs of a bundle on a GPU.

    Parameters
    ----------
    bundle
        The bundle.
    names
        Segments, or the whole graph by the name `WHOLE`.
    driver, device
        The GPU's ordinal, and its driver.
    boundary
        How tensors between engines lie: row by row, which is all that there is.

    Raises
    ------
    MissingBackendError
        When ONNX Runtime is not installed.
    InputError
        When this ONNX Runtime has no CUDA provider, or vectors are asked for.
    """
    if boundary == "vector":
        problem = "takes and gives tensors row by row only"
        raise InputError("engine 'onnxruntime'", problem, "Use boundary linear, or another engine")
    graph = bundle.stream_graph
    whole = whole_graph(graph, bundle.manifest.whole_cost)
    return {
        name: OrtCudaEngine(
            (whole if name == WHOLE else graph)[name],
            bundle.whole_path if name == WHOLE else bundle.segment_path(name),
            device,
        )
        for name in names
    }
