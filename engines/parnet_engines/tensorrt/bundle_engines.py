"""Build the engines of a bundle, or find that they are there already."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, Protocol

from parnet_engines.cuda.boundary import choose_layouts, require_boundary
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.tensorrt.build import BuildProgress, BuildRequest, build_engine
from parnet_engines.tensorrt.build_place import BuildPlace, describe_driver
from parnet_engines.tensorrt.engine_cache import (
    look_up,
    onnx_path,
    recipe_of,
    resolve_options,
    sidecar_path,
    store,
)
from parnet_engines.tensorrt.engine_sidecar import SCHEMA_VERSION, Sidecar
from parnet_engines.tensorrt.module import LABELS, import_tensorrt, installed_version
from parnet_export import files
from parnet_export.errors import InputError
from parnet_export.stream_graph import Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from parnet_engines.tensorrt.build import BuiltEngine
    from parnet_engines.tensorrt.module import Backend
    from parnet_engines.tensorrt.options import EngineOptions
    from parnet_export.bundle import Bundle

_LOG_SUFFIX = ".log"
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What became of one engine.

    Parameters
    ----------
    segment
        Name of the segment, or ``"whole"``.
    target
        The GPUs that it is for, for people.
    status
        Whether it was built, or found unchanged.
    causes
        Why it was built, each as a clause.
    path
        Its sidecar.
    sidecar
        What is known about it.
    """

    segment: str
    target: str
    status: Literal["built", "unchanged"]
    causes: tuple[str, ...]
    path: Path
    sidecar: Sidecar


class EngineProgress(BuildProgress, Protocol):
    """Who is told how far building a bundle's engines is: each engine, and its phases."""

    def engine_start(self, name: str) -> None:
        """Begin with an engine."""

    def engine_finish(self) -> None:
        """Have done with an engine."""


def names_of(bundle: Bundle, *, whole: bool, segments: bool = True) -> tuple[str, ...]:
    """Return what a bundle can have engines of: its segments, and perhaps the whole graph."""
    names = tuple(segment.name for segment in bundle.stream_graph.segments) if segments else ()
    return (*names, WHOLE) if whole else names


def build_engines(
    bundle: Bundle,
    places: Iterable[BuildPlace],
    options: EngineOptions,
    *,
    whole: bool = True,
    segments: bool = True,
    timing_cache: Path | None = None,
    progress: EngineProgress | None = None,
    command: tuple[str, ...] = (),
) -> Iterator[EngineReport]:
    """Build the engines of a bundle, one after another; those that are there stay.

    A build that fails or is interrupted leaves the engines before it, and whatever was in
    the place of its own engine. TensorRT is imported when the first engine has to be built.

    Parameters
    ----------
    bundle
        The bundle. Its precision is that of the engines.
    places
        For which GPUs, each target once.
    options
        How.
    whole
        Whether the whole graph gets an engine besides the segments.
    segments
        Whether the segments get engines.
    timing_cache
        A file with timings of kernels, to read and replace; not part of what tells engines
        apart, since it makes building quicker and nothing else.
    progress
        Who is told how far it is.
    command
        The command line to note in the sidecars.

    Yields
    ------
    EngineReport
        One for each target and segment, in that order.

    Raises
    ------
    InputError
        When TensorRT cannot build one.
    MissingBackendError
        When the backend is not installed.
    """
    for place in places:
        version = installed_version(place.target.backend)
        for name in names_of(bundle, whole=whole, segments=segments):
            if progress is not None:
                progress.engine_start(f"{name} for {place.target}")
            job = _Job(bundle, place, name, resolve_options(options, name), version)
            yield job.report(timing_cache, progress, command)
            if progress is not None:
                progress.engine_finish()


@dataclass(frozen=True, slots=True)
class _Job:
    """One engine of one bundle for one target."""

    bundle: Bundle
    place: BuildPlace
    name: str
    options: EngineOptions
    version: str

    def report(
        self,
        timing_cache: Path | None,
        progress: EngineProgress | None,
        command: tuple[str, ...],
    ) -> EngineReport:
        target = self.place.target
        path = sidecar_path(self.bundle, target, self.name, self.options)
        recipe = recipe_of(self.bundle, self.name, target, self.options, self.version)
        found = look_up(path, recipe)
        if found.sidecar is not None:
            return EngineReport(self.name, str(target), "unchanged", (), path, found.sidecar)
        log_path = path.with_suffix(_LOG_SUFFIX)
        built = self._build(log_path, timing_cache, progress)
        sidecar = store(
            path,
            built.plan,
            Sidecar(
                schema_version=SCHEMA_VERSION,
                recipe=recipe,
                plan="",
                plan_sha256="",
                plan_bytes=0,
                tensors=built.tensors,
                build_s=built.build_s,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                command=command,
                driver=describe_driver() if self.place.device else "",
                audit=built.audit,
            ),
        )
        files.write_text(log_path, built.log)
        return EngineReport(self.name, str(target), "built", found.causes, path, sidecar)

    def _build(
        self, log_path: Path, timing_cache: Path | None, progress: BuildProgress | None
    ) -> BuiltEngine:
        segment = segment_of(self.bundle, self.name)
        graph = self.bundle.stream_graph
        request = BuildRequest(
            segment=segment,
            onnx_path=onnx_path(self.bundle, self.name),
            precision=self.bundle.manifest.precision,
            options=self.options,
            layouts=choose_layouts(
                (*segment.inputs, *segment.outputs),
                self.options.boundary,
                (spec.name for spec in (*graph.inputs, *graph.outputs)),
            ),
            target=self.place.target,
            log_path=log_path,
            device=self.place.device,
            timing_cache=timing_cache,
        )
        trt = import_tensorrt(self.place.target.backend)
        return _interruptible(
            lambda cancelled: build_engine(trt, request, progress=progress, cancelled=cancelled)
        )


def segment_of(bundle: Bundle, name: str) -> Segment:
    """Return a segment, or the whole network as one by the name `WHOLE`."""
    graph = bundle.stream_graph
    if name == WHOLE:
        return Segment(WHOLE, graph.inputs, graph.outputs, bundle.manifest.whole_cost)
    return graph[name]


def require_options(
    bundle: Bundle, backend: Backend, options: EngineOptions, timing_cache: Path | None
) -> None:
    """Refuse options that a bundle's precision or a backend cannot follow.

    Raises
    ------
    InputError
        When one is asked for.
    """
    require_boundary(options.boundary, bundle.manifest.precision, "--boundary")
    if backend == "tensorrt-rtx":
        for option, is_given, lack in (
            ("--version-compatible", options.version_compatible, "engines for other versions"),
            ("--timing-cache", timing_cache is not None, "timing cache"),
        ):
            if is_given:
                raise InputError(option, f"{LABELS[backend]} has no {lack}", "Leave it out")


def _interruptible(build: Callable[[threading.Event], BuiltEngine]) -> BuiltEngine:
    """Build in another thread, so that Ctrl-C reaches this one, which cancels the build.

    An exception cannot pass through TensorRT, which calls the progress monitor.
    """
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(build, cancelled)
        try:
            while not future.done():
                wait([future], timeout=_POLL_S)  # without a timeout, Windows would not wake up
        except BaseException:
            cancelled.set()
            with _without_interrupts():
                wait([future])
            raise
        return future.result()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore further Ctrl-C: Python must not end while TensorRT is still at work."""
    if threading.current_thread() is not threading.main_thread():  # no other gets them
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
