"""The process that runs one row.

Thread pools of several rows in one process disturb each other: a pool that spins
while it waits takes the cores from the row whose turn it is, and a pool that does
not spin is slower than what users run. So every row has a process of its own,
which sleeps until its turn. It reads a `Job` and then `TurnRequest`s, one JSON
line each, from standard input, and answers with JSON lines on standard output.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from typing import IO, Literal

import msgspec
import psutil

from parnet_bench.measure import timed
from parnet_export.errors import ParnetError

Plan = Literal["whole", "streams"]
"""The whole graph as one engine, or one engine per segment."""

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker runs.

    Parameters
    ----------
    bundle
        Path of a bundle.
    plan
        How to run it.
    devices
        Where to run, as `parnet_engines.session.Session.open` takes it.
    cores
        Logical CPU cores that the process may use.
    sizes
        Sizes of the symbolic dimensions of the inputs.
    """

    bundle: str
    plan: Plan
    devices: str
    cores: tuple[int, ...]
    sizes: dict[str, int]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """Ask for a number of runs in succession."""

    runs: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers.

    Parameters
    ----------
    latencies_ns
        Of the runs that were asked for; empty in the first reply, which says that
        the row is loaded.
    error
        A message for the user, after which the worker ends.
    exit_code
        The exit code that goes with `error`.
    """

    latencies_ns: tuple[int, ...] = ()
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
    """Open the session of the first line, then run it as often as each further line asks."""
    from parnet_engines.session import Session
    from parnet_export.samples import make_samples

    job = msgspec.json.decode(requests.readline(), type=Job)
    use_cores(job.cores)
    with Session.open(job.bundle, job.devices, plan=job.plan, threads=len(job.cores)) as session:
        sample = next(make_samples(session.inputs, sizes=job.sizes))
        turn = timed(lambda: session.run(sample.inputs))
        _send(replies, Reply())
        for line in requests:
            request = msgspec.json.decode(line, type=TurnRequest)
            _send(replies, Reply(latencies_ns=tuple(turn(request.runs))))


def use_cores(cores: tuple[int, ...]) -> None:
    """Keep this process and the threads it starts on some cores, where the system can."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has no affinity masks
        process.cpu_affinity(list(cores))


def end_with_parent() -> None:
    """Have Linux end this process when its parent dies.

    A suspended process does not notice that its pipes are closed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _send(replies: IO[bytes], reply: Reply) -> None:
    replies.write(msgspec.json.encode(reply) + b"\n")


if __name__ == "__main__":
    main()
