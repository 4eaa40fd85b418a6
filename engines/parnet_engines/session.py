"""A loaded bundle, ready to run.

The session hands a segment to a worker thread as soon as everything it reads from
is there, so that independent segments run at the same time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from parnet_engines.ort import OrtEngine
from parnet_export.antichain import heaviest_antichain
from parnet_export.bundle import Bundle, open_bundle
from parnet_export.errors import InputError, ParnetError
from parnet_export.stream_graph import Segment, StreamGraph

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from parnet_engines.engine import Engine
    from parnet_export.stream_graph import TensorSpec

    Tensors = dict[str, NDArray[Any]]

Plan = Literal["streams", "whole"]
"""``"streams"``: segments run concurrently. ``"whole"``: the whole graph runs as one engine."""


class SegmentFailedError(ParnetError):
    """A segment's engine raised an error, which is this error's cause.

    Parameters
    ----------
    segment
        Name of the segment.
    cause
        What its engine raised.
    """

    def __init__(self, segment: str, cause: BaseException) -> None:
        self.segment = segment
        super().__init__(f"segment {segment!r} failed: {type(cause).__name__}: {cause}")


class Session:
    """Runs the segments of one network; several threads may share it.

    `Session.open` makes one from a bundle. The constructor takes any engines.

    Parameters
    ----------
    stream_graph
        Who feeds whom.
    engines
        An engine for each segment. The session owns them: `close` closes them.
    lanes
        Worker threads for segments that run at the same time, shared by all calls of
        `run`. A segment that runs by itself runs in the calling thread.

    Raises
    ------
    ValueError
        When a segment has no engine, or there is no lane.
    """

    def __init__(
        self, stream_graph: StreamGraph, engines: Mapping[str, Engine], *, lanes: int
    ) -> None:
        missing = [s.name for s in stream_graph.segments if s.name not in engines]
        if missing or lanes < 1:
            raise ValueError(f"no engine for {missing}" if missing else "no lane")
        self._graph = stream_graph
        self._engines = dict(engines)
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="parnet-lane")
        self._state = threading.Condition()
        self._running = 0
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        devices: str = "cpu",
        *,
        plan: Plan = "streams",
        threads: int | None = None,
    ) -> Self:
        """Load a bundle.

        Parameters
        ----------
        bundle
            A bundle, or the path of one.
        devices
            Where to run: ``"cpu"``.
        plan
            Whether to run the segments concurrently or the whole graph as one engine.
        threads
            CPU threads in all; by default one for each processor that this process may
            use. Segments that run at the same time share them evenly.

        Raises
        ------
        InputError
            When the bundle, the devices, the plan or the threads cannot be used.
        MissingBackendError
            When ONNX Runtime is not installed.
        """
        if devices != "cpu":
            raise InputError(
                f"devices {devices!r}", "this version runs on the CPU only", "Use 'cpu'"
            )
        if plan not in {"streams", "whole"}:
            raise InputError(f"plan {plan!r}", "is unknown", "Use 'streams' or 'whole'")
        if threads is not None and threads < 1:
            raise InputError(f"threads {threads}", "is less than one", "Use at least one thread")
        if not isinstance(bundle, Bundle):
            bundle = open_bundle(Path(bundle))
        graph = bundle.stream_graph
        paths = {segment.name: bundle.segment_path(segment.name) for segment in graph.segments}
        if plan == "whole":
            whole = Segment("whole", graph.inputs, graph.outputs, bundle.manifest.whole_cost)
            graph = StreamGraph(graph.inputs, graph.outputs, (whole,))
            paths = {whole.name: bundle.whole_path}
        available = threads or _usable_processors()
        width = len(heaviest_antichain(graph, {segment.name: 1 for segment in graph.segments}))
        lanes = max(1, min(width, available))
        alone = _segments_without_company(graph)
        engines = {
            segment.name: OrtEngine(
                segment,
                paths[segment.name],
                threads=available if segment.name in alone else available // lanes,
            )
            for segment in graph.segments
        }
        return cls(graph, engines, lanes=lanes)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` takes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns."""
        return self._graph.outputs

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the network once.

        Parameters
        ----------
        inputs
            An array for each network input, of exactly its type and shape. A symbolic
            dimension takes any size, the same one in all inputs. Do not change the
            arrays before the call returns.

        Returns
        -------
        dict
            An array for each network output. Read them only: they may be shared with
            the inputs, or with other outputs.

        Raises
        ------
        InputError
            When an input is missing, unknown, or of another type or shape.
        SegmentFailedError
            When an engine fails. Segments that have not started are not run, and those
            under way end before the error is raised; the session stays usable.
        ValueError
            When the session is closed.
        """
        tensors = _checked(self.inputs, inputs)
        with self._state:
            if self._closed:
                raise ValueError("the session is closed")
            self._running += 1
        try:
            self._run_segments(tensors)
        finally:
            with self._state:
                self._running -= 1
                self._state.notify_all()
        return {spec.name: tensors[spec.name] for spec in self.outputs}

    def _run_segments(self, tensors: Tensors) -> None:
        """Run every segment once and add what it produces to `tensors`.

        Only the calling thread touches `tensors`, and every segment gets a copy of the
        dictionary's entries that it reads, so nothing here needs a lock.
        """
        missing = {name: len(before) for name, before in self._graph.predecessors.items()}
        ready = deque(name for name, count in missing.items() if count == 0)
        under_way: dict[Future[Tensors], str] = {}
        try:
            while ready or under_way:
                if len(ready) == 1 and not under_way:
                    # Nothing can run beside it: spare it the way to another thread and back.
                    name = ready.popleft()
                    finished = {name: self._run_segment(name, tensors)}
                else:
                    while ready:
                        name = ready.popleft()
                        future = self._pool.submit(self._run_segment, name, dict(tensors))
                        under_way[future] = name
                    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                    finished = {under_way.pop(future): future.result() for future in done}
                for name, produced in finished.items():
                    tensors.update(produced)
                    for successor in self._graph.successors[name]:
                        missing[successor] -= 1
                        if missing[successor] == 0:
                            ready.append(successor)
        finally:
            # After an error, and after Ctrl-C: nobody reads these any more.
            for future in under_way:
                future.cancel()
            wait(under_way)

    def _run_segment(self, name: str, tensors: Tensors) -> Tensors:
        try:
            return self._engines[name].run(tensors)
        except Exception as error:
            raise SegmentFailedError(name, error) from error

    def close(self) -> None:
        """Wait for calls of `run` under way, then release threads and engines.

        Closing twice does no harm.
        """
        with self._state:
            self._closed = True
            self._state.wait_for(lambda: self._running == 0)
        self._pool.shutdown()
        for engine in self._engines.values():
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


def _checked(specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return the inputs as arrays, or say which one is not what the network takes."""
    takes = f"The network takes {', '.join(_describe(s.name, s.dtype, s.shape) for s in specs)}"
    unknown = sorted(set(inputs) - {spec.name for spec in specs})
    if unknown:
        raise InputError(f"input {unknown[0]!r}", "is not an input of the network", takes)
    sizes: dict[str, int] = {}
    tensors = {}
    for spec in specs:
        if spec.name not in inputs:
            raise InputError(f"input {spec.name!r}", "is missing", takes)
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
            raise InputError(f"input {spec.name!r}", f"was given as{given}", takes)
        tensors[spec.name] = array
    return tensors


def _describe(name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"{name} {dtype} [{', '.join(map(str, shape))}]"


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _segments_without_company(graph: StreamGraph) -> set[str]:
    """Return the segments that no other one can run beside: all are before or after them."""
    before: dict[str, set[str]] = {}
    for segment in graph.segments:
        direct = graph.predecessors[segment.name]
        before[segment.name] = set(direct).union(*(before[name] for name in direct))
    related = {name: set(ancestors) for name, ancestors in before.items()}
    for name, ancestors in before.items():
        for ancestor in ancestors:
            related[ancestor].add(name)
    return {name for name, others in related.items() if len(others) == len(before) - 1}
