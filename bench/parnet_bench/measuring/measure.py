"""The order in which rows are measured, and when to stop.

Machines drift: clocks, temperature and neighbours change over seconds, so rows
measured one after the other are not measured on the same machine. Here every
row takes a turn in every round, in an order that changes from round to round,
and what disturbs a round disturbs all rows of it. Processes differ as well, in
where they lie in memory, for as long as they live: so all of it is repeated with
fresh ones.

Nothing in this module knows what a row is or how long anything takes by itself:
workers and the clock are given.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.measuring.measurement import Measurement, NextTurn, RowFailure
from parnet_bench.measuring.warm_up import WarmUp, warm_up
from parnet_bench.results.result import Pipelined, ProcessRecording
from parnet_bench.stats.precision import Precision
from parnet_bench.workers.turn import Turn, TurnRequest, Worker
from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from parnet_bench.results.procedure import Procedure, StopReason
    from parnet_bench.results.result import Stage
    from parnet_engines.clock import Clock

    Launch = Callable[[str, int], Worker]
    """Load a row, given by its name, in a fresh process, given by its number."""

_NS_PER_S = 1_000_000_000
_WARM_UP_SHARE = 0.4
_PIPELINED_SHARE = 0.2
_ROUNDS_AIM = 10


def measure(
    groups: Mapping[str, object],
    launch: Launch,
    procedure: Procedure,
    clock: Clock,
    *,
    observe: Callable[[NextTurn], object] = lambda _: None,
    finish: Callable[[str, Worker], object] = lambda _name, _worker: None,
    between: Callable[[], object] = lambda: None,
) -> Measurement:
    """Warm every row up and measure all rows in interleaved rounds, process by process.

    Parameters
    ----------
    groups
        The rows by name, and what they are compared within: each row with the first one
        of the same group.
    launch
        Loads a row.
    procedure
        How long and in what order to measure.
    clock
        Tells how much time is left.
    observe
        Told before each turn; not while a row is being timed.
    finish
        Called with each row and its worker at the end of each process; a row may fail
        there as well.
    between
        Called before the first process and after each one, when no worker is loaded.

    Returns
    -------
    Measurement
        After Ctrl-C, what had been recorded until then, with ``stopped="interrupted"``.

    Raises
    ------
    ValueError
        When there is no row.
    """
    if not groups:
        raise ValueError("there is nothing to measure")
    campaign = _Campaign(dict(groups), launch, procedure, clock, observe)
    stopped: StopReason = "rounds" if procedure.rounds is not None else "target"
    between()
    try:
        for process in range(procedure.processes):
            reached = campaign.run_process(process, finish)
            between()
            if not campaign.names:
                break
            if not reached and procedure.rounds is None:
                stopped = "time"
    except KeyboardInterrupt:
        stopped = "interrupted"
    return campaign.measurement(stopped)


@dataclass(slots=True)
class _Generation:
    """The workers of one process number, and what they have recorded."""

    workers: dict[str, Worker] = field(default_factory=dict)
    warm_ups: dict[str, WarmUp] = field(default_factory=dict)
    orders: list[tuple[str, ...]] = field(default_factory=list)
    rounds: list[dict[str, Turn]] = field(default_factory=list)
    pipelined: list[dict[str, Turn]] = field(default_factory=list)


class _Campaign:
    def __init__(
        self,
        groups: dict[str, object],
        launch: Launch,
        procedure: Procedure,
        clock: Clock,
        observe: Callable[[NextTurn], object],
    ) -> None:
        self._groups = groups
        self._launch = launch
        self._procedure = procedure
        self._clock = clock
        self._observe = observe
        self._shuffler = np.random.default_rng(procedure.seed)
        self._end_ns = clock.now_ns() + round(procedure.max_time_s * _NS_PER_S)
        self._begin_ns = clock.now_ns()
        self._generations: list[_Generation] = []
        self._failures: dict[str, RowFailure] = {}

    @property
    def names(self) -> list[str]:
        """The rows that have not failed."""
        return [name for name in self._groups if name not in self._failures]

    def run_process(self, process: int, finish: Callable[[str, Worker], object]) -> bool:
        """Load, warm up and measure all rows once; return whether the target was reached."""
        begin_ns = self._clock.now_ns()
        left = self._procedure.processes - process
        budget_ns = max(0, self._end_ns - begin_ns) // left
        generation = _Generation()
        self._generations.append(generation)
        with contextlib.ExitStack() as stack:
            for name in self.names:
                self._tell(generation, name, "loading")
                with self._catching(name, "load"):
                    worker = self._launch(name, process)
                    stack.callback(worker.close)
                    generation.workers[name] = worker
            for name in self.names:
                self._tell(generation, name, "warming up")
                share_s = _WARM_UP_SHARE * budget_ns / _NS_PER_S / len(self.names)
                with self._catching(name, "run"):
                    worker = generation.workers[name]
                    generation.warm_ups[name] = warm_up(worker, self._procedure, share_s)
            reached = False
            if self.names:
                pipelined = self._procedure.in_flight > 1
                share = 1 - _PIPELINED_SHARE if pipelined else 1.0
                reached = self._one_at_a_time(generation, begin_ns + round(share * budget_ns))
                if pipelined:
                    self._several_in_flight(generation, begin_ns + budget_ns)
            for name in self.names:
                with self._catching(name, "run"):
                    finish(name, generation.workers[name])
        return reached

    def measurement(self, stopped: StopReason) -> Measurement:
        """Return what there is: the rows that have not failed, and their whole rounds."""
        names = self.names
        recorded = [generation for generation in self._generations if generation.rounds]
        return Measurement(
            recordings={
                name: tuple(
                    _recording(generation, name, self._procedure) for generation in recorded
                )
                for name in names
                if recorded
            },
            orders=tuple(
                tuple(tuple(n for n in order if n in names) for order in generation.orders)
                for generation in recorded
            ),
            failures=tuple(self._failures.values()),
            stopped=stopped,
        )

    # ------------------------------------------------------------------ one in flight

    def _one_at_a_time(self, generation: _Generation, deadline_ns: int) -> bool:
        precision = Precision(self._references(), self._procedure.processes)
        budget_s = max(0, deadline_ns - self._clock.now_ns()) / _NS_PER_S
        requests = {
            name: TurnRequest(
                self._runs(generation, name, budget_s),
                lead_in=self._procedure.lead_in,
                l2_flush=self._procedure.l2_flush,
            )
            for name in self.names
        }
        if not self._procedure.interleave:
            return self._row_by_row(generation, requests, budget_s)
        begin_ns = self._clock.now_ns()
        while True:
            end = self._end_of_rounds(generation, precision, begin_ns, deadline_ns)
            if end is not None:
                return end
            turns = self._round(generation, requests, precision)
            if not self.names:
                return False
            if turns.keys() != requests.keys():  # a row has failed
                requests = {name: requests[name] for name in self.names}
                precision = Precision(self._references(), self._procedure.processes)
                for earlier in generation.rounds:
                    precision.add({name: earlier[name].latencies_ns for name in self.names})
            precision.add({name: turns[name].latencies_ns for name in self.names})
            generation.rounds.append(turns)

    def _end_of_rounds(
        self, generation: _Generation, precision: Precision, begin_ns: int, deadline_ns: int
    ) -> bool | None:
        """Return whether the target was reached if a process ends here, and None if not."""
        count, procedure = len(generation.rounds), self._procedure
        if procedure.rounds is not None:
            return True if count >= procedure.rounds else None
        if count < procedure.min_rounds:
            return None
        if self._has_enough(generation) and precision.reached(procedure.target_ci):
            return True
        now_ns = self._clock.now_ns()
        return False if now_ns + (now_ns - begin_ns) / count > deadline_ns else None

    def _round(
        self, generation: _Generation, requests: Mapping[str, TurnRequest], precision: Precision
    ) -> dict[str, Turn]:
        """Give every row its turn; return those that have not failed."""
        order = self._shuffled(list(requests))
        widths = precision.half_widths()
        turns: dict[str, Turn] = {}
        for name in order:
            self._tell(
                generation,
                name,
                "measuring",
                round_number=len(generation.rounds) + 1,
                median_ns=precision.median_ns(name),
                half_width=widths[name] if math.isfinite(widths[name]) else None,
            )
            with self._catching(name, "run"):
                turns[name] = generation.workers[name].take_turn(requests[name])
        generation.orders.append(order)
        return {name: turns[name] for name in requests if name in turns}

    def _row_by_row(
        self, generation: _Generation, requests: Mapping[str, TurnRequest], budget_s: float
    ) -> bool:
        """Let each row make all its rounds before the next one begins."""
        rounds = self._procedure.rounds
        if rounds is None:
            round_ns = sum(
                (request.lead_in + request.runs) * generation.warm_ups[name].latency_ns
                for name, request in requests.items()
            )
            rounds = max(self._procedure.min_rounds, int(budget_s * _NS_PER_S / round_ns))
        turns: dict[str, list[Turn]] = {name: [] for name in requests}
        for name in self._shuffled(list(requests)):
            for number in range(rounds):
                self._tell(generation, name, "measuring", round_number=number + 1)
                with self._catching(name, "run"):
                    turns[name].append(generation.workers[name].take_turn(requests[name]))
                if name in self._failures:
                    break
        names = self.names
        generation.rounds += [{name: turns[name][i] for name in names} for i in range(rounds)]
        generation.orders += [tuple(names)] * rounds
        return self._procedure.rounds is not None

    def _has_enough(self, generation: _Generation) -> bool:
        """Whether each row has been measured for this process's part of the least time."""
        share_ns = self._procedure.min_time_s * _NS_PER_S / self._procedure.processes
        measured: defaultdict[str, int] = defaultdict(int)
        for turns in generation.rounds:
            for name, turn in turns.items():
                measured[name] += sum(turn.latencies_ns)
        return all(measured[name] >= share_ns for name in self.names)

    # -------------------------------------------------------------- several in flight

    def _several_in_flight(self, generation: _Generation, deadline_ns: int) -> None:
        in_flight = self._procedure.in_flight
        begin_ns = self._clock.now_ns()
        budget_s = max(0, deadline_ns - begin_ns) / _NS_PER_S
        requests = {
            name: TurnRequest(
                max(in_flight, self._runs(generation, name, budget_s)),
                lead_in=in_flight,
                in_flight=in_flight,
            )
            for name in self.names
        }
        most = self._procedure.rounds or len(generation.rounds)
        while self.names and len(generation.pipelined) < most:
            now_ns, count = self._clock.now_ns(), len(generation.pipelined)
            exactly = self._procedure.rounds is not None
            if count and not exactly and now_ns + (now_ns - begin_ns) / count > deadline_ns:
                return
            turns: dict[str, Turn] = {}
            for name in self._shuffled(self.names):
                self._tell(generation, name, "pipelined", round_number=count + 1)
                with self._catching(name, "run"):
                    turns[name] = generation.workers[name].take_turn(requests[name])
            generation.pipelined.append(turns)

    # ---------------------------------------------------------------------- in common

    def _references(self) -> dict[str, str]:
        first: dict[object, str] = {}
        return {name: first.setdefault(self._groups[name], name) for name in self.names}

    def _runs(self, generation: _Generation, name: str, budget_s: float) -> int:
        aim_s = min(self._procedure.turn_s, budget_s / (_ROUNDS_AIM * len(self.names)))
        return self._procedure.runs_per_turn(generation.warm_ups[name].latency_ns, aim_s)

    def _shuffled(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(names[index] for index in self._shuffler.permutation(len(names)))

    @contextlib.contextmanager
    def _catching(self, name: str, stage: Stage) -> Iterator[None]:
        """Let a row that fails drop out, and all others go on."""
        try:
            yield
        except ParnetError as error:
            process = len(self._generations) - 1
            self._failures[name] = RowFailure(name, stage, process, error)

    def _tell(
        self,
        generation: _Generation,
        row: str,
        phase: str,
        *,
        round_number: int = 0,
        median_ns: float | None = None,
        half_width: float | None = None,
    ) -> None:
        processes, process = self._procedure.processes, len(self._generations)
        if self._procedure.rounds is not None:
            done = len(generation.rounds) / self._procedure.rounds
            fraction, left_s = (process - 1 + done) / processes, None
        else:
            now_ns = self._clock.now_ns()
            fraction = (now_ns - self._begin_ns) / max(1, self._end_ns - self._begin_ns)
            left_s = max(0, self._end_ns - now_ns) / _NS_PER_S
        self._observe(
            NextTurn(
                row, phase, process, round_number, min(1.0, fraction), left_s, median_ns, half_width
            )
        )


def _recording(generation: _Generation, name: str, procedure: Procedure) -> ProcessRecording:
    turns = [turns[name] for turns in generation.rounds]
    warmed = generation.warm_ups[name]
    pipelined = [turns[name] for turns in generation.pipelined]
    return ProcessRecording(
        settled=warmed.settled,
        warm_up_ns=warmed.latencies_ns,
        rounds_ns=tuple(turn.latencies_ns for turn in turns),
        pipelined=Pipelined(
            procedure.in_flight,
            tuple(turn.latencies_ns for turn in pipelined),
            tuple(turn.elapsed_ns for turn in pipelined),
        )
        if pipelined
        else None,
        load_ms=generation.workers[name].load_ms,
    )
