"""The stream graph: which segments there are and who feeds whom.

A *segment* is a subgraph that runs as one engine. A *stream graph* is the
directed acyclic graph of segments, joined by named tensors. Both are plain
values: they load neither torch nor a runtime, and serialise as they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, type and shape of one tensor.

    Parameters
    ----------
    name
        The tensor's name in the ONNX graph.
    dtype
        NumPy's name of the element type, such as ``"float32"``.
    shape
        One entry per dimension; a string is a symbolic dimension such as ``"batch"``.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"tensor {self.name!r} has the unsupported type {self.dtype!r}")

    def resolve(self, dimensions: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Return the shape with symbolic dimensions replaced, by 1 where not given."""
        known = dimensions or {}
        return tuple(d if isinstance(d, int) else known.get(d, 1) for d in self.shape)

    def size_bytes(self, dimensions: Mapping[str, int] | None = None) -> int:
        """Return the bytes of a dense tensor of this type and shape."""
        return math.prod(self.resolve(dimensions)) * _ITEM_BYTES[self.dtype]

    @property
    def is_dynamic(self) -> bool:
        """Whether any dimension is symbolic."""
        return any(isinstance(d, str) for d in self.shape)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a graph costs, counted from its operators; symbolic dimensions count as 1.

    Parameters
    ----------
    parameters
        Elements of the constant floating-point tensors that the graph reads.
    macs
        Multiply-accumulate operations of convolutions and matrix products.
    weight_bytes
        Bytes of the constant tensors.
    activation_bytes
        Bytes of all tensors that the operators read and write, constants excluded.
    nodes
        Number of operators, an upper bound of the kernel launches.
    depth
        Longest chain of convolutions and matrix products.
    """

    parameters: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    nodes: int
    depth: int

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-accumulate."""
        return 2 * self.macs


@dataclass(frozen=True, slots=True)
class Segment:
    """A subgraph that runs as one engine.

    Parameters
    ----------
    name
        Unique within the stream graph, such as ``"stream1"``.
    inputs, outputs
        The tensors that cross the segment's boundary, constants excluded.
    cost
        What the segment costs by itself.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cost: Cost


@dataclass(frozen=True, slots=True)
class Edge:
    """One tensor that one segment produces and another one reads."""

    tensor: TensorSpec
    producer: str
    consumer: str


@dataclass(frozen=True)
class StreamGraph:
    """A directed acyclic graph of segments, in a topological order.

    Parameters
    ----------
    inputs, outputs
        The tensors of the whole network.
    segments
        Every segment reads only network inputs and outputs of earlier segments.

    Raises
    ------
    ValueError
        When names repeat, a tensor has no producer, or the order is not topological.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        known = {tensor.name for tensor in self.inputs}
        names: set[str] = set()
        for segment in self.segments:
            if segment.name in names:
                raise ValueError(f"two segments are named {segment.name!r}")
            names.add(segment.name)
            for tensor in segment.inputs:
                if tensor.name not in known:
                    raise ValueError(
                        f"segment {segment.name!r} reads {tensor.name!r}, "
                        "which no earlier segment and no network input provides"
                    )
            for tensor in segment.outputs:
                if tensor.name in known:
                    raise ValueError(f"tensor {tensor.name!r} is produced twice")
                known.add(tensor.name)
        for tensor in self.outputs:
            if tensor.name not in known:
                raise ValueError(f"nothing produces the network output {tensor.name!r}")

    def __getitem__(self, name: str) -> Segment:
        """Return the segment called `name`."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise KeyError(name)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every tensor that crosses from one segment to another, in consumer order."""
        producers = {t.name: s.name for s in self.segments for t in s.outputs}
        return tuple(
            Edge(tensor, producers[tensor.name], segment.name)
            for segment in self.segments
            for tensor in segment.inputs
            if tensor.name in producers
        )

    @cached_property
    def predecessors(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the segments that each segment reads from, without repeats."""
        found: dict[str, dict[str, None]] = {segment.name: {} for segment in self.segments}
        for edge in self.edges:
            found[edge.consumer][edge.producer] = None
        return {name: tuple(producers) for name, producers in found.items()}

    @cached_property
    def successors(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the segments that read from each segment, without repeats."""
        found: dict[str, dict[str, None]] = {segment.name: {} for segment in self.segments}
        for edge in self.edges:
            found[edge.producer][edge.consumer] = None
        return {name: tuple(consumers) for name, consumers in found.items()}

    def critical_path(self, weights: Mapping[str, float]) -> tuple[str, ...]:
        """Return the heaviest chain of segments.

        Parameters
        ----------
        weights
            A non-negative weight for every segment, such as its FLOPs or latency.
        """
        best: dict[str, tuple[float, tuple[str, ...]]] = {}
        for segment in self.segments:
            before = max(
                (best[name] for name in self.predecessors[segment.name]),
                key=lambda entry: entry[0],
                default=(0.0, ()),
            )
            best[segment.name] = (
                before[0] + weights[segment.name],
                (*before[1], segment.name),
            )
        return max(best.values(), key=lambda entry: entry[0], default=(0.0, ()))[1]

    def ideal_speedup(self, weights: Mapping[str, float]) -> float:
        """Return total work divided by the work on the critical path."""
        critical = sum(weights[name] for name in self.critical_path(weights))
        return sum(weights.values()) / critical if critical else 1.0
