"""Rows of a comparison, measured in turns."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from parnet_bench.selftest.engine_rows import WHOLE_ENGINE
from parnet_bench.selftest.failure import reason_of
from parnet_bench.stats import statistics
from parnet_engines.planning.rounds import ratio_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from parnet_bench.selftest.engine_rows import EngineRow
    from parnet_engines.clock import Clock
    from parnet_engines.planning.rounds import Ratio


_FIRST_KEPT = 1
"""The first round is not recorded: a GPU that was at rest raises its clocks in it."""


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """One way to run a network, measured.

    Parameters
    ----------
    network, name, engine, execution
        As for `EngineRow`.
    reason
        Why it is not possible, or what ended it while it was measured.
    median_ms, p99_ms
        Of all samples; None without, p99 also where there are too few samples to tell.
    against_whole
        How many times as fast as the whole engine of the same network, from ratios within
        rounds.
    samples_ms
        One tuple for each round.
    """

    network: str
    name: str
    engine: str
    execution: str
    reason: str
    median_ms: float | None
    p99_ms: float | None
    against_whole: Ratio | None
    samples_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Turns:
    """What rows did in their turns, by their numbers.

    Parameters
    ----------
    samples_ms
        The latencies of each possible row in milliseconds, round by round.
    failures
        Why rows dropped out; the rounds before are kept.
    interrupted
        Whether somebody has pressed Ctrl-C before the last round.
    """

    samples_ms: Mapping[int, tuple[tuple[float, ...], ...]]
    failures: Mapping[int, str] = field(default_factory=dict)
    interrupted: bool = False


def measure_in_turns(
    rows: Sequence[EngineRow],
    clock: Clock,
    *,
    rounds: int,
    runs: int,
    seed: int,
    between: Callable[[], object] = lambda: None,
) -> Turns:
    """Measure all rows that are possible.

    In a round every row has one turn, in random order: one untimed run, which finds caches and
    clocks as its own, and the timed ones. The first round is not recorded: a GPU that was at
    rest raises its clocks in it. A row that fails drops out, and the others go on.

    Parameters
    ----------
    rows
        What to measure.
    clock
        Times it.
    rounds, runs
        How many rounds, and how many timed runs each row has in a round.
    seed
        Of the order of rows.
    between
        Called after each turn.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C in the first round. Later, the whole rounds before are returned.
    """
    order = random.Random(seed)  # noqa: S311 - an order, no secret
    turns = [(number, row.run) for number, row in enumerate(rows) if row.run is not None]
    found: dict[int, list[tuple[float, ...]]] = {number: [] for number, _ in turns}
    failures: dict[int, str] = {}
    for count in range(rounds + 1):
        order.shuffle(turns)
        try:
            for number, run in turns:
                try:
                    found[number].append(_turn(run, runs, clock))
                except Exception as error:  # noqa: BLE001 - a row's trouble is no other row's
                    when = f"in round {count}" if count else "before the first round"
                    failures[number] = f"failed {when}: {reason_of(error)}"
                between()
        except KeyboardInterrupt:
            if count < _FIRST_KEPT + 1:
                raise
            whole = {number: tuple(one[_FIRST_KEPT:count]) for number, one in found.items()}
            return Turns(whole, failures, interrupted=True)
        turns = [(number, run) for number, run in turns if number not in failures]
    return Turns({number: tuple(one[_FIRST_KEPT:]) for number, one in found.items()}, failures)


def _turn(run: Callable[[], object], runs: int, clock: Clock) -> tuple[float, ...]:
    run()
    samples_ms = []
    for _ in range(runs):
        begin_ns = clock.now_ns()
        run()
        samples_ms.append((clock.now_ns() - begin_ns) / 1e6)
    return tuple(samples_ms)


def summarise(rows: Sequence[EngineRow], turns: Turns) -> tuple[MeasuredRow, ...]:
    """Return rows with their statistics."""
    whole = {row.network: number for number, row in enumerate(rows) if row.name == WHOLE_ENGINE}
    found = []
    for number, row in enumerate(rows):
        samples_ms = turns.samples_ms.get(number, ())
        base_ms = turns.samples_ms.get(whole.get(row.network, -1), ())
        every = [sample for one in samples_ms for sample in one]
        p99 = statistics.percentile(every, 99) if every else None
        found.append(
            MeasuredRow(
                row.network,
                row.name,
                row.engine,
                row.execution,
                turns.failures.get(number, row.reason),
                median(every) if every else None,
                p99.value if p99 else None,
                ratio_in_rounds(base_ms, samples_ms),
                samples_ms,
            )
        )
    return tuple(found)


def ratio_in_rounds(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]
) -> Ratio | None:
    """Return the ratio of two rows' medians in the rounds that both have; None without any."""
    shared = min(len(numerators), len(denominators))
    if not shared:
        return None
    sides = ([median(one) for one in rounds[:shared]] for rounds in (numerators, denominators))
    return ratio_of(*sides)
