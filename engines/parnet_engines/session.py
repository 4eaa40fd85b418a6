"""A loaded network, ready to run: a checked program with its engines, lanes and memory."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from parnet_engines.buffers import find_shapes
from parnet_engines.check import CheckedProgram
from parnet_engines.clock import MonotonicClock
from parnet_engines.cpu_engines import EngineName, load_engines, pins_all_threads, require_engine
from parnet_engines.devices import can_pin
from parnet_engines.host import Host
from parnet_engines.plan_option import choose
from parnet_engines.program import Run
from parnet_engines.recording import Recording, Span
from parnet_engines.segment_errors import SegmentFailedError, SegmentHungError
from parnet_export.bundle import Bundle, open_bundle
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from parnet_engines.engine import Engine
    from parnet_engines.evaluate import Objective
    from parnet_engines.ort import Spin
    from parnet_export.stream_graph import TensorSpec

__all__ = ["Plan", "SegmentFailedError", "SegmentHungError", "Session"]

Plan = Literal["auto", "whole", "streams", "authors"]
"""How `Session.open` places a network on lanes, besides a file that says it."""

_KEPT_SHAPES = 4
"""How many combinations of input shapes keep their memory and threads, per slot."""


class Session:
    """Runs a checked program; several threads may share it.

    `Session.open` makes one from a bundle. The constructor takes any program and engines.

    Parameters
    ----------
    program
        What to run, proven free of races and deadlocks. As many calls of `run` are under
        way at once as it has inferences in flight; further calls wait their turn.
    engines
        An engine for each segment and lane that runs it. The session owns them: `close`
        closes them.
    pin
        Whether the threads of the lanes are pinned to their cores, where the system can.
        The origin lane runs in the thread that calls `run`, which is pinned meanwhile.
    timeout_s
        Time limit of an inference in seconds. It costs two more hand-overs between
        threads for each inference.
    record
        Whether to note when each step begins and ends, for `take_recording`.

    Raises
    ------
    TypeError
        When the program is not a `CheckedProgram`.
    ValueError
        When a segment has no engine.
    InputError
        When the time limit is not positive.
    """

    def __init__(
        self,
        program: CheckedProgram,
        engines: Mapping[tuple[str, str], Engine],
        *,
        pin: bool = True,
        timeout_s: float | None = None,
        record: bool = False,
    ) -> None:
        if not isinstance(program, CheckedProgram):
            raise TypeError("a session runs a CheckedProgram; parnet_engines.check makes one")
        runs = [step for step in program.program.steps if isinstance(step, Run)]
        missing = [step.segment for step in runs if (step.segment, step.lane) not in engines]
        if missing:
            raise ValueError(f"no engine for {missing}")
        if timeout_s is not None and not timeout_s > 0:
            raise InputError(
                f"time limit {timeout_s}", "is not positive", "Use seconds, or none for no limit"
            )
        self._checked_program = program
        self._engines = dict(engines)
        self._pin = pin and can_pin()
        self._timeout_s = timeout_s
        self._clock = MonotonicClock() if record else None
        buffers = program.program.buffers_by_name
        self._inputs = tuple(buffers[name].tensor for name in program.program.inputs)
        self._outputs = tuple(buffers[name].tensor for name in program.program.outputs)
        self._slots = tuple(_Slot() for _ in range(program.program.inferences_in_flight))
        self._numbers = itertools.count()
        self._spans: list[Span] = []
        self._recording = threading.Lock()
        self._hung: SegmentHungError | None = None
        self._closed = False
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _give_up, self._slots)

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        devices: str = "cpu",
        *,
        plan: Plan | Path = "streams",
        engine: EngineName = "onnxruntime",
        lanes: int | None = None,
        threads: int | None = None,
        objective: Objective = "latency",
        in_flight: int | None = None,
        record: bool = False,
        timeout_s: float | None = None,
    ) -> Self:
        """Load a bundle.

        Parameters
        ----------
        bundle
            A bundle, or the path of one.
        devices
            Where to run: ``"cpu"``, or CPU cores as `parse_devices` reads them.
        plan
            ``"whole"``: the whole graph runs as one engine on the first device.
            ``"streams"``: segments run concurrently, placed by what is known of their
            costs. ``"authors"``: the layout of ParNet's authors, a stream on each of
            three devices. ``"auto"``: what measuring here found to be quickest; see
            `parnet_engines.auto_plan`. A path: the plan or program in that file.
        engine
            The runtime of the engines: ``"onnxruntime"`` or ``"openvino"``. Plans rest on
            what segments take with ONNX Runtime, and so does ``"auto"``, which is for it
            alone.
        lanes
            How many segments may run at the same time, at most; by default as many as can.
        threads
            CPU threads in all, no more than there are cores; by default one for each core
            of the devices.
        objective
            What the plan makes best: the latency of one inference, or how many there are
            in a second when several callers run the session at the same time.
        in_flight
            How many calls of `run` may be under way at once; by default one for latency,
            and for throughput as many as there are lanes.
        record
            Whether to note when each step begins and ends, for `take_recording`.
        timeout_s
            Time limit of an inference in seconds.

        Raises
        ------
        InputError
            When the bundle, the devices, the plan or the numbers cannot be used.
        CheckFailedError
            When the program in a file is not one of this bundle.
        MissingBackendError
            When the runtime is not installed.
        """
        require_engine(engine)
        if plan == "auto" and engine != "onnxruntime":
            problem = f"measures with onnxruntime, not with {engine}"
            raise InputError("plan 'auto'", problem, "Use plan 'streams' or 'whole'")
        if not isinstance(bundle, Bundle):
            bundle = open_bundle(Path(bundle))
        choice = choose(
            bundle,
            devices,
            plan,
            open_program=partial(cls.load, bundle),
            lanes=lanes,
            threads=threads,
            objective=objective,
            in_flight=in_flight,
        )
        return cls.load(bundle, choice.program, engine=engine, record=record, timeout_s=timeout_s)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        program: CheckedProgram,
        *,
        engine: EngineName = "onnxruntime",
        record: bool = False,
        timeout_s: float | None = None,
        beside_others: bool = False,
    ) -> Self:
        """Load what a program needs of a bundle.

        A program of a single lane on the device ``"cpu"`` has the whole machine: its
        threads are not pinned, and look for work even between inferences for a while.

        Parameters
        ----------
        bundle
            The bundle.
        program
            A program that runs its segments or its whole graph.
        engine
            As for `open`.
        record, timeout_s
            As for the session itself.
        beside_others
            Whether other sessions run at the same time on other cores, so that even a
            program of a single lane keeps to its own.

        Raises
        ------
        InputError
            When the runtime cannot load a file of the bundle.
        MissingBackendError
            When the runtime is not installed.
        """
        used = program.program.lanes
        alone = len(used) == 1 and not beside_others
        pin = can_pin() and not (alone and used[0].device == "cpu")
        pin = pin and pins_all_threads(engine, bundle, program.program)
        spin: Spin = "always" if alone else "in_runs"
        engines = load_engines(bundle, program.program, pin=pin, spin=spin, engine=engine)
        return cls(program, engines, pin=pin, record=record, timeout_s=timeout_s)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` takes."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns."""
        return self._outputs

    @property
    def program(self) -> CheckedProgram:
        """What the session runs."""
        return self._checked_program

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the network once.

        Parameters
        ----------
        inputs
            An array for each network input, of exactly its type and shape. A symbolic
            dimension takes any size, the same one in all inputs. Each shape that is new
            to the session costs time for memory of its own.

        Returns
        -------
        dict
            A new array for each network output, which belongs to the caller: it shares
            memory with nothing else. Nothing besides them is allocated.

        Raises
        ------
        InputError
            When an input is missing, unknown, or of another type or shape; or when this
            process was forked from the one that opened the session.
        SegmentFailedError
            When an engine fails. Segments that have not started are not run, and those
            under way end before the error is raised; the session stays usable.
        SegmentHungError
            When the inference takes longer than the time limit, or an earlier one did.
        ValueError
            When the session is closed.
        """
        if os.getpid() != self._process:
            raise InputError(
                "session",
                "was opened before this process was forked, and its threads are not here",
                "Open a session in each process, after the fork",
            )
        arrays = _checked(self._inputs, inputs)
        number = next(self._numbers)
        slot = self._slots[number % len(self._slots)]
        with slot.lock:
            if self._closed:
                raise ValueError("the session is closed")
            if self._hung is not None:
                raise SegmentHungError(self._hung.segments, self._hung.timeout_s)
            host = self._host(slot, arrays)
            for buffer, array in zip(host.inputs, arrays, strict=True):
                np.copyto(buffer, array)
            try:
                spans = host.run(number)
            except SegmentHungError as error:
                self._hung = error
                raise
            if spans:
                with self._recording:
                    self._spans += spans
            named = zip(self._outputs, host.outputs, strict=True)
            return {spec.name: buffer.copy() for spec, buffer in named}

    def take_recording(self) -> Recording:
        """Return what was recorded since the last call, and forget it.

        Without `record` it is empty. Inferences that failed leave nothing in it.
        """
        with self._recording:
            spans, self._spans = self._spans, []
        return Recording(self._checked_program.program.lanes, tuple(spans))

    def close(self) -> None:
        """Wait for calls of `run` under way, then release threads, engines and memory.

        Neither waits for a segment that hangs nor closes its engine. Closing twice does no
        harm; in a forked process it does nothing.
        """
        if os.getpid() != self._process:
            return
        self._closed = True
        running: set[str] = set()
        for slot in self._slots:
            with slot.lock:
                for host in slot.hosts.values():
                    host.close()
                    running.update(host.running)
                slot.hosts.clear()
        engines, self._engines = self._engines, {}
        for (segment, _), engine in engines.items():
            if segment not in running:
                engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _host(self, slot: _Slot, arrays: Sequence[NDArray[Any]]) -> Host:
        """Return the slot's host for the shapes of the inputs, the last used ones kept."""
        shapes = tuple(array.shape for array in arrays)
        host = slot.hosts.get(shapes)
        if host is None:
            if len(slot.hosts) == _KEPT_SHAPES:
                oldest = next(iter(slot.hosts))
                slot.hosts[oldest].close()
                del slot.hosts[oldest]
            program = self._checked_program
            host = slot.hosts[shapes] = Host(
                program,
                self._engines,
                find_shapes(program.program, self._engines, arrays),
                pin=self._pin,
                timeout_s=self._timeout_s,
                clock=self._clock,
            )
        slot.hosts.move_to_end(shapes)
        return host


