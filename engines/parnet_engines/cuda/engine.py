"""What an engine on a GPU is: one segment, or a whole network, enqueued on CUDA streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.engine import SegmentEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from parnet_export.stream_graph import Segment, TensorSpec


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """A tensor in the memory of a GPU that somebody else owns.

    Parameters
    ----------
    name
        Name of the tensor.
    dtype
        NumPy's name of the element type.
    shape
        All sizes known.
    pointer
        Address in the device's memory.
    device
        CUDA ordinal of the device.
    layout
        How the elements lie there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pointer: int
    device: int
    layout: TensorLayout = TensorLayout.LINEAR

    @property
    def size_bytes(self) -> int:
        """The memory that the tensor takes, padding included."""
        return self.layout.size_bytes(self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class EngineFile:
    """A file that an engine was loaded from.

    Parameters
    ----------
    path
        Where it lies.
    size_bytes
        Its size.
    """

    path: Path
    size_bytes: int


class CudaSegmentEngine(SegmentEngine):
    """What engines on GPUs have in common: a segment, a device and layouts of tensors.

    Parameters
    ----------
    segment
        Name and tensors of what the engine computes.
    device
        CUDA ordinal of the GPU that it is for.
    layouts
        How tensors lie that are not row-major.
    """

    def __init__(
        self, segment: Segment, device: int, layouts: Mapping[str, TensorLayout] | None = None
    ) -> None:
        super().__init__(segment)
        self._device = device
        self._layouts = dict(layouts or {})

    @property
    def device(self) -> int:
        """CUDA ordinal of the device that the engine was made for."""
        return self._device

    @property
    def file(self) -> EngineFile | None:
        """None: the engine was made from the graph itself."""
        return None

    def layout(self, tensor: str) -> TensorLayout:
        """Return the layout in which the engine reads or writes one of its tensors."""
        return self._layouts.get(tensor, TensorLayout.LINEAR)


class CudaEngine(Protocol):
    """A segment in executable form on one GPU.

    Engines know nothing of each other, of lanes, or of CUDA graphs.
    """

    @property
    def name(self) -> str:
        """The segment's name."""

    @property
    def device(self) -> int:
        """CUDA ordinal of the device that the engine was made for."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine reads."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine produces."""

    @property
    def file(self) -> EngineFile | None:
        """The file with the engine in it; None for runtimes that make it anew each time."""

    def layout(self, tensor: str) -> TensorLayout:
        """Return the layout in which the engine reads or writes one of its tensors."""

    def bind(
        self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]
    ) -> Callable[[int], None]:
        """Fix the memory that the engine works on, and return what enqueues it.

        Parameters
        ----------
        inputs, outputs
            Tensors on the engine's device in the order of the properties `inputs` and
            `outputs`, of their types and in their layouts. They stay where they are.

        Returns
        -------
        Callable
            Takes the handle of a CUDA stream, enqueues one execution there and returns
            without waiting for it. After its first call, which may allocate and synchronise,
            it does neither, so that a CUDA graph can capture it. Each binding has an
            execution context and workspace of its own; one thread at a time calls it.
        """

    def close(self) -> None:
        """Release contexts and memory. Closing twice does no harm; running afterwards does."""
