"""A loaded network, ready to run: a checked program with its engines, lanes and memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from parnet_engines.base_session import BaseSession
from parnet_engines.cpu.buffers import find_shapes
from parnet_engines.cpu.engines import load_engines, pins_all_threads, require_engine
from parnet_engines.cpu.host import Host
from parnet_engines.cuda.devices import names_gpus
from parnet_engines.cuda.session import CudaSession
from parnet_engines.network_inputs import checked_inputs
from parnet_engines.planning.devices import can_pin
from parnet_engines.planning.plan_option import choose
from parnet_engines.schedule.execution import Execution
from parnet_engines.schedule.program import Run
from parnet_engines.segment_errors import SegmentFailedError, SegmentHungError
from parnet_export.bundle import Bundle, open_bundle
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.engine import Engine
    from parnet_engines.planning.evaluate import Objective
    from parnet_engines.runtimes.ort import Spin
    from parnet_engines.schedule.check import CheckedProgram

__all__ = ["PLANS", "Plan", "SegmentFailedError", "SegmentHungError", "Session"]

Plan = Literal["auto", "whole", "streams", "authors"]
"""How `Session.open` places a network on lanes, besides a file that says it."""

PLANS: tuple[Plan, ...] = get_args(Plan)
"""All that `Plan` allows."""


class Session(BaseSession["Engine", "Host"]):
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
    engine
        Name of the engines' runtime.
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
        engine: str = "",
        pin: bool = True,
        timeout_s: float | None = None,
        record: bool = False,
    ) -> None:
        super().__init__(program, engines, engine=engine, timeout_s=timeout_s, record=record)
        self._pin = pin and can_pin()

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        devices: str = "cpu",
        *,
        plan: Plan | Path = "streams",
        engine: str = "auto",
        lanes: int | None = None,
        threads: int | None = None,
        objective: Objective = "latency",
        in_flight: int | None = None,
        record: bool = False,
        timeout_s: float | None = None,
        boundary: Boundary | None = None,
        max_aux_streams: int | None = None,
    ) -> Session | CudaSession:
        """Load a bundle.

        Parameters
        ----------
        bundle
            A bundle, or the path of one.
        devices
            Where to run: ``"cpu"``, or CPU cores as `parse_devices` reads them, or GPUs as
            `parnet_engines.cuda.devices.parse_gpus` does, such as ``"0"`` or ``"0,1,2"``.
        plan
            ``"whole"``: the whole graph runs as one engine on the first device.
            ``"streams"``: segments run concurrently, placed by what is known of their
            costs. ``"authors"``: the layout of ParNet's authors, a stream on each of
            three devices. ``"auto"``: what measuring here found to be quickest; see
            `parnet_engines.planning.auto_plan`. A path: the plan or program in that file.
        engine
            The runtime of the engines. On the CPU ``"onnxruntime"`` (as ``"auto"`` is),
            ``"openvino"`` or ``"torch"``; plans rest on what segments take with ONNX
            Runtime, and so does plan ``"auto"``, which is for it alone. On GPUs
            ``"tensorrt"``, ``"torch"`` or ``"onnxruntime"``; ``"auto"`` is the first of
            them that can run the bundle.
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
        boundary
            On GPUs, how tensors between engines lie in memory: ``"linear"``, row by row, or
            ``"vector"``, channels last in vectors of 8, for half precision. By default
            torch has vectors where the precision has any, and TensorRT what is built
            unless asked otherwise, linear ones.
        max_aux_streams
            On GPUs, take the engines that TensorRT was let build with so many CUDA streams of
            their own. By default those that are built unless asked otherwise: segments
            without any, and the whole graph with as many as TensorRT likes.

        Raises
        ------
        InputError
            When the bundle, the devices, the plan or the numbers cannot be used.
        CheckFailedError
            When the program in a file is not one of this bundle.
        MissingBackendError
            When the runtime is not installed.
        """
        if names_gpus(devices):
            if threads is not None:
                problem = "is a number of CPU threads, and the devices are GPUs"
                raise InputError(f"threads {threads}", problem, "Leave it out, or use lanes")
            return CudaSession.open_on_gpus(
                bundle,
                devices,
                plan=plan,
                engine=engine,
                lanes=lanes,
                objective=objective,
                in_flight=in_flight,
                record=record,
                timeout_s=timeout_s,
                boundary=boundary,
                max_aux_streams=max_aux_streams,
            )
        if boundary is not None:
            problem = "is between engines on GPUs, and these are on the CPU"
            raise InputError(f"boundary {boundary!r}", problem, "Leave it out")
        if max_aux_streams is not None:
            problem = "are something that engines on the CPU do not have"
            raise InputError("auxiliary streams", problem, "Leave them out")
        engine = "onnxruntime" if engine == "auto" else engine
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
        engine: str = "onnxruntime",
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
        return cls(program, engines, engine=engine, pin=pin, record=record, timeout_s=timeout_s)

    @property
    def execution(self) -> Execution:
        """How the program is carried out."""
        return Execution("threads")

    def inspect(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the segments one after another; see `BaseSession.inspect`."""
        self._require_own_process()
        arrays = checked_inputs(self._inputs, inputs)
        tensors = {spec.name: array for spec, array in zip(self._inputs, arrays, strict=True)}
        with self._in_slot():
            for step in self._checked_program.program.steps:
                if isinstance(step, Run):
                    try:
                        found = self._engines[step.segment, step.lane].run(tensors)
                    except Exception as error:
                        raise SegmentFailedError(step.segment, error) from error
                    tensors |= found
        return tensors

    def _new_host(self, arrays: Sequence[NDArray[Any]]) -> Host:
        program = self._checked_program
        return Host(
            program,
            self._engines,
            find_shapes(program.program, self._engines, arrays),
            pin=self._pin,
            timeout_s=self._timeout_s,
            clock=self._clock,
        )
