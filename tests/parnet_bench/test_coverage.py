"""The statistics against truth: whole measurements are simulated, by the shipped rules.

A clock that only rows move, rows whose latencies are drawn, and the default procedure with
its warm-up, rounds, processes, time limit and stopping rule. The small grids of the normal
run allow for chance; the large ones, a thousand measurements for each case, meet the figures
that the documentation states.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import optimize, stats

from parnet_bench.stats.statistics import ratio_of_medians, typical_median
from parnet_bench.stats.steadiness import drift

LATENCY_NS = 150e6
SMALL, LARGE = 60, 1000


def normal(generator, count):
    return 1 + 0.02 * generator.standard_normal(count)


def lognormal(generator, count):
    return np.exp(0.3 * generator.standard_normal(count))


def bimodal(generator, count):
    slow = generator.random(count) < 0.3
    return np.where(slow, 1.3, 1.0) * (1 + 0.01 * generator.standard_normal(count))


def slow_tail(generator, count):
    return 1 + generator.pareto(2.5, count)


def bimodal_below(latency):
    return 0.7 * stats.norm.cdf(latency, 1, 0.01) + 0.3 * stats.norm.cdf(latency, 1.3, 0.013)


MEDIANS = {
    normal: 1.0,
    lognormal: 1.0,
    bimodal: optimize.brentq(lambda latency: bimodal_below(latency) - 0.5, 0.9, 1.4),
    slow_tail: 2 ** (1 / 2.5),
}


def measured(simulate, draw, seed, *, slowdown=1.0, latency_ns=LATENCY_NS, **options):
    """Measure two rows that differ by `slowdown` alone; return the blocks of each."""
    draws = {
        "a": lambda generator, count: latency_ns * draw(generator, count),
        "b": lambda generator, count: slowdown * latency_ns * draw(generator, count),
    }
    recordings = simulate(draws, seed, **options).recordings
    return [[process.rounds_ns for process in recordings[name]] for name in "ab"]


def least_held(share, count):
    """Return how often something of this probability happens at least, but for chance."""
    return stats.binom(count, share).ppf(1e-4)


def coverage(simulate, draw, count, **options):
    """Return how many intervals of the median hold the truth, and how many of the ratio."""
    held = np.zeros(2, int)
    for seed in range(count):
        a, b = measured(simulate, draw, seed, **options)
        held += (
            typical_median(a).interval.contains(LATENCY_NS * MEDIANS[draw]),
            ratio_of_medians(b, a).interval.contains(1.0),
        )
    return held


@pytest.mark.parametrize("process_noise", [0.0, 0.01])
@pytest.mark.parametrize("draw", MEDIANS)
def test_intervals_hold_the_truth(simulate, draw, process_noise):
    held = coverage(simulate, draw, SMALL, process_noise=process_noise)
    assert held.min() >= least_held(0.95, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("process_noise", [0.0, 0.01])
@pytest.mark.parametrize("draw", MEDIANS)
def test_of_a_thousand_intervals_93_percent_hold_the_truth(simulate, draw, process_noise):
    held = coverage(simulate, draw, LARGE, process_noise=process_noise)
    assert held[0] >= 0.93 * LARGE
    # Both rows are the same, so that every ratio without 1 is a false alarm.
    assert LARGE - held[1] <= 0.065 * LARGE


def found_slower(simulate, count, **options):
    found = (
        ratio_of_medians(*reversed(measured(simulate, normal, seed, slowdown=1.03, **options)))
        for seed in range(count)
    )
    return sum(ratio.interval.low > 1 for ratio in found)


def test_a_slowdown_of_3_percent_is_found_in_2_percent_of_noise(simulate):
    assert found_slower(simulate, SMALL) >= least_held(0.97, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("latency_ns", [2e6, 20e6, 150e6])
def test_of_a_thousand_slowdowns_of_3_percent_95_percent_are_found(simulate, latency_ns):
    assert found_slower(simulate, LARGE, latency_ns=latency_ns) >= 0.95 * LARGE


def drifting(simulate, count, change, **options):
    """Return in how many measurements drift is flagged, when 120 s change so much."""

    def speed(now_ns):
        return 1 + change * now_ns / 120e9

    return sum(
        drift(measured(simulate, normal, seed, drift=speed, **options)[0]) is not None
        for seed in range(count)
    )


@pytest.mark.parametrize("change", [0.2, -0.2])
def test_drift_is_flagged_and_nothing_else(simulate, change):
    assert drifting(simulate, SMALL, change) >= least_held(0.97, SMALL)
    assert drifting(simulate, SMALL, 0.0) <= stats.binom(SMALL, 0.02).ppf(1 - 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("latency_ns", [20e6, 150e6])
@pytest.mark.parametrize("change", [0.2, -0.2])
def test_of_a_thousand_drifting_measurements_95_percent_are_flagged(simulate, change, latency_ns):
    assert drifting(simulate, LARGE, change, latency_ns=latency_ns) >= 0.95 * LARGE
    assert drifting(simulate, LARGE, 0.0, latency_ns=latency_ns) <= 0.03 * LARGE


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("draw", MEDIANS)
def test_intervals_of_few_processes_hold_the_truth_too(simulate, draw, processes):
    count = 300
    test = functools.partial(coverage, simulate, draw, count, processes=processes)
    assert test().min() >= least_held(0.93, count)
