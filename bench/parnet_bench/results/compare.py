"""Two results against each other, row by row, to see what has become slower.

The two were measured at different times, so nothing that disturbed one of them cancels.
The interval of a ratio comes from the intervals of its two medians by MOVER, the method
of variance estimates recovery (Zou and Donner, *Construction of confidence limits about
effect measures*, Statistics in Medicine 27, 2008), on the logarithms of the medians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parnet_bench.results.comparability import Difference, refusals, remarks
from parnet_bench.results.summary import blocks_of
from parnet_bench.stats.statistics import (
    CONFIDENCE,
    MIN_PROCESSES,
    Estimate,
    Interval,
    typical_median,
)

if TYPE_CHECKING:
    from parnet_bench.results.result import Result, Row

Verdict = Literal["slower", "faster", "unclear", "no interval"]

_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One row of both results.

    Parameters
    ----------
    name
        The row's name.
    before_ms, after_ms
        Its median latency in either result.
    ratio
        The second latency divided by the first: above 1 it has become slower.
    interval
        Of the ratio; None where either result has too few processes and rounds for one.
    verdict
        What the interval says of the ratio, compared with 1.
    is_regression
        Whether it has become slower, significantly and by more than the threshold.
    """

    name: str
    before_ms: float
    after_ms: float
    ratio: float
    interval: Interval | None
    verdict: Verdict
    is_regression: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results against each other.

    Parameters
    ----------
    rows
        The rows that both have, in the order of the first result.
    refused
        Why latencies are not comparable; empty where they are.
    remarks
        What a reader must know besides.
    threshold
        Relative slowdown that is tolerated.
    confidence
        Of all intervals.
    """

    rows: tuple[RowComparison, ...]
    refused: tuple[Difference, ...]
    remarks: tuple[str, ...]
    threshold: float
    confidence: float = CONFIDENCE

    @property
    def regressions(self) -> tuple[RowComparison, ...]:
        """The rows that have become slower, significantly and beyond the threshold."""
        return tuple(row for row in self.rows if row.is_regression)


def compare(before: Result, after: Result, threshold: float = 0.0) -> Comparison:
    """Compare two results, whether they are comparable or not.

    Parameters
    ----------
    before, after
        The earlier result, and the one that must not be slower.
    threshold
        Relative slowdown that is tolerated: at 0.02 a row is a regression when its interval
        excludes 1 and its median is more than 2 % slower.

    Raises
    ------
    ValueError
        When the threshold is negative or no number.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"the threshold must not be negative: {threshold}")
    others = {row.description.name: row for row in after.rows}
    rows = tuple(
        _compare_row(row, others[row.description.name], threshold, before.procedure.seed)
        for row in before.rows
        if row.description.name in others
    )
    few = tuple(_few_blocks(before, after, rows))
    return Comparison(rows, refusals(before, after), (*remarks(before, after), *few), threshold)


def ratio_of_estimates(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Return the ratio of two independent positive estimates, with its interval by MOVER."""
    value = numerator.value / denominator.value
    over, under = numerator.interval, denominator.interval
    if over is None or under is None:
        return Estimate(value, None)
    below = math.hypot(
        math.log(numerator.value / over.low), math.log(under.high / denominator.value)
    )
    above = math.hypot(
        math.log(over.high / numerator.value), math.log(denominator.value / under.low)
    )
    return Estimate(value, Interval(value * math.exp(-below), value * math.exp(above)))


def _compare_row(before: Row, after: Row, threshold: float, seed: int) -> RowComparison:
    medians = [typical_median(blocks_of(row), seed=seed) for row in (before, after)]
    ratio = ratio_of_estimates(medians[1], medians[0])
    verdict = _verdict(ratio.interval)
    return RowComparison(
        name=before.description.name,
        before_ms=medians[0].value / _NS_PER_MS,
        after_ms=medians[1].value / _NS_PER_MS,
        ratio=ratio.value,
        interval=ratio.interval,
        verdict=verdict,
        is_regression=verdict == "slower" and ratio.value > 1 + threshold,
    )


def _verdict(interval: Interval | None) -> Verdict:
    if interval is None:
        return "no interval"
    if interval.contains(1.0):
        return "unclear"
    return "slower" if interval.low > 1 else "faster"


def _few_blocks(before: Result, after: Result, rows: tuple[RowComparison, ...]) -> list[str]:
    lacking = [row.name for row in rows if row.interval is None]
    found = []
    if lacking:
        found.append(
            f"Too few processes and rounds for intervals of {', '.join(lacking)}: nothing is "
            f"known of their significance. Measure with at least {MIN_PROCESSES} processes."
        )
    elif min(len(before.orders), len(after.orders)) < MIN_PROCESSES:
        found.append(
            "Not every result is of several processes: how much latencies differ from process to "
            f"process is not in the intervals. Measure with at least {MIN_PROCESSES} processes."
        )
    return found
