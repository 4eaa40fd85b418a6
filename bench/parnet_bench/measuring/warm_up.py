"""Warming a row up until its latency is steady."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.stats.statistics import median
from parnet_bench.workers.turn import TurnRequest, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.results.procedure import Procedure, Settling

_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The runs of a row before it was measured.

    Parameters
    ----------
    latencies_ns
        Every run from the first.
    settled
        Whether the latency had become steady when the time for it was up.
    """

    latencies_ns: tuple[int, ...]
    settled: bool

    @property
    def latency_ns(self) -> float:
        """The latency at the end of the warm-up."""
        return median(self.latencies_ns[len(self.latencies_ns) // 2 :])


def warm_up(worker: Worker, procedure: Procedure, share_s: float = math.inf) -> WarmUp:
    """Run one row until its latency is steady or the time for that is up.

    Parameters
    ----------
    worker
        The row.
    procedure
        Says when a row counts as warm.
    share_s
        The row's part of the time that there is. Two windows are run whatever they take.
    """
    settling = procedure.settling
    max_s = min(settling.max_s, share_s)

    def run(runs: int) -> tuple[int, ...]:
        return worker.take_turn(TurnRequest(runs, l2_flush=procedure.l2_flush)).latencies_ns

    recorded = [*run(1)]  # the first run allocates and compiles; it fits in no window
    previous: Sequence[int] = ()
    latency_ns: float = recorded[0]
    while True:
        window = run(settling.runs_per_window(latency_ns, max_s))
        recorded.extend(window)
        settled = _agree(previous, window, settling)
        if settled or (previous and sum(recorded) >= max_s * _NS_PER_S):
            return WarmUp(tuple(recorded), settled)
        previous = window
        latency_ns = median(window)


def _agree(before: Sequence[int], after: Sequence[int], settling: Settling) -> bool:
    """Whether two windows are the same but for noise."""
    if not before:
        return False
    centers = median(before), median(after)
    variance = _median_variance(before) + _median_variance(after)
    difference = abs(centers[1] - centers[0])
    return difference <= settling.tolerance * centers[0] + 2 * math.sqrt(variance)


def _median_variance(window: Sequence[int]) -> float:
    """Return the squared standard error of a window's median: pi/2 of the mean's.

    Noise is told from the differences between neighbours, which a trend hardly touches:
    a latency that still falls must not pass for a noisy one.
    """
    if len(window) < 2:
        return 0.0
    deviation = median(np.abs(np.diff(window))) / (0.6745 * math.sqrt(2))
    return math.pi / 2 * deviation**2 / len(window)
