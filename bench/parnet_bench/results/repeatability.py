"""Whether measurements of the same rows agree with each other."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from parnet_bench.results.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_bench.results.result import Result
    from parnet_bench.stats.statistics import Interval


@dataclass(frozen=True, slots=True)
class RowAgreement:
    """How often the intervals of one row's speed-up overlap from run to run.

    Parameters
    ----------
    name, reference
        The row, and the one that it is compared with.
    speedups
        The speed-up in each run.
    pairs, overlapping
        Pairs of runs, and those of them whose intervals overlap.
    """

    name: str
    reference: str
    speedups: tuple[float, ...]
    pairs: int
    overlapping: int

    @property
    def share(self) -> float:
        """Share of the pairs that overlap."""
        return self.overlapping / self.pairs


def agreement(results: Iterable[Result]) -> tuple[RowAgreement, ...]:
    """Compare the intervals of speed-ups of every two runs, row by row.

    Rows that fewer than two runs have an interval for are left out.
    """
    found: defaultdict[tuple[str, str], list[tuple[float, Interval]]] = defaultdict(list)
    for result in results:
        for row in summarise(result):
            if row.speedup_interval is not None:
                found[row.name, row.reference].append((row.speedup, row.speedup_interval))
    agreements = []
    for (name, reference), runs in found.items():
        pairs = list(combinations([interval for _, interval in runs], 2))
        if pairs:
            overlapping = sum(a.low <= b.high and b.low <= a.high for a, b in pairs)
            speedups = tuple(speedup for speedup, _ in runs)
            agreements.append(RowAgreement(name, reference, speedups, len(pairs), overlapping))
    return tuple(agreements)
