from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_bench.measuring.measure import measure
from parnet_bench.measuring.warm_up import warm_up
from parnet_bench.results.procedure import Procedure, Settling
from parnet_bench.workers.turn import Turn, TurnRequest
from parnet_engines.clock import FakeClock
from parnet_export.errors import ParnetError

MS = 1_000_000


class Machine:
    """Rows of given latencies that write down who ran when."""

    def __init__(self, latencies_ms, row_type, drift=lambda _: 1.0):
        self.latencies_ms = latencies_ms
        self.row_type = row_type
        self.drift = drift
        self.clock = FakeClock()
        self.launched = []
        self.runs = []
        self.closed = []

    def launch(self, name, process):
        self.launched.append((name, process))
        row = self.row_type(self.clock, lambda count, now: self.draw(name, count, now))
        row.close = lambda: self.closed.append((name, process))
        return row

    def draw(self, name, count, now_ns):
        self.runs += [name] * count
        return np.full(count, self.latencies_ms[name] * MS * self.drift(now_ns))

    def measure(self, procedure, **options):
        groups = dict.fromkeys(self.latencies_ms, 1)
        return measure(groups, self.launch, procedure, self.clock, **options)


@pytest.fixture
def machine(simulated_row):
    return lambda latencies_ms, **options: Machine(latencies_ms, simulated_row, **options)


def brief(**options):
    """A procedure of a few rounds in one process, without pipelined turns."""
    return Procedure(**{"processes": 1, "in_flight": 1, "rounds": 4} | options)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_every_round_of_every_process_runs_every_row_once(
    simulated_row, latencies_ms, rounds, processes, seed
):
    latencies = {f"row{index}": ms for index, ms in enumerate(latencies_ms)}
    procedure = brief(rounds=rounds, processes=processes, seed=seed)
    measurement = Machine(latencies, simulated_row).measure(procedure)
    assert measurement.stopped == "rounds"
    assert [len(orders) for orders in measurement.orders] == [rounds] * processes
    for order in itertools.chain.from_iterable(measurement.orders):
        assert Counter(order) == Counter(list(latencies))
    for name, latency_ms in latencies.items():
        recorded = measurement.recordings[name]
        assert len(recorded) == processes
        for process in recorded:
            assert len(process.rounds_ns) == rounds
            assert set(process.samples_ns) == {latency_ms * MS}
            assert process.load_ms == 1000
    assert Machine(latencies, simulated_row).measure(procedure) == measurement


def test_every_process_is_fresh_and_ends_before_the_next_one(machine):
    rows = machine({"a": 10, "b": 20})
    rows.measure(brief(processes=3))
    expected = list(itertools.product(range(3), "ab"))
    assert rows.launched == [(name, process) for process, name in expected]
    assert sorted(rows.closed) == sorted(rows.launched)


def test_the_order_of_the_rows_changes_from_round_to_round_and_with_the_seed(machine):
    latencies = dict.fromkeys("abcd", 1)

    def orders(seed):
        (found,) = machine(latencies).measure(brief(rounds=200, seed=seed)).orders
        return found

    seen = Counter(orders(1))
    assert len(seen) == 24  # all permutations of four rows
    assert max(seen.values()) < 30  # 8.3 expected
    assert orders(1) != orders(2)
    first_rows = Counter(order[0] for order in orders(1))
    assert min(first_rows.values()) > 30  # 50 expected


def test_measuring_ends_when_time_is_up_and_processes_share_it(machine):
    # Latencies that wander keep intervals from getting narrow.
    rows = machine({"a": 100, "b": 100}, drift=lambda now: 1 + 0.3 * np.sin(now / 1e8))
    measurement = rows.measure(Procedure(max_time_s=60, processes=3, in_flight=1))
    assert measurement.stopped == "time"
    assert 50 <= rows.clock.now_ns() / 1e9 <= 62
    counts = [len(orders) for orders in measurement.orders]
    assert max(counts) - min(counts) <= 3


def test_measuring_ends_early_when_everything_is_known_precisely(machine):
    rows = machine({"a": 100, "b": 50})
    measurement = rows.measure(Procedure(max_time_s=600, processes=3, in_flight=1))
    assert measurement.stopped == "target"
    assert rows.clock.now_ns() / 1e9 < 60


def test_each_row_is_measured_for_the_least_time_even_when_known_precisely(machine):
    measurement = machine({"fast": 1, "slow": 40}).measure(
        Procedure(max_time_s=600, min_time_s=30, processes=3, in_flight=1)
    )
    assert measurement.stopped == "target"
    for recorded in measurement.recordings.values():
        assert sum(sum(process.samples_ns) for process in recorded) / 1e9 >= 30


def test_rows_that_take_seconds_are_still_measured_in_the_fewest_rounds_allowed(machine):
    measurement = machine({"slow": 4000}).measure(
        Procedure(max_time_s=1, processes=2, in_flight=1, min_rounds=3)
    )
    for process in measurement.recordings["slow"]:
        assert [len(turn) for turn in process.rounds_ns] == [2, 2, 2]
    assert measurement.stopped == "time"


