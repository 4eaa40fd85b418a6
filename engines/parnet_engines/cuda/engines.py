"""Engines for GPUs: which runtimes there are, and loading what a program needs of one."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, cast

from parnet_engines.cuda.boundary import require_boundary
from parnet_engines.cuda.devices import ordinal_of
from parnet_engines.schedule.program import Run
from parnet_export.errors import InputError, MissingBackendError, ParnetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.engine import CudaEngine
    from parnet_engines.schedule.program import Program
    from parnet_export.bundle import Bundle

CudaEngineName = Literal["tensorrt", "torch", "onnxruntime"]
"""A runtime that makes engines for GPUs."""

CUDA_ENGINES: Mapping[str, str] = {
    "tensorrt": "parnet_engines.tensorrt.run",
    "torch": "parnet_engines.runtimes.torch_engine",
    "onnxruntime": "parnet_engines.runtimes.ort_cuda",
}
"""The module of each runtime, the fastest first. Each one has a `load_engines`."""


class _Module(Protocol):
    """A module of `CUDA_ENGINES`."""

    def load_engines(
        self,
        bundle: Bundle,
        names: Iterable[str],
        driver: CudaDriver,
        device: int,
        *,
        boundary: Boundary | None = None,
        **its_own: int,
    ) -> Mapping[str, CudaEngine]:
        """Load the engines of segments, or of the whole graph, on one GPU.

        Nobody gives a runtime options that are another one's.
        """


def load_engines(
    bundle: Bundle,
    program: Program,
    driver: CudaDriver,
    engine: str = "auto",
    boundary: Boundary | None = None,
    *,
    max_aux_streams: int | None = None,
) -> tuple[dict[tuple[str, str], CudaEngine], str]:
    """Load an engine for each segment and lane that runs it, one for each segment and GPU.

    Parameters
    ----------
    bundle
        The bundle whose segments, or whole graph, the program runs.
    program
        The program.
    driver
        CUDA.
    engine
        A runtime of `CUDA_ENGINES`; ``"auto"``: the first of them that can be used here.
    boundary
        How tensors between engines lie in memory; None leaves it to the runtime.
    max_aux_streams
        Take TensorRT's engines that were built for so many auxiliary streams; None: those that
        are built unless asked otherwise, or another runtime's.

    Returns
    -------
    engines, name
        The engines by segment and lane, and the runtime they are of.

    Raises
    ------
    MissingBackendError
        When the runtime is not installed.
    InputError
        When there is no such runtime or boundary, or it cannot load a segment on a GPU.
    """
    require_boundary(boundary, bundle.manifest.precision, "boundary")
    load = partial(_load, bundle, program, driver, boundary)
    if max_aux_streams is not None:
        if engine not in {"auto", "tensorrt"}:
            problem = f"are something that engines of {engine} do not have"
            raise InputError("auxiliary streams", problem, "Leave them out, or use tensorrt")
        return load("tensorrt", max_aux_streams=max_aux_streams), "tensorrt"
    if engine != "auto":
        require_cuda_engine(engine)
        return load(engine), engine
    reasons = []
    for name in CUDA_ENGINES:
        try:
            return load(name), name
        except (InputError, MissingBackendError) as error:
            reasons.append(f"{name}: {error}")
    raise InputError(
        "engine 'auto'", f"no runtime can run this bundle ({' '.join(reasons)})", "Install one"
    )


def require_cuda_engine(engine: str) -> None:
    """Raise `InputError` for what is no runtime of `CUDA_ENGINES`."""
    if engine not in CUDA_ENGINES:
        known = ", ".join(("auto", *CUDA_ENGINES))
        raise InputError(f"engine {engine!r}", "is none for GPUs", f"Use {known}")


def _load(
    bundle: Bundle,
    program: Program,
    driver: CudaDriver,
    boundary: Boundary | None,
    engine: str,
    **its_own: int,
) -> dict[tuple[str, str], CudaEngine]:
    places = {
        (step.segment, step.lane): ordinal_of(program.lanes_by_name[step.lane].device)
        for step in program.steps
        if isinstance(step, Run)
    }
    module = cast("_Module", importlib.import_module(CUDA_ENGINES[engine]))
    loaded: dict[tuple[str, int], CudaEngine] = {}
    try:
        for device in dict.fromkeys(places.values()):
            names = dict.fromkeys(s for (s, _), where in places.items() if where == device)
            found = module.load_engines(bundle, names, driver, device, boundary=boundary, **its_own)
            loaded |= {(name, device): one for name, one in found.items()}
    except ParnetError:
        for one in loaded.values():
            one.close()
        raise
    return {place: loaded[place[0], device] for place, device in places.items()}
