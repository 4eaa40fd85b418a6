"""A row in a process of its own, suspended whenever it is not its turn."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Self

import msgspec

from parnet_bench.workers.worker import Reply, Request
from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from types import TracebackType

    from parnet_bench.results.result import RowTimeline
    from parnet_bench.workers.device_figures import DeviceFigures
    from parnet_bench.workers.job import Job
    from parnet_bench.workers.turn import Turn, TurnRequest

_NS_PER_MS = 1_000_000


class RowFailedError(ParnetError):
    """A row could not be loaded or run.

    Parameters
    ----------
    name
        The row's name.
    problem
        What happened, as one or more sentences.
    exit_code
        Of the command that needed the row.
    """

    def __init__(self, name: str, problem: str, exit_code: int) -> None:
        super().__init__(f"{name}: {problem}")
        self.problem = problem
        self.exit_code = exit_code


class RowProcess:
    """A worker process with one row loaded, ready to be measured.

    The process is started by the constructor and ended by `close`. Between turns it
    is suspended, with all its threads. It is a `parnet_bench.workers.turn.Worker`.

    Parameters
    ----------
    name
        The row's name, for messages.
    job
        What to run.

    Raises
    ------
    RowFailedError
        When the row cannot be loaded.
    """

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        start_ns = time.perf_counter_ns()
        # A session of its own keeps Ctrl-C at the terminal from reaching the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "parnet_bench.workers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._ask(job)
            self.load_ms = (time.perf_counter_ns() - start_ns) / _NS_PER_MS
            self._process.send_signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def take_turn(self, request: TurnRequest) -> Turn:
        """Run the row as often as asked; see `parnet_bench.workers.turn.Worker.take_turn`.

        Raises
        ------
        RowFailedError
            When the row fails.
        """
        turn = self._awake(Request(turn=request)).turn
        if turn is None:
            raise AssertionError("a worker answers a request for a turn by a turn")
        return turn

    def device_figures(self, request: TurnRequest) -> DeviceFigures:
        """Return what a row on GPUs tells besides latencies.

        Parameters
        ----------
        request
            The inferences to time part by part.

        Raises
        ------
        RowFailedError
            When the row fails.
        """
        figures = self._awake(Request(figures=request)).figures
        if figures is None:
            raise AssertionError("a worker answers a request for figures by figures")
        return figures

    def timeline(self, runs: int) -> RowTimeline:
        """Record some inferences step by step, and return the one of median latency.

        Raises
        ------
        RowFailedError
            When the row fails.
        """
        timeline = self._awake(Request(timeline_runs=runs)).timeline
        if timeline is None:
            raise AssertionError("a worker answers a request for a timeline by a timeline")
        return timeline

    def _awake(self, request: Request) -> Reply:
        self._process.send_signal(signal.SIGCONT)
        reply = self._ask(request)
        self._process.send_signal(signal.SIGSTOP)
        return reply

    def close(self) -> None:
        """End the process. Closing twice does no harm."""
        self._process.kill()  # works on a suspended process, and nothing in it needs saving
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A request that found nobody to read it is still buffered.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _ask(self, request: Job | Request) -> Reply:
        requests, replies = _pipes(self._process)
        try:
            requests.write(msgspec.json.encode(request) + b"\n")
            requests.flush()
            line = replies.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._ended()
        reply = msgspec.json.decode(line, type=Reply)
        if reply.error:
            raise RowFailedError(self.name, reply.error, reply.exit_code)
        return reply

    def _ended(self) -> RowFailedError:
        """Return the error for a worker that ended without an answer."""
        code = self._process.wait()
        if code >= 0:
            problem = f"its process ended with exit code {code}; it has printed why"
        else:
            name = signal.Signals(-code).name
            problem = f"its process was ended by {name}. Memory may have run out: use fewer rows"
        return RowFailedError(self.name, f"{problem}.", exit_code=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise AssertionError("the worker was started with pipes")
    return process.stdin, process.stdout