def test_turns_of_fast_and_slow_rows_take_about_the_same_time(machine):
    measurement = machine({"fast": 0.1, "slow": 50}).measure(brief(rounds=1))
    for recorded in measurement.recordings.values():
        assert sum(recorded[0].samples_ns) == 250 * MS


def test_pipelined_turns_come_after_and_are_kept_apart(machine):
    rows = machine({"a": 10, "b": 20})
    workers = {}

    def finish(name, worker):
        workers.setdefault(name, worker)

    measurement = rows.measure(brief(in_flight=3, rounds=2), finish=finish)
    for name, worker in workers.items():
        flights = [request.in_flight for request in worker.requests]
        assert flights == sorted(flights)
        assert set(flights) == {1, 3}
        (process,) = measurement.recordings[name]
        assert process.pipelined.in_flight == 3
        assert len(process.pipelined.latencies_ns) == len(process.pipelined.elapsed_ns) == 2
        assert all(turn.lead_in == 3 for turn in worker.requests if turn.in_flight == 3)
    assert machine({"a": 10}).measure(brief()).recordings["a"][0].pipelined is None


def test_without_interleaving_each_row_makes_all_its_rounds_in_succession(machine):
    rows = machine({"a": 10, "b": 20, "c": 5})
    measurement = rows.measure(brief(interleave=False, rounds=6))
    assert len(measurement.orders[0]) == 6
    # The warm-ups come first, a row after the other, and then again a row after the other.
    assert len([name for name, _ in itertools.groupby(rows.runs)]) in {5, 6}
    timed = machine({"a": 10, "b": 20}).measure(
        Procedure(interleave=False, max_time_s=30, processes=3, in_flight=1)
    )
    assert timed.stopped == "time"
    assert all(len(orders) > 3 for orders in timed.orders)


def test_interleaved_rows_see_the_same_drifting_machine(machine):
    rows = machine({"a": 10, "b": 10}, drift=lambda now_ns: 1 + now_ns / 10e9)
    measurement = rows.measure(brief(rounds=20))
    medians = [np.median(measurement.recordings[name][0].samples_ns) for name in "ab"]
    assert medians[0] / medians[1] == pytest.approx(1, abs=0.03)
    # Measured one after the other, each for the same time, the second would look slower.
    halves = np.array_split(measurement.recordings["a"][0].samples_ns, 2)
    assert np.median(halves[1]) / np.median(halves[0]) > 1.2


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_row_that_fails_in_the_middle_drops_out_and_says_why(machine, in_flight):
    rows = machine({"a": 10, "b": 20, "c": 30})
    turns = Counter()
    launch = rows.launch

    def failing(name, process):
        worker = launch(name, process)
        take_turn = worker.take_turn

        def counted(request):
            turns[name] += 1
            if name == "b" and process == 1 and turns[name] > 20:
                raise ParnetError("b: the device is lost")
            return take_turn(request)

        worker.take_turn = counted
        return worker

    rows.launch = failing
    measurement = rows.measure(brief(processes=3, rounds=20, in_flight=in_flight))
    assert list(measurement.recordings) == ["a", "c"]
    (failure,) = measurement.failures
    assert (failure.name, failure.stage, failure.process) == ("b", "run", 1)
    assert "the device is lost" in str(failure.error)
    for orders in measurement.orders:
        assert len(orders) == 20
        assert all(sorted(order) == ["a", "c"] for order in orders)
    assert ("b", 2) not in rows.launched
    assert sorted(rows.closed) == sorted(rows.launched)


def test_rows_are_compared_with_the_next_one_when_the_first_one_fails_early(machine):
    rows = machine({"a": 10, "b": 20, "c": 30})
    launch = rows.launch

    def failing(name, process):
        if name == "a":
            raise ParnetError("a: cannot be loaded")
        return launch(name, process)

    rows.launch = failing
    measurement = rows.measure(Procedure(max_time_s=100))
    assert (measurement.stopped, measurement.failures[0].stage) == ("target", "load")
    assert list(measurement.recordings) == ["b", "c"]


def test_when_all_rows_fail_there_is_nothing_but_reasons(machine):
    rows = machine({"a": 10, "b": 20})

    def refuse(name, _):
        raise ParnetError(f"{name}: cannot be loaded")

    rows.launch = refuse
    measurement = rows.measure(Procedure())
    assert measurement.recordings == {}
    assert [failure.name for failure in measurement.failures] == ["a", "b"]


def test_ctrl_c_keeps_the_rounds_that_are_complete(machine):
    rows = machine({"a": 100, "b": 100})
    heard = []

    def observe(turn):
        heard.append((turn.process, turn.round_number))
        if turn.process == 2 and turn.round_number == 4 and heard[-2][1] == 4:
            raise KeyboardInterrupt

    measurement = rows.measure(brief(processes=3, rounds=10), observe=observe)
    assert measurement.stopped == "interrupted"
    assert [len(orders) for orders in measurement.orders] == [10, 3]
    for recorded in measurement.recordings.values():
        assert [len(process.rounds_ns) for process in recorded] == [10, 3]
    assert sorted(rows.closed) == sorted(rows.launched)


