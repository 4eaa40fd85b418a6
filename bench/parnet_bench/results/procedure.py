"""How rows are measured: how long, how often, in which order, and until what is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

StopReason = Literal["target", "time", "min-time", "rounds", "interrupted"]
"""Every process was as precise as asked for; time was up; enough time was measured (in files
of older versions); the rounds that were asked for were made; Ctrl-C."""

_NS_PER_S = 1_000_000_000


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
    window_runs: int = 3
    tolerance: float = 0.02
    max_s: float = 10.0

    def runs_per_window(self, latency_ns: float, max_s: float) -> int:
        """Return how many runs of a row make up a window.

        Parameters
        ----------
        latency_ns
            Of one run.
        max_s
            Time for the whole warm-up.
        """
        aim = math.ceil(min(self.window_s, max_s / 4) * _NS_PER_S / max(latency_ns, 1))
        # Rows of seconds must settle too: there are at least four windows in the time.
        most = int(max_s / 4 * _NS_PER_S / max(latency_ns, 1))
        return max(aim, min(self.window_runs, most), 1)


@dataclass(frozen=True, slots=True)
class Procedure:
    """How long and in what order to measure.

    Parameters
    ----------
    processes
        How many times every row gets a fresh worker process. Where a process lies in
        memory, and which pages it got, make its latencies differ from the next one's for as
        long as it lives; only several processes show by how much.
    target_ci
        Stop when the intervals of all medians and ratios reach no further than this to
        either side, relative to their values.
    max_time_s
        Stop when this time is up, loading and warming up included. Every process gets an
        equal share of what is left. A process makes `min_rounds` rounds whatever they take.
    min_time_s
        Do not stop before every row has been measured for this long, one inference at a
        time, as far as `max_time_s` allows.
    rounds
        Make exactly this many rounds in every process instead.
    min_rounds
        Fewest rounds in a process.
    turn_s
        Time a row's turn aims for. Long enough that the first run of a turn, which
        finds another row's data in the caches, is a small part of it.
    turn_runs
        Fewest measured runs of a turn.
    lead_in
        Runs at the start of each turn that are not recorded.
    interleave
        Whether rows take turns in every round; otherwise each row makes all its rounds
        before the next one begins.
    in_flight
        Inferences under way at the same time in pipelined turns; 1 for none of these turns.
    percentiles
        Which percentiles of the latencies to state, each between 0 and 100.
    l2_flush
        Whether caches are emptied before each run: the CPU's last-level cache, or the L2
        caches of the row's GPUs.
    data_transfers
        Whether latencies on GPUs include copies from and to the host.
    seed
        Seed of the order within the rounds.
    settling
        When the warm-up of a row ends.
    """

    processes: int = 5
    target_ci: float = 0.01
    max_time_s: float = 110.0
    min_time_s: float = 0.0
    rounds: int | None = None
    min_rounds: int = 3
    turn_s: float = 0.25
    turn_runs: int = 2
    lead_in: int = 1
    interleave: bool = True
    in_flight: int = 2
    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    l2_flush: bool = False
    data_transfers: bool = True
    seed: int = 0
    settling: Settling = field(default_factory=Settling)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What latencies have in them, where that is not the usual, one sentence each."""
        found = []
        if not self.data_transfers:
            found.append(
                "Latencies leave out copies between the host and GPUs: inputs and outputs stay "
                "there."
            )
        if self.l2_flush:
            found.append("Caches were emptied before each inference, outside of its latency.")
        return tuple(found)

    def __post_init__(self) -> None:
        for value, what in (
            (self.max_time_s, "the time to measure"),
            (self.target_ci, "the width of intervals to reach"),
        ):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{what} must be positive, not {value}")
        for percent in self.percentiles:
            if not 0 < percent < 100:
                raise ValueError(f"a percentile lies between 0 and 100, not at {percent}")
        if not (math.isfinite(self.min_time_s) and self.min_time_s >= 0):
            raise ValueError(f"the least time of a row must not be negative: {self.min_time_s}")
        for count, what in (
            (self.processes, "process"),
            (self.in_flight, "inference in flight"),
            (self.min_rounds, "round"),
            (1 if self.rounds is None else self.rounds, "round"),
        ):
            if count < 1:
                raise ValueError(f"there must be at least one {what}, not {count}")

    def runs_per_turn(self, latency_ns: float, aim_s: float) -> int:
        """Return how many recorded runs of a row make up a turn.

        Parameters
        ----------
        latency_ns
            Of one run.
        aim_s
            Time that the turn should take.
        """
        return max(self.turn_runs, round(aim_s * _NS_PER_S / max(latency_ns, 1)))
