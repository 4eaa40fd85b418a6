"""Work and data flow of a network, without its operators.

A *work graph* is all that clustering needs to know: nodes with a time, tensors
with a size, who writes and who reads them. Times come from counts through a
`DeviceModel`, so that a split does not depend on the machine it is made on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """Turns counts into times: a yardstick for clustering, not a prediction.

    The defaults describe no device in particular. Their ratios are those of current
    accelerators at batch 1: a kernel launch costs as much as some megaflops, and
    handing a tensor to another lane as much as several launches.

    Parameters
    ----------
    flops_per_us
        Floating-point operations per microsecond; the default is 1 TFLOP/s.
    bytes_per_us
        Bytes read or written per microsecond; the default is 100 GB/s.
    launch_us
        Fixed cost of starting one operator.
    crossing_us
        Fixed cost of handing a result from one lane to another.
    """

    flops_per_us: float = 1e6
    bytes_per_us: float = 1e5
    launch_us: float = 3.0
    crossing_us: float = 20.0

    def __post_init__(self) -> None:
        if min(self.flops_per_us, self.bytes_per_us) <= 0:
            raise ValueError("a device needs positive rates")
        if min(self.launch_us, self.crossing_us) < 0:
            raise ValueError("a device needs non-negative fixed costs")

    def operator_us(self, flops: int, moved_bytes: int) -> float:
        """Return the time of one operator that is bound by arithmetic or by memory."""
        return max(flops / self.flops_per_us, moved_bytes / self.bytes_per_us) + self.launch_us


@dataclass(frozen=True, slots=True)
class ClusteringOptions:
    """What is worth running in parallel.

    Parameters
    ----------
    min_gain
        A parallel region is kept when running it in parallel would shorten the network
        by at least this fraction.
    min_region_gain
        A parallel region is kept only if running it in parallel shortens the region
        itself by more than this fraction.
    device
        The yardstick; handing a tensor to another lane must gain more than it costs.
    """

    min_gain: float = 0.03
    min_region_gain: float = 0.10
    device: DeviceModel = field(default_factory=DeviceModel)

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain <= 1 or not 0 <= self.min_region_gain <= 1:
            raise ValueError("gains are fractions between 0 and 1")

    def negligible_us(self, work_us: float) -> float:
        """Return how much of some work is too little to care about."""
        return max(self.device.crossing_us, self.min_region_gain * work_us)

    def small_gain_us(self, region_us: float, network_us: float) -> float:
        """Return the largest gain for which a region is not worth running in parallel."""
        return max(self.negligible_us(region_us), self.min_gain * network_us)

    def tolerated_loss_us(self, pair_us: float, network_us: float) -> float:
        """Return how much parallelism two neighbours may lose when they merge.

        A share of the pair alone would let a long stem swallow a branch that is worth
        keeping for the network, hence the bound by the network.
        """
        share_us = min(self.min_region_gain * pair_us, self.min_gain * network_us)
        return max(self.device.crossing_us, share_us)


@dataclass(frozen=True, slots=True)
class WorkTensor:
    """A tensor between nodes.

    Parameters
    ----------
    size_bytes
        What crosses when another cluster reads it.
    producer
        The node that writes it; None for a network input.
    consumers
        The nodes that read it, without repeats, ascending.
    """

    size_bytes: int
    producer: int | None
    consumers: tuple[int, ...]


@dataclass(frozen=True)
class WorkGraph:
    """Nodes with times and the tensors between them.

    Parameters
    ----------
    times_us
        One time per node. Nodes are numbered in a topological order.
    tensors
        Network inputs and everything that nodes write, constants excluded.

    Raises
    ------
    ValueError
        When a time is negative, or a tensor is read before it is written.
    """

    times_us: tuple[float, ...]
    tensors: tuple[WorkTensor, ...]

    def __post_init__(self) -> None:
        if any(time < 0 for time in self.times_us):
            raise ValueError("times must not be negative")
        for tensor in self.tensors:
            first = -1 if tensor.producer is None else tensor.producer
            if list(tensor.consumers) != sorted(set(tensor.consumers)):
                raise ValueError("consumers must be ascending, without repeats")
            if tensor.consumers and not first < tensor.consumers[0]:
                raise ValueError("nodes must be numbered in a topological order")
            if max((first, *tensor.consumers)) >= len(self.times_us):
                raise ValueError("a tensor names a node that does not exist")

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """Tensors each node reads."""
        found: list[list[int]] = [[] for _ in self.times_us]
        for index, tensor in enumerate(self.tensors):
            for node in tensor.consumers:
                found[node].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def writes(self) -> tuple[tuple[int, ...], ...]:
        """Tensors each node writes."""
        found: list[list[int]] = [[] for _ in self.times_us]
        for index, tensor in enumerate(self.tensors):
            if tensor.producer is not None:
                found[tensor.producer].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def total_us(self) -> float:
        """Time of all nodes one after another."""
        return sum(self.times_us)

    @cached_property
    def live(self) -> tuple[bool, ...]:
        """Whether each node depends on a network input; the others are constant expressions."""
        found: list[bool] = []
        for reads in self.reads:
            producers = (self.tensors[tensor].producer for tensor in reads)
            found.append(any(p is None or found[p] for p in producers))
        return tuple(found)
