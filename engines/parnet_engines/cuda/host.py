"""The CUDA interpreter: executes a checked program on CUDA streams of one GPU or several.

Memory is allocated, engines are bound and everything is captured once; an inference is one
launch where CUDA allows it, see `parnet_engines.cuda.launch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.cuda.clocks import CudaClocks
from parnet_engines.cuda.driver import CudaError, on_device
from parnet_engines.cuda.engine import DeviceTensor
from parnet_engines.cuda.interface import CudaInterface
from parnet_engines.cuda.lanes import CudaLanes
from parnet_engines.cuda.launch import Launcher
from parnet_engines.cuda.memory import allocate_buffers, find_layouts, from_layout
from parnet_engines.cuda.parts import PartTimers
from parnet_engines.cuda.resources import CudaResources
from parnet_engines.schedule.program import Run
from parnet_engines.segment_errors import SegmentFailedError, SegmentHungError
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.clock import Clock
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.engine import CudaEngine
    from parnet_engines.cuda.memory import Region
    from parnet_engines.cuda.parts import PartTimes
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.execution import Execution
    from parnet_engines.schedule.recording import Span

    Enqueue = Callable[[int], None]

_KEPT_PLACES = 4
"""For how many combinations of a caller's addresses graphs are kept."""

_POLL_S = 50e-6

_PREPARING = threading.Lock()
"""Held by the thread that binds engines, runs them for the first time, and captures.

First runs load kernels and make handles of libraries, which may wait for the whole device, and
that breaks a capture, whichever thread it is of.
"""


