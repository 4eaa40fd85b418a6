from __future__ import annotations

import json
import math

import pytest

from parnet_engines.planning.cost_table import (
    DEVICE_MODELS,
    WHOLE,
    CostTable,
    DeviceModel,
    SegmentCost,
    estimate_costs,
    lane_threads,
    load_costs,
    save_costs,
)
from parnet_engines.schedule.placement import Lane
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec


def entry(segment="a", kind="cpu", threads=1, busy=1, ms=1.0, source="measured", where="here"):
    return SegmentCost(segment, kind, threads, busy, ms, source, where)


@pytest.mark.parametrize("ms", [-1.0, math.nan, math.inf])
def test_a_latency_is_a_finite_time(ms):
    with pytest.raises(ValueError, match="segment 'a' has a latency"):
        entry(ms=ms)


@pytest.mark.parametrize(("threads", "busy"), [(0, 1), (1, 0)])
def test_a_situation_has_a_thread_and_a_lane(threads, busy):
    with pytest.raises(ValueError, match="at least one thread and one lane"):
        entry(threads=threads, busy=busy)


def test_a_situation_has_one_entry():
    with pytest.raises(ValueError, match="segment 'a' has 2 entries for cpu with 2 threads"):
        CostTable((entry(threads=2), entry(threads=2, ms=3.0)))


def test_the_nearest_number_of_busy_lanes_stands_in_and_of_two_the_lower():
    table = CostTable(tuple(entry(busy=busy, ms=float(busy)) for busy in (1, 3, 8)))
    found = [table.find("a", "cpu", 1, busy).latency_ms for busy in (1, 2, 3, 4, 6, 99)]
    assert found == [1.0, 1.0, 3.0, 3.0, 8.0, 8.0]
    assert table.find("a", "cpu", 2) is None
    assert table.find("a", "cuda") is None
    assert table.find("b", "cpu") is None


def test_a_lane_has_the_latency_of_its_kind_and_width():
    table = CostTable((entry(threads=2, ms=5.0), entry(kind="cuda", ms=7.0)), "net")
    assert table.latency_ms("a", Lane("x", "cpu:0-3", (0, 1))) == 5.0
    assert table.latency_ms("a", Lane("y", "cuda:1")) == 7.0
    assert lane_threads(Lane("y", "cuda:1")) == 1
    with pytest.raises(InputError) as caught:
        table.latency_ms("a", Lane("x", "cpu", (0, 1, 2)))
    assert "cost table of net: has no latency of segment 'a' on cpu with 3 thread" in str(
        caught.value
    )


def test_a_width_is_known_if_every_segment_has_it():
    table = CostTable((entry(), entry(threads=2), entry("b", threads=2), entry("b", "cuda")))
    assert table.widths(["a", "b"], "cpu") == (2,)
    assert table.widths(["a"], "cpu") == (1, 2)
    assert table.widths(["a", "b"], "cuda") == ()
    assert table.widths([], "cpu") == ()


def test_an_estimate_never_takes_the_place_of_a_measurement():
    measured, estimated = entry(ms=2.0), entry(ms=9.0, source="estimated")
    table = CostTable((measured,), "net")
    assert table.updated([estimated]).entries == (measured,)
    assert CostTable((estimated,)).updated([measured]).entries == (measured,)
    assert table.updated([entry(ms=3.0)]).entries == (entry(ms=3.0),)
    more = table.updated([entry("b")])
    assert (len(more.entries), more.network) == (2, "net")
    assert table.is_measured
    assert not CostTable().is_measured
    assert not CostTable((measured, entry("b", source="estimated"))).is_measured


def test_measurements_belong_to_an_environment():
    table = CostTable((entry(), entry("b", where="there"), entry("c", source="estimated")), "net")
    assert table.of_environment("here") == CostTable((entry(),), "net")