class _Slot:
    """What one inference in flight has to itself."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hosts: OrderedDict[tuple[tuple[int, ...], ...], Host] = OrderedDict()


def _give_up(slots: Sequence[_Slot]) -> None:
    """Let the threads of a session end that nobody has closed and nobody has any more."""
    for slot in slots:
        for host in slot.hosts.values():
            host.give_up()


def _checked(
    specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Return the inputs in order, or say which one is not what the network takes."""
    names = {spec.name for spec in specs}
    if inputs.keys() != names:
        unknown, missing = sorted(set(inputs) - names), sorted(names - set(inputs))
        problem = "is not an input of the network" if unknown else "is missing"
        raise InputError(f"input {(unknown or missing)[0]!r}", problem, _takes(specs))
    sizes: dict[str, int] = {}
    arrays = []
    for spec in specs:
        array = np.asarray(inputs[spec.name])
        # Runtimes read the bytes as they are, so the byte order matters as well.
        fits = array.dtype.name == spec.dtype and array.dtype.isnative
        fits = fits and array.ndim == len(spec.shape)
        for expected, size in zip(spec.shape, array.shape, strict=False):
            known = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            fits = fits and size == known and size > 0
        if not fits:
            given = _describe("", array.dtype.newbyteorder("=").name, array.shape)
            given += "" if array.dtype.isnative else " in the other byte order"
            raise InputError(f"input {spec.name!r}", f"was given as{given}", _takes(specs))
        arrays.append(array)
    return arrays


def _takes(specs: Sequence[TensorSpec]) -> str:
    tensors = (_describe(spec.name, spec.dtype, spec.shape) for spec in specs)
    return f"The network takes {', '.join(tensors)}"


def _describe(name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"{name} {dtype} [{', '.join(map(str, shape))}]"
