"""Engines for the CPU: which runtimes there are, and loading what a program needs of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from parnet_engines.planning.bundle_program import graph_of
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.planning.engine_cores import engine_cores
from parnet_engines.runtimes.openvino import OpenVinoEngine
from parnet_engines.runtimes.ort import OrtEngine, Spin
from parnet_engines.schedule.program import Run
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from parnet_engines.engine import Engine
    from parnet_engines.schedule.program import Program
    from parnet_export.bundle import Bundle
    from parnet_export.stream_graph import Segment

EngineName = Literal["onnxruntime", "openvino", "torch"]
"""A runtime that makes engines for the CPU."""


class LoadEngine(Protocol):
    """Loads an ONNX file for some cores."""

    def __call__(
        self, segment: Segment, path: Path, *, cores: tuple[int, ...], pin: bool, spin: Spin
    ) -> Engine:
        """Return the engine.

        Parameters
        ----------
        segment
            Name and tensors of what the file computes.
        path
            The ONNX file.
        cores
            A thread for each of them, one at least.
        pin
            Whether the engine's threads are pinned to them.
        spin
            As for `OrtEngine`.
        """


def _load_onnxruntime(
    segment: Segment, path: Path, *, cores: tuple[int, ...], pin: bool, spin: Spin
) -> Engine:
    threads = max(1, len(cores))
    return OrtEngine(segment, path, threads=threads, cores=cores if pin else (), spin=spin)


def _load_openvino(
    segment: Segment,
    path: Path,
    *,
    cores: tuple[int, ...],
    pin: bool,  # noqa: ARG001 - OpenVINO pins nothing to given cores
    spin: Spin,  # noqa: ARG001 - and its threads decide for themselves when to sleep
) -> Engine:
    return OpenVinoEngine(segment, path, threads=max(1, len(cores)))


def _load_torch(
    segment: Segment,
    path: Path,
    *,
    cores: tuple[int, ...],  # noqa: ARG001 - torch has one number of threads for the process
    pin: bool,  # noqa: ARG001
    spin: Spin,  # noqa: ARG001
) -> Engine:
    from parnet_engines.runtimes.torch_engine import TorchEngine  # torch takes seconds to load

    return TorchEngine(segment, path)


CPU_ENGINES: Mapping[str, LoadEngine] = {
    "onnxruntime": _load_onnxruntime,
    "openvino": _load_openvino,
    "torch": _load_torch,
}
"""How to load an engine of each runtime."""


def load_engines(
    bundle: Bundle,
    program: Program,
    *,
    pin: bool,
    spin: Spin,
    engine: str = "onnxruntime",
) -> dict[tuple[str, str], Engine]:
    """Load an engine for each segment and lane that runs it, with the cores it has there.

    Parameters
    ----------
    bundle
        The bundle whose segments, or whole graph, the program runs.
    program
        The program.
    pin
        Whether the threads of the engines are pinned to their cores; there is one for
        each core in any case.
    spin
        As for `OrtEngine`.
    engine
        A runtime of `CPU_ENGINES`.

    Raises
    ------
    MissingBackendError
        When the runtime is not installed.
    InputError
        When there is no such runtime, or it cannot load a file.
    """
    require_engine(engine)
    graph = graph_of(bundle, (s.segment for s in program.steps if isinstance(s, Run)))
    return {
        (segment, lane): CPU_ENGINES[engine](
            graph[segment],
            bundle.whole_path if segment == WHOLE else bundle.segment_path(segment),
            cores=cores,
            pin=pin,
            spin=spin,
        )
        for (segment, lane), cores in engine_cores(program, graph).items()
    }


def require_engine(engine: str) -> None:
    """Raise `InputError` for what is no runtime of `CPU_ENGINES`."""
    if engine not in CPU_ENGINES:
        raise InputError(f"engine {engine!r}", "is unknown", f"Use one of {', '.join(CPU_ENGINES)}")


def pins_all_threads(engine: str, bundle: Bundle, program: Program) -> bool:
    """Return whether lanes can be pinned without holding up the engines' other threads.

    Torch shares its threads among all engines of the process. OpenVINO's threads inherit the
    cores of whichever thread first needs them, and then serve all engines, so lanes of several
    threads are better left where the system puts them.
    """
    if engine == "torch":
        return False
    if engine != "openvino":
        return True
    graph = graph_of(bundle, (s.segment for s in program.steps if isinstance(s, Run)))
    return all(len(cores) <= 1 for cores in engine_cores(program, graph).values())
