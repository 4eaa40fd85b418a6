from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from parnet_bench.stats.statistics import (
    MIN_PROCESSES,
    MIN_ROUNDS,
    Interval,
    interval_ranks,
    median,
    median_absolute_deviation,
    percentile,
    ratio_of_medians,
    samples_needed,
    typical_median,
)

SAMPLES = st.lists(st.integers(1, 10**9), min_size=1, max_size=60)

quick = settings(deadline=None, max_examples=50)


@quick
@given(SAMPLES)
def test_median_and_deviation_are_those_of_scipy(samples):
    assert median(samples) == np.median(samples)
    assert median_absolute_deviation(samples) == stats.median_abs_deviation(samples)


@quick
@given(st.integers(1, 2000), st.sampled_from([10, 50, 90, 99]), st.sampled_from([0.9, 0.95, 0.99]))
def test_interval_ranks_are_the_narrowest_with_half_the_risk_on_each_side(count, percent, level):
    below = stats.binom(count, percent / 100)
    tail = (1 - level) / 2
    ranks = interval_ranks(count, percent, level)
    if ranks is None:
        # Not even the smallest, or not even the largest sample is far enough out.
        assert below.cdf(0) > tail or below.sf(count - 1) > tail
        return
    low, high = ranks
    assert below.cdf(low - 1) <= tail < below.cdf(low)
    assert below.sf(high - 1) <= tail < below.sf(high - 2)


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 99.9])
def test_an_interval_exists_from_the_stated_number_of_samples_on(percent):
    needed = samples_needed(percent)
    assert interval_ranks(needed - 1, percent) is None
    low, high = interval_ranks(needed, percent)
    assert 1 <= low < high <= needed
    assert percentile(np.arange(needed - 1), percent) is None


def test_a_99th_percentile_takes_368_samples():
    # 0.99 ** 368 is the first power below 2.5 %.
    assert samples_needed(99) == 368
    assert 0.99**368 <= 0.025 < 0.99**367


@pytest.mark.parametrize("percent", [50, 90, 99])
@pytest.mark.parametrize("name", ["normal", "lognormal", "bimodal", "slow tail"])
def test_percentile_intervals_hold_the_truth_as_often_as_they_say(percent, name):
    distribution = {
        "normal": stats.norm(100, 2),
        "lognormal": stats.lognorm(0.3, scale=100),
        "slow tail": stats.pareto(2.5, scale=100),
        "bimodal": None,
    }[name]
    rng = np.random.default_rng(7)
    shape = (400, 500)
    if distribution is None:
        runs = np.where(
            rng.random(shape) < 0.7, rng.normal(100, 1, shape), rng.normal(130, 1, shape)
        )
        # The quantile of the mixture, found by bisection on its distribution function.
        low, high = 50.0, 200.0
        for _ in range(80):
            middle = (low + high) / 2
            mass = 0.7 * stats.norm.cdf(middle, 100, 1) + 0.3 * stats.norm.cdf(middle, 130, 1)
            low, high = (middle, high) if mass < percent / 100 else (low, middle)
        truth = low
    else:
        runs = distribution.rvs(shape, random_state=rng)
        truth = distribution.ppf(percent / 100)
    held = sum(percentile(run, percent).interval.contains(truth) for run in runs)
    # Coverage is at least 95 %; four standard errors of 400 simulated runs are 4.4 %.
    assert held / len(runs) >= 0.95 - 0.044


# ------------------------------------------------------------------- medians and ratios


def process_median(block):
    return np.median(np.concatenate(block))


