"""Engines that run a segment's ONNX graph by torch: on the CPU, and on CUDA streams.

They make lanes, copies, captures and timelines run on any machine with torch and a GPU, with
or without TensorRT.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parnet_engines.cuda.boundary import choose_layouts
from parnet_engines.cuda.engine import CudaSegmentEngine
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.engine import SegmentEngine
from parnet_engines.runtimes.torch_graph import TorchGraph
from parnet_engines.runtimes.torch_pool import TorchPool, release_unused
from parnet_engines.runtimes.torch_precision import float32_precision
from parnet_engines.tensorrt.bundle_engines import segment_of
from parnet_engines.tensorrt.engine_cache import onnx_path
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.engine import DeviceTensor
    from parnet_export.bundle import Bundle
    from parnet_export.stream_graph import Segment


class TorchEngine(SegmentEngine):
    """An ONNX file, run by torch on the CPU.

    Parameters
    ----------
    segment
        Name and tensors of what the file computes.
    path
        The ONNX file.

    Raises
    ------
    InputError
        When the file cannot be read, or has an operator that is not here.
    """

    def __init__(self, segment: Segment, path: Path) -> None:
        super().__init__(segment)
        self._graph: TorchGraph | None = TorchGraph(path, segment.name)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs; see `Engine.run`."""
        graph = _opened(self._graph, self.name)
        tensors = {s.name: torch.from_numpy(np.array(inputs[s.name])) for s in self.inputs}
        with torch.inference_mode():
            found = dict(zip(graph.outputs, graph(tensors), strict=True))
        return {spec.name: found[spec.name].contiguous().numpy() for spec in self.outputs}

    def bind(
        self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
    ) -> Callable[[], None]:
        """Fix the memory to work on; see `Engine.bind`."""
        graph = _opened(self._graph, self.name)
        reads = {s.name: torch.from_numpy(a) for s, a in zip(self.inputs, inputs, strict=True)}
        writes = {s.name: torch.from_numpy(a) for s, a in zip(self.outputs, outputs, strict=True)}
        return partial(_compute, graph, reads, writes)

    def close(self) -> None:
        """Release the weights, as soon as no binding is left."""
        self._graph = None


class TorchCudaEngine(CudaSegmentEngine):
    """An ONNX file, run by torch on a GPU.

    Parameters
    ----------
    segment
        Name and tensors of what the file computes.
    path
        The ONNX file.
    device
        CUDA ordinal.
    layouts
        How tensors lie that are not row-major.
    channels_last
        Whether images lie with their channels last inside, whatever the layout of the tensors
        around; see `TorchGraph`.
    tf32
        Whether convolutions and products of float32 may be rounded to TF32.

    Raises
    ------
    InputError
        When the file cannot be read, has an operator that is not here, or this torch has
        no kernels for the GPU.
    """

    def __init__(
        self,
        segment: Segment,
        path: Path,
        device: int = 0,
        *,
        layouts: Mapping[str, TensorLayout] | None = None,
        channels_last: bool = False,
        tf32: bool = False,
    ) -> None:
        require_kernels(device)
        super().__init__(segment, device, layouts)
        self._tf32 = tf32
        self._graph: TorchGraph | None = TorchGraph(
            path, segment.name, f"cuda:{device}", channels_last=channels_last
        )
        # The weights are there before any stream reads them. Waiting for the whole device would
        # spoil a capture that another thread has open on it.
        torch.cuda.current_stream(device).synchronize()

    def bind(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]
    ) -> Callable[[int], None]:
        """Fix the memory to work on; see `CudaEngine.bind`."""
        graph = _opened(self._graph, self.name)
        reads = {tensor.name: as_tensor(tensor) for tensor in inputs}
        writes = {tensor.name: as_tensor(tensor) for tensor in outputs}
        return _CudaBinding(graph, reads, writes, self._device, tf32=self._tf32)

    def close(self) -> None:
        """Release the weights, as soon as no binding is left."""
        if self._graph is not None:
            self._graph = None
            release_unused()


