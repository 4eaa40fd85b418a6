from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from parnet_bench.stats.precision import Precision, final_factor
from parnet_bench.stats.statistics import MIN_ROUNDS, ratio_of_medians, typical_median


def test_nothing_is_known_before_there_are_rounds_enough():
    precision = Precision({"a": "a", "b": "a"}, processes=5)
    assert precision.median_ns("a") is None
    for _ in range(MIN_ROUNDS - 1):
        precision.add({"a": [100], "b": [200]})
    assert precision.half_widths() == {"a": np.inf, "b": np.inf}
    precision.add({"a": [100], "b": [200]})
    assert precision.reached(1e-9)
    assert precision.median_ns("b") == pytest.approx(200)


def test_the_factor_is_students_with_a_guard_against_processes_that_look_alike():
    guard = np.sqrt(stats.chi2(4).ppf(0.9) / 4)
    assert final_factor(5, 20) == pytest.approx(stats.t(4).ppf(0.975) * guard / np.sqrt(5))
    assert final_factor(1, 20) == pytest.approx(stats.t(19).ppf(0.975))


def test_final_intervals_are_as_narrow_as_the_rule_expects_nine_times_out_of_ten():
    rng = np.random.default_rng(0)
    narrow = 0
    for _ in range(300):
        latencies = 1e6 * (1 + 0.02 * rng.standard_normal((2, 5, 12, 9)))
        widths = []
        for process in range(5):
            precision = Precision({"a": "a", "b": "a"}, processes=5)
            for number in range(12):
                precision.add(dict(zip("ab", latencies[:, process, number], strict=True)))
            widths.append(max(precision.half_widths().values()))
        estimates = typical_median(latencies[0]), ratio_of_medians(*latencies)
        reach = max(found.interval.high / found.value - 1 for found in estimates)
        narrow += reach <= np.mean(widths)
    # Each interval alone is assured with 90 %, and here are two.
    assert narrow / 300 > 0.8


def test_the_ratio_counts_where_it_is_known_less_well_than_the_median():
    machine = 1 + 0.1 * np.random.default_rng(0).standard_normal(20)
    alone, against = Precision({"a": "a", "b": "b"}, 5), Precision({"a": "a", "b": "a"}, 5)
    for speed in machine:
        for precision in (alone, against):
            precision.add({"a": [1e6 * speed], "b": [2e6 / speed]})
    wide, wider = (np.log1p(precision.half_widths()["b"]) for precision in (alone, against))
    assert wider == pytest.approx(2 * wide, rel=1e-4)
