"""Order statistics of latencies, and intervals that assume no distribution.

Latencies are skewed and often bimodal, so nothing here rests on a mean or on
normality. Intervals of percentiles come from the binomial distribution of
order statistics (David and Nagaraja, *Order Statistics*, section 7.1); the
interval of a ratio comes from resampling whole rounds, which keeps what
disturbed both rows of a round in both of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

CONFIDENCE = 0.95
"""Confidence of every interval unless another one is asked for."""

MIN_ROUNDS = 8
"""Fewest rounds from which a ratio's interval is resampled; below, it comes out too narrow."""

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval that holds the true value with about the stated confidence."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval; no interval where there are too few samples for one."""

    value: float
    interval: Interval | None


def median(samples: npt.ArrayLike) -> float:
    """Return the median of at least one sample."""
    return float(np.median(np.asarray(samples, dtype=np.float64)))


def median_absolute_deviation(samples: npt.ArrayLike) -> float:
    """Return the median distance from the median, without a scale factor."""
    values = np.asarray(samples, dtype=np.float64)
    return float(np.median(np.abs(values - np.median(values))))


def percentile(
    samples: npt.ArrayLike, percent: float, confidence: float = CONFIDENCE
) -> Estimate | None:
    """Estimate a percentile, or return None when the samples do not reach that far.

    Parameters
    ----------
    samples
        Independent samples in any order, shape ``(n,)``.
    percent
        Between 0 and 100, exclusive.
    confidence
        Lower bound of the interval's coverage; order statistics being discrete,
        the true coverage is a little higher.

    Returns
    -------
    Estimate or None
        The interpolated sample percentile and its interval. None when fewer than
        `samples_needed` are given: then not even the extremes bound the percentile.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    ranks = interval_ranks(len(ordered), percent, confidence)
    if ranks is None:
        return None
    low, high = ranks
    return Estimate(
        value=float(np.percentile(ordered, percent)),
        interval=Interval(float(ordered[low - 1]), float(ordered[high - 1])),
    )


def interval_ranks(
    count: int, percent: float, confidence: float = CONFIDENCE
) -> tuple[int, int] | None:
    """Return the ranks of the two samples between which a percentile lies.

    The number of samples below the true percentile is binomial, whatever the
    distribution. Each side of the interval misses with at most half of
    ``1 - confidence``.

    Returns
    -------
    tuple of int, or None
        Ranks ``(low, high)`` from 1 to `count`, or None if there are too few samples.
    """
    if count < samples_needed(percent, confidence):
        return None
    at_most = np.cumsum(_binomial_masses(count, percent / 100))
    tail = (1 - confidence) / 2
    # The percentile lies below sample `low` when fewer than `low` samples lie below it.
    low = int(np.searchsorted(at_most, tail, side="right"))
    # It lies above sample `high` when at least `high` samples lie below it.
    high = int(np.searchsorted(at_most, 1 - tail, side="left")) + 1
    return max(low, 1), min(high, count)


def samples_needed(percent: float, confidence: float = CONFIDENCE) -> int:
    """Return how many samples an interval of a percentile takes at least.

    With fewer, all samples lie on one side of the true percentile with a
    probability above half of ``1 - confidence``.
    """
    farther = max(percent, 100 - percent) / 100
    return int(np.ceil(np.log((1 - confidence) / 2) / np.log(farther)))


def ratio_of_medians(
    numerator: Sequence[npt.ArrayLike],
    denominator: Sequence[npt.ArrayLike],
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Estimate the ratio of two rows' medians from interleaved rounds.

    Rounds are resampled in pairs: a round that is drawn brings both rows' samples
    with it, so that a disturbance of the machine cancels as it did in reality.

    Parameters
    ----------
    numerator, denominator
        Samples of each round, the same number of rounds for both. Rounds may
        differ in length.
    seed
        Seed of the resampling.
    confidence
        Share of the resampled ratios that the interval holds.

    Returns
    -------
    Estimate
        The ratio of the medians over all rounds, with its bootstrap interval; no
        interval below `MIN_ROUNDS` rounds.

    Raises
    ------
    ValueError
        When the rows have different numbers of rounds.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} rounds against {len(denominator)}")
    rows = [_Pooled.from_rounds(rounds) for rounds in (numerator, denominator)]
    counts = np.ones((1, len(numerator)), dtype=np.int64)
    value = float(rows[0].medians(counts)[0] / rows[1].medians(counts)[0])
    if len(numerator) < MIN_ROUNDS:
        return Estimate(value, None)
    draws = np.random.default_rng(seed).multinomial(
        len(numerator), [1 / len(numerator)] * len(numerator), size=_RESAMPLES
    )
    ratios = rows[0].medians(draws) / rows[1].medians(draws)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Estimate(value, Interval(float(low), float(high)))


@dataclass(frozen=True, slots=True)
class _Pooled:
    """All samples of a row in ascending order, in blocks of about the root of their number.

    Finding a median takes one step over the blocks and one inside a block, which
    keeps thousands of resamples of millions of samples within seconds.

    Parameters
    ----------
    ordered
        The samples, shape ``(n,)``.
    owners
        The round that each sample is from, shape ``(n,)``.
    width
        Samples in a block; the last one may be shorter.
    blocks
        How many samples of each round lie in each block, shape ``(rounds, blocks)``.
    """

    ordered: npt.NDArray[np.float64]
    owners: npt.NDArray[np.int64]
    width: int
    blocks: npt.NDArray[np.float64]

    @classmethod
    def from_rounds(cls, rounds: Sequence[npt.ArrayLike]) -> _Pooled:
        values = [np.asarray(samples, dtype=np.float64) for samples in rounds]
        pooled = np.concatenate(values)
        order = np.argsort(pooled, kind="stable")
        owners = np.repeat(np.arange(len(values)), [len(samples) for samples in values])[order]
        width = math.isqrt(len(pooled) - 1) + 1
        blocks = np.zeros((len(values), -(-len(pooled) // width)))
        np.add.at(blocks, (owners, np.arange(len(pooled)) // width), 1)
        return cls(pooled[order], owners, width, blocks)

    def medians(self, draws: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the median of each resample; ``draws[i, r]`` counts round r in resample i."""
        reached = np.cumsum(draws @ self.blocks, axis=1)
        total = reached[:, -1]
        lower = self._at_rank(draws, reached, (total + 1) // 2)
        upper = self._at_rank(draws, reached, total // 2 + 1)
        return np.asarray((lower + upper) / 2)

    def _at_rank(
        self,
        draws: npt.NDArray[np.int64],
        reached: npt.NDArray[np.float64],
        ranks: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.float64]:
        """Return the sample at a rank, counted from 1, of each resample."""
        block = np.argmax(reached >= ranks[:, None], axis=1)
        before = np.where(block > 0, reached[np.arange(len(draws)), block - 1], 0)
        members = block[:, None] * self.width + np.arange(self.width)
        owners = self.owners[np.minimum(members, len(self.owners) - 1)]
        counts = np.cumsum(np.take_along_axis(draws, owners, axis=1), axis=1)
        offset = np.argmax(counts >= (ranks - before)[:, None], axis=1)
        return np.asarray(self.ordered[block * self.width + offset])


def _binomial_masses(count: int, probability: float) -> npt.NDArray[np.float64]:
    """Return P(B = k) for k = 0 .. count, computed through logarithms to avoid overflow."""
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, count + 1)))))
    successes = np.arange(count + 1)
    logs = (
        log_factorials[-1]
        - log_factorials
        - log_factorials[::-1]
        + successes * np.log(probability)
        + successes[::-1] * np.log1p(-probability)
    )
    return np.asarray(np.exp(logs), dtype=np.float64)
