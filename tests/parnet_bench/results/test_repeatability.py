from __future__ import annotations

import json

import numpy as np
import pytest

from parnet_bench.cli import app
from parnet_bench.results.repeatability import agreement
from parnet_bench.results.result_file import as_dict
from parnet_export import console
from parnet_export.console import write_json


@pytest.fixture
def results(make_result):
    """Results of two rows, of which the second one is so many times as fast."""

    def make(*speedups):
        found = []
        for seed, speedup in enumerate(speedups):
            noise = 1 + 0.01 * np.random.default_rng(seed).standard_normal((2, 15, 20))
            slow, fast = (10**7 * noise / [[[1.0]], [[speedup]]]).astype(int).tolist()
            found.append(make_result({"slow": slow, "fast": fast}, processes=3))
        return found

    return make


def test_every_two_runs_are_compared(results):
    (row,) = agreement(results(2.0, 2.0, 2.0, 3.0))
    assert (row.name, row.reference) == ("fast", "slow")
    assert row.speedups == pytest.approx((2, 2, 2, 3), rel=0.02)
    assert (row.pairs, row.overlapping) == (6, 3)
    assert row.share == 0.5


def test_a_single_run_and_rows_without_intervals_have_nothing_to_agree_with(results, make_result):
    assert agreement(results(2.0)) == ()
    short = make_result({"a": [[1, 2]], "b": [[1, 2]]})
    assert agreement([short, short]) == ()


@pytest.mark.parametrize(("speedups", "code"), [((2.0, 2.0, 2.0), 0), ((2.0, 2.0, 3.0), 1)])
def test_the_command_fails_where_too_few_pairs_overlap(results, tmp_path, capfd, speedups, code):
    paths = [tmp_path / f"{number}.json" for number in range(len(speedups))]
    for path, result in zip(paths, results(*speedups), strict=True):
        write_json(path, as_dict(result))
    assert console.run(app, ["repeatability", *map(str, paths), "--json"]) == code
    printed, error = capfd.readouterr()
    document = json.loads(printed)
    assert (document["runs"], document["pairs"]) == (3, 3)
    assert ("overlap, not 90.0 %" in error) == bool(code)
    console.run(app, ["repeatability", *map(str, paths)])
    assert "of 3 pairs overlap." in capfd.readouterr().out


def test_results_with_nothing_in_common_are_refused(results, tmp_path, capfd):
    write_json(tmp_path / "one.json", as_dict(results(2.0)[0]))
    assert console.run(app, ["repeatability", str(tmp_path / "one.json")]) == 2
    assert "no row in common" in capfd.readouterr().err
