from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from statistics import median

import pytest

from parnet_engines.clock import FakeClock
from parnet_engines.planning.rounds import ratio_of, run_rounds


@pytest.mark.parametrize("count", range(1, 13))
def test_the_interval_covers_the_median_as_often_as_it_says_and_no_narrower_one_does(count):
    ratio = ratio_of(range(1, count + 1), [1] * count)
    assert ratio.value == median(range(1, count + 1))
    assert ratio.rounds == count

    def coverage(low: float, high: float) -> float:
        # Each round's ratio is below or above the true median with equal chance; the
        # interval of ranks low to high then holds it if neither end is beyond it.
        held = sum(
            low <= sum(below) < high for below in itertools.product((False, True), repeat=count)
        )
        return held / 2**count

    if math.isinf(ratio.high):
        assert ratio.low == 0
        assert coverage(1, count) < 0.95
    else:
        assert coverage(ratio.low, ratio.high) >= 0.95
        assert ratio.low + ratio.high == count + 1
        if ratio.low + 1 < ratio.high - 1:
            assert coverage(ratio.low + 1, ratio.high - 1) < 0.95


def test_the_interval_holds_the_true_ratio_in_nineteen_of_twenty_experiments():
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        drift = [rng.lognormvariate(0, 1) for _ in range(25)]  # meets both alike
        slow = [1.3 * d * rng.lognormvariate(0, 0.1) for d in drift]
        fast = [d * rng.lognormvariate(0, 0.1) for d in drift]
        ratio = ratio_of(slow, fast)
        held += ratio.low <= 1.3 <= ratio.high
    assert 940 <= held <= 995


def test_a_ratio_needs_matching_rounds():
    with pytest.raises(ValueError, match="needs rounds"):
        ratio_of([], [])
    with pytest.raises(ValueError, match="shorter"):
        ratio_of([1, 2], [1])


class Candidates:
    """Runs of known length on a fake clock, and the order in which they were asked for."""

    def __init__(self, **latency_ms: float) -> None:
        self.clock = FakeClock()
        self.asked: list[str] = []
        self.runs = {
            name: lambda n=name, ms=ms: self._run(n, ms) for name, ms in latency_ms.items()
        }

    def _run(self, name: str, latency_ms: float) -> None:
        self.asked.append(name)
        self.clock.advance_ms(latency_ms)

    def rounds(self, **options: object) -> dict[str, tuple[float, ...]]:
        settings = {"budget_s": 1.0, "min_rounds": 3, "max_rounds": 50, "order": random.Random(0)}
        return run_rounds(self.runs, clock=self.clock, **(settings | options))


def test_every_round_has_a_turn_of_each_candidate_in_random_order():
    candidates = Candidates(a=4, b=8, c=100)
    found = candidates.rounds()
    assert {name: set(latencies) for name, latencies in found.items()} == {
        "a": {4.0},
        "b": {8.0},
        "c": {100.0},
    }
    turns = [name for name, _ in itertools.groupby(candidates.asked[6:])]
    count = len(found["a"])
    orders = Counter()
    rest = candidates.asked[6:]
    for _ in range(count):
        taken, rest = rest[:7], rest[7:]  # one run more than is timed: 2 + 1, 1 + 1, 1 + 1
        assert Counter(taken) == {"a": 3, "b": 2, "c": 2}
        orders[tuple(dict.fromkeys(taken))] += 1
    assert rest == []
    assert len(orders) > 1
    assert len(turns) > count


def test_threads_that_wait_awake_are_asleep_before_the_next_turn():
    candidates = Candidates(a=1, b=1)
    ends_ms = {}
    pauses = {"a": [], "b": []}
    runs = dict(candidates.runs)

    def watched(name):
        for earlier, end_ms in ends_ms.items():
            pauses[earlier].append(candidates.clock.now_ns() / 1e6 - end_ms)
        ends_ms.clear()
        runs[name]()
        ends_ms[name] = candidates.clock.now_ns() / 1e6

    candidates.runs = {name: lambda n=name: watched(n) for name in runs}
    candidates.rounds(spinners=["b"])
    assert max(pauses["a"][4:]) < 10  # the first runs only tell how many there will be
    assert max(pauses["b"]) > 50


@pytest.mark.parametrize(
    ("latency_ms", "budget_s", "rounds"),
    [(10, 1.0, 45), (10, 0.001, 3), (0.01, 60, 50), (1000, 1.0, 3)],
)
def test_the_number_of_rounds_follows_from_the_budget(latency_ms, budget_s, rounds):
    found = Candidates(a=latency_ms).rounds(budget_s=budget_s)
    assert len(found["a"]) == rounds


def test_the_first_runs_are_not_timed_and_a_turn_counts_by_its_median():
    lengths_ms = iter([500, 2, 300, 2, 2, 900, 2])
    clock = FakeClock()
    found = run_rounds(
        {"a": lambda: clock.advance_ms(next(lengths_ms))},
        budget_s=0,
        min_rounds=1,
        max_rounds=1,
        clock=clock,
        order=random.Random(0),
    )
    assert found == {"a": (2.0,)}
    assert list(lengths_ms) == []
