"""A turn: one row runs a number of times, and each run is timed.

This is all that happens while a row is being timed, so it imports next to nothing.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    ClockNs = Callable[[], int]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Ask for a number of runs in succession.

    Parameters
    ----------
    runs
        Runs to record.
    lead_in
        Runs before them that are not recorded.
    in_flight
        Inferences under way at the same time.
    l2_flush
        Whether to empty caches before each run; see `parnet_bench.results.procedure.Procedure`.
    """

    runs: int
    lead_in: int = 0
    in_flight: int = 1
    l2_flush: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """What was recorded in a turn.

    Parameters
    ----------
    latencies_ns
        Of each recorded run.
    elapsed_ns
        From handing the first recorded run over to having the outputs of the last one.
    """

    latencies_ns: tuple[int, ...]
    elapsed_ns: int


class Worker(Protocol):
    """A row that is loaded and takes turns."""

    @property
    def load_ms(self) -> float:
        """From starting the process to its first result."""

    def take_turn(self, request: TurnRequest) -> Turn:
        """Run as often as asked.

        Raises
        ------
        ParnetError
            When the row fails.
        """

    def close(self) -> None:
        """End the row. Closing twice does no harm."""


def one_at_a_time(
    run: Callable[[], object],
    request: TurnRequest,
    *,
    prepare: Callable[[], object] | None = None,
    clock: ClockNs = time.perf_counter_ns,
) -> Turn:
    """Time each run by itself.

    Parameters
    ----------
    run
        One inference, returning when its outputs are there.
    request
        How many runs.
    prepare
        What to do before each run, not timed.
    clock
        A monotonic clock in nanoseconds.
    """
    for _ in range(request.lead_in):
        if prepare is not None:
            prepare()
        run()
    latencies_ns = [0] * request.runs
    begin = clock()
    for index in range(request.runs):
        if prepare is not None:
            prepare()
        start = clock()
        run()
        latencies_ns[index] = clock() - start
    return Turn(tuple(latencies_ns), clock() - begin)


def several_in_flight(
    run: Callable[[], object], request: TurnRequest, *, clock: ClockNs = time.perf_counter_ns
) -> Turn:
    """Keep several runs under way, each handed over by a thread of its own.

    Parameters
    ----------
    run
        One inference, returning when its outputs are there; called by several threads.
    request
        How many runs, and how many of them at a time. The lead-in comes before, so that
        the recorded runs begin with as many under way as they go on with.
    clock
        A monotonic clock in nanoseconds.
    """
    numbers = iter(range(request.lead_in + request.runs))
    taking = threading.Lock()
    spans_ns: list[tuple[int, int]] = [(0, 0)] * (request.lead_in + request.runs)
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            while not errors:
                with taking:
                    number = next(numbers, None)
                if number is None:
                    return
                start = clock()
                run()
                spans_ns[number] = (start, clock())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(request.in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    recorded = spans_ns[request.lead_in :]
    # Throughput counts from one completion to another: with the pipeline full, that of the
    # last lead-in run and that of the last run.
    led_in = sorted(end for _, end in spans_ns[: request.lead_in])
    begin = led_in[-1] if led_in else min(start for start, _ in recorded)
    return Turn(
        tuple(end - start for start, end in recorded),
        max(1, max(end for _, end in recorded) - begin),
    )
