"""Comparing latencies in rounds, and the interval of their ratio.

In every round each candidate has one turn, in random order, so that whatever else the
machine does in the meantime meets all of them alike. A round gives one ratio; nothing is
assumed about how ratios are distributed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Collection, Mapping, Sequence

    from parnet_engines.clock import Clock

CONFIDENCE = 0.95
"""Confidence of a ratio's interval."""

_TURN_MS = 8.0
"""A turn has as many runs as last so long, and one at least."""

_MAX_RUNS = 20
"""A turn has no more runs than this."""

_PAUSE_MS = 2.0
"""Pause after a turn, in which the threads of the candidate go to sleep."""

_PAUSE_OF_SPINNERS_MS = 60.0
"""Pause after a turn of a candidate whose threads look for work before they go to sleep.

Those of ONNX Runtime do so for 28 ms on a 2-core Xeon, and would take a core from whoever is
next.
"""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one of two candidates takes as the other.

    Parameters
    ----------
    value
        The median of the rounds' ratios.
    low, high
        The interval that holds the true median with the confidence `CONFIDENCE`; from 0 to
        infinity where there are too few rounds to tell.
    rounds
        How many rounds it rests on.
    """

    value: float
    low: float
    high: float
    rounds: int


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Return the ratio of two candidates' latencies in the same rounds.

    The interval lies between two order statistics of the rounds' ratios, chosen by the
    binomial distribution as in the sign test (David and Nagaraja, Order Statistics, 7.1).

    Raises
    ------
    ValueError
        When there are no rounds, or not as many of one as of the other.
    """
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    if not ratios:
        raise ValueError("a ratio needs rounds")
    count = len(ratios)
    outside, excluded = 0.0, 0
    while True:
        outside += math.comb(count, excluded) / 2**count
        if 2 * outside > 1 - CONFIDENCE:
            break
        excluded += 1
    low = ratios[excluded - 1] if excluded else 0.0
    high = ratios[count - excluded] if excluded else math.inf
    return Ratio(median(ratios), low, high, count)


def run_rounds(
    candidates: Mapping[str, Callable[[], object]],
    *,
    spinners: Collection[str] = (),
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
    clock: Clock,
    order: random.Random,
) -> dict[str, tuple[float, ...]]:
    """Return each candidate's latency in each round, in milliseconds.

    How many rounds there are is settled by the first run of each candidate, before
    anything is compared.

    Parameters
    ----------
    candidates
        What to run, by name.
    spinners
        Those whose threads keep their cores for a while after a run.
    budget_s
        Seconds that the rounds may take together, as far as `min_rounds` allow.
    min_rounds, max_rounds
        Fewest and most rounds.
    clock
        By which runs are timed.
    order
        Shuffles the candidates of each round.
    """
    runs = {}
    round_ms = 0.0
    for name, run in candidates.items():
        run()
        latency_ms = max(_timed_ms(run, clock), 1e-6)
        runs[name] = max(1, min(_MAX_RUNS, round(_TURN_MS / latency_ms)))
        round_ms += _pause_ms(name, spinners) + (runs[name] + 1) * latency_ms
    count = max(min_rounds, min(max_rounds, int(budget_s * 1000 / round_ms)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    clock.sleep_until(clock.now_ns() + round(_PAUSE_OF_SPINNERS_MS * 1e6))
    for _ in range(count):
        order.shuffle(names)
        for name in names:
            candidates[name]()
            latencies_ms = [_timed_ms(candidates[name], clock) for _ in range(runs[name])]
            found[name].append(median(latencies_ms))
            clock.sleep_until(clock.now_ns() + round(_pause_ms(name, spinners) * 1e6))
    return {name: tuple(latencies_ms) for name, latencies_ms in found.items()}


def _pause_ms(name: str, spinners: Collection[str]) -> float:
    return _PAUSE_OF_SPINNERS_MS if name in spinners else _PAUSE_MS


def _timed_ms(run: Callable[[], object], clock: Clock) -> float:
    begin_ns = clock.now_ns()
    run()
    return (clock.now_ns() - begin_ns) / 1e6
