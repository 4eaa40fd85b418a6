"""One file for the weights that several ONNX graphs share.

ONNX lets an initializer be a reference to bytes of another file in the same
folder. The graph of the whole network and the graphs of its segments refer to
the same bytes, so the weights exist once, however many graphs read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

INLINE_BELOW_BYTES = 1024
"""Smaller tensors stay in the graphs: runtimes need shapes and axes to load a graph at all."""

ALIGNMENT_BYTES = 64
"""Where tensors start: a cache line, which also suits every vector instruction."""

PAGE_BYTES = 4096
"""Where tensors of at least `PAGED_FROM_BYTES` start, so that a runtime can map them
(the ONNX specification's advice on external data)."""

PAGED_FROM_BYTES = 1 << 20
"""From this size on, the padding before a page is less than half a percent."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of a tensor lie in a weights file."""

    tensor: ir.TensorProtocol
    offset_bytes: int
    size_bytes: int


def large_tensors(models: Iterable[ir.Model]) -> tuple[ir.TensorProtocol, ...]:
    """Return the initializers worth storing outside of the graphs, each tensor object once."""
    found: dict[int, ir.TensorProtocol] = {}
    for model in models:
        for value in _initializers(model):
            tensor = value.const_value
            if tensor is not None and _is_large(tensor):
                found.setdefault(id(tensor), tensor)
    return tuple(found.values())


def write_tensors(
    tensors: Sequence[ir.TensorProtocol], stream: IO[bytes]
) -> tuple[StoredTensor, ...]:
    """Write tensors one after another, little-endian, holding one of them in memory at a time."""
    stored = []
    end_bytes = 0
    for tensor in tensors:
        alignment_bytes = PAGE_BYTES if tensor.nbytes >= PAGED_FROM_BYTES else ALIGNMENT_BYTES
        padding_bytes = -end_bytes % alignment_bytes
        content = tensor.tobytes()
        stream.write(bytes(padding_bytes))
        stream.write(content)
        stored.append(StoredTensor(tensor, end_bytes + padding_bytes, len(content)))
        end_bytes += padding_bytes + len(content)
    return tuple(stored)


def refer_to(model: ir.Model, stored: Iterable[StoredTensor], file_name: str) -> ir.Model:
    """Return a copy of `model` whose stored initializers refer to bytes of `file_name`.

    Parameters
    ----------
    model
        Left as it is. The copy has its own nodes and values and shares the other tensors.
    stored
        What `write_tensors` returned; tensors are recognised as objects.
    file_name
        The weights file, in the folder where the copy is going to be saved.
    """
    places = {id(place.tensor): place for place in stored}
    copy = model.clone()
    for value in _initializers(copy):
        tensor = value.const_value
        place = places.get(id(tensor))
        if tensor is None:
            continue
        if place is None:
            if isinstance(tensor, ir.ExternalTensor):
                # A small tensor that its source keeps in another file, which the copy cannot reach.
                value.const_value = ir.Tensor(
                    tensor.numpy().copy(), dtype=tensor.dtype, name=value.name
                )
            continue
        value.const_value = ir.ExternalTensor(
            file_name,
            place.offset_bytes,
            place.size_bytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )
    return copy


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():  # the subgraphs of If and Loop have initializers, too
        yield from graph.initializers.values()


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= INLINE_BELOW_BYTES
