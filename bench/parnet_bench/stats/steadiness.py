"""Whether the latencies of a row are of one kind: no trend, one mode, like processes.

Every test works on logarithms, so that effects are relative, and asks two questions: could
chance alone look like this, and is the effect large enough to matter? Chance gets one in
two hundred, for many rows are tested at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import fdtri, ndtri, stdtrit

from parnet_bench.stats.statistics import MIN_PROCESSES, median

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parnet_bench.stats.statistics import Block

DRIFT = 0.01
"""Change of the latency over the measurement that matters, relative."""

MODE_DISTANCE = 0.02
"""Distance between two modes that matters, relative."""

PROCESS_SPREAD = 0.02
"""Standard deviation between processes that matters, relative."""

_RISK = 0.005
_ALIKE_RISK = 0.01
_MINORITY = 0.1
_SEPARATION = 4.0
_FEWEST_SAMPLES = 64
_FEWEST_PROCESSES = 3


@dataclass(frozen=True, slots=True)
class Modes:
    """Two modes of a row's latencies.

    Parameters
    ----------
    fast, slow
        Medians of the two, relative to the row's median.
    slow_share
        Share of the samples that are slow.
    """

    fast: float
    slow: float
    slow_share: float


def drift(blocks: Sequence[Block]) -> float | None:
    """Return by how much a latency rises over the measurement, or None if it is steady.

    Three tests share the risk. Within processes, Mann and Kendall's test of the medians of
    rounds, of all processes together and of each alone; the size is Theil and Sen's slope
    times the number of rounds. From process to process, Student's test of the slope of
    their medians, which random differences between processes seldom pass for.

    Parameters
    ----------
    blocks
        The samples of each process, round by round.

    Returns
    -------
    float or None
        Relative change; negative where the latency falls.
    """
    risk = _RISK / 3
    trends = [_trend(block) for block in blocks if len(block) > 2]
    changes = [t.change for t in trends if _significant([t], risk / len(trends))]
    if trends and _significant(trends, risk):
        changes.append(sum(trend.change for trend in trends))
    changes.append(_change_between(blocks, risk))
    change = math.expm1(max(changes, key=abs))
    return change if abs(change) >= DRIFT else None


def modes(blocks: Sequence[Block]) -> Modes | None:
    """Return the two modes of a row's latencies, or None if there is one.

    The samples are split where the variance between both parts is largest (Otsu 1979).
    They are two modes where the parts' medians are far apart in terms of the spread within
    them (Ashman's D, with robust spreads) and each holds a tenth of the samples. Samples are
    taken relative to their round's process, whose own level is no mode.
    """
    logs = [np.log(np.concatenate([np.asarray(turn, float) for turn in block])) for block in blocks]
    values = np.sort(np.concatenate([log - np.median(log) for log in logs]))
    if len(values) < _FEWEST_SAMPLES:
        return None
    count = len(values)
    below = np.arange(1, count)
    sums = np.cumsum(values)
    means_below = sums[:-1] / below
    means_above = (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (means_above - means_below) ** 2
    # A handful of outliers far away is a tail and no mode.
    least = math.ceil(_MINORITY * count)
    between[: least - 1] = between[count - least :] = -1.0
    split = int(np.argmax(between)) + 1
    fast, slow = values[:split], values[split:]
    distance = float(np.median(slow) - np.median(fast))
    spread = math.sqrt((_spread(fast) ** 2 + _spread(slow) ** 2) / 2)
    if distance < MODE_DISTANCE or distance < _SEPARATION * spread:
        return None
    return Modes(math.exp(np.median(fast)), math.exp(np.median(slow)), len(slow) / count)


def process_spread(blocks: Sequence[Block]) -> float | None:
    """Return the relative standard deviation between processes, or None if they are alike.

    A one-way analysis of variance of the medians of rounds. What rounds vary by themselves
    is taken off.
    """
    logs = [_round_logs(block) for block in blocks]
    if len(logs) < MIN_PROCESSES or min(map(len, logs)) < 2:
        return None
    within = float(np.mean([log.var(ddof=1) / len(log) for log in logs]))
    between = float(np.var([log.mean() for log in logs], ddof=1))
    degrees = len(logs) - 1, sum(map(len, logs)) - len(logs)
    if between <= within * float(fdtri(*degrees, 1 - _RISK)):
        return None
    spread = math.expm1(math.sqrt(between - within))
    return spread if spread >= PROCESS_SPREAD else None


@dataclass(frozen=True, slots=True)
class _Trend:
    """Mann and Kendall's score with its variance, and the change on a log scale."""

    score: float
    variance: float
    change: float


def _trend(block: Block) -> _Trend:
    logs = _round_logs(block)
    count = len(logs)
    earlier, later = np.triu_indices(count, 1)
    differences = logs[later] - logs[earlier]
    return _Trend(
        score=float(np.sign(differences).sum()),
        variance=count * (count - 1) * (2 * count + 5) / 18,
        change=float(np.median(differences / (later - earlier))) * (count - 1),
    )


def _change_between(blocks: Sequence[Block], risk: float) -> float:
    """Return the change from the first to the last process, 0 where chance explains it.

    What is left of the trend tells how much processes differ by themselves. Where that is
    no more than what rounds vary, rounds tell it better than a handful of processes do.
    """
    count = len(blocks)
    if count < _FEWEST_PROCESSES or min(map(len, blocks)) < 2:
        return 0.0
    rounds = [_round_logs(block) for block in blocks]
    values = np.array([math.log(_median_of(block)) for block in blocks])
    values -= values.mean()
    steps = np.arange(count) - (count - 1) / 2
    slope = float(steps @ values / (steps @ steps))
    residual = values - slope * steps
    degrees, more = count - 2, sum(map(len, rounds)) - count
    variance = float(residual @ residual) / degrees
    within = float(np.mean([log.var(ddof=1) / len(log) for log in rounds]))
    if variance < within * float(fdtri(degrees, more, 1 - _ALIKE_RISK)):
        variance = max(variance, within)
        degrees += more
    error = math.sqrt(variance / float(steps @ steps))
    significant = abs(slope) > float(stdtrit(degrees, 1 - risk / 2)) * error
    return slope * (count - 1) if significant else 0.0


def _median_of(block: Block) -> float:
    return median(np.concatenate([np.asarray(turn, np.float64) for turn in block]))


def _significant(trends: Sequence[_Trend], risk: float) -> bool:
    score = abs(sum(trend.score for trend in trends))
    deviation = math.sqrt(sum(trend.variance for trend in trends))
    return score - 1 > float(ndtri(1 - risk / 2)) * deviation


def _round_logs(block: Block) -> npt.NDArray[np.float64]:
    return np.log([median(turn) for turn in block])


def _spread(values: npt.NDArray[np.float64]) -> float:
    """Return the standard deviation that a normal distribution of the same quartiles has."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 1.349
