"""What measuring gives, and how far it is, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parnet_bench.results.procedure import StopReason
    from parnet_bench.results.result import ProcessRecording, Stage
    from parnet_export.errors import ParnetError


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no recording."""

    name: str
    stage: Stage
    process: int
    error: ParnetError


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was recorded.

    Parameters
    ----------
    recordings
        For each row that was measured to the end, what its processes recorded.
    orders
        For each process and round, the names of those rows in the order of their turns.
    failures
        The other rows.
    stopped
        Why the measurement ended.
    """

    recordings: dict[str, tuple[ProcessRecording, ...]]
    orders: tuple[tuple[tuple[str, ...], ...], ...]
    failures: tuple[RowFailure, ...]
    stopped: StopReason


@dataclass(frozen=True, slots=True)
class NextTurn:
    """How far a measurement is.

    Parameters
    ----------
    row
        The row whose turn begins.
    phase
        What is being done.
    process
        Which process, from 1.
    round_number
        From 1; 0 before the first round.
    fraction
        Estimated share of the measurement that is done.
    left_s
        Most seconds that it may still take; None where the number of rounds decides.
    median_ns
        The row's median in this process so far; None before its first turn.
    half_width
        How far the row's widest interval is expected to reach to either side, relative
        to its value; None where too little is known.
    """

    row: str
    phase: str
    process: int
    round_number: int
    fraction: float
    left_s: float | None = None
    median_ns: float | None = None
    half_width: float | None = None
