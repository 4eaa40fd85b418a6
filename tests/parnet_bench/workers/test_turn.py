from __future__ import annotations

import threading
import time

import pytest

from parnet_bench.workers.turn import TurnRequest, one_at_a_time, several_in_flight


def test_a_turn_times_each_run_by_itself_and_not_its_lead_in():
    moments = iter([0, 1, 6, 100, 107, 200, 211, 300])
    runs = []
    turn = one_at_a_time(
        lambda: runs.append(1), TurnRequest(3, lead_in=2), clock=lambda: next(moments)
    )
    assert turn.latencies_ns == (5, 7, 11)
    assert turn.elapsed_ns == 300
    assert len(runs) == 5


def test_what_prepares_a_run_comes_before_each_one_and_is_not_timed():
    now = [0]

    def take(duration):
        now[0] += duration

    turn = one_at_a_time(
        lambda: take(3),
        TurnRequest(4, lead_in=1),
        prepare=lambda: take(1000),
        clock=lambda: now[0],
    )
    assert turn.latencies_ns == (3,) * 4
    assert now[0] == 5 * 1003


@pytest.mark.parametrize("in_flight", [2, 3])
def test_several_in_flight_are_under_way_at_the_same_time_and_never_more(in_flight):
    under_way, seen, guard = [0], [], threading.Lock()

    def run():
        with guard:
            under_way[0] += 1
            seen.append(under_way[0])
        time.sleep(0.005)
        with guard:
            under_way[0] -= 1

    request = TurnRequest(12, lead_in=in_flight, in_flight=in_flight)
    turn = several_in_flight(run, request)
    assert max(seen) == in_flight
    assert len(seen) == 12 + in_flight
    assert len(turn.latencies_ns) == 12
    assert min(turn.latencies_ns) >= 5_000_000
    # All runs together take a fraction of what they take one after another.
    assert turn.elapsed_ns < 0.8 * sum(turn.latencies_ns)


def test_an_error_in_flight_reaches_the_caller():
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        several_in_flight(fail, TurnRequest(4, in_flight=2))
