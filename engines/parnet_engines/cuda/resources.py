"""What a program holds of CUDA, and releases: contexts, streams, events, memory, graphs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from parnet_engines.cuda.capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable

    from parnet_engines.cuda.driver import CudaDriver


class CudaResources:
    """Acquires resources of CUDA, and releases them in reverse order.

    A release that fails keeps none of the others from being tried.

    Parameters
    ----------
    driver
        The driver.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._stack = contextlib.ExitStack()

    def retain_context(self, device: int) -> None:
        """Keep a device's primary context alive."""
        self._driver.retain_context(device)
        self._stack.callback(self._driver.release_context, device)

    def create_stream(self, device: int, priority: int) -> int:
        """Return a CUDA stream."""
        stream = self._driver.create_stream(device, priority)
        self._stack.callback(self._driver.destroy_stream, device, stream)
        return stream

    def create_event(self, device: int, *, timing: bool = False) -> int:
        """Return an event."""
        event = self._driver.create_event(device, timing=timing)
        self._stack.callback(self._driver.destroy_event, device, event)
        return event

    def allocate(self, device: int, size_bytes: int) -> int:
        """Return the address of memory of a device, of at least one byte."""
        address = self._driver.allocate(device, max(1, size_bytes))
        self._stack.callback(self._driver.free, device, address)
        return address

    def allocate_pinned(self, device: int, size_bytes: int) -> int:
        """Return the address of page-locked host memory, of at least one byte."""
        address = self._driver.allocate_pinned(device, max(1, size_bytes))
        self._stack.callback(self._driver.free_pinned, device, address)
        return address

    def capture(self, device: int, stream: int, enqueue: Callable[[], None]) -> int:
        """Return an executable graph; see `parnet_engines.cuda.capture.capture`."""
        executable = capture(self._driver, device, stream, enqueue)
        self._stack.callback(self._driver.destroy_executable, device, executable)
        return executable

    def close(self) -> None:
        """Release everything. Closing twice does no harm.

        Raises
        ------
        CudaError
            When the driver reported an error, after everything has been released.
        """
        self._stack.close()

    def abandon(self) -> None:
        """Forget everything without a release, because the GPU still uses it."""
        self._stack.pop_all()
