"""Measure planned rows: one process each, interleaved rounds, one result."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from parnet_bench.measure import Measurement, NextTurn, Procedure, measure
from parnet_bench.result import Recording, Result, Row
from parnet_bench.row_process import RowProcess
from parnet_bench.worker import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parnet_bench.environment import Environment
    from parnet_bench.rows import PlannedRow


def measure_rows(
    rows: Sequence[PlannedRow],
    procedure: Procedure,
    environment: Environment,
    *,
    notes: tuple[str, ...] = (),
    observe: Callable[[NextTurn], object] = lambda _: None,
) -> Result:
    """Load every row in a process of its own and measure them all in turns.

    Parameters
    ----------
    rows
        What to measure; the first row is what the others are compared with.
    procedure
        How long and in what order.
    environment
        As it was before the processes were started.
    notes
        Sentences to keep with the result.
    observe
        Told before each turn.

    Raises
    ------
    RowFailedError
        When a row cannot be loaded or run.
    KeyboardInterrupt
        After Ctrl-C before the first round was complete. Later, the result is partial.
    """
    with contextlib.ExitStack() as processes:
        turns = {}
        for row in rows:
            job = Job(
                bundle=str(row.bundle.path),
                plan=row.plan,
                devices=row.description.devices,
                cores=row.description.cores,
                sizes=row.sizes,
            )
            name = row.description.name
            turns[name] = processes.enter_context(RowProcess(name, job)).turn
        measurement = measure(turns, procedure, observe)
    if not measurement.rounds:
        raise KeyboardInterrupt
    return _result(rows, procedure, environment, measurement, notes)


def _result(
    rows: Sequence[PlannedRow],
    procedure: Procedure,
    environment: Environment,
    measurement: Measurement,
    notes: tuple[str, ...],
) -> Result:
    names = [row.description.name for row in rows]
    recorded = []
    for row, name in zip(rows, names, strict=True):
        warm_up = measurement.warm_ups[name]
        recording = Recording(
            settled=warm_up.settled,
            warm_up_ns=warm_up.latencies_ns,
            rounds_ns=tuple(turn.latencies_ns[name] for turn in measurement.rounds),
        )
        recorded.append(Row(row.description, recording))
    return Result(
        environment=environment,
        procedure=procedure,
        stopped=measurement.stopped,
        orders=tuple(
            tuple(names.index(name) for name in turn.order) for turn in measurement.rounds
        ),
        rows=tuple(recorded),
        notes=notes,
    )
