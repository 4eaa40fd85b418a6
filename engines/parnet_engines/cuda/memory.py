"""The memory that a program works on, in GPUs: sizes, layouts, addresses."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.cuda.devices import ordinal_of
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.schedule.program import Copy, Run
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.cuda.engine import CudaEngine
    from parnet_engines.cuda.resources import CudaResources
    from parnet_engines.schedule.program import Buffer, Program

    Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Where one buffer of a program lies.

    Parameters
    ----------
    address
        In the memory of the device, or of a caller there.
    device
        The device's ordinal.
    shape
        All sizes known.
    dtype
        NumPy's name of the element type.
    layout
        How the elements lie.
    """

    address: int
    device: int
    shape: tuple[int, ...]
    dtype: str
    layout: TensorLayout

    @property
    def size_bytes(self) -> int:
        """The memory it takes, padding included."""
        return self.layout.size_bytes(self.shape, self.dtype)


def array_at(address: int, shape: Shape, dtype: str) -> NDArray[Any]:
    """Return host memory at an address as an array; it has to outlive the array."""
    kind = np.dtype(dtype)
    memory = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), kind).reshape(shape)


def from_layout(memory: NDArray[np.uint8], region: Region) -> NDArray[Any]:
    """Return a tensor that lies in any layout as a row-major array without padding.

    Parameters
    ----------
    memory
        The bytes of the region.
    region
        What they hold.
    """
    values = memory.view(region.dtype)
    layout = region.layout
    if layout is TensorLayout.LINEAR:
        return values.reshape(region.shape)
    items, channels, *image = region.shape
    vectors = -(-channels // layout.vector)
    if layout is TensorLayout.HWC8:
        pixels = values.reshape(items, *image, vectors * layout.vector)
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 1)[:, :channels])
    blocks = values.reshape(items, vectors, *image, layout.vector)
    whole = np.moveaxis(blocks, -1, 2).reshape(items, vectors * layout.vector, *image)
    return np.ascontiguousarray(whole[:, :channels])


def resolve_shapes(program: Program, inputs: Sequence[Shape]) -> dict[str, Shape]:
    """Return the shape of every buffer for network inputs of given shapes.

    Raises
    ------
    InputError
        When a tensor between segments has a symbolic dimension that no input has.
    """
    sizes: dict[str, int] = {}
    for name, given in zip(program.inputs, inputs, strict=True):
        shape = program.buffers_by_name[name].tensor.shape
        sizes |= {d: n for d, n in zip(shape, given, strict=True) if isinstance(d, str)}
    for buffer in program.buffers:
        for dimension in buffer.tensor.shape:
            if isinstance(dimension, str) and dimension not in sizes:
                raise InputError(
                    f"tensor {buffer.tensor.name!r}",
                    f"has the dimension {dimension!r}, whose size follows from no input",
                    "Run it on the CPU, or export the network with this dimension fixed",
                )
    return {buffer.name: buffer.tensor.resolve(sizes) for buffer in program.buffers}


def find_layouts(
    program: Program, engines: Mapping[tuple[str, str], CudaEngine]
) -> dict[str, TensorLayout]:
    """Return the layout of every buffer, which all engines that use it agree on.

    Raises
    ------
    InputError
        When two engines want a tensor in different layouts, or an engine wants one of the
        network's inputs or outputs in another layout than the linear one.
    """
    found = dict.fromkeys((*program.inputs, *program.outputs), TensorLayout.LINEAR)
    for step in program.steps:
        if isinstance(step, Copy):
            layout = found.setdefault(step.source, TensorLayout.LINEAR)
            _agree(found, step.target, layout, program)
        elif isinstance(step, Run):
            for buffer, layout in _used_by(step, engines[step.segment, step.lane]):
                _agree(found, buffer, layout, program)
    return found


def _used_by(step: Run, engine: CudaEngine) -> Iterator[tuple[str, TensorLayout]]:
    specs = (*engine.inputs, *engine.outputs)
    for spec, buffer in zip(specs, (*step.inputs, *step.outputs), strict=True):
        yield buffer, engine.layout(spec.name)


def _agree(
    found: dict[str, TensorLayout], buffer: str, layout: TensorLayout, program: Program
) -> None:
    known = found.setdefault(buffer, layout)
    if known is not layout:
        tensor = program.buffers_by_name[buffer].tensor.name
        raise InputError(
            f"engines that use tensor {tensor!r}",
            f"want it in two layouts, {known.label} and {layout.label}",
            "Build all engines of the bundle again, together",
        )


def allocate_buffers(
    program: Program,
    shapes: Mapping[str, Shape],
    layouts: Mapping[str, TensorLayout],
    resources: CudaResources,
) -> dict[str, Region]:
    """Return memory for every buffer that a step or the caller uses.

    Buffers of one storage share memory.
    """
    used = dict.fromkeys(
        (*program.inputs, *program.outputs, *(n for s in program.steps for n in s.reads + s.writes))
    )
    buffers = [program.buffers_by_name[name] for name in used]
    needed: dict[str, int] = {}
    for buffer in buffers:
        size_bytes = _region(buffer, 0, shapes, layouts).size_bytes
        needed[buffer.storage] = max(needed.get(buffer.storage, 0), size_bytes)
    places: dict[str, int] = {}
    for buffer in buffers:
        if buffer.storage not in places:
            device = ordinal_of(buffer.device)
            places[buffer.storage] = resources.allocate(device, needed[buffer.storage])
    return {b.name: _region(b, places[b.storage], shapes, layouts) for b in buffers}


def _region(
    buffer: Buffer,
    address: int,
    shapes: Mapping[str, Shape],
    layouts: Mapping[str, TensorLayout],
) -> Region:
    tensor, shape = buffer.tensor, shapes[buffer.name]
    layout = layouts.get(buffer.name, TensorLayout.LINEAR)
    return Region(address, ordinal_of(buffer.device), shape, tensor.dtype, layout)
