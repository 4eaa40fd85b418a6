"""Order statistics of latencies, and intervals that assume no distribution of them.

Latencies are skewed and often bimodal, so nothing here rests on a mean of latencies or on
their normality. Intervals of percentiles come from the binomial distribution of
order statistics (David and Nagaraja, *Order Statistics*, section 7.1).

Medians and ratios are those of a row's typical process: latencies of one process have
its layout in memory in common, so ten thousand of them tell less than they seem to. The
intervals come from a block bootstrap. From three processes on, the blocks are processes.
The statistic is then a mean of one number per process, and the bootstrap needs no drawing
(Efron and Tibshirani, *An Introduction to the Bootstrap*, section 6.2): with the correction
for few blocks it is Student's interval. With fewer processes the blocks are rounds, drawn
together for both rows of a ratio, so that what disturbed both of a round stays in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import bdtr, stdtrit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Block = Sequence[npt.ArrayLike]
    """The samples of one process, round by round."""

CONFIDENCE = 0.95
"""Confidence of every interval unless another one is asked for."""

MIN_PROCESSES = 3
"""Fewest processes whose differences make an interval."""

MIN_ROUNDS = 8
"""Fewest rounds in a process that make an interval where there are fewer processes."""

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
    at_most = bdtr(np.arange(count + 1), count, percent / 100)
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


def typical_median(
    blocks: Sequence[Block], *, seed: int = 0, confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate a row's median latency: the geometric mean of its processes' medians.

    Parameters
    ----------
    blocks
        The samples of each process, round by round.
    seed
        Seed of the resampling where there are fewer than `MIN_PROCESSES` processes.
    confidence
        Of the interval.

    Returns
    -------
    Estimate
        No interval where there are neither processes nor rounds enough.

    Raises
    ------
    ValueError
        When there is no process.
    """
    return _estimate([[block] for block in blocks], np.ones(1), seed, confidence)


def ratio_of_medians(
    numerator: Sequence[Block],
    denominator: Sequence[Block],
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Estimate the ratio of two rows' typical medians from the same processes and rounds.

    Parameters
    ----------
    numerator, denominator
        The samples of each process, round by round, as many rounds for both. Rounds may
        differ in length.
    seed, confidence
        As in `typical_median`.

    Returns
    -------
    Estimate
        The ratio is that of the two `typical_median`; no interval where there are neither
        processes nor rounds enough.

    Raises
    ------
    ValueError
        When the rows have different numbers of processes or rounds, or none.
    """
    shapes = [[len(block) for block in blocks] for blocks in (numerator, denominator)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"processes of {shapes[0]} rounds against {shapes[1]}")
    pairs = [list(pair) for pair in zip(numerator, denominator, strict=True)]
    return _estimate(pairs, np.array([1.0, -1.0]), seed, confidence)


def _estimate(
    processes: Sequence[Sequence[Block]],
    signs: npt.NDArray[np.float64],
    seed: int,
    confidence: float,
) -> Estimate:
    """Estimate the product over rows of ``median ** sign``, a geometric mean over processes."""
    if not processes:
        raise ValueError("there are no processes")
    pooled = [[_Pooled.from_rounds(block) for block in blocks] for blocks in processes]
    logs = np.array([signs @ [math.log(row.median()) for row in rows] for rows in pooled])
    count, value = len(logs), math.exp(logs.mean())
    if count >= MIN_PROCESSES:
        degrees = count - 1
        variance = float(logs.var(ddof=1)) / count
    else:
        rounds = [len(blocks[0]) for blocks in processes]
        if min(rounds) < MIN_ROUNDS:
            return Estimate(value, None)
        degrees = sum(rounds) - count
        generator = np.random.default_rng(seed)
        variance = sum(_variance_of(rows, signs, generator) for rows in pooled) / count**2
    reach = float(stdtrit(degrees, (1 + confidence) / 2)) * math.sqrt(variance)
    return Estimate(value, Interval(value * math.exp(-reach), value * math.exp(reach)))


def _variance_of(
    rows: Sequence[_Pooled], signs: npt.NDArray[np.float64], generator: np.random.Generator
) -> float:
    """Return the variance of one process's log median or ratio, by resampling its rounds."""
    count = len(rows[0].blocks)
    draws = generator.multinomial(count, [1 / count] * count, size=_RESAMPLES)
    logs = signs @ np.log([row.medians(draws) for row in rows])
    # Resampling finds (count - 1) / count of the variance.
    return float(logs.var()) * count / (count - 1)


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

    def median(self) -> float:
        """Return the median of all samples."""
        return median(self.ordered)

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
