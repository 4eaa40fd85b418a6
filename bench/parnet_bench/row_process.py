"""A row in a process of its own, suspended whenever it is not its turn."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Self

import msgspec

from parnet_bench.worker import Job, Reply, TurnRequest
from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


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
        self.exit_code = exit_code


class RowProcess:
    """A worker process with one row loaded, ready to be measured.

    The process is started by the constructor and ended by `close`. Between turns it
    is suspended, with all its threads.

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
        self._name = name
        # A session of its own keeps Ctrl-C at the terminal from reaching the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "parnet_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._ask(job)
            self._process.send_signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def turn(self, runs: int) -> Sequence[int]:
        """Run the row that many times in succession; see `parnet_bench.measure.Turn`.

        Raises
        ------
        RowFailedError
            When the row fails.
        """
        self._process.send_signal(signal.SIGCONT)
        latencies_ns = self._ask(TurnRequest(runs)).latencies_ns
        self._process.send_signal(signal.SIGSTOP)
        return latencies_ns

    def close(self) -> None:
        """End the process. Closing twice does no harm."""
        self._process.kill()  # works on a suspended process, and nothing in it needs saving
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, request: Job | TurnRequest) -> Reply:
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
            raise RowFailedError(self._name, reply.error, reply.exit_code)
        return reply

    def _ended(self) -> Exception:
        """Return the error for a worker that ended without an answer."""
        code = self._process.wait()
        if code >= 0:
            # A bug of ours: the worker has printed its traceback.
            return RuntimeError(f"the worker of {self._name} ended with exit code {code}")
        name = signal.Signals(-code).name
        problem = f"its process was ended by {name}. Memory may have run out: measure fewer rows."
        return RowFailedError(self._name, problem, exit_code=1)

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
