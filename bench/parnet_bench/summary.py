"""What a result says: percentiles, ratios and the network's costs, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.statistics import (
    CONFIDENCE,
    Estimate,
    Interval,
    median_absolute_deviation,
    percentile,
    ratio_of_medians,
    samples_needed,
)

if TYPE_CHECKING:
    from parnet_bench.result import Result, Row

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class RowSummary:
    """The figures of one row.

    Parameters
    ----------
    name, network, form
        As in the row's description.
    samples, rounds
        How many runs were recorded, in how many rounds.
    min_ms, median_ms, mad_ms, max_ms
        Extremes, median, and median absolute deviation from the median.
    median_interval_ms, p90_interval_ms, p99_interval_ms
        Intervals of the percentiles with `confidence`, from order statistics; they
        take samples for independent.
    p90_ms, p99_ms
        None where there are too few samples for an interval.
    p90_samples_needed, p99_samples_needed
        How many samples these percentiles take.
    samples_per_s
        Samples of the network per second at the median latency, one inference at a time.
    parameters, flops, depth
        As in the row's description.
    speedup
        Median latency of the first row divided by this row's.
    speedup_interval
        Bootstrap interval over rounds; None for the first row and below
        `parnet_bench.statistics.MIN_ROUNDS` rounds.
    confidence
        Of all intervals.
    """

    name: str
    network: str
    form: str
    samples: int
    rounds: int
    min_ms: float
    median_ms: float
    median_interval_ms: Interval | None
    mad_ms: float
    max_ms: float
    p90_ms: float | None
    p90_interval_ms: Interval | None
    p90_samples_needed: int
    p99_ms: float | None
    p99_interval_ms: Interval | None
    p99_samples_needed: int
    samples_per_s: float
    parameters: int
    flops: int
    depth: int
    speedup: float
    speedup_interval: Interval | None
    confidence: float


def summarise(result: Result) -> tuple[RowSummary, ...]:
    """Compute the figures of every row from the raw samples."""
    first = result.rows[0]
    return tuple(
        _summarise(row, _speedup(first, row, result.procedure.seed)) for row in result.rows
    )


def _speedup(first: Row, row: Row, seed: int) -> Estimate:
    if row is first:
        return Estimate(1.0, None)
    return ratio_of_medians(first.recording.rounds_ns, row.recording.rounds_ns, seed=seed)


def _summarise(row: Row, speedup: Estimate) -> RowSummary:
    description = row.description
    latencies_ms = np.asarray(row.recording.samples_ns) / _NS_PER_MS
    median_ms = float(np.median(latencies_ms))
    p50, p90, p99 = (percentile(latencies_ms, percent) for percent in (50, 90, 99))
    return RowSummary(
        name=description.name,
        network=description.network,
        form=description.form,
        samples=len(latencies_ms),
        rounds=len(row.recording.rounds_ns),
        min_ms=float(latencies_ms.min()),
        median_ms=median_ms,
        median_interval_ms=p50.interval if p50 else None,
        mad_ms=median_absolute_deviation(latencies_ms),
        max_ms=float(latencies_ms.max()),
        p90_ms=p90.value if p90 else None,
        p90_interval_ms=p90.interval if p90 else None,
        p90_samples_needed=samples_needed(90),
        p99_ms=p99.value if p99 else None,
        p99_interval_ms=p99.interval if p99 else None,
        p99_samples_needed=samples_needed(99),
        samples_per_s=description.batch * 1000 / median_ms,
        parameters=description.parameters,
        flops=description.flops,
        depth=description.depth,
        speedup=speedup.value,
        speedup_interval=speedup.interval,
        confidence=CONFIDENCE,
    )
