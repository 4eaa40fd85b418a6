from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_bench.measure import Procedure, Settling, measure, timed, warm_up

MS = 1_000_000
AT_ONCE = Settling(window_s=1e-6, window_runs=2)


class Machine:
    """Rows with given latencies on one clock that only they move."""

    def __init__(self, latency_ns, drift=lambda _: 1.0):
        self.latency_ns = latency_ns
        self.drift = drift
        self.now_ns = 0
        self.runs = []

    def run(self, name):
        self.runs.append(name)
        self.now_ns += round(self.latency_ns[name] * self.drift(self.now_ns))

    def turns(self):
        return {
            name: timed(lambda name=name: self.run(name), clock=lambda: self.now_ns)
            for name in self.latency_ns
        }


def sequence(latencies_ns):
    """A row whose successive runs take these times."""
    remaining = iter(latencies_ns)
    return lambda runs: list(itertools.islice(remaining, runs))


def test_a_turn_times_each_run_by_itself():
    moments = iter([0, 5, 100, 107, 200, 211])
    assert timed(lambda: None, clock=lambda: next(moments))(3) == [5, 7, 11]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
def test_every_round_runs_every_row_once_in_an_order_of_the_seed(latencies_ms, rounds, seed):
    names = [f"row{index}" for index in range(len(latencies_ms))]
    procedure = Procedure(rounds=rounds, seed=seed, settling=AT_ONCE)

    def recorded():
        machine = Machine({name: ms * MS for name, ms in zip(names, latencies_ms, strict=True)})
        return measure(machine.turns(), procedure), machine

    measurement, machine = recorded()
    assert len(measurement.rounds) == rounds
    assert measurement.stopped == "rounds"
    warm_up_runs = sum(len(row.latencies_ns) for row in measurement.warm_ups.values())
    turns = [name for name, _ in itertools.groupby(machine.runs[warm_up_runs:])]
    played = [name for done in measurement.rounds for name in done.order]
    assert turns == [name for name, _ in itertools.groupby(played)]
    for done in measurement.rounds:
        assert Counter(done.order) == Counter(names)
        for name, latency_ms in zip(names, latencies_ms, strict=True):
            assert set(done.latencies_ns[name]) == {latency_ms * MS}
    assert recorded()[0] == measurement


def test_the_order_of_the_rows_changes_from_round_to_round_and_with_the_seed():
    latencies = dict.fromkeys("abcd", MS)

    def orders(seed):
        procedure = Procedure(rounds=200, seed=seed, settling=AT_ONCE)
        measurement = measure(Machine(latencies).turns(), procedure)
        return [done.order for done in measurement.rounds]

    seen = Counter(orders(1))
    assert len(seen) == 24  # all permutations of four rows
    assert max(seen.values()) < 30  # 8.3 expected
    assert orders(1) != orders(2)
    first_rows = Counter(order[0] for order in orders(1))
    assert min(first_rows.values()) > 30  # 50 expected


def test_measuring_ends_when_the_row_with_the_least_time_has_enough():
    machine = Machine({"fast": 1 * MS, "slow": 40 * MS})
    measurement = measure(machine.turns(), Procedure(min_time_s=3.0, settling=AT_ONCE))
    assert measurement.stopped == "min-time"

    def time_s(name, rounds):
        return sum(sum(done.latencies_ns[name]) for done in rounds) / 1e9

    for rounds, enough in ((measurement.rounds, True), (measurement.rounds[:-1], False)):
        assert (min(time_s("fast", rounds), time_s("slow", rounds)) >= 3.0) == enough


def test_rows_that_take_seconds_are_still_measured_in_the_fewest_rounds_allowed():
    machine = Machine({"slow": 4000 * MS})
    measurement = measure(machine.turns(), Procedure(min_time_s=1.0))
    assert len(measurement.rounds) == 8
    assert {len(done.latencies_ns["slow"]) for done in measurement.rounds} == {2}


