"""Tail latencies by MLPerf's early-stopping estimate.

A sample percentile says nothing of how sure it is. MLPerf Inference (rules, appendix
"Early stopping"; Reddi et al., arXiv 1911.02549) reports an order statistic instead that is,
with 99 % confidence, no less than the true percentile: the more samples there are, the
nearer it comes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betainc

if TYPE_CHECKING:
    import numpy.typing as npt

TAIL_CONFIDENCE = 0.99
"""Confidence that the estimate is no less than the percentile, as MLPerf demands it."""


def tail_estimate(
    samples: npt.ArrayLike, percent: float, confidence: float = TAIL_CONFIDENCE
) -> float | None:
    """Return MLPerf's estimate of a percentile, or None when there are too few samples.

    Parameters
    ----------
    samples
        Independent samples in any order, shape ``(n,)``.
    percent
        Between 0 and 100, exclusive.
    confidence
        Probability with which the estimate is no less than the percentile.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    allowed = overlatent_allowed(len(ordered), percent, confidence)
    return float(ordered[len(ordered) - allowed]) if allowed else None


def overlatent_allowed(count: int, percent: float, confidence: float = TAIL_CONFIDENCE) -> int:
    """Return the largest t of MLPerf's rule; the estimate is the t-th largest sample.

    It is the largest t for which ``I(p; h, t + 1) <= 1 - confidence`` with ``h = count - t``:
    so many samples above a latency, of so many in all, still prove with that confidence
    that more than the share p lies below it. 0 when there is none.
    """
    # Beyond the expected number of samples above the percentile, nothing is proven.
    above = np.arange(math.floor(count * (1 - percent / 100)) + 1)
    above = above[above < count]
    risks = betainc(count - above, above + 1, percent / 100)
    # The risk grows with t.
    return max(0, int(np.searchsorted(risks, 1 - confidence, side="right")) - 1)


def tail_samples_needed(percent: float, confidence: float = TAIL_CONFIDENCE) -> int:
    """Return the fewest samples that give an estimate: 64 for p90, 662 for p99."""
    high = 1
    while not overlatent_allowed(high, percent, confidence):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if overlatent_allowed(middle, percent, confidence):
            high = middle
        else:
            low = middle
    return high
