from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from parnet_bench.stats.tail import overlatent_allowed, tail_estimate, tail_samples_needed


def allowed_by_summation(count, percent, confidence):
    """MLPerf's t, from exact binomial sums instead of the incomplete beta function.

    I(p; h, t + 1) is the probability that at least h of h + t samples lie below the
    percentile, when each does with probability p.
    """
    share = Fraction(percent) / 100
    masses = [
        math.comb(count, above) * (1 - share) ** above * share ** (count - above)
        for above in range(count + 1)
    ]
    risk, best = Fraction(0), 0
    for above in range(count):
        risk += masses[above]
        if risk > 1 - Fraction(str(confidence)):
            break
        best = above
    return best


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.sampled_from([50, 80, 90, 95, 99]), st.sampled_from([0.9, 0.99]))
def test_the_estimate_is_that_of_an_independent_computation(count, percent, confidence):
    expected = allowed_by_summation(count, percent, confidence)
    assert overlatent_allowed(count, percent, confidence) == expected
    samples = np.random.default_rng(count).permutation(count) + 1.0
    estimate = tail_estimate(samples, percent, confidence)
    # The t - 1 largest are discarded; the largest of the rest is the estimate.
    assert estimate == (count - (expected - 1) if expected else None)


def test_a_90th_percentile_takes_64_samples_and_a_99th_662():
    # MLPerf Inference states both.
    assert tail_samples_needed(90) == 64
    assert tail_samples_needed(99) == 662


@pytest.mark.parametrize("percent", [50, 90, 97.5, 99, 99.9])
def test_there_is_an_estimate_from_the_stated_number_of_samples_on(percent):
    needed = tail_samples_needed(percent)
    assert tail_estimate(np.arange(needed - 1), percent) is None
    assert tail_estimate(np.arange(needed), percent) == needed - 1


@pytest.mark.parametrize("count", [64, 300, 2000])
def test_the_estimate_is_hardly_ever_below_the_percentile(count):
    runs = np.random.default_rng(1).lognormal(0, 0.5, (2000, count))
    truth = stats.lognorm(0.5).ppf(0.9)
    below = sum(tail_estimate(run, 90) < truth for run in runs)
    # Nominally 1 %; beyond the 99.99 % quantile of so many trials it would be wrong.
    assert below <= stats.binom(2000, 0.01).ppf(0.9999)


def test_no_samples_give_no_estimate():
    assert tail_estimate([], 90) is None
