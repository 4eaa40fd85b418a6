"""The memory that a program works on: its buffers as NumPy arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.schedule.program import Copy, Run
from parnet_engines.segment_errors import SegmentFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.engine import Engine
    from parnet_engines.schedule.program import Program

    Shape = tuple[int, ...]

_ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register: no tensor shares either with another one."""


def find_shapes(
    program: Program,
    engines: Mapping[tuple[str, str], Engine],
    inputs: Sequence[NDArray[Any]],
) -> dict[str, Shape]:
    """Return the shape of every buffer for inputs of given shapes.

    Symbolic dimensions take the sizes that they have in the inputs. Where some buffer has
    a dimension that no input has, the segments are run once, one after another, to see.

    Parameters
    ----------
    program
        The program.
    engines
        An engine for each segment on each lane that runs it.
    inputs
        An array for each of ``program.inputs``.

    Raises
    ------
    SegmentFailedError
        When a segment fails in that run.
    """
    buffers = program.buffers_by_name
    sizes: dict[str, int] = {}
    for name, array in zip(program.inputs, inputs, strict=True):
        shape = buffers[name].tensor.shape
        sizes |= {d: n for d, n in zip(shape, array.shape, strict=True) if isinstance(d, str)}
    unknown = {
        dimension
        for buffer in program.buffers
        for dimension in buffer.tensor.shape
        if isinstance(dimension, str) and dimension not in sizes
    }
    if not unknown:
        return {buffer.name: buffer.tensor.resolve(sizes) for buffer in program.buffers}
    arrays: dict[str, NDArray[Any]] = dict(zip(program.inputs, inputs, strict=True))
    for step in program.steps:
        if isinstance(step, Copy):
            arrays[step.target] = arrays[step.source]
        elif isinstance(step, Run):
            engine = engines[step.segment, step.lane]
            named = zip(engine.inputs, step.inputs, strict=True)
            reads = {spec.name: arrays[buffer] for spec, buffer in named}
            try:
                found = engine.run(reads)
            except Exception as error:
                raise SegmentFailedError(step.segment, error) from error
            for spec, buffer in zip(engine.outputs, step.outputs, strict=True):
                arrays[buffer] = found[spec.name]
    return {name: array.shape for name, array in arrays.items()}


def allocate(program: Program, shapes: Mapping[str, Shape]) -> dict[str, NDArray[Any]]:
    """Return an array for every buffer, zero at first; those of one storage share memory.

    Parameters
    ----------
    program
        The program.
    shapes
        The shape of each buffer that a step or the caller uses.
    """
    needed: dict[str, int] = {}
    sizes = {}
    for buffer in program.buffers:
        if buffer.name not in shapes:
            continue
        item_bytes = np.dtype(buffer.tensor.dtype).itemsize
        sizes[buffer.name] = math.prod(shapes[buffer.name]) * item_bytes
        needed[buffer.storage] = max(needed.get(buffer.storage, 0), sizes[buffer.name])
    memory = {storage: _aligned(size) for storage, size in needed.items()}
    return {
        buffer.name: memory[buffer.storage][: sizes[buffer.name]]
        .view(buffer.tensor.dtype)
        .reshape(shapes[buffer.name])
        for buffer in program.buffers
        if buffer.name in shapes
    }


def _aligned(size_bytes: int) -> NDArray[np.uint8]:
    """Return zeros that start at a multiple of the alignment."""
    memory = np.zeros(size_bytes + _ALIGNMENT_BYTES, np.uint8)
    skipped = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[skipped : skipped + size_bytes]
