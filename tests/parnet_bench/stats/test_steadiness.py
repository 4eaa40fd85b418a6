from __future__ import annotations

import numpy as np
import pytest

from parnet_bench.stats.steadiness import drift, modes, process_spread


def blocks(rng, *, processes=5, rounds=12, runs=9, noise=0.02, levels=0.0, trend=0.0):
    """Latencies of about 1, rising by `trend` from the first to the last round."""
    count = processes * rounds
    rise = 1 + trend * np.linspace(0, 1, count).reshape(processes, rounds, 1)
    level = np.exp(levels * rng.standard_normal((processes, 1, 1)))
    return list(rise * level * (1 + noise * rng.standard_normal((processes, rounds, runs))))


def share(test, make, runs=200):
    return np.mean([test(make(np.random.default_rng(seed))) is not None for seed in range(runs)])


@pytest.mark.parametrize("trend", [0.05, -0.05])
@pytest.mark.parametrize("processes", [1, 3, 5])
def test_a_latency_that_drifts_is_found_and_measured(trend, processes):
    def make(rng):
        return blocks(rng, processes=processes, rounds=60 // processes, trend=trend)

    assert share(drift, make) >= 0.95
    found = [drift(make(np.random.default_rng(seed))) for seed in range(40)]
    assert np.median([change for change in found if change]) == pytest.approx(trend, rel=0.35)


@pytest.mark.parametrize("levels", [0.0, 0.01])
@pytest.mark.parametrize("processes", [1, 5])
def test_a_steady_latency_is_not_said_to_drift(levels, processes):
    def make(rng):
        return blocks(rng, processes=processes, rounds=40 // processes, levels=levels)

    assert share(drift, make) <= 0.05


def test_a_step_in_the_middle_of_a_process_is_a_drift():
    latencies = blocks(np.random.default_rng(0), rounds=40)
    latencies[2][20:] *= 1.1
    assert drift(latencies) > 0.05


def test_a_drift_too_small_to_matter_is_none():
    assert drift(blocks(np.random.default_rng(0), noise=1e-5, trend=0.005)) is None


def test_two_rounds_tell_no_drift():
    assert drift([[[1.0], [2.0]]]) is None


def bimodal(rng, distance=0.3, slow_share=0.3, count=300):
    slow = rng.random(count) < slow_share
    return [[np.where(slow, 1 + distance, 1) * (1 + 0.01 * rng.standard_normal(count))]]


def test_two_modes_are_found_with_their_places_and_shares():
    assert share(modes, bimodal) >= 0.95
    found = modes(bimodal(np.random.default_rng(0)))
    assert found.slow / found.fast == pytest.approx(1.3, rel=0.02)
    assert found.slow_share == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: 1 + 0.02 * rng.standard_normal(300),
        lambda rng: np.exp(0.3 * rng.standard_normal(300)),
        lambda rng: 1 + rng.pareto(2.5, 300),
        lambda rng: 1 + 0.1 * rng.random(300),
        lambda rng: np.where(rng.random(300) < 0.02, 2.0, 1 + 0.01 * rng.standard_normal(300)),
    ],
    ids=["normal", "lognormal", "slow tail", "uniform", "outliers"],
)
def test_one_mode_is_not_taken_for_two(draw):
    assert share(modes, lambda rng: [[draw(rng)]]) <= 0.02


def test_modes_close_to_each_other_and_few_samples_are_none():
    assert modes([[np.repeat([1.0, 1.01], 100)]]) is None
    assert modes([[np.repeat([1.0, 1.5], 10)]]) is None


def test_levels_of_processes_are_no_modes_but_a_spread():
    latencies = blocks(np.random.default_rng(0), levels=0.2, noise=0.005)
    assert modes(latencies) is None
    assert process_spread(latencies) is not None


def test_processes_that_differ_are_found_and_their_spread_measured():
    def make(rng):
        return blocks(rng, processes=10, levels=0.05)

    assert share(process_spread, make) >= 0.95
    found = [process_spread(make(np.random.default_rng(seed))) for seed in range(100)]
    assert np.median([spread for spread in found if spread]) == pytest.approx(0.05, rel=0.15)


def test_processes_that_are_alike_are_not_said_to_differ():
    assert share(process_spread, blocks) <= 0.02
    assert process_spread(blocks(np.random.default_rng(0), noise=1e-4, levels=0.005)) is None
    assert process_spread(blocks(np.random.default_rng(0), processes=2, levels=0.5)) is None