class _CudaBinding:
    """A graph, the memory it works on, and a pool for what lies in between."""

    def __init__(
        self,
        graph: TorchGraph,
        reads: Mapping[str, torch.Tensor],
        writes: Mapping[str, torch.Tensor],
        device: int,
        *,
        tf32: bool,
    ) -> None:
        self._graph = graph
        self._reads = reads
        self._writes = writes
        self._device = device
        self._tf32 = tf32
        self._pool = TorchPool(device)
        self._streams: dict[int, torch.cuda.ExternalStream] = {}

    def __call__(self, stream: int) -> None:
        """Enqueue one execution on a CUDA stream."""
        external = self._streams.get(stream)
        if external is None:
            external = torch.cuda.ExternalStream(stream, self._device)
            self._streams[stream] = external
        with self._pool.in_use(external), float32_precision(tf32=self._tf32):
            _compute(self._graph, self._reads, self._writes)


def strides_of(tensor: DeviceTensor) -> tuple[int, ...] | None:
    """Return the distances in bytes between neighbours along each axis; None for row-major.

    Raises
    ------
    ValueError
        When the layout is none that strides can express.
    """
    if tensor.layout is TensorLayout.LINEAR:
        return None
    if tensor.layout is not TensorLayout.HWC8:
        raise ValueError(f"torch has no layout {tensor.layout.label}")
    item = np.dtype(tensor.dtype).itemsize
    _, channels, height, width = tensor.shape
    pixel = -(-channels // 8) * 8 * item
    return (height * width * pixel, item, width * pixel, pixel)


def as_tensor(tensor: DeviceTensor) -> torch.Tensor:
    """Return a torch tensor that shares the memory of a GPU's tensor."""
    return torch.as_tensor(_Interface(tensor), device=f"cuda:{tensor.device}")


class _Interface:
    """A tensor as the CUDA array interface describes it (version 3)."""

    def __init__(self, tensor: DeviceTensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tensor.shape,
            "typestr": np.dtype(tensor.dtype).str,
            "data": (tensor.pointer, False),
            "strides": strides_of(tensor),
            "version": 3,
        }


def require_kernels(device: int) -> None:
    """Require that this torch can run on a GPU.

    Raises
    ------
    InputError
        When torch was built without CUDA, or for other GPUs.
    """
    subject = f"GPU {device}"
    if not torch.cuda.is_available():
        problem = "this torch was built without CUDA, or finds no GPU"
        raise InputError(subject, problem, "Install torch for CUDA, or use another engine")
    major, minor = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    wanted = f"sm_{major}{minor}"
    # Kernels of the same generation run, and intermediate code of an older one is compiled.
    runs = any(_fits(architecture, major, minor) for architecture in built_for)
    if not runs:
        raise InputError(
            subject,
            f"is {wanted}, and this torch was built for {', '.join(built_for)}",
            "Install a torch that was built for it, or use another engine",
        )


def _fits(architecture: str, major: int, minor: int) -> bool:
    kind, _, digits = architecture.partition("_")
    number = int("".join(c for c in digits if c.isdigit()) or 0)
    if kind == "compute":
        return number <= 10 * major + minor
    return number // 10 == major and number % 10 <= minor


def load_engines(
    bundle: Bundle,
    names: Iterable[str],
    driver: CudaDriver,  # noqa: ARG001 - torch brings its own
    device: int,
    *,
    boundary: Boundary | None = None,
) -> dict[str, TorchCudaEngine]:
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
        How tensors between engines lie; None: as torch computes them, in vectors where the
        precision has any.

    Raises
    ------
    InputError
        When torch cannot run on the GPU, or a graph has an operator that is not here.
    """
    graph = bundle.stream_graph
    outside = [spec.name for spec in (*graph.inputs, *graph.outputs)]
    # A segment's tensors do not tell it: those of the whole network are float32 in any case.
    channels_last = bundle.manifest.precision == "fp16"
    engines = {}
    for name in names:
        segment = segment_of(bundle, name)
        tensors = (*segment.inputs, *segment.outputs)
        layouts = choose_layouts(tensors, boundary or "vector", outside)
        path = onnx_path(bundle, name)
        engines[name] = TorchCudaEngine(
            segment, path, device, layouts=layouts, channels_last=channels_last
        )
    return engines


def _compute(
    graph: TorchGraph,
    reads: Mapping[str, torch.Tensor],
    writes: Mapping[str, torch.Tensor],
) -> None:
    with torch.inference_mode():
        for name, value in zip(graph.outputs, graph(reads), strict=True):
            writes[name].copy_(value)


def _opened(graph: TorchGraph | None, name: str) -> TorchGraph:
    if graph is None:
        raise ValueError(f"engine {name!r} is closed")
    return graph
