from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_bench.machine.activity import read_activity
from parnet_bench.results.result import FailedRow, Pipelined, Recording, RowTimeline, SplitTimes
from parnet_bench.results.result_file import SCHEMA_VERSION, as_dict, decode, read_result
from parnet_bench.results.summary import summarise
from parnet_bench.stats.statistics import Interval
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
    assert [process["rounds_ns"] for process in second["recording"]["processes"]] == [SECOND]
    assert second["label"] == "net (random weights)"
    summary = second["summary"]
    assert summary["median_ms"] == pytest.approx(1.025)
    assert summary["samples_per_s"] == pytest.approx(4 / 1.025e-3)
    assert summary["speedup"] == pytest.approx(2.05 / 1.025)
    assert first["summary"]["speedup"] == 1.0
    assert (summary["parameters"], summary["flops"], summary["depth"]) == (1267146, 306632000, 12)
    # Four samples bound neither the median nor any percentile.
    assert summary["median_interval_ms"] is None
    _, p90, p99 = summary["percentiles"]
    assert (p90["value_ms"], p90["samples_needed"], p90["tail_samples_needed"]) == (None, 36, 64)
    assert (p99["value_ms"], p99["samples_needed"], p99["tail_samples_needed"]) == (None, 368, 662)
    assert [warning["kind"] for warning in document["warnings"]] == ["few-processes", "few-samples"]


def test_with_enough_samples_percentiles_and_ratios_have_intervals(make_result):
    rng = np.random.default_rng(0)
    fast = (1_000_000 * rng.lognormal(0, 0.1, (20, 20))).astype(int)
    result = make_result({"slow": (2 * fast).tolist(), "fast": fast.tolist()})
    summary = as_dict(result)["rows"][1]["summary"]
    samples_ms = fast.ravel() / 1e6
    assert summary["median_ms"] == pytest.approx(np.median(samples_ms))
    for percentile in summary["percentiles"]:
        exact = np.percentile(samples_ms, percentile["percent"])
        assert percentile["value_ms"] == pytest.approx(exact)
        interval = msgspec.convert(percentile["interval_ms"], Interval)
        assert interval.contains(percentile["value_ms"])
        assert {interval.low, interval.high} <= set(samples_ms)
    _, p90, p99 = summary["percentiles"]
    assert p90["tail_ms"] >= p90["value_ms"]
    assert p99["tail_ms"] is None  # 400 samples are too few
    assert msgspec.convert(summary["speedup_interval"], Interval).contains(2.0)


def test_every_row_is_compared_with_the_first_one_of_its_batch_size(make_result):
    result = make_result({"a": FIRST, "b": SECOND, "c": FIRST})
    batches = (1, 8, 8)
    rows = tuple(
        replace(row, description=replace(row.description, batch=batch))
        for row, batch in zip(result.rows, batches, strict=True)
    )
    summaries = summarise(replace(result, rows=rows))
    assert [summary.reference for summary in summaries] == ["a", "b", "b"]
    assert [summary.speedup for summary in summaries] == pytest.approx([1, 1, 0.5])
    assert summaries[1].samples_per_s == pytest.approx(8 / 1.025e-3)


def test_throughput_in_flight_counts_samples_by_the_time_of_whole_rounds(make_result):
    result = make_result({"a": FIRST * 3}, processes=3, batch=4)
    row = result.rows[0]
    # Three inferences of four samples each in 6, 5 and 10 ms.
    processes = tuple(
        replace(process, pipelined=Pipelined(2, ((4 * 10**6,) * 3,), (elapsed_ms * 10**6,)))
        for process, elapsed_ms in zip(row.recording.processes, (6, 5, 10), strict=True)
    )
    row = replace(row, recording=Recording(processes))
    (summary,) = summarise(replace(result, rows=(row,)))
    assert summary.pipelined.samples_per_s == pytest.approx(12 / (300 ** (1 / 3) * 1e-3))
    assert summary.pipelined.samples_per_s_interval.contains(summary.pipelined.samples_per_s)
    assert (summary.pipelined.samples, summary.pipelined.median_ms) == (9, 4)


def test_everything_that_can_be_recorded_survives_the_way_through_a_file(make_result):
    result = make_result({"a": FIRST * 3, "b": SECOND * 3}, processes=3)
    parts = ((1, 2), (3, 4))
    process = replace(
        result.rows[0].recording.processes[0],
        pipelined=Pipelined(2, ((5, 6),), (7,)),
        split=SplitTimes(parts, parts, parts, parts),
        load_ms=12.5,
    )
    first = replace(
        result.rows[0],
        recording=Recording((process, *result.rows[0].recording.processes[1:])),
        timeline=RowTimeline({"lanes": []}, {"spans": []}),
    )
    failed = FailedRow(result.rows[1].description, "load", 0, "it is gone.")
    activity = read_activity()
    full = replace(
        result,
        rows=(first, result.rows[1]),
        failed=(failed,),
        activities=(activity, activity),
        overhead_ns=(1, 2, 3),
    )
    assert decode(encode_json(as_dict(full)).encode(), "result") == full


def test_files_of_the_first_schema_are_read_as_one_process(root):
    path = root / "tests" / "golden" / "latency-schema-1.json"
    stored = json.loads(path.read_text())
    result = read_result(path)
    assert stored["schema_version"] == 1
    assert len(result.orders) == 1
    for row, old in zip(result.rows, stored["rows"], strict=True):
        (process,) = row.recording.processes
        assert process.rounds_ns == tuple(map(tuple, old["rounds_ns"]))
        assert process.warm_up_ns == tuple(old["warm_up_ns"])
        assert (process.pipelined, process.load_ms) == (None, None)
        assert row.description.name == old["name"]
    again = decode(encode_json(as_dict(result)).encode(), "result")
    assert again == result


def test_a_stored_summary_is_never_believed(make_result):
    document = as_dict(make_result({"a": FIRST}))
    document["rows"][0]["summary"]["median_ms"] = 1e-9
    read = decode(encode_json(document).encode(), "result")
    assert as_dict(read)["rows"][0]["summary"]["median_ms"] == pytest.approx(2.05)


def test_a_newer_schema_asks_for_an_upgrade(make_result):
    document = as_dict(make_result({"a": FIRST})) | {"schema_version": SCHEMA_VERSION + 1}
    with pytest.raises(InputError, match=r"schema version 3; .* Upgrade parnet-export"):
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
        ({"orders": [[[0]] * 3]}, "rounds of 'a' are missing"),
        ({"schema_version": [2]}, "schema version"),
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


@pytest.mark.parametrize("rounds", [[[0]], [[-5]], [[]], []])
def test_rows_without_samples_or_with_impossible_ones_are_refused(make_result, rounds):
    document = as_dict(make_result({"a": FIRST}))
    document["rows"][0]["recording"]["processes"][0]["rounds_ns"] = rounds
    document["orders"] = [[[0]] * len(rounds)]
    with pytest.raises(InputError, match=r"no samples|missing|not positive"):
        decode(encode_json(document).encode(), "some.json")
