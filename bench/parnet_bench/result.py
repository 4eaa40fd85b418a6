"""What a measurement yields: raw samples, and everything needed to judge them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# msgspec reads the annotations of these dataclasses at run time.
from parnet_bench.environment import Environment  # noqa: TC001
from parnet_bench.measure import Procedure, StopReason  # noqa: TC001
from parnet_export.bundle import Precision, Provenance  # noqa: TC001
from parnet_export.stream_graph import TensorSpec  # noqa: TC001

Form = Literal["unfused", "whole", "streams"]
"""The network as trained; the fused network as one graph; as one engine per segment."""


@dataclass(frozen=True, slots=True)
class RowDescription:
    """What a row measures.

    Parameters
    ----------
    name
        Unique within a result.
    network
        The network's name.
    form
        Which form of the network runs.
    target
        The path or catalogue name that was asked for.
    provenance
        Where the weights come from.
    precision
        Element type of the weights; None for ONNX files, which may mix them.
    batch
        Samples in one inference.
    inputs
        The tensors of one inference, without symbolic dimensions.
    parameters
        Weights of the network.
    flops
        Floating-point operations for one sample.
    depth
        Longest chain of convolutions and matrix products.
    devices
        What the row runs on, as it was asked for.
    cores
        Logical CPU cores that the row may use.
    """

    name: str
    network: str
    form: Form
    target: str
    provenance: Provenance
    precision: Precision | None
    batch: int
    inputs: tuple[TensorSpec, ...]
    parameters: int
    flops: int
    depth: int
    devices: str
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded of a row, in nanoseconds.

    Parameters
    ----------
    settled
        Whether the latency had become steady before the first round.
    warm_up_ns
        The runs until then.
    rounds_ns
        The recorded runs of each round; round i is the same round in all rows.
    """

    settled: bool
    warm_up_ns: tuple[int, ...]
    rounds_ns: tuple[tuple[int, ...], ...]

    @property
    def samples_ns(self) -> tuple[int, ...]:
        """All recorded runs in the order in which they happened."""
        return tuple(latency for turn in self.rounds_ns for latency in turn)


@dataclass(frozen=True, slots=True)
class Row:
    """A row and what was recorded of it."""

    description: RowDescription
    recording: Recording


@dataclass(frozen=True, slots=True)
class Result:
    """One run of ``parnet-bench latency``.

    Parameters
    ----------
    environment
        The machine and the software.
    procedure
        How long and in what order rows were measured.
    stopped
        Why the measurement ended.
    orders
        For each round, the rows' indices in the order of their turns.
    rows
        All rows; ratios refer to the first one.
    notes
        What a reader of the numbers must know, one sentence each.
    """

    environment: Environment
    procedure: Procedure
    stopped: StopReason
    orders: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows or not self.orders:
            raise ValueError("there are no samples")
        for row in self.rows:
            rounds_ns = row.recording.rounds_ns
            if len(rounds_ns) != len(self.orders) or not all(rounds_ns):
                raise ValueError(f"rounds of {row.description.name!r} are missing")

    @property
    def partial(self) -> bool:
        """Whether the measurement was cut off before it was done."""
        return self.stopped == "interrupted"