class CudaHost:
    """One slot of a program: its memory, bound engines, streams and graphs.

    One thread at a time may use it.

    Parameters
    ----------
    checked_program
        What to execute.
    engines
        An engine for each segment and lane that runs it. They stay the caller's.
    shapes
        The shape of every buffer, see `parnet_engines.cuda.memory.resolve_shapes`.
    driver
        CUDA.
    timeout_s
        Time limit of an inference in seconds.
    clock
        If given, the times of all runs and copies are recorded, on its time scale.
    use_graphs
        Whether to launch CUDA graphs where they can be captured.

    Raises
    ------
    CudaError
        When the driver refuses something that there is no way around.
    SegmentFailedError
        When an engine fails in its first run.
    InputError
        When engines do not fit together.
    """

    def __init__(
        self,
        checked_program: CheckedProgram,
        engines: Mapping[tuple[str, str], CudaEngine],
        shapes: Mapping[str, tuple[int, ...]],
        driver: CudaDriver,
        *,
        timeout_s: float | None = None,
        clock: Clock | None = None,
        use_graphs: bool = True,
    ) -> None:
        self._program = checked_program.program
        self._engines = engines
        self._driver = driver
        self._timeout_s = timeout_s
        self._clock = clock
        self._resources = CudaResources(driver)
        self._launches: dict[tuple[int, ...], tuple[Callable[[], None], dict[int, Enqueue]]] = {}
        self._bindings: dict[int, Enqueue] = {}
        self._used_streams: tuple[tuple[int, int], ...] = ()
        self._is_hung = False
        self._is_pending = False
        try:
            self._build(checked_program, shapes, use_graphs=use_graphs)
        except BaseException:
            self.give_up()
            raise

    def _build(
        self,
        checked_program: CheckedProgram,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        use_graphs: bool,
    ) -> None:
        program, resources = self._program, self._resources
        timed = self._clock is not None
        self._lanes = lanes = CudaLanes(checked_program, self._driver, resources, timed=timed)
        layouts = find_layouts(program, self._engines)
        self._regions = allocate_buffers(program, shapes, layouts, resources)
        lanes.prepare_detours(self._regions)
        self._arrived = resources.create_event(lanes.home)
        self._left = resources.create_event(lanes.home)
        self._clocks = (
            None
            if self._clock is None
            else CudaClocks(program, lanes, self._driver, resources, self._clock)
        )
        self._interface = CudaInterface(program, self._regions, self._driver, resources)
        self._launcher = Launcher(program, lanes, self._driver, resources, use_graphs=use_graphs)
        self._used_streams = tuple((d, lanes.streams[n]) for n, d in lanes.ordinals.items())
        self._interface.clear_inputs(lanes.origin)
        self._launches[self._interface.own_place] = self._prepare(self._regions)

    @property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """Page-locked host memory for the network's inputs.

        Write it before `run`, which leaves it as it is.
        """
        if self._is_pending:
            self._settle()
        return self._interface.inputs

    @property
    def outputs(self) -> tuple[NDArray[Any], ...]:
        """Page-locked host memory with the outputs: valid from the end of `run` to the next."""
        return self._interface.outputs

    @property
    def running(self) -> tuple[str, ...]:
        """The segments that hang, as far as is known; a GPU does not say which one it is."""
        return tuple(segment for segment, _ in self._engines) if self._is_hung else ()

    @property
    def execution(self) -> Execution:
        """How the program is carried out."""
        return self._execution

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the network's inputs, then its outputs, lie in the origin's device.

        Given to `run`, they keep it from copying anything from and to the host.
        """
        return self._interface.own_place

    @property
    def regions(self) -> Mapping[str, Region]:
        """Where the program's buffers lie."""
        return self._regions

    def run(
        self,
        inference: int = 0,
        *,
        inputs: Sequence[int | None] = (),
        outputs: Sequence[int | None] = (),
        stream: int | None = None,
        after: Iterable[int] = (),
        timed: bool = False,
    ) -> tuple[Span, ...]:
        """Execute the program once.

        Parameters
        ----------
        inference
            The number under which it is recorded.
        inputs, outputs
            For each network input and output an address in the origin's device where the
            caller's tensor lies, or None to go by `inputs` and `outputs` of this object. They
            are used in place if they are aligned as CUDA's own allocations are, and for the first
            few combinations of addresses; others are copied within the device.
        stream
            A CUDA stream of the origin's device to be ordered against: the inference
            begins after what this stream has been given before, and what it is given
            afterwards begins after the inference.
        after
            CUDA streams of the origin's device whose work so far comes before the inference.
        timed
            Whether to time the parts of the inference, for `part_times`.

        Returns
        -------
        tuple
            If times are recorded, a span for each run and copy.

        Notes
        -----
        Returns when the outputs are complete; given a stream and addresses for all outputs,
        as soon as everything is enqueued.

        Raises
        ------
        CudaError
            When the driver reports an error of this inference or an earlier one.
        SegmentFailedError
            When an engine cannot be enqueued.
        SegmentHungError
            When the time limit is over, now or in an earlier run.
        """
        if self._is_hung:
            raise SegmentHungError((), self._timeout_s or 0.0)
        given = (
            *(tuple(inputs) or (None,) * len(self._interface.inputs)),
            *(tuple(outputs) or (None,) * len(self._interface.outputs)),
        )
        lanes = self._lanes
        with on_device(self._driver, lanes.home):
            # First of all, since preparing a launch writes to the caller's tensors, too.
            for earlier in (*after, *(() if stream is None else (stream,))):
                self._driver.record_event(self._arrived, earlier)
                self._driver.wait_event(lanes.origin, self._arrived)
            place = self._prepared_place(given)
            launch, _ = self._launches[place]
            began_ns = self._clocks.synchronise() if self._clocks else {}
            copy_in = partial(self._interface.copy_in, given, place, lanes.origin)
            copy_out = partial(self._interface.copy_out, given, place, lanes.origin)
            if timed:
                self._part_timers.enqueue(lanes.origin, copy_in, launch, copy_out)
            else:
                copy_in()
                launch()
                copy_out()
            if stream is not None:
                self._driver.record_event(self._left, lanes.origin)
                self._driver.wait_event(stream, self._left)
            self._is_pending = True
            if stream is None or None in given[len(self._interface.inputs) :] or self._clocks:
                self._settle()
        return self._clocks.spans(inference, began_ns) if self._clocks else ()

    def part_times(self) -> PartTimes:
        """Return how long the parts of the last inference took that was `timed`.

        It has to be complete, as `run` says.
        """
        return self._part_timers.read()

    def read(self, buffer: str) -> NDArray[Any]:
        """Return a copy of what a buffer holds after the last inference."""
        self._settle()
        region = self._regions[buffer]
        memory = np.empty(region.size_bytes, np.uint8)
        lane = next(n for n, device in self._lanes.ordinals.items() if device == region.device)
        stream = self._lanes.streams[lane]
        with on_device(self._driver, region.device):
            size_bytes = region.size_bytes
            self._driver.copy_to_host(memory.ctypes.data, region.address, size_bytes, stream)
            self._driver.synchronize(stream)
        return from_layout(memory, region)

    def give_up(self) -> None:
        """Release everything; nobody is there any more to hear of errors."""
        with contextlib.suppress(CudaError):
            self.close()

    def close(self) -> None:
        """Wait for what is under way, and release everything. Closing twice does no harm.

        After an inference that hangs everything is left as it is.
        """
        if self._is_hung:
            self._resources.abandon()
            _leave_as_it_is(self._launches, self._bindings)
            return
        try:
            self._drain()
        finally:
            self._used_streams = ()
            self._launches.clear()
            self._bindings.clear()
            self._resources.close()

    @cached_property
    def _part_timers(self) -> PartTimers:
        return PartTimers(self._driver, self._resources, self._lanes.home)

    def _prepare(
        self, regions: Mapping[str, Region]
    ) -> tuple[Callable[[], None], dict[int, Enqueue]]:
        """Bind engines where they have to be bound to these regions, and capture.

        A graph works in the memory of the bindings, which are returned to be kept alive.
        """
        with _PREPARING:
            bindings: dict[int, Enqueue] = {}
            for index, step in enumerate(self._program.steps):
                if isinstance(step, Run):
                    buffers = (*step.inputs, *step.outputs)
                    same = all(regions[name] is self._regions[name] for name in buffers)
                    known = self._bindings.get(index) if same else None
                    bindings[index] = known or self._bind(step, regions)
            if not self._bindings:
                self._bindings = bindings
            actions = self._lanes.actions(regions, bindings)
            self._execution, launch = self._launcher.prepare(actions)
            return launch, bindings

    def _bind(self, step: Run, regions: Mapping[str, Region]) -> Enqueue:
        engine = self._engines[step.segment, step.lane]
        specs = (*engine.inputs, *engine.outputs)
        tensors = [
            DeviceTensor(spec.name, r.dtype, r.shape, r.address, r.device, r.layout)
            for spec, r in zip(specs, (regions[n] for n in step.inputs + step.outputs), strict=True)
        ]
        count = len(engine.inputs)
        try:
            with on_device(self._driver, self._lanes.ordinals[step.lane]):
                enqueue = engine.bind(tensors[:count], tensors[count:])
        except (CudaError, InputError, SegmentFailedError):
            raise
        except Exception as error:
            raise SegmentFailedError(step.segment, error) from error
        return partial(_enqueue, step.segment, enqueue)

    def _prepared_place(self, given: Sequence[int | None]) -> tuple[int, ...]:
        """Return for which addresses to launch, after whatever a launch there needs."""
        wanted = self._interface.place(given)
        if wanted in self._launches:
            return wanted
        if len(self._launches) > _KEPT_PLACES:
            return self._interface.own_place
        self._settle()
        self._launches[wanted] = self._prepare(self._interface.regions_at(wanted))
        return wanted

    def _settle(self) -> None:
        """Wait until the origin's stream has done all it was given."""
        self._is_pending = False
        stream = self._lanes.origin
        with on_device(self._driver, self._lanes.home):
            if self._timeout_s is None:
                self._driver.synchronize(stream)
                return
            deadline_s = time.monotonic() + self._timeout_s
            while not self._driver.is_idle(stream):
                if time.monotonic() > deadline_s:
                    self._is_hung = True
                    raise SegmentHungError((), self._timeout_s)
                time.sleep(_POLL_S)

    def _drain(self) -> None:
        """Wait for all streams, so that nothing in use is released."""
        for device, stream in self._used_streams:
            with on_device(self._driver, device):
                self._driver.synchronize(stream)


def _leave_as_it_is(*used: object) -> None:
    """Let the memory of engines outlive everything, even the interpreter.

    Runtimes release it with the last reference, and that waits for the GPU, for good.
    """
    for one in used:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def _enqueue(segment: str, enqueue: Enqueue, stream: int) -> None:
    try:
        enqueue(stream)
    except CudaError:
        raise
    except Exception as error:
        raise SegmentFailedError(segment, error) from error
