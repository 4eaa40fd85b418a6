"""TensorRT engines of the rows whose graphs are made here, so that all rows have one runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from parnet_bench.targets.graphs import is_bundle
from parnet_engines.cuda.devices import names_gpus
from parnet_engines.tensorrt.build_place import choose_places
from parnet_engines.tensorrt.bundle_engines import build_engines
from parnet_engines.tensorrt.engine_finder import built_backend
from parnet_engines.tensorrt.options import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parnet_bench.targets.planned_row import PlannedRow, Working
    from parnet_bench.targets.request import Request
    from parnet_engines.tensorrt.build_place import BuildPlace
    from parnet_engines.tensorrt.module import Backend


def with_engines(
    rows: Sequence[PlannedRow], request: Request, working: Working
) -> tuple[PlannedRow, ...]:
    """Build what TensorRT needs to run the rows, where it is to run them.

    It is where TensorRT is asked for, and where the runtime is left open and a bundle of the
    user has engines: the ratio of two runtimes would say nothing about networks. Engines of
    the user's own bundles are what ``parnet-export build`` has made; there they lie, or the
    row says what to build. Those of other graphs are kept where the graphs are.

    Parameters
    ----------
    rows
        Rows on the CPU, or on GPUs.
    request
        What the rows were made for.
    working
        Told what takes time: a context manager around it.

    Returns
    -------
    tuple
        The rows, with TensorRT as their runtime where that has been settled here.

    Raises
    ------
    InputError
        When TensorRT cannot build a graph.
    MissingBackendError
        When it is asked for and not installed.
    """
    if not names_gpus(request.devices) or request.engine not in {"auto", "tensorrt"}:
        return tuple(rows)
    made_here = [row for row in rows if not is_bundle(row.description.target)]
    found = (built_backend(row.bundle) for row in rows if is_bundle(row.description.target))
    backend: Backend | Literal["auto"] = next((one for one in found if one is not None), "auto")
    if backend == request.engine == "auto":
        return tuple(rows)
    if made_here:
        _build(made_here, choose_places(backend, request.devices, None), working)
    return tuple(
        replace(row, description=replace(row.description, wanted_engine="tensorrt")) for row in rows
    )


def _build(rows: Iterable[PlannedRow], places: Sequence[BuildPlace], working: Working) -> None:
    done = set()
    for row in rows:
        options = EngineOptions(boundary=row.description.boundary or "linear")
        is_whole = row.form_of_graph == "whole"
        what = (row.bundle.path, is_whole, options.boundary)
        if what in done:
            continue
        done.add(what)
        with working(f"building TensorRT engines for {row.description.name}"):
            for _ in build_engines(
                row.bundle, places, options, whole=is_whole, segments=not is_whole
            ):
                pass  # each is written as it comes
