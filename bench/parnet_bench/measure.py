"""The order in which rows are measured, and when to stop.

Machines drift: clocks, temperature and neighbours change over seconds, so rows
measured one after the other are not measured on the same machine. Here every
row takes a turn in every round, in an order that changes from round to round,
and what disturbs a round disturbs all rows of it.

Nothing in this module knows what a row is or reads a clock: a *turn* is any
callable that runs its row a number of times and returns the latencies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from parnet_bench.statistics import median

Turn = Callable[[int], Sequence[int]]
"""Runs a row that many times in succession and returns each latency in nanoseconds."""

StopReason = Literal["min-time", "rounds", "interrupted"]

_NS_PER_S = 1_000_000_000
_ROUNDS_AIM = 20


@dataclass(frozen=True, slots=True)
class Settling:
    """When a row counts as warm.

    A row runs window after window. It is warm once the medians of two successive
    windows differ by no more than `tolerance` plus twice their standard error, so
    that noise alone cannot keep a row from settling.

    Parameters
    ----------
    window_s
        Time a window aims for.
    window_runs
        Runs in a window of rows that are slower than that.
    tolerance
        Relative difference between windows that is of no interest.
    max_s
        A row that has not settled after this time is measured as it is, and marked.
    """

    window_s: float = 0.25
    window_runs: int = 5
    tolerance: float = 0.02
    max_s: float = 10.0

    def runs_per_window(self, latency_ns: float) -> int:
        """Return how many runs of a row of this latency make up a window."""
        aim = math.ceil(self.window_s * _NS_PER_S / max(latency_ns, 1))
        # Rows of seconds must settle too: there are at least four windows in `max_s`.
        most = int(self.max_s / 4 * _NS_PER_S / max(latency_ns, 1))
        return max(aim, min(self.window_runs, most), 1)


@dataclass(frozen=True, slots=True)
class Procedure:
    """How long and in what order to measure.

    Parameters
    ----------
    min_time_s
        Stop when every row has been measured for this long, and for `min_rounds` rounds.
    rounds
        Stop after exactly this many rounds instead.
    min_rounds
        Fewest rounds when `min_time_s` decides.
    turn_s
        Time a row's turn aims for. Long enough that the first run of a turn, which
        finds another row's data in the caches, is a small part of it.
    turn_runs
        Fewest measured runs of a turn.
    lead_in
        Runs at the start of each turn that are not recorded.
    seed
        Seed of the order within the rounds.
    settling
        When the warm-up of a row ends.
    """

    min_time_s: float = 5.0
    rounds: int | None = None
    min_rounds: int = 8
    turn_s: float = 0.25
    turn_runs: int = 2
    lead_in: int = 1
    seed: int = 0
    settling: Settling = field(default_factory=Settling)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_time_s) and self.min_time_s > 0):
            raise ValueError(f"the time to measure must be positive, not {self.min_time_s}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"there must be at least one round, not {self.rounds}")

    def runs_per_turn(self, latency_ns: float) -> int:
        """Return how many measured runs of a row of this latency make up a turn."""
        # Ratios take rounds, so a short measurement has short turns rather than few.
        aim_s = min(self.turn_s, self.min_time_s / _ROUNDS_AIM)
        return max(self.turn_runs, round(aim_s * _NS_PER_S / max(latency_ns, 1)))


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The runs of a row before it was measured.

    Parameters
    ----------
    latencies_ns
        Every run from the first.
    settled
        Whether the latency had become steady when the time for it was up.
    """

    latencies_ns: tuple[int, ...]
    settled: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of every row.

    Parameters
    ----------
    order
        The rows' names in the order of their turns.
    latencies_ns
        The recorded runs of each row, in nanoseconds.
    """

    order: tuple[str, ...]
    latencies_ns: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was recorded; a round that was cut off is not part of it."""

    warm_ups: dict[str, WarmUp]
    rounds: tuple[Round, ...]
    stopped: StopReason


@dataclass(frozen=True, slots=True)
class NextTurn:
    """How far a measurement is.

    Parameters
    ----------
    row
        The row whose turn begins.
    round_number
        From 1; 0 during the warm-up.
    fraction
        Estimated share of the rounds that is done.
    """

    row: str
    round_number: int
    fraction: float


def timed(run: Callable[[], object], clock: Callable[[], int] = time.perf_counter_ns) -> Turn:
    """Return the turn that times each call of `run`.

    Parameters
    ----------
    run
        One inference, returning when its outputs are there.
    clock
        A monotonic clock in nanoseconds.
    """

    def turn(runs: int) -> list[int]:
        latencies_ns = [0] * runs
        for index in range(runs):
            start = clock()
            run()
            latencies_ns[index] = clock() - start
        return latencies_ns

    return turn


