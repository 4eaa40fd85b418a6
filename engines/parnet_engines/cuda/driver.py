"""The CUDA driver as the interpreter needs it: few verbs, handles that are plain integers.

`parnet_engines.cuda.bindings.BindingsDriver` is the machine's driver.
`parnet_engines.cuda.recording_driver.RecordingDriver` needs no GPU: it notes every call and
carries out in host memory what a GPU would.

Devices are CUDA ordinals, and everything lives in their primary contexts, the ones that
torch, CuPy and ``pycuda.autoprimaryctx`` use. Who creates something releases it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from collections.abc import Iterator


class CudaError(ParnetError):
    """A call of the CUDA driver failed.

    Parameters
    ----------
    call
        Name of the driver's function.
    code
        Name of the error, such as ``"CUDA_ERROR_OUT_OF_MEMORY"``.
    text
        What the driver says about it.
    """

    def __init__(self, call: str, code: str, text: str = "") -> None:
        self.call = call
        self.code = code
        super().__init__(f"{call} failed: {code}{f' ({text})' if text else ''}")


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the driver says about a GPU.

    Parameters
    ----------
    ordinal
        Its number, from 0.
    name
        The product's name.
    compute_capability
        Major and minor, such as ``(9, 0)``.
    memory_bytes
        All of its memory.
    l2_cache_bytes
        Its L2 cache; 0 where that is not known.
    pci_bus_id
        Where its board is plugged in, such as ``"0000:3B:00.0"``; empty where that is not
        known. Ordinals tell nobody but CUDA which board a GPU is: CUDA numbers the fastest
        first, and only those of ``CUDA_VISIBLE_DEVICES``.
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    l2_cache_bytes: int = 0
    pci_bus_id: str = ""


@dataclass(frozen=True, slots=True)
class PointerInfo:
    """Where an address lies.

    Parameters
    ----------
    device
        Ordinal of the GPU whose memory it is in; None for memory of the host.
    is_primary
        Whether it was allocated in the device's primary context.
    """

    device: int | None
    is_primary: bool


class CudaDriver(Protocol):
    """Everything the interpreter asks of CUDA.

    Every method raises `CudaError` when the driver refuses. What takes a stream needs the
    context of the stream's device to be current in this thread; what takes a device needs
    only that its context is retained. What is being released is gone even when the driver
    reports an error, which then is one of an earlier call.
    """

    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs of this machine, by ordinal."""

    def retain_context(self, device: int) -> None:
        """Keep a device's primary context alive."""

    def release_context(self, device: int) -> None:
        """Undo one `retain_context`."""

    def push_context(self, device: int) -> None:
        """Make a retained context current in this thread, above the one before."""

    def set_context(self, device: int) -> None:
        """Replace the current context by another retained one."""

    def pop_context(self) -> None:
        """Make the context current that was so before the last `push_context`."""

    def can_access_peer(self, device: int, peer: int) -> bool:
        """Return whether a device can read and write another one's memory."""

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Let a device access another's memory for as long as their contexts live.

        It does no harm when it is enabled already, and nobody disables it: other users of
        the primary contexts may rely on it.
        """

    def priority_range(self, device: int) -> tuple[int, int]:
        """Return the least and the greatest priority of streams; greater ones are lower numbers."""

    def create_stream(self, device: int, priority: int) -> int:
        """Return a new CUDA stream, which does not synchronise with the default stream."""

    def destroy_stream(self, device: int, stream: int) -> None:
        """Release a CUDA stream."""

    def is_primary_stream(self, stream: int, device: int) -> bool:
        """Return whether a stream belongs to a device's primary context."""

    def create_event(self, device: int, *, timing: bool = False) -> int:
        """Return a new event of a device."""

    def destroy_event(self, device: int, event: int) -> None:
        """Release an event."""

    def record_event(self, event: int, stream: int, *, external: bool = False) -> None:
        """Record an event at the end of what a stream has been given.

        Parameters
        ----------
        event, stream
            Of the same device.
        external
            While `stream` is captured: let every launch of the graph record the event,
            rather than only order the graph's nodes. Not allowed otherwise.
        """

    def wait_event(self, stream: int, event: int) -> None:
        """Let what a stream is given from now on wait for an event, of any device."""

    def elapsed_ms(self, device: int, begin: int, end: int) -> float:
        """Return the milliseconds between two events of a device that have been reached."""

    def free_bytes(self, device: int) -> int:
        """Return how much of a device's memory no process uses; its context is retained."""

    def allocate(self, device: int, size_bytes: int) -> int:
        """Return the address of new memory of a device."""

    def free(self, device: int, address: int) -> None:
        """Release memory of a device."""

    def allocate_pinned(self, device: int, size_bytes: int) -> int:
        """Return the address of new page-locked host memory, usable by every device."""

    def free_pinned(self, device: int, address: int) -> None:
        """Release page-locked host memory that was allocated by way of a device."""

    def copy_to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Enqueue a copy from host memory."""

    def copy_to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Enqueue a copy to host memory."""

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Enqueue a copy within one device's memory."""

    def copy_peer(
        self,
        target: int,
        source: int,
        size_bytes: int,
        stream: int,
        *,
        target_device: int,
        source_device: int,
    ) -> None:
        """Enqueue a copy between the memories of two devices that can access each other's."""

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """Enqueue filling memory with zeros."""

    def begin_capture(self, stream: int) -> None:
        """Collect what this stream is given in a graph, instead of executing it.

        Streams that wait for an event of a captured stream join in. Other threads are
        left alone.
        """

    def end_capture(self, stream: int) -> int:
        """End the capture that began on a stream, and return the graph.

        Raises
        ------
        CudaError
            When something in between was refused, or a stream has not come back. The
            capture may still be open; `abort_capture` ends it in any case.
        """

    def abort_capture(self, stream: int) -> None:
        """End a capture if one is open, destroy its graph and clear the error. Never raises."""

    def instantiate(self, device: int, graph: int) -> int:
        """Return an executable graph, whose nodes have their streams' priorities."""

    def destroy_graph(self, device: int, graph: int) -> None:
        """Release a graph; executable ones made from it stay."""

    def destroy_executable(self, device: int, executable: int) -> None:
        """Release an executable graph."""

    def launch(self, executable: int, stream: int) -> None:
        """Enqueue all of an executable graph on a stream."""

    def synchronize(self, stream: int) -> None:
        """Wait until a stream has done all it was given."""

    def is_idle(self, stream: int) -> bool:
        """Return whether a stream has done all it was given."""

    def locate(self, address: int) -> PointerInfo:
        """Return where an address lies; a context has to be current, no matter which."""


@contextlib.contextmanager
def on_device(driver: CudaDriver, device: int) -> Iterator[None]:
    """Have a device's context current meanwhile, and the one before again afterwards."""
    driver.push_context(device)
    try:
        yield
    finally:
        driver.pop_context()
