"""Find the engine of a bundle that runs on a given GPU, or say why none does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from parnet_engines.tensorrt.engine_cache import (
    ENGINES_FOLDER,
    build_command,
    onnx_path,
    sidecar_name,
    this_platform,
)
from parnet_engines.tensorrt.engine_sidecar import describe_gpu, misfit, read_sidecar
from parnet_engines.tensorrt.module import LABELS, choose_backend, installed_backends
from parnet_engines.tensorrt.options import target_of
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from parnet_engines.cuda.driver import Gpu
    from parnet_engines.tensorrt.engine_sidecar import Sidecar
    from parnet_engines.tensorrt.module import Backend, TensorRt
    from parnet_engines.tensorrt.options import EngineOptions
    from parnet_export.bundle import Bundle


def backend_of(bundle: Bundle, wanted: Backend | Literal["auto"]) -> Backend:
    """Return the backend whose engines of a bundle are to run.

    Parameters
    ----------
    bundle
        The bundle.
    wanted
        A backend stays what it is. ``"auto"`` is the first installed one that the bundle has
        engines of, TensorRT before TensorRT-RTX; without any, as for building.

    Raises
    ------
    MissingBackendError
        When it is not installed; for ``"auto"``, when none is.
    """
    chosen = choose_backend(wanted)
    return chosen if wanted != "auto" else built_backend(bundle) or chosen


def built_backend(bundle: Bundle) -> Backend | None:
    """Return the first installed backend that a bundle has engines of; None without any."""
    found = (backend for backend in installed_backends() if _has_engines(bundle, backend))
    return next(found, None)


def find_engine(bundle: Bundle, name: str, trt: TensorRt, gpu: Gpu, options: EngineOptions) -> Path:
    """Return the sidecar of an engine that runs on a GPU; one built for just that GPU if any.

    Parameters
    ----------
    bundle
        The bundle.
    name
        A segment, or the whole graph by the name `WHOLE`.
    trt
        What is to run it.
    gpu
        Where.
    options
        Boundary and auxiliary streams tell engines apart; the rest does not matter here.

    Raises
    ------
    InputError
        When there is none: what there is was built for something else, which one sentence
        names, along with the command that rebuilds it.
    """
    backend = trt.backend
    exact = target_of(backend, gpu).folder
    found = sorted(
        _sidecars(bundle, backend, sidecar_name(name, options)),
        key=lambda path: (path.parent.name != exact, path),
    )
    reasons, rebuilt_with = [], []
    for path in found:
        sidecar = read_sidecar(path)
        reason = _changed(bundle, name, sidecar) or misfit(
            sidecar, version=trt.version, platform=this_platform(), gpu=gpu
        )
        if not reason:
            return path
        reasons.append((path, f"the engine was {sidecar.built_for}, and {reason}"))
        rebuilt_with.append(sidecar.recipe.options)
    if reasons:
        command = build_command(bundle.path, name, backend, gpu.ordinal, rebuilt_with[0])
        raise InputError(*reasons[0], f"Build it again: {command}")
    command = build_command(bundle.path, name, backend, gpu.ordinal, options)
    problem = f"holds no {LABELS[backend]} engine of {name!r} for {describe_gpu(gpu)}"
    raise InputError(bundle.path, problem, f"Build it: {command}")


def _has_engines(bundle: Bundle, backend: Backend) -> bool:
    return next(_sidecars(bundle, backend, "*.json"), None) is not None


def _sidecars(bundle: Bundle, backend: Backend, name: str) -> Iterator[Path]:
    """Yield the sidecars of a backend's engines by name, for whatever GPUs."""
    # "tensorrt-*" alone would match folders of TensorRT-RTX, too.
    architectures = ("sm*", "any")
    for architecture in architectures:
        yield from bundle.path.glob(f"{ENGINES_FOLDER}/{backend}-{architecture}/{name}")


def _changed(bundle: Bundle, name: str, sidecar: Sidecar) -> str:
    graph = bundle.manifest.files[onnx_path(bundle, name).name]
    if sidecar.recipe.onnx_sha256 != graph.sha256:
        return "the bundle's graph has changed since"
    return ""
