from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_bench.result_file import SCHEMA_VERSION, as_dict, decode, read_result
from parnet_bench.statistics import Interval
from parnet_export.console import encode_json, write_json
from parnet_export.errors import InputError

FIRST = [[2_000_000, 2_200_000], [2_100_000, 1_900_000]]
SECOND = [[1_000_000, 1_100_000], [1_050_000, 950_000]]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 10**12), min_size=1, max_size=4), min_size=1, max_size=9))
def test_results_survive_the_way_through_a_file(make_result, rounds):
    result = make_result({"a": rounds, "b": rounds})
    assert decode(encode_json(as_dict(result)).encode(), "result") == result


def test_a_file_is_read_as_it_was_written(make_result, tmp_path):
    result = make_result({"a": FIRST, "b": SECOND}, stopped="interrupted", notes=("a note",))
    write_json(tmp_path / "result.json", as_dict(result))
    read = read_result(tmp_path / "result.json")
    assert read == result
    assert read.partial


def test_each_row_carries_its_summary_its_label_and_its_raw_samples(make_result):
    document = json.loads(encode_json(as_dict(make_result({"a": FIRST, "b": SECOND}, batch=4))))
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["partial"] is False
    first, second = document["rows"]
    assert second["rounds_ns"] == SECOND
    assert second["label"] == "net (random weights)"
    summary = second["summary"]
    assert summary["median_ms"] == pytest.approx(1.025)
    assert summary["samples_per_s"] == pytest.approx(4 / 1.025e-3)
    assert summary["speedup"] == pytest.approx(2.05 / 1.025)
    assert first["summary"]["speedup"] == 1.0
    assert (summary["parameters"], summary["flops"], summary["depth"]) == (1267146, 306632000, 12)
    # Four samples bound neither the median nor any percentile.
    assert summary["median_interval_ms"] is None
    assert (summary["p90_ms"], summary["p90_samples_needed"]) == (None, 36)
    assert (summary["p99_ms"], summary["p99_samples_needed"]) == (None, 368)


def test_with_enough_samples_percentiles_and_ratios_have_intervals(make_result):
    rng = np.random.default_rng(0)
    fast = (1_000_000 * rng.lognormal(0, 0.1, (20, 20))).astype(int)
    result = make_result({"slow": (2 * fast).tolist(), "fast": fast.tolist()})
    summary = as_dict(result)["rows"][1]["summary"]
    samples_ms = fast.ravel() / 1e6
    for percent, key in ((50, "median"), (90, "p90"), (99, "p99")):
        assert summary[f"{key}_ms"] == pytest.approx(np.percentile(samples_ms, percent))
        interval = msgspec.convert(summary[f"{key}_interval_ms"], Interval)
        assert interval.contains(summary[f"{key}_ms"])
        assert {interval.low, interval.high} <= set(samples_ms)
    assert msgspec.convert(summary["speedup_interval"], Interval).contains(2.0)


def test_a_stored_summary_is_never_believed(make_result):
    document = as_dict(make_result({"a": FIRST}))
    document["rows"][0]["summary"]["median_ms"] = 1e-9
    read = decode(encode_json(document).encode(), "result")
    assert as_dict(read)["rows"][0]["summary"]["median_ms"] == pytest.approx(2.05)


def test_a_newer_schema_asks_for_an_upgrade(make_result):
    document = as_dict(make_result({"a": FIRST})) | {"schema_version": SCHEMA_VERSION + 1}
    with pytest.raises(InputError, match=r"schema version 2; .* Upgrade parnet-export"):
        decode(encode_json(document).encode(), "future.json")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": 0}, "schema version 0"),
        ({"schema_version": None}, "schema version None"),
        ({"kind": "a bundle"}, "no result"),
        ({"rows": []}, "no samples"),
        ({"rows": None}, "rows"),
        ({"rows": [1]}, "rows"),
        ({"orders": []}, "no samples"),
        ({"orders": [[0]] * 3}, "rounds of 'a' are missing"),
        ({"environment": {}}, "environment"),
        ({"stopped": "tired"}, "stopped"),
    ],
)
def test_what_is_no_result_is_refused_with_its_name_and_what_to_do(make_result, change, problem):
    document = as_dict(make_result({"a": FIRST})) | change
    with pytest.raises(InputError, match=problem) as caught:
        decode(encode_json(document).encode(), "some.json")
    assert str(caught.value).startswith("some.json: ")
    assert "Measure again with" in str(caught.value)


def test_missing_empty_truncated_and_random_files_are_refused(make_result, tmp_path):
    content = encode_json(as_dict(make_result({"a": FIRST}))).encode()
    noise = np.random.default_rng(0).bytes(500)
    path = tmp_path / "result.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_result(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_result(tmp_path)
    for damaged, problem in (
        (b"", "is empty"),
        (content[: len(content) // 2], "is damaged"),
        (noise, "is damaged"),
        (b"[1, 2]", "is no result"),
        (b"null", "is no result"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=problem) as caught:
            read_result(path)
        assert str(path) in str(caught.value)
