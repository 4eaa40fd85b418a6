from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_engines.planning import bundle_costs, cost_measure, engine_cores
from parnet_engines.planning.bundle_costs import (
    TYPICAL_CORE,
    add_bundle_costs,
    costs_for,
    load_bundle_costs,
    network_of,
)
from parnet_engines.planning.cost_measure import measure_costs
from parnet_engines.planning.cost_table import COSTS_NAME, SegmentCost
from parnet_engines.planning.machine import describe_machine
from parnet_engines.runtimes.delay_engine import DelayEngine
from parnet_engines.schedule.placement import Lane
from parnet_engines.schedule.program import Run
from parnet_engines.session import SegmentFailedError, Session
from parnet_export.bundle import Bundle, Provenance, open_bundle
from parnet_export.errors import InputError
from parnet_export.pack import write_bundle
from parnet_export.splitting.split import SplitOptions, split_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from parnet_engines.schedule.check import CheckedProgram


NAMES = ["stem", "stream1", "stream2", "head"]
SERIAL = {"stem", "head"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of a stem, two convolution branches and a head."""
    rng = np.random.default_rng(0)

    def conv(source: str, weight: str, target: str) -> Any:
        return helper.make_node("Conv", [source, weight], [target], pads=[1, 1, 1, 1])

    shapes = {"w0": (64, 3, 3, 3)} | {f"w{i}": (64, 64, 3, 3) for i in range(1, 5)}
    graph = helper.make_graph(
        [
            conv("image", "w0", "stem"),
            conv("stem", "w1", "left1"),
            conv("left1", "w2", "left2"),
            conv("stem", "w3", "right1"),
            conv("right1", "w4", "right2"),
            helper.make_node("Add", ["left2", "right2"], ["sum"]),
        ],
        "branches",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch", 3, 16, 16))],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ("batch", 64, 16, 16))],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 16, name)
            for name, shape in shapes.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    split = split_model(ir.from_proto(model), SplitOptions(min_gain=0.0))
    assert [segment.name for segment in split.stream_graph.segments] == NAMES
    provenance = Provenance("branches", "test", weights="random", seed=0)
    return write_bundle(split, tmp_path / "b", precision="fp32", provenance=provenance)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(cost_measure, "BUDGET_S", 0.0)
    monkeypatch.setattr(engine_cores, "WORTH_SHARING_MS", 0.0)


def lane(name: str, *cores: int, device: str = "cpu") -> Lane:
    return Lane(name, device, cores)


class BusyDelay(DelayEngine):
    """Takes 1 ms alone and 12 ms while another one runs, wherever that is."""

    running = 0
    lock = threading.Lock()

    def _wait(self) -> None:
        with self.lock:
            BusyDelay.running += 1
            self.latency_ms = 12.0 if BusyDelay.running > 1 else 1.0
        super()._wait()
        with self.lock:
            BusyDelay.running -= 1


def opener(make: Callable[..., Any], opened: list[CheckedProgram]) -> Callable[..., Session]:
    """Open sessions of engines that `make` returns for a segment and a lane."""

    def open_program(
        program: CheckedProgram, *, record: bool = False, beside_others: bool = False
    ) -> Session:
        assert beside_others
        opened.append(program)
        lanes = program.program.lanes_by_name
        engines = {
            (s.segment, s.lane): make(program.graph[s.segment], lanes[s.lane])
            for s in program.program.steps
            if isinstance(s, Run)
        }
        return Session(program, engines, pin=False, record=record)

    return open_program


def test_each_segment_is_timed_alone_and_beside_busy_lanes_for_each_width(bundle):
    delays_ms = {name: 4.0 + 4.0 * index for index, name in enumerate(NAMES)}

    def make(segment: Any, on: Lane) -> DelayEngine:
        return DelayEngine(segment, delays_ms[segment.name] / len(on.cores))

    opened: list[CheckedProgram] = []
    lanes = [lane("a", 0, 1), lane("b", 2), lane("c", 3)]
    costs = measure_costs(bundle, lanes, opener(make, opened))
    found = {(cost.segment, cost.threads, cost.busy_lanes): cost for cost in costs}
    situations = {(threads, busy) for threads in (1, 2) for busy in (1, 3)} | {(4, 1)}
    assert set(found) == {(name, *situation) for name in NAMES for situation in situations}
    assert len(found) == len(costs)
    for (name, threads, busy), cost in found.items():
        cores = 4 if name in SERIAL and busy == 3 else threads
        expected_ms = delays_ms[name] / cores
        assert expected_ms <= cost.latency_ms < expected_ms + 20
        assert (cost.device_kind, cost.source) == ("cpu", "measured")
        assert cost.environment == describe_machine()
    assert [program.program.lanes[0].cores for program in opened] == [
        *(on.cores for on in lanes),
        (0, 1, 2, 3),
    ]


def test_beside_busy_lanes_means_that_none_is_ever_alone(bundle):
    costs = measure_costs(bundle, [lane("a", 0), lane("b", 1)], opener(busy_delay, []))
    for cost in costs:
        is_alone = cost.busy_lanes == 1 or cost.segment in SERIAL
        low_ms = 1.0 if is_alone else 12.0
        assert low_ms <= cost.latency_ms < low_ms + 10


def busy_delay(segment: Any, _: Lane) -> BusyDelay:
    return BusyDelay(segment, 1.0)


def test_a_lane_without_neighbours_on_its_device_is_timed_alone_only(bundle):
    lanes = [lane("a", 0, device="cpu:0"), lane("b", 1, device="cpu:1")]
    costs = measure_costs(bundle, lanes, opener(busy_delay, []))
    assert {cost.busy_lanes for cost in costs} == {1}
    assert len(costs) == len(NAMES)


def test_a_segment_that_fails_is_named_and_no_thread_is_left(bundle):
    class Failing(DelayEngine):
        runs = 0

        def _wait(self) -> None:
            self.runs += 1
            if self.name == "head" and self.runs > 12:
                raise RuntimeError("no luck")

    lanes = [lane("a", 0), lane("b", 1)]
    before = set(threading.enumerate())
    with pytest.raises(SegmentFailedError, match="segment 'head' failed"):
        measure_costs(bundle, lanes, opener(lambda s, _: Failing(s, 0.0), []))
    assert set(threading.enumerate()) <= before


def test_real_engines_are_measured_where_they_will_run(bundle):
    cores = sorted(os.sched_getaffinity(0))
    lanes = [lane(f"lane{core}", core) for core in cores[:2]]
    costs = measure_costs(bundle, lanes, partial(Session.load, bundle))
    situations = {(1, 1), (1, 2), (2, 1)} if len(cores) > 1 else {(1, 1)}
    assert {(c.segment, c.threads, c.busy_lanes) for c in costs} == {
        (name, *situation) for name in NAMES for situation in situations
    }
    assert all(0 < cost.latency_ms < 1000 for cost in costs)
    assert sorted(os.sched_getaffinity(0)) == cores


# --------------------------------------------------------------------- costs of a bundle


def measured(bundle: Bundle, *, threads: int = 1, busy: int = 1, ms: float = 2.0):
    machine = describe_machine()
    return [
        SegmentCost(segment.name, "cpu", threads, busy, ms, "measured", machine)
        for segment in bundle.stream_graph.segments
    ]


def test_costs_are_kept_with_the_bundle_which_stays_valid(bundle):
    assert load_bundle_costs(bundle).entries == ()
    added = add_bundle_costs(bundle, measured(bundle, ms=2.0))
    assert load_bundle_costs(bundle) == added
    assert open_bundle(bundle.path).manifest == bundle.manifest
    add_bundle_costs(bundle, measured(bundle, threads=2, ms=1.5))
    again = add_bundle_costs(bundle, measured(bundle, ms=3.0))
    assert {(c.threads, c.latency_ms) for c in again.entries} == {(1, 3.0), (2, 1.5)}
    assert load_bundle_costs(bundle) == again


def test_costs_of_another_machine_or_bundle_count_for_nothing(bundle, monkeypatch):
    add_bundle_costs(bundle, measured(bundle))
    changed = replace(bundle.manifest, manifest_sha256="1" * 64)
    assert load_bundle_costs(replace(bundle, manifest=changed)).entries == ()
    monkeypatch.setattr(bundle_costs, "describe_machine", lambda: "another machine")
    assert load_bundle_costs(bundle).entries == ()


def test_a_damaged_file_of_costs_is_named(bundle):
    (bundle.path / COSTS_NAME).write_text("{")
    with pytest.raises(InputError, match=rf"{COSTS_NAME}: is no cost table"):
        load_bundle_costs(bundle)


def test_plans_rest_on_measurements_only_if_every_width_was_measured(bundle):
    narrow, wide = [lane("a", 0), lane("b", 1)], [lane("a", 0, 1), lane("b", 2)]
    assert {cost.source for cost in costs_for(bundle, [narrow]).entries} == {"estimated"}
    add_bundle_costs(bundle, measured(bundle))
    assert {cost.source for cost in costs_for(bundle, [narrow]).entries} == {"measured"}
    estimated = costs_for(bundle, [wide, narrow])
    assert {cost.environment for cost in estimated.entries} == {TYPICAL_CORE.name}
    assert estimated.network == network_of(bundle)
    for on in wide:
        for segment in bundle.stream_graph.segments:
            assert estimated.latency_ms(segment.name, on, 2) > 0


def test_the_machine_is_described_in_one_line_with_its_runtime():
    line = describe_machine()
    assert f"{len(os.sched_getaffinity(0))} cores" in line
    assert "onnxruntime " in line
    assert "\n" not in line


def test_the_time_limit_ends_a_measurement(bundle, monkeypatch):
    monkeypatch.setattr(cost_measure, "BUDGET_S", 0.15)
    runs = 0

    class Counting(DelayEngine):
        def _wait(self) -> None:
            nonlocal runs
            runs += 1
            super()._wait()

    begin_s = time.monotonic()
    count = len(NAMES)
    measure_costs(bundle, [lane("a", 0)], opener(lambda s, _: Counting(s, 1.0), []))
    assert time.monotonic() - begin_s < 5
    assert cost_measure.MIN_ROUNDS * count < runs < cost_measure.MAX_ROUNDS * count