def test_a_table_comes_back_from_its_file(tmp_path):
    table = CostTable((entry(ms=1 / 3), entry("b", "cuda", source="estimated")), "net")
    save_costs(tmp_path / "costs.json", table)
    assert load_costs(tmp_path / "costs.json") == table
    assert load_costs(tmp_path / "costs.json", "net") == table
    with pytest.raises(InputError, match="holds the costs of net"):
        load_costs(tmp_path / "costs.json", "other")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{", "is no cost table"),
        ("[]", "is no cost table"),
        ({"schema_version": 99}, "has schema version 99; this version reads up to 1"),
        ({"schema_version": 1, "network": "n"}, "is no cost table"),
        ({"schema_version": 1, "network": "n", "entries": [{}]}, "is no cost table"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, content, problem):
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=problem) as caught:
        load_costs(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_table_with_impossible_entries_is_refused(tmp_path):
    path = tmp_path / "costs.json"
    save_costs(path, CostTable((entry(),)))
    good = json.loads(path.read_text())
    for entries in ([good["entries"][0] | {"latency_ms": -1.0}], good["entries"] * 2):
        path.write_text(json.dumps(good | {"entries": entries}))
        with pytest.raises(InputError, match="is no cost table"):
            load_costs(path)


HEAVY = Cost(0, 5 * 10**9, 3_000_000, 1_000_000, 4, 4)
"""1e10 FLOPs, 4 MB."""
WIDE = Cost(0, 10**3, 3 * 10**9, 10**9, 2, 2)
"""Almost no arithmetic, 4 GB."""


@pytest.mark.parametrize(
    ("kind", "cost", "threads", "busy", "expected_ms"),
    [
        ("cpu", HEAVY, 1, 1, 4 * 0.002 + 100.0),  # 1e10 / (1e12 * 0.1)
        ("cpu", HEAVY, 4, 1, 4 * 0.002 + 25.0),  # threads share the arithmetic
        ("cpu", HEAVY, 1, 2, 4 * 0.002 + 100.0),  # lanes have cores of their own
        ("cpu", WIDE, 4, 1, 2 * 0.002 + 400.0),  # 4e9 / (1e11 * 0.1)
        ("cpu", WIDE, 4, 2, 2 * 0.002 + 800.0),  # and share the memory
        ("cuda", HEAVY, 1, 1, 4 * 0.002 + 100.0),
        ("cuda", HEAVY, 1, 2, 4 * 0.002 + 200.0),  # lanes share all but launches
        ("cuda", WIDE, 1, 2, 2 * 0.002 + 800.0),
    ],
)
def test_estimates_are_rooflines_with_launches(kind, cost, threads, busy, expected_ms):
    model = DeviceModel("m", kind, 1e12, 1e11, 2.0, efficiency=0.1)
    assert model.latency_ms(cost, threads, busy) == pytest.approx(expected_ms)


def test_estimates_are_made_for_every_segment_width_and_number_of_lanes():
    tensors = [TensorSpec(name, "float32", (1,)) for name in "xyz"]
    graph = StreamGraph(
        (tensors[0],),
        (tensors[2],),
        (
            Segment("a", (tensors[0],), (tensors[1],), HEAVY),
            Segment("b", (tensors[1],), (tensors[2],), WIDE),
        ),
    )
    model = DeviceModel("m", "cpu", 1e12, 1e11, 2.0)
    table = estimate_costs(
        graph, model, whole=HEAVY, threads=(1, 3), max_busy_lanes=2, network="net"
    )
    assert {cost.situation for cost in table.entries} == {
        (name, "cpu", threads, busy)
        for name in ("a", "b", WHOLE)
        for threads in (1, 3)
        for busy in (1, 2)
    }
    assert {(cost.source, cost.environment) for cost in table.entries} == {("estimated", "m")}
    assert table.network == "net"
    assert table.find("a", "cpu", 3, 2).latency_ms == model.latency_ms(HEAVY, 3, 2)
    assert not table.is_measured
    assert estimate_costs(graph, model).find(WHOLE, "cpu") is None


def test_half_precision_is_never_slower_on_the_devices_known_by_name():
    names = {name for name, _ in DEVICE_MODELS}
    for name in names:
        full, half = DEVICE_MODELS[name, "fp32"], DEVICE_MODELS[name, "fp16"]
        assert half.latency_ms(HEAVY) <= full.latency_ms(HEAVY)
        assert half.latency_ms(WIDE) == full.latency_ms(WIDE)
