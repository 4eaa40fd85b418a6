"""The process in which the load generator drives one row.

It reads a `ScenarioJob` from standard input, lets the load generator write its log, and
ends. A row has a process of its own for the same reasons as in `parnet_bench.workers.worker`.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from parnet_bench.loadgen import scenarios as generator
from parnet_bench.loadgen.scenarios import Load, make_log_settings, make_settings
from parnet_bench.machine.own_process import end_with_parent, use_cores
from parnet_bench.workers.job import Job, open_session
from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.base_session import AnySession

    Inputs = Mapping[str, NDArray[Any]]

_PILOT_RUNS = 5
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ScenarioJob:
    """What the process does.

    Parameters
    ----------
    job
        The row.
    load
        What is asked of the load generator; `expected_ms` of 0 is measured first.
    folder
        An existing folder for the log.
    """

    job: Job
    load: Load
    folder: str


@dataclass(frozen=True, slots=True)
class _Ended:
    """The last line of the process: empty, or a message for the user."""

    error: str = ""
    exit_code: int = 0


class SystemUnderTest:
    """Answers the load generator's queries by running a session.

    Streams wait for their answer, so their queries run where they are issued; queries that
    arrive all at once or on a schedule are put in line for one thread.

    Parameters
    ----------
    session
        What runs.
    loadgen
        The module ``mlperf_loadgen``.
    load
        Its scenario and the size of a batch.
    sizes
        Sizes of symbolic dimensions of the inputs.
    """

    def __init__(
        self, session: AnySession, loadgen: Any, load: Load, sizes: Mapping[str, int]
    ) -> None:
        self._session = session
        self._loadgen = loadgen
        self._load = load
        self._sizes = dict(sizes)
        self._inputs: dict[int, Inputs] = {}
        self._waiting: queue.SimpleQueue[Sequence[Any] | None] = queue.SimpleQueue()
        self.failure: Exception | None = None

    @cached_property
    def _thread(self) -> threading.Thread:
        return threading.Thread(target=self._answer_waiting, name="scenario", daemon=True)

    def load_samples(self, indices: Sequence[int]) -> None:
        """Make inputs of some indices, the same ones in every run."""
        from parnet_export.samples import make_samples

        for index in indices:
            made = make_samples(self._session.inputs, seed=index, sizes=self._sizes)
            self._inputs[index] = next(made).inputs

    def unload_samples(self, indices: Sequence[int]) -> None:
        """Forget inputs; an index may be named twice, to fill the last query."""
        for index in indices:
            self._inputs.pop(index, None)

    def issue(self, samples: Sequence[Any]) -> None:
        """Answer a query, or put it in line.

        Raises
        ------
        ParnetError
            What an earlier query, or this one, has failed with. It ends the test.
        """
        if self.failure is not None:
            raise self.failure
        if self._load.scenario in {"single-stream", "multi-stream"}:
            self._answer(samples)
            return
        if not self._thread.is_alive():
            self._thread.start()
        self._waiting.put(samples)

    def flush(self) -> None:
        """Do nothing: no query waits for others to fill a batch."""

    def stop(self) -> None:
        """End the thread when everything in line is answered."""
        self._waiting.put(None)

    def _answer_waiting(self) -> None:
        while (samples := self._waiting.get()) is not None:
            try:
                self._answer(samples)
            except Exception as error:  # noqa: BLE001 -- raised again where the test can end
                self.failure = error
                self._complete(samples)  # the load generator waits for every answer

    def _answer(self, samples: Sequence[Any]) -> None:
        """Run as many samples at a time as the row's batch holds; the last may be filled up."""
        for start in range(0, len(samples), self._load.batch):
            part = samples[start : start + self._load.batch]
            self._session.run(self._inputs[part[0].index])
            self._complete(part)

    def _complete(self, samples: Sequence[Any]) -> None:
        response = self._loadgen.QuerySampleResponse
        self._loadgen.QuerySamplesComplete([response(s.id, 0, 0) for s in samples])


def run_scenario(work: ScenarioJob) -> None:
    """Run a scenario in a process of its own and wait for it.

    Raises
    ------
    ParnetError
        When the row cannot be loaded or run.
    """
    done = subprocess.run(  # noqa: S603 -- our own module
        [sys.executable, "-P", "-m", __name__],
        input=msgspec.json.encode(work),
        stdout=subprocess.PIPE,
        check=False,
    )
    if not done.stdout:
        if done.returncode in {_INTERRUPTED, -signal.SIGINT}:
            raise KeyboardInterrupt
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            raise ParnetError(f"The row's process was ended by {name}. Memory may have run out.")
        # A bug of ours: the process has printed its traceback.
        raise RuntimeError(f"the scenario's process ended with exit code {done.returncode}")
    ended = msgspec.json.decode(done.stdout, type=_Ended)
    if ended.error:
        error = ParnetError(ended.error)
        error.exit_code = ended.exit_code
        raise error


def main() -> None:
    """Serve one job from standard input."""
    end_with_parent()
    work = msgspec.json.decode(sys.stdin.buffer.read(), type=ScenarioJob)
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)  # whatever else is printed must not get between the replies
        try:
            serve(work)
        except ParnetError as error:
            replies.write(msgspec.json.encode(_Ended(str(error), error.exit_code)))
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)
        else:
            replies.write(msgspec.json.encode(_Ended()))


def serve(work: ScenarioJob) -> None:
    """Load the row and run its test; the log is in the job's folder afterwards."""
    module = generator.import_loadgen()
    job, folder = work.job, Path(work.folder)
    use_cores(job.cores)
    with open_session(job, Path(job.bundle)) as session:
        load = work.load
        if not load.expected_ms:
            load = replace(load, expected_ms=_pilot_ms(session, job.sizes))
        system = SystemUnderTest(session, module, load, job.sizes)
        settings = make_settings(module, load, folder / "rules.conf")
        sut = module.ConstructSUT(system.issue, system.flush)
        qsl = module.ConstructQSL(
            load.samples, load.samples, system.load_samples, system.unload_samples
        )
        log = make_log_settings(module, folder)
        module.StartTestWithLogSettings(sut, qsl, settings, log, str(folder / "audit.config"))
        system.stop()
        module.DestroyQSL(qsl)
        module.DestroySUT(sut)
        if system.failure is not None:
            raise system.failure


def _pilot_ms(session: AnySession, sizes: Mapping[str, int]) -> float:
    """Return about what one inference takes, after the first ones."""
    from parnet_export.samples import make_samples

    inputs = next(make_samples(session.inputs, sizes=sizes)).inputs
    taken = []
    for _ in range(_PILOT_RUNS):
        start = time.perf_counter()
        session.run(inputs)
        taken.append(time.perf_counter() - start)
    return 1000 * min(taken)


if __name__ == "__main__":
    main()
