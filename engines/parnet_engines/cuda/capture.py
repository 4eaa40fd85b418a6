"""Capturing what is enqueued on CUDA streams in a graph, without leaving a capture open."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from parnet_engines.cuda.driver import CudaDriver


def capture(driver: CudaDriver, device: int, stream: int, enqueue: Callable[[], None]) -> int:
    """Return an executable graph of what a function enqueues.

    Parameters
    ----------
    driver
        The driver.
    device
        The device of the stream; its context is current.
    stream
        Where the capture begins and ends. Other streams join in by waiting for an event
        of this one, and come back the same way.
    enqueue
        Enqueues everything, on any of these streams.

    Raises
    ------
    Exception
        Whatever refused the capture. None is open then, and no graph is left.
    """
    with _COLLECTOR.off():
        driver.begin_capture(stream)
        try:
            enqueue()
            graph = driver.end_capture(stream)
        except BaseException:
            driver.abort_capture(stream)
            raise
    with contextlib.ExitStack() as undo:
        undo.callback(driver.destroy_graph, device, graph)
        executable = driver.instantiate(device, graph)
        try:
            undo.close()
        except BaseException:
            driver.destroy_executable(device, executable)
            raise
    return executable


class _Collector:
    """Python's collector, off for as long as any thread captures.

    What it collects may release memory of the GPU, which CUDA forbids to a thread that
    captures; and it works in whatever thread happens to be running.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captures = 0
        self._was_on = False

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Keep it off meanwhile, and switch it on when the last one is through."""
        with self._lock:
            if not self._captures:
                self._was_on = gc.isenabled()
                gc.disable()
            self._captures += 1
        try:
            yield
        finally:
            with self._lock:
                self._captures -= 1
                if not self._captures and self._was_on:
                    gc.enable()


_COLLECTOR = _Collector()
