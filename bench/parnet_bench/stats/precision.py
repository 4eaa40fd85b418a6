"""When to stop: how precisely medians and ratios are known so far.

A process stops once its rounds tell medians and ratios precisely enough for the final
intervals, which rest on the differences between processes, to come out as narrow as asked
for. The rule looks only at what happens within a process, and so leaves the differences
between processes alone: were they consulted, a measurement would end just when they happen
to be small, and its intervals would be too narrow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import chdtri, stdtrit

from parnet_bench.stats.statistics import CONFIDENCE, MIN_PROCESSES, MIN_ROUNDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

_ASSURANCE = 0.9
"""Probability that the final interval is as narrow as the rule expects, when processes
differ by no more than their own noise."""


class Precision:
    """What the rounds of one process say about each row.

    Parameters
    ----------
    references
        For each row, the row that it is compared with: another one, or itself.
    processes
        How many processes the measurement has.
    """

    def __init__(self, references: Mapping[str, str], processes: int) -> None:
        self._names = list(references)
        self._references = np.array([self._names.index(name) for name in references.values()])
        self._processes = processes
        self._log_medians: list[list[float]] = []

    def add(self, latencies_ns: Mapping[str, Sequence[int]]) -> None:
        """Add a round."""
        self._log_medians.append(
            [math.log(max(1.0, float(np.median(latencies_ns[name])))) for name in self._names]
        )

    @property
    def rounds(self) -> int:
        """How many rounds have been added."""
        return len(self._log_medians)

    def median_ns(self, name: str) -> float | None:
        """Return the median of a row's rounds; None before the first one."""
        if not self._log_medians:
            return None
        index = self._names.index(name)
        return math.exp(float(np.median([logs[index] for logs in self._log_medians])))

    def half_widths(self) -> dict[str, float]:
        """Return for each row how far its widest interval is expected to reach to one side.

        Relative to the value; the larger one of the row's median and of its ratio.
        Infinite below `parnet_bench.stats.statistics.MIN_ROUNDS` rounds.
        """
        if self.rounds < MIN_ROUNDS:
            return dict.fromkeys(self._names, math.inf)
        logs = np.array(self._log_medians)
        errors = np.maximum(
            _standard_errors(logs), _standard_errors(logs - logs[:, self._references])
        )
        widths = np.expm1(final_factor(self._processes, self.rounds) * errors)
        return dict(zip(self._names, widths.tolist(), strict=True))

    def reached(self, target: float) -> bool:
        """Whether all intervals are expected to be as narrow as `target`."""
        return max(self.half_widths().values()) <= target


def final_factor(processes: int, rounds: int) -> float:
    """Return the final half width, on a log scale, over one process's standard error.

    Parameters
    ----------
    processes
        Processes of the measurement.
    rounds
        Rounds of each one.
    """
    if processes >= MIN_PROCESSES:
        degrees = processes - 1
        guard = math.sqrt(float(chdtri(degrees, 1 - _ASSURANCE)) / degrees)
    else:
        degrees, guard = processes * (rounds - 1), 1.0
    quantile = float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
    return quantile * guard / math.sqrt(processes)


def _standard_errors(columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the standard error of the mean of each column of independent values."""
    return np.asarray(columns.std(axis=0, ddof=1) / math.sqrt(len(columns)))
