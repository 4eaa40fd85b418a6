"""Sessions on GPUs: NumPy arrays in and out, or arrays that lie in a GPU and stay there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from parnet_engines.base_session import BaseSession
from parnet_engines.cuda.caller_arrays import (
    UsablePlaces,
    find_arrays,
    find_targets,
    require_fitting,
    stand_in,
    streams_of,
)
from parnet_engines.cuda.device_array import stream_handle
from parnet_engines.cuda.devices import open_driver, ordinal_of, parse_gpus
from parnet_engines.cuda.engines import load_engines, require_cuda_engine
from parnet_engines.cuda.gpu_plan import choose_on_gpus
from parnet_engines.cuda.host import CudaHost
from parnet_engines.cuda.memory import resolve_shapes
from parnet_engines.network_inputs import checked_inputs
from parnet_engines.schedule.program import Run
from parnet_export.bundle import Bundle, open_bundle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.cuda.device_array import DeviceArray
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.engine import CudaEngine, EngineFile
    from parnet_engines.cuda.parts import PartTimes
    from parnet_engines.planning.evaluate import Objective
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.execution import Execution


class CudaSession(BaseSession["CudaEngine", CudaHost]):
    """Runs a checked program on GPUs; several threads may share it.

    Parameters
    ----------
    program
        What to run.
    engines
        An engine for each segment and lane that runs it. The session closes them.
    driver
        CUDA.
    engine
        Name of the engines' runtime.
    use_graphs
        Whether to launch CUDA graphs where they can be captured.
    timeout_s, record
        As for `Session`.
    """

    def __init__(
        self,
        program: CheckedProgram,
        engines: Mapping[tuple[str, str], CudaEngine],
        driver: CudaDriver,
        *,
        engine: str = "",
        use_graphs: bool = True,
        timeout_s: float | None = None,
        record: bool = False,
    ) -> None:
        super().__init__(program, engines, engine=engine, timeout_s=timeout_s, record=record)
        self._driver = driver
        self._use_graphs = use_graphs
        self._execution: Execution | None = None
        self._home = ordinal_of(program.program.origin.device)
        self._usable = UsablePlaces(driver, self._home)
        self._uploaded: list[NDArray[Any]] | None = None

    @classmethod
    def open_on_gpus(
        cls,
        bundle: Bundle | Path | str,
        devices: str,
        *,
        plan: str | Path = "streams",
        engine: str = "auto",
        lanes: int | None = None,
        objective: Objective = "latency",
        in_flight: int | None = None,
        record: bool = False,
        timeout_s: float | None = None,
        use_graphs: bool = True,
        boundary: Boundary | None = None,
        max_aux_streams: int | None = None,
    ) -> Self:
        """Load a bundle on GPUs; see `Session.open`.

        Raises
        ------
        InputError
            When the bundle, the devices, the plan, the engine or the numbers cannot be used.
        CheckFailedError
            When the program in a file is not one of this bundle.
        MissingBackendError
            When the runtime or ``cuda-bindings`` is not installed.
        """
        if engine != "auto":
            require_cuda_engine(engine)
        driver = open_driver(parse_gpus(devices))
        if not isinstance(bundle, Bundle):
            bundle = open_bundle(Path(bundle))
        load = partial(
            cls.load_on_gpus,
            bundle,
            driver=driver,
            engine=engine,
            boundary=boundary,
            max_aux_streams=max_aux_streams,
            use_graphs=use_graphs,
        )
        program = choose_on_gpus(
            bundle,
            devices,
            plan,
            gpus=[gpu.name for gpu in driver.gpus()],
            open_program=load,
            lanes=lanes,
            objective=objective,
            in_flight=in_flight,
        )
        open_driver([lane.device for lane in program.program.lanes])  # a file may name others
        return load(program, record=record, timeout_s=timeout_s)

    @classmethod
    def load_on_gpus(
        cls,
        bundle: Bundle,
        program: CheckedProgram,
        *,
        driver: CudaDriver,
        engine: str = "auto",
        boundary: Boundary | None = None,
        max_aux_streams: int | None = None,
        use_graphs: bool = True,
        record: bool = False,
        timeout_s: float | None = None,
        beside_others: bool = False,  # noqa: ARG003 - streams of all sessions share their GPU
    ) -> Self:
        """Load what a program needs of a bundle.

        Raises
        ------
        InputError
            When no engine can be loaded on these GPUs.
        MissingBackendError
            When the runtime is not installed.
        """
        engines, name = load_engines(
            bundle, program.program, driver, engine, boundary, max_aux_streams=max_aux_streams
        )
        return cls(
            program,
            engines,
            driver,
            engine=name,
            use_graphs=use_graphs,
            record=record,
            timeout_s=timeout_s,
        )

    @property
    def device(self) -> int:
        """Ordinal of the GPU where an inference starts and ends."""
        return self._home

    @property
    def engine_files(self) -> tuple[EngineFile, ...]:
        """The files that the engines were loaded from, each once; none for some runtimes."""
        files = (engine.file for engine in self._engines.values())
        return tuple(dict.fromkeys(file for file in files if file is not None))

    @property
    def execution(self) -> Execution:
        """How the program is carried out, as far as it is known: after the first `run`.

        Raises
        ------
        ValueError
            When nothing has run yet.
        """
        if self._execution is None:
            raise ValueError("nothing has run yet, so that it is not known how it is carried out")
        return self._execution

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        outputs: Mapping[str, Any] | None = None,
        stream: object = None,
    ) -> dict[str, Any]:
        """Run the network once.

        Parameters
        ----------
        inputs
            An array for each network input, of exactly its type and shape: NumPy's, or one
            that lies in the GPU where the program starts, see
            `parnet_engines.cuda.device_array.as_device_array`. Those are used where they lie.
            (For the first few combinations of addresses; what lies elsewhere later on is
            copied within the GPU, because a CUDA graph keeps its addresses.)
        outputs
            Arrays in the same GPU that network outputs are written to.
        stream
            A CUDA stream of any library: the inference begins after what it has been
            given so far, and what it is given later begins after the inference. It also
            begins after what the streams have been given that arrays in the GPU name
            (CuPy's and Numba's do); arrays that name none are taken to be in use on the
            default stream, if no stream is given here.

        Returns
        -------
        dict
            For each network output the array of `outputs`, or a new NumPy array. If they are
            all in `outputs` and a stream is given, the inference may still be under way.

        Raises
        ------
        InputError
            When an array is missing, unknown, of another type or shape, or lies in another
            GPU or context.
        SegmentFailedError, SegmentHungError, ValueError
            As for `Session.run`.
        CudaError
            When CUDA reports an error.
        """
        sources = find_arrays(self.inputs, inputs, "input")
        targets = find_targets(self.outputs, outputs or {})
        if not sources and not targets and stream is None:
            return super().run(inputs)
        return self._run_in_place(inputs, sources, targets, outputs or {}, stream)

    def upload(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Copy inputs to the GPU, where `run_resident` finds them.

        Every inference that can be in flight gets a copy, and runs once. Nothing else may use
        the session meanwhile, and `run` puts other inputs in their place.

        Parameters
        ----------
        inputs
            NumPy arrays, as for `run`.
        """
        self._require_own_process()
        self._uploaded = arrays = checked_inputs(self.inputs, inputs)
        for _ in self._slots:
            with self._in_slot() as (slot, number):
                host = self._host(slot, arrays)
                _fill(host, arrays)
                self._keep(host.run(number))

    def run_resident(self) -> None:
        """Run the network on inputs that lie in the GPU already, and leave the outputs there.

        Nothing is copied between the host and the GPU. It returns when the outputs are
        complete.

        Raises
        ------
        ValueError
            When there was no `upload`, or the session is closed.
        SegmentHungError, CudaError
            As for `run`.
        """
        self._require_own_process()
        arrays = self._require_uploaded()
        with self._in_slot() as (slot, number):
            host = self._host(slot, arrays)
            inputs, outputs = self._places(host)
            self._keep(host.run(number, inputs=inputs, outputs=outputs))

    def time_parts(self, inputs: Mapping[str, NDArray[Any]] | None = None) -> PartTimes:
        """Run the network once, and return how long its parts took.

        Timing costs some microseconds that a plain `run` does not take.

        Parameters
        ----------
        inputs
            NumPy arrays, as for `run`; None to run as `run_resident` does.

        Raises
        ------
        InputError, SegmentFailedError, SegmentHungError, CudaError, ValueError
            As for `run` and `run_resident`.
        """
        self._require_own_process()
        arrays = self._require_uploaded() if inputs is None else checked_inputs(self.inputs, inputs)
        with self._in_slot() as (slot, number):
            host = self._host(slot, arrays)
            if inputs is None:
                sources, targets = self._places(host)
                self._keep(host.run(number, inputs=sources, outputs=targets, timed=True))
            else:
                _fill(host, arrays)
                self._keep(host.run(number, timed=True))
            return host.part_times()

    def inspect(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once and read all memory; see `BaseSession.inspect`."""
        self._require_own_process()
        arrays = checked_inputs(self.inputs, inputs)
        program = self.program.program
        tensors = {spec.name: array for spec, array in zip(self.inputs, arrays, strict=True)}
        with self._in_slot() as (slot, number):
            host = self._host(slot, arrays)
            _fill(host, arrays)
            self._keep(host.run(number))
            for step in program.steps:
                if isinstance(step, Run):
                    for name in step.outputs:
                        tensor = program.buffers_by_name[name].tensor.name
                        tensors.setdefault(tensor, host.read(name))
        return tensors

    def _run_in_place(
        self,
        inputs: Mapping[str, Any],
        sources: Mapping[str, DeviceArray],
        targets: Mapping[str, DeviceArray],
        outputs: Mapping[str, Any],
        stream: object,
    ) -> dict[str, Any]:
        self._require_own_process()
        # Only types and shapes are checked of what stands in for arrays in the GPU.
        stand_ins = {name: stand_in(array) for name, array in sources.items()}
        arrays = checked_inputs(self.inputs, {**inputs, **stand_ins})
        with self._in_slot() as (slot, number):
            host = self._host(slot, arrays)
            require_fitting(self.outputs, targets, host.outputs)
            self._usable.require_usable(sources, "input")
            self._usable.require_usable(targets, "output")
            handle = None
            if stream is not None:
                handle = stream_handle(stream, self._driver, self._home)
            after = streams_of((*sources.values(), *targets.values()), handle)
            if len(sources) < len(self.inputs):
                for spec, buffer, array in zip(self.inputs, host.inputs, arrays, strict=True):
                    if spec.name not in sources:
                        buffer[...] = array
            spans = host.run(
                number,
                inputs=[_pointer(sources.get(spec.name)) for spec in self.inputs],
                outputs=[_pointer(targets.get(spec.name)) for spec in self.outputs],
                stream=handle,
                after=after,
            )
            self._keep(spans)
            return {
                spec.name: outputs[spec.name] if spec.name in targets else buffer.copy()
                for spec, buffer in zip(self.outputs, host.outputs, strict=True)
            }

    def _require_uploaded(self) -> list[NDArray[Any]]:
        if self._uploaded is None:
            raise ValueError("no inputs were uploaded")
        return self._uploaded

    def _places(self, host: CudaHost) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return where a host's inputs and outputs lie; given back to it, it copies nothing."""
        count = len(self.inputs)
        return host.addresses[:count], host.addresses[count:]

    def _new_host(self, arrays: Sequence[NDArray[Any]]) -> CudaHost:
        program = self.program
        host = CudaHost(
            program,
            self._engines,
            resolve_shapes(program.program, [array.shape for array in arrays]),
            self._driver,
            timeout_s=self._timeout_s,
            clock=self._clock,
            use_graphs=self._use_graphs,
        )
        self._execution = host.execution
        return host


def _fill(host: CudaHost, arrays: Sequence[NDArray[Any]]) -> None:
    for buffer, array in zip(host.inputs, arrays, strict=True):
        np.copyto(buffer, array)


def _pointer(array: DeviceArray | None) -> int | None:
    return array.pointer if array else None