def warm_up(turn: Turn, settling: Settling) -> WarmUp:
    """Run one row until its latency is steady or the time for that is up."""
    recorded = [*turn(1)]  # the first run allocates and compiles; it fits in no window
    previous: Sequence[int] = ()
    latency_ns: float = recorded[0]
    while True:
        window = turn(settling.runs_per_window(latency_ns))
        recorded.extend(window)
        elapsed_s = sum(recorded) / _NS_PER_S
        settled = elapsed_s >= 2 * settling.window_s and _agree(previous, window, settling)
        if settled or elapsed_s >= settling.max_s:
            return WarmUp(tuple(recorded), settled)
        previous = window
        latency_ns = median(window)


def measure(
    turns: Mapping[str, Turn],
    procedure: Procedure,
    observe: Callable[[NextTurn], object] = lambda _: None,
) -> Measurement:
    """Warm every row up, then measure all rows in interleaved rounds.

    Parameters
    ----------
    turns
        The rows by name.
    procedure
        How long and in what order to measure.
    observe
        Told before each turn; not while a row is being timed.

    Returns
    -------
    Measurement
        After Ctrl-C, what had been recorded until then, with ``stopped="interrupted"``.

    Raises
    ------
    ValueError
        When there is no row.
    """
    if not turns:
        raise ValueError("there is nothing to measure")
    warm_ups: dict[str, WarmUp] = {}
    rounds: list[Round] = []
    try:
        for index, (name, turn) in enumerate(turns.items()):
            observe(NextTurn(name, 0, index / len(turns)))
            warm_ups[name] = warm_up(turn, procedure.settling)
        stopped = _measure_rounds(turns, procedure, warm_ups, rounds, observe)
    except KeyboardInterrupt:
        stopped = "interrupted"
    return Measurement(warm_ups, tuple(rounds), stopped)


def _measure_rounds(
    turns: Mapping[str, Turn],
    procedure: Procedure,
    warm_ups: Mapping[str, WarmUp],
    rounds: list[Round],
    observe: Callable[[NextTurn], object],
) -> StopReason:
    """Append rounds until it is time to stop; what is appended survives an interruption."""
    runs = {
        name: procedure.runs_per_turn(median(warmed.latencies_ns[len(warmed.latencies_ns) // 2 :]))
        for name, warmed in warm_ups.items()
    }
    names = list(turns)
    measured_ns = dict.fromkeys(names, 0)
    shuffler = np.random.default_rng(procedure.seed)
    while True:
        done = _fraction(procedure, len(rounds), min(measured_ns.values()))
        if done >= 1:
            return "min-time" if procedure.rounds is None else "rounds"
        order = [names[index] for index in shuffler.permutation(len(names))]
        latencies_ns: dict[str, tuple[int, ...]] = {}
        for name in order:
            observe(NextTurn(name, len(rounds) + 1, done))
            latencies = turns[name](procedure.lead_in + runs[name])
            latencies_ns[name] = tuple(latencies[procedure.lead_in :])
        for name, latencies in latencies_ns.items():
            measured_ns[name] += sum(latencies)
        rounds.append(Round(tuple(order), latencies_ns))


def _fraction(procedure: Procedure, rounds: int, least_measured_ns: int) -> float:
    if procedure.rounds is not None:
        return rounds / procedure.rounds
    by_time = least_measured_ns / (procedure.min_time_s * _NS_PER_S)
    return min(by_time, rounds / procedure.min_rounds)


def _agree(before: Sequence[int], after: Sequence[int], settling: Settling) -> bool:
    """Whether two windows are the same but for noise."""
    if not before:
        return False
    centers = median(before), median(after)
    variance = _median_variance(before) + _median_variance(after)
    difference = abs(centers[1] - centers[0])
    return difference <= settling.tolerance * centers[0] + 2 * math.sqrt(variance)


def _median_variance(window: Sequence[int]) -> float:
    """Return the squared standard error of a window's median: pi/2 of the mean's.

    Noise is told from the differences between neighbours, which a trend hardly touches:
    a latency that still falls must not pass for a noisy one.
    """
    if len(window) < 2:
        return 0.0
    deviation = median(np.abs(np.diff(window))) / (0.6745 * math.sqrt(2))
    return math.pi / 2 * deviation**2 / len(window)
