"""Rows in turns, what is computed from them, and what is said about it."""

from __future__ import annotations

import pytest

from parnet_bench.machine.state import GpuState
from parnet_bench.selftest.comparison_findings import findings
from parnet_bench.selftest.device_limits import Limits
from parnet_bench.selftest.engine_rows import SPLIT, SPLIT_BY_VECTORS, EngineRow
from parnet_bench.selftest.measured_rows import measure_in_turns, summarise
from parnet_bench.selftest.path_figures import PathFigures
from parnet_engines.clock import FakeClock


def measured_of(rows, clock, *, rounds=9, runs=20):
    return summarise(rows, measure_in_turns(rows, clock, rounds=rounds, runs=runs, seed=0))


def row(name: str, clock: FakeClock | None = None, ms: float = 0.0, network: str = "net"):
    run = None if clock is None else lambda: clock.advance_ms(ms)
    return EngineRow(network, name, run, "torch", "eager", "" if clock else "is not here")


def test_rows_take_turns_and_are_compared_within_rounds():
    clock = FakeClock()
    rows = [
        row("whole engine", clock, 3.0),
        row("split streams", clock, 2.0),
        row("whole engine, aux streams"),
        row("whole engine", clock, 1.0, "other"),
    ]
    measured = measured_of(rows, clock, runs=40)
    assert [r.median_ms for r in measured] == [3.0, 2.0, None, 1.0]
    assert measured[1].against_whole.value == 1.5
    assert (measured[1].against_whole.low, measured[1].against_whole.high) == (1.5, 1.5)
    assert [len(one) for one in measured[0].samples_ms] == [40] * 9
    assert measured[0].p99_ms is None  # 360 samples do not reach that far
    assert (measured[2].samples_ms, measured[2].reason) == ((), "is not here")


@pytest.mark.parametrize(("split_ms", "missed"), [(1.0, False), (2.5, True)])
def test_a_missed_aim_says_where_the_time_goes(split_ms, missed):
    clock = FakeClock()
    rows = [row("whole engine", clock, 3.0), row("split streams", clock, split_ms)]
    measured = measured_of(rows, clock)
    path = PathFigures({"stem": 0.5, "stream3": 1.25}, 1.75, 0.4, "one stream dominates")
    (text,) = findings(measured, [Limits("net", 0.1, 0.2, path)])
    assert text.startswith(f"net: split streams are {3 / split_ms:.2f}x as fast as the whole")
    assert ("critical path takes 1.750 ms (stream3 1.250 ms, stem 0.500 ms)" in text) == missed
    assert ("overlap 40% of the time: one stream dominates" in text) == missed


def test_the_better_boundary_is_compared_with_the_aim_and_with_the_other():
    clock = FakeClock()
    rows = [
        row("whole engine", clock, 3.0),
        row(SPLIT, clock, 2.0),
        row(SPLIT_BY_VECTORS, clock, 1.0),
    ]
    measured = measured_of(rows, clock)
    gain, aim = findings(measured, [Limits("net", 0.1, 0.2, PathFigures())])
    assert gain.startswith("net: with vectors between engines split streams are 2.00x (2.00")
    assert aim == f"net: {SPLIT_BY_VECTORS} are 3.00x as fast as the whole engine"


def test_a_gpu_may_raise_its_clocks_before_anything_is_recorded():
    clock = FakeClock()
    slow = iter([50.0] * 21)
    run = lambda: clock.advance_ms(next(slow, 2.0))  # noqa: E731
    (measured,) = measured_of([EngineRow("net", SPLIT, run)], clock, rounds=30)
    assert (measured.median_ms, measured.p99_ms) == (2.0, 2.0)
    assert {ms for one in measured.samples_ms for ms in one} == {2.0}
    assert len(measured.samples_ms) == 30


def test_a_row_that_fails_drops_out_with_what_it_had_and_the_others_go_on():
    clock = FakeClock()
    left = iter(range(4 * 21 + 5))

    def fail_at_last():
        if next(left, None) is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nhint")
        clock.advance_ms(2.0)

    rows = [
        row("whole engine", clock, 3.0),
        EngineRow("net", SPLIT, fail_at_last, "torch", "one CUDA graph"),
    ]
    whole, split = measured_of(rows, clock)
    assert (len(whole.samples_ms), whole.reason) == (9, "")
    assert len(split.samples_ms) == 3
    assert split.reason == (
        "failed in round 4: RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert (split.against_whole.value, split.against_whole.rounds) == (1.5, 3)


def interrupted_in(round_number):
    clock = FakeClock()
    left = iter(range(3 * round_number))

    def run():
        if next(left, None) is None:
            raise KeyboardInterrupt
        clock.advance_ms(2.0)

    rows = [row("whole engine", clock, 3.0), EngineRow("net", SPLIT, run)]
    return measure_in_turns(rows, clock, rounds=9, runs=2, seed=0)


def test_an_interrupted_measurement_keeps_its_whole_rounds():
    turns = interrupted_in(4)
    assert turns.interrupted
    assert turns.samples_ms == {0: ((3.0, 3.0),) * 3, 1: ((2.0, 2.0),) * 3}
    with pytest.raises(KeyboardInterrupt):
        interrupted_in(1)


def test_something_may_be_done_between_turns_and_is_not_timed():
    clock = FakeClock()
    rows = [row("whole engine", clock, 3.0), row(SPLIT, clock, 2.0)]

    def look():
        clock.advance_ms(50.0)
        looks.append(1)

    looks = []
    turns = measure_in_turns(rows, clock, rounds=4, runs=2, seed=0, between=look)
    assert turns.samples_ms == {0: ((3.0, 3.0),) * 4, 1: ((2.0, 2.0),) * 4}
    assert len(looks) == 10  # a round before those that are recorded


def test_networks_are_compared_with_references_in_the_same_rounds():
    clock = FakeClock()
    for ms, said in (
        (4.0, "is 2.00x (2.00 to 2.00) as fast as resnet50"),
        (0.5, "is 0.25x (0.25 to 0.25) as fast as resnet50, and is to be ahead of it"),
    ):
        rows = [
            row("torch, fused", clock, 1.0, "parnet-l"),
            row("whole engine", clock, 3.0, "parnet-l"),
            row(SPLIT, clock, 2.0, "parnet-l"),
            row("whole engine", clock, ms, "resnet50"),
        ]
        limit = Limits("parnet-l", None, None, PathFigures(reason="was not recorded"))
        aim, reference = findings(measured_of(rows, clock), [limit])
        assert aim == "parnet-l: split streams are 1.50x as fast as the whole engine"
        assert reference == f"parnet-l (split streams) {said}"


def test_a_missed_aim_without_a_recording_is_said_all_the_same():
    clock = FakeClock()
    measured = measured_of([row("whole engine", clock, 2.0), row(SPLIT, clock, 2.0)], clock)
    limit = Limits("net", None, None, PathFigures(reason="memory ran out"))
    assert findings(measured, [limit]) == (
        "net: split streams are 1.00x as fast as the whole engine (aim 1.5x)",
    )


def test_a_gpu_that_was_held_down_is_a_finding():
    cool = GpuState(0, "H100", "600", True, 1900, 1980, (), 1)
    hot = GpuState(1, "H100", "600", True, 1200, 1980, ("heat",), 1, 88, 650.0)
    (text,) = findings((), (), (cool, hot))
    assert text == "GPU 1 (H100) was held down by heat, at up to 88 °C and 650 W"
