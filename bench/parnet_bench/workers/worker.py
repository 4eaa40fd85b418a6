"""The process that runs one row.

Thread pools of several rows in one process disturb each other: a pool that spins
while it waits takes the cores from the row whose turn it is, and a pool that does
not spin is slower than what users run. So every row has a process of its own,
which sleeps until its turn. It reads a `Job` and then `Request`s, one JSON
line each, from standard input, and answers with JSON lines on standard output.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import IO

import msgspec

from parnet_bench.machine.own_process import end_with_parent, use_cores
from parnet_bench.results.result import RowTimeline  # noqa: TC001

# msgspec reads the annotations of the dataclasses below at run time.
from parnet_bench.workers.device_figures import DeviceFigures  # noqa: TC001
from parnet_bench.workers.job import Job
from parnet_bench.workers.turn import Turn, TurnRequest  # noqa: TC001
from parnet_export.errors import ParnetError


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for a turn, for the figures of GPUs, or for a timeline.

    Parameters
    ----------
    turn
        The turn to take.
    figures
        Otherwise, the inferences to time part by part on the row's GPUs.
    timeline_runs
        Otherwise, how many inferences to record step by step.
    """

    turn: TurnRequest | None = None
    figures: TurnRequest | None = None
    timeline_runs: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers.

    The first reply, which is empty, says that the row has its first result.

    Parameters
    ----------
    turn
        The turn that was asked for.
    figures
        The figures that were asked for.
    timeline
        The timeline that was asked for.
    error
        A message for the user, after which the worker ends.
    exit_code
        The exit code that goes with `error`.
    """

    turn: Turn | None = None
    figures: DeviceFigures | None = None
    timeline: RowTimeline | None = None
    error: str = ""
    exit_code: int = 0


def main() -> None:
    """Serve one job from standard input to standard output."""
    end_with_parent()
    requests = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)  # whatever else is printed must not get between the replies
        try:
            serve(requests, replies)
        except ParnetError as error:
            _send(replies, Reply(error=str(error), exit_code=error.exit_code))


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Load the row of the first line, then do what each further line asks."""
    from parnet_bench.workers.loaded_row import LoadedRow

    job = msgspec.json.decode(requests.readline(), type=Job)
    use_cores(job.cores)
    with LoadedRow(job) as row:
        _send(replies, Reply())
        for line in requests:
            request = msgspec.json.decode(line, type=Request)
            if request.turn is not None:
                _send(replies, Reply(turn=row.take_turn(request.turn)))
            elif request.figures is not None:
                _send(replies, Reply(figures=row.device_figures(request.figures)))
            else:
                _send(replies, Reply(timeline=row.timeline(request.timeline_runs)))


def _send(replies: IO[bytes], reply: Reply) -> None:
    replies.write(msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    main()