@quick
@given(st.data())
def test_from_three_processes_on_intervals_are_students_over_processes(data):
    count = data.draw(st.integers(MIN_PROCESSES, 6))
    turn = st.lists(st.integers(1, 50), min_size=1, max_size=4)
    block = st.lists(turn, min_size=2, max_size=2)
    rows = [data.draw(st.lists(block, min_size=count, max_size=count)) for _ in range(2)]
    logs = [np.log([process_median(block) for block in row]) for row in rows]
    for estimate, values in (
        (typical_median(rows[0]), logs[0]),
        (ratio_of_medians(*rows), logs[0] - logs[1]),
    ):
        assert estimate.value == pytest.approx(stats.gmean(np.exp(values)))
        spread = values.std(ddof=1) / np.sqrt(count)
        if spread > 1e-9:
            expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=spread)
            found = np.log([estimate.interval.low, estimate.interval.high])
            assert found == pytest.approx(expected)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_of_one_process_intervals_come_from_resampling_its_rounds_one_by_one(data):
    count = data.draw(st.integers(MIN_ROUNDS, 12))
    turn = st.lists(st.integers(1, 50), min_size=1, max_size=4)
    rows = [data.draw(st.lists(turn, min_size=count, max_size=count)) for _ in range(2)]
    seed = data.draw(st.integers(0, 5))
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=2000)

    def median_of(row, drawn):
        return np.median([x for turn, times in zip(row, drawn, strict=True) for x in turn * times])

    logs = [np.log(median_of(rows[0], drawn) / median_of(rows[1], drawn)) for drawn in draws]
    spread = np.std(logs) * np.sqrt(count / (count - 1))
    estimate = ratio_of_medians([rows[0]], [rows[1]], seed=seed)
    value = process_median(rows[0]) / process_median(rows[1])
    assert estimate.value == pytest.approx(value)
    reach = stats.t.ppf(0.975, count - 1) * spread
    expected = value * np.exp([-reach, reach])
    assert (estimate.interval.low, estimate.interval.high) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_ratio_intervals_of_one_process_hold_the_truth_on_a_machine_that_wanders(drift):
    rng = np.random.default_rng(3)
    held = 0
    for seed in range(200):
        machine = 1 + drift * rng.standard_normal((20, 1))
        slow = 1.03 * machine * (1 + 0.02 * rng.standard_normal((20, 2)))
        fast = machine * (1 + 0.02 * rng.standard_normal((20, 2)))
        held += ratio_of_medians([slow], [fast], seed=seed).interval.contains(1.03)
    # Nominally 95 %; four standard errors of 200 simulated comparisons are 6.2 %.
    assert held / 200 >= 0.95 - 0.062


def test_pairing_rounds_keeps_a_drift_that_both_rows_share_out_of_the_ratio():
    rng = np.random.default_rng(5)
    machine = np.linspace(1, 2, 20)[:, None]  # twice as slow at the end as in the beginning
    rows = [machine * (1 + 0.001 * rng.standard_normal((20, 10))) for _ in range(2)]
    paired = ratio_of_medians([rows[0]], [rows[1]]).interval
    shuffled = ratio_of_medians([rows[0]], [rng.permutation(rows[1])]).interval
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)


def test_differences_between_processes_widen_intervals_that_samples_alone_would_not():
    rng = np.random.default_rng(6)
    levels = 1 + 0.02 * rng.standard_normal(5)
    rows = [level * (1 + 0.001 * rng.standard_normal((10, 50))) for level in levels]
    together = typical_median([np.concatenate(rows)]).interval
    apart = typical_median(rows).interval
    assert apart.high - apart.low > 3 * (together.high - together.low)


def test_few_rounds_of_few_processes_give_a_value_without_an_interval():
    rounds = [[10], [20]] * (MIN_ROUNDS // 2)
    assert ratio_of_medians([rounds], [rounds]).interval == Interval(1.0, 1.0)
    assert ratio_of_medians([rounds[1:]], [rounds[1:]]).interval is None
    assert ratio_of_medians([rounds[1:]] * 2, [rounds[1:]] * 2).interval is None
    assert ratio_of_medians([rounds[1:]], [rounds[1:]]).value == pytest.approx(1.0)
    assert typical_median([rounds[:1]] * 3).interval is not None


def test_rows_of_different_numbers_of_rounds_or_processes_are_not_compared():
    with pytest.raises(ValueError, match=r"of \[3\] rounds against \[2\]"):
        ratio_of_medians([[[1]] * 3], [[[1]] * 2])
    with pytest.raises(ValueError, match=r"of \[1, 1\] rounds against \[1\]"):
        ratio_of_medians([[[1]]] * 2, [[[1]]])
    with pytest.raises(ValueError, match="no processes"):
        typical_median([])