def test_ctrl_c_during_the_warm_up_leaves_no_recordings(machine):
    rows = machine({"a": 100})

    def interrupt(*_):
        raise KeyboardInterrupt

    rows.draw = interrupt
    measurement = rows.measure(Procedure())
    assert (measurement.stopped, measurement.recordings) == ("interrupted", {})


def test_observers_hear_of_each_turn_before_it_and_how_far_things_are(machine):
    heard = []
    rows = machine({"a": 100, "b": 100})
    measurement = rows.measure(brief(rounds=10), observe=heard.append)
    phases = [phase for phase, _ in itertools.groupby(turn.phase for turn in heard)]
    assert phases == ["loading", "warming up", "measuring"]
    played = [(turn.row, turn.round_number) for turn in heard if turn.round_number]
    (orders,) = measurement.orders
    assert played == [(name, number) for number, done in enumerate(orders, 1) for name in done]
    rounds = [turn for turn in heard if turn.round_number]
    assert [turn.fraction for turn in rounds[::2]] == pytest.approx(np.arange(10) / 10)
    assert rounds[0].median_ns is None
    assert rounds[-1].median_ns == pytest.approx(100 * MS)
    assert rounds[-1].half_width == pytest.approx(0, abs=1e-12)


def test_observers_hear_how_much_time_is_left(machine):
    heard = []
    machine({"a": 100}).measure(Procedure(max_time_s=60, in_flight=1), observe=heard.append)
    left = [turn.left_s for turn in heard]
    assert left == sorted(left, reverse=True)
    assert 59 < left[0] <= 60


def test_there_must_be_something_to_measure():
    with pytest.raises(ValueError, match="nothing to measure"):
        measure({}, lambda *_: None, Procedure(), FakeClock())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_time_s": 0},
        {"max_time_s": np.nan},
        {"min_time_s": -1},
        {"target_ci": 0},
        {"rounds": 0},
        {"processes": 0},
        {"in_flight": 0},
        {"percentiles": (100.0,)},
    ],
)
def test_a_procedure_that_never_measures_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must|between"):
        Procedure(**wrong)


# ------------------------------------------------------------------------------ warm-up


class Sequence:
    """A row whose successive runs take these times."""

    def __init__(self, latencies_ns):
        self.remaining = iter(latencies_ns)

    def take_turn(self, request: TurnRequest):
        return Turn(tuple(itertools.islice(self.remaining, request.runs)), 1)


def warmed(latencies_ns, share_s=np.inf, **settling):
    procedure = Procedure(settling=Settling(**settling))
    return warm_up(Sequence(latencies_ns), procedure, share_s)


@pytest.mark.parametrize("half_life_runs", [20, 100, 1000])
def test_a_decaying_latency_settles_only_where_it_has_become_flat(half_life_runs):
    rng = np.random.default_rng(half_life_runs)
    runs = np.arange(200_000)
    level = 1 + 2 * 0.5 ** (runs / half_life_runs)
    latencies = (5 * MS * level * rng.lognormal(0, 0.01, len(runs))).astype(int).tolist()
    found = warmed(latencies, max_s=200)
    assert found.settled
    settled_after = len(found.latencies_ns)
    # What was cut off as warm-up leaves a slope within tolerance and noise over a window.
    window = Settling().runs_per_window(5 * MS, 200)
    assert level[settled_after] / level[settled_after + window] < 1.03
    assert settled_after < max(15 * half_life_runs, 200)


def test_a_steady_row_is_warm_after_two_windows_however_noisy():
    rng = np.random.default_rng(0)
    for noise in (0.0, 0.05, 0.5):
        found = warmed((MS * rng.lognormal(0, noise, 100_000)).astype(int).tolist())
        assert found.settled
        assert 0.4 <= sum(found.latencies_ns) / 1e9 < 1.5


def test_the_first_run_does_not_decide_how_long_the_warm_up_is():
    found = warmed([3000 * MS] + [MS] * 10_000)
    assert found.settled
    assert len(found.latencies_ns) < 600


def test_a_row_that_never_settles_is_measured_after_the_time_for_it_and_marked():
    found = warmed((int(10 * MS * 1.03**run) for run in range(1000)), max_s=10)
    assert not found.settled
    assert 10 <= sum(found.latencies_ns) / 1e9 < 13


def test_a_row_of_many_seconds_settles_in_a_handful_of_runs():
    found = warmed([3000 * MS] * 100, max_s=10)
    assert found.settled
    assert len(found.latencies_ns) == 3


def test_little_time_makes_windows_shorter_and_not_fewer():
    found = warmed([10 * MS] * 1000, share_s=0.2)
    assert found.settled
    assert 5 <= len(found.latencies_ns) <= 15