def test_turns_of_fast_and_slow_rows_take_about_the_same_time():
    machine = Machine({"fast": MS // 10, "slow": 50 * MS})
    (done,) = measure(machine.turns(), Procedure(rounds=1, settling=AT_ONCE)).rounds
    assert sum(done.latencies_ns["fast"]) == 250 * MS
    assert sum(done.latencies_ns["slow"]) == 250 * MS


def test_the_first_run_of_a_turn_is_not_recorded():
    class ColdMachine(Machine):
        def run(self, name):
            cold = self.runs[-1:] != [name]
            super().run(name)
            self.now_ns += 1000 * MS * cold

    machine = ColdMachine({"a": 100 * MS, "b": 200 * MS})
    measurement = measure(machine.turns(), Procedure(rounds=20, settling=AT_ONCE))
    for name, latency_ms in (("a", 100), ("b", 200)):
        samples = {x for done in measurement.rounds for x in done.latencies_ns[name]}
        assert samples == {latency_ms * MS}


def test_interleaved_rows_see_the_same_drifting_machine():
    machine = Machine({"a": 10 * MS, "b": 10 * MS}, drift=lambda now_ns: 1 + now_ns / 10e9)
    measurement = measure(machine.turns(), Procedure(min_time_s=4.0, settling=AT_ONCE))
    medians = [
        np.median([x for done in measurement.rounds for x in done.latencies_ns[name]])
        for name in ("a", "b")
    ]
    assert medians[0] / medians[1] == pytest.approx(1, abs=0.03)
    # Measured one after the other, each for the same time, the second would look slower.
    halves = np.array_split([x for done in measurement.rounds for x in done.latencies_ns["a"]], 2)
    assert np.median(halves[1]) / np.median(halves[0]) > 1.2


def test_ctrl_c_keeps_the_rounds_that_are_complete():
    machine = Machine({"a": 100 * MS, "b": 100 * MS})
    turns = machine.turns()
    heard = []

    def observe(turn):
        heard.append((turn.row, turn.round_number))
        if turn.round_number == 4 and heard[-2][1] == 4:
            raise KeyboardInterrupt

    measurement = measure(turns, Procedure(rounds=10, settling=AT_ONCE), observe)
    assert measurement.stopped == "interrupted"
    assert len(measurement.rounds) == 3
    assert all(set(done.latencies_ns) == {"a", "b"} for done in measurement.rounds)


def test_ctrl_c_during_the_warm_up_leaves_no_rounds():
    def turn(_):
        raise KeyboardInterrupt

    measurement = measure({"a": turn}, Procedure())
    assert (measurement.stopped, measurement.rounds) == ("interrupted", ())


def test_observers_hear_of_each_turn_before_it_and_how_much_is_done():
    machine = Machine({"a": 100 * MS, "b": 100 * MS})
    heard = []
    measurement = measure(machine.turns(), Procedure(rounds=4, settling=AT_ONCE), heard.append)
    assert [turn.row for turn in heard if turn.round_number == 0] == ["a", "b"]
    played = [(turn.row, turn.round_number) for turn in heard if turn.round_number]
    assert played == [
        (name, number) for number, done in enumerate(measurement.rounds, 1) for name in done.order
    ]
    fractions = [turn.fraction for turn in heard if turn.round_number]
    assert fractions == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_there_must_be_something_to_measure():
    with pytest.raises(ValueError, match="nothing to measure"):
        measure({}, Procedure())


@pytest.mark.parametrize("wrong", [{"min_time_s": 0}, {"min_time_s": np.nan}, {"rounds": 0}])
def test_a_procedure_that_never_measures_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Procedure(**wrong)


@pytest.mark.parametrize("half_life_runs", [20, 100, 1000])
def test_a_decaying_latency_settles_only_where_it_has_become_flat(half_life_runs):
    rng = np.random.default_rng(half_life_runs)
    runs = np.arange(200_000)
    level = 1 + 2 * 0.5 ** (runs / half_life_runs)
    latencies = (5 * MS * level * rng.lognormal(0, 0.01, len(runs))).astype(int).tolist()
    warmed = warm_up(sequence(latencies), Settling(max_s=200))
    assert warmed.settled
    settled_after = len(warmed.latencies_ns)
    # What was cut off as warm-up leaves a slope within tolerance and noise over a window.
    window = Settling().runs_per_window(5 * MS)
    assert level[settled_after] / level[settled_after + window] < 1.03
    assert settled_after < max(15 * half_life_runs, 200)


def test_a_steady_row_is_warm_after_two_windows_however_noisy():
    rng = np.random.default_rng(0)
    for noise in (0.0, 0.05, 0.5):
        latencies = (MS * rng.lognormal(0, noise, 100_000)).astype(int).tolist()
        warmed = warm_up(sequence(latencies), Settling())
        assert warmed.settled
        assert 0.5 <= sum(warmed.latencies_ns) / 1e9 < 1.5


def test_the_first_run_does_not_decide_how_long_the_warm_up_is():
    warmed = warm_up(sequence([3000 * MS] + [MS] * 10_000), Settling())
    assert warmed.settled
    assert len(warmed.latencies_ns) < 600


def test_a_row_that_never_settles_is_measured_after_the_time_for_it_and_marked():
    growing = (int(10 * MS * 1.01**run) for run in range(10_000))
    warmed = warm_up(sequence(growing), Settling(max_s=10))
    assert not warmed.settled
    assert 10 <= sum(warmed.latencies_ns) / 1e9 < 13


def test_a_row_of_many_seconds_settles_in_a_handful_of_runs():
    warmed = warm_up(sequence([3000 * MS] * 100), Settling(max_s=10))
    assert warmed.settled
    assert len(warmed.latencies_ns) == 3
