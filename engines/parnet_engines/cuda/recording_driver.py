"""A CUDA driver without a GPU: it notes every call, and does in host memory what GPUs would.

What is enqueued on a stream is carried out at once, in issue order, which is one of the
orders that CUDA allows; a captured graph is carried out whenever it is launched. Rules that
CUDA enforces are enforced: contexts have to be current, captured streams have to come back,
no memory is taken or given back meanwhile, nothing is used after its release.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from parnet_engines.cuda.driver import CudaError, Gpu, PointerInfo
from parnet_engines.cuda.recorded_capture import OpenCaptures, RecordedCapture, RecordedEvent
from parnet_engines.cuda.recorded_memory import RecordedMemory

if TYPE_CHECKING:
    from collections.abc import Callable

_GIB = 1 << 30
_L2_BYTES = 1 << 20
_DEFAULT_STREAMS = (1, 2)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the driver.

    Parameters
    ----------
    verb
        The method, or ``"run"`` for what an engine enqueues.
    device
        The device whose context was current, or that the call names; -1 without any.
    operands
        The arguments: handles, addresses, sizes, names.
    """

    verb: str
    device: int
    operands: tuple[Any, ...]


class RecordingDriver:
    """A `CudaDriver` that needs no GPU; for one thread at a time.

    Parameters
    ----------
    gpus
        How many GPUs there are.
    peer_access
        Whether they can access each other's memory.
    joint_graphs
        Whether a graph may reach over several devices.
    fail_at
        Let the call of this number fail, counted from 0 over all calls.
    """

    def __init__(
        self,
        gpus: int = 1,
        *,
        peer_access: bool = True,
        joint_graphs: bool = True,
        fail_at: int | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.fail_at = fail_at
        self.now_ms = 0.0
        self._gpus = tuple(
            Gpu(i, f"Recorder {i}", (9, 0), 80 * _GIB, _L2_BYTES, f"0000:{9 - i:02X}:00.0")
            for i in range(gpus)
        )
        self._peer_access = peer_access
        self._handles = itertools.count(1000)
        self._retained: Counter[int] = Counter()
        self._stack: list[int] = []
        self._streams: dict[int, int] = {}
        self._events: dict[int, RecordedEvent] = {}
        self._memory = RecordedMemory()
        self._graphs: dict[int, RecordedCapture] = {}
        self._executables: dict[int, RecordedCapture] = {}
        self._captures = OpenCaptures(
            lambda stream, lead: joint_graphs or self._streams[stream] == self._streams[lead]
        )

    @property
    def open_resources(self) -> dict[str, int]:
        """How many of each kind of resource are not released, those with none left out."""
        counts = {
            "contexts": sum(self._retained.values()),
            "current contexts": len(self._stack),
            "streams": len(self._streams),
            "events": len(self._events),
            "buffers": self._memory.count(pinned=False),
            "pinned buffers": self._memory.count(pinned=True),
            "graphs": len(self._graphs),
            "executable graphs": len(self._executables),
            "captures": len(self._captures),
        }
        return {kind: count for kind, count in counts.items() if count}

    @property
    def is_capturing(self) -> bool:
        """Whether a capture is open."""
        return len(self._captures) > 0

    def gpus(self) -> tuple[Gpu, ...]:
        """See `CudaDriver.gpus`."""
        return self._gpus

    def retain_context(self, device: int) -> None:
        """See `CudaDriver.retain_context`."""
        self._note("retain_context", device)
        self._retained[device] += 1

    def release_context(self, device: int) -> None:
        """See `CudaDriver.release_context`."""
        self._retained[device] -= 1
        self._note("release_context", device)

    def push_context(self, device: int) -> None:
        """See `CudaDriver.push_context`."""
        self._note("push_context", device)
        self._require_retained(device)
        self._stack.append(device)

    def set_context(self, device: int) -> None:
        """See `CudaDriver.set_context`."""
        self._note("set_context", device)
        self._require_retained(device)
        self._stack[-1] = device

    def pop_context(self) -> None:
        """See `CudaDriver.pop_context`."""
        device = self._stack.pop()
        self._note("pop_context", device)

    def can_access_peer(self, device: int, peer: int) -> bool:
        """See `CudaDriver.can_access_peer`."""
        self._note("can_access_peer", device, peer)
        return self._peer_access

    def enable_peer_access(self, device: int, peer: int) -> None:
        """See `CudaDriver.enable_peer_access`."""
        self._note("enable_peer_access", device, peer)

    def priority_range(self, device: int) -> tuple[int, int]:
        """See `CudaDriver.priority_range`."""
        self._note("priority_range", device)
        return 0, -5

    def create_stream(self, device: int, priority: int) -> int:
        """See `CudaDriver.create_stream`."""
        return self._create(self._streams, "create_stream", device, device, priority)

    def destroy_stream(self, device: int, stream: int) -> None:
        """See `CudaDriver.destroy_stream`."""
        self._require_home(self._streams.pop(stream), device)
        self._note("destroy_stream", device, stream)

    def is_primary_stream(self, stream: int, device: int) -> bool:
        """See `CudaDriver.is_primary_stream`."""
        self._note("is_primary_stream", device, stream)
        return self._streams.get(stream) == device

    def create_event(self, device: int, *, timing: bool = False) -> int:
        """See `CudaDriver.create_event`."""
        event = RecordedEvent(device, timing)
        return self._create(self._events, "create_event", device, event, timing)

    def destroy_event(self, device: int, event: int) -> None:
        """See `CudaDriver.destroy_event`."""
        self._require_home(self._events.pop(event).device, device)
        self._note("destroy_event", device, event)

    def record_event(self, event: int, stream: int, *, external: bool = False) -> None:
        """See `CudaDriver.record_event`."""
        found = self._events[event]
        if found.device != self._device_of(stream):
            raise CudaError("record_event", "CUDA_ERROR_INVALID_HANDLE")
        if external:
            if self._captures.of(stream) is None:
                raise CudaError("record_event", "CUDA_ERROR_ILLEGAL_STATE")
            self._enqueue("record_event", stream, partial(self._stamp, found), event, "external")
            return
        self._guarded("record_event", stream, event)
        self._captures.record(found, stream)
        if found.capture is None:
            self._stamp(found)

    def wait_event(self, stream: int, event: int) -> None:
        """See `CudaDriver.wait_event`."""
        self._guarded("wait_event", stream, event)
        self._captures.wait(stream, self._events[event])

    def elapsed_ms(self, device: int, begin: int, end: int) -> float:
        """See `CudaDriver.elapsed_ms`."""
        first, last = self._events[begin], self._events[end]
        self._note("elapsed_ms", device, begin, end)
        return last.reached_ms(device) - first.reached_ms(device)

    def free_bytes(self, device: int) -> int:
        """See `CudaDriver.free_bytes`."""
        self._require_retained(device)
        self._note("free_bytes", device)
        return self._gpus[device].memory_bytes - self._memory.size_bytes(device)

    def allocate(self, device: int, size_bytes: int) -> int:
        """See `CudaDriver.allocate`."""
        return self._allocate("allocate", device, size_bytes, owner=device)

    def free(self, device: int, address: int) -> None:
        """See `CudaDriver.free`."""
        self._require_home(self._memory.release(address), device)
        self._note("free", device, address)
        self._captures.require_none("free")

    def allocate_pinned(self, device: int, size_bytes: int) -> int:
        """See `CudaDriver.allocate_pinned`."""
        return self._allocate("allocate_pinned", device, size_bytes, owner=None)

    def free_pinned(self, device: int, address: int) -> None:
        """See `CudaDriver.free_pinned`."""
        self._memory.release(address)
        self._note("free_pinned", device, address)
        self._captures.require_none("free_pinned")

    def copy_to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.copy_to_device`."""
        self._copy("copy_to_device", target, source, size_bytes, stream)

    def copy_to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.copy_to_host`."""
        self._copy("copy_to_host", target, source, size_bytes, stream)

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.copy_on_device`."""
        self._copy("copy_on_device", target, source, size_bytes, stream)

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
        """See `CudaDriver.copy_peer`."""
        if not self._peer_access or target_device == source_device:
            raise CudaError("copy_peer", "CUDA_ERROR_INVALID_VALUE")
        self._copy("copy_peer", target, source, size_bytes, stream)

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.clear`."""
        self._memory.require(address, size_bytes)
        fill = partial(ctypes.memset, address, 0, size_bytes)
        self._enqueue("clear", stream, fill, address, size_bytes)

    def run(self, stream: int, name: str, compute: Callable[[], object]) -> None:
        """Enqueue what an engine computes, as a kernel would be."""
        self._enqueue("run", stream, compute, name)

    def begin_capture(self, stream: int) -> None:
        """See `CudaDriver.begin_capture`."""
        self._guarded("begin_capture", stream)
        self._captures.begin(stream)

    def end_capture(self, stream: int) -> int:
        """See `CudaDriver.end_capture`."""
        capture = self._captures.require_lead(stream)
        self._note("end_capture", self._streams[stream], stream)
        self._captures.end(capture)
        handle = next(self._handles)
        self._graphs[handle] = capture
        return handle

    def abort_capture(self, stream: int) -> None:
        """See `CudaDriver.abort_capture`."""
        self.calls.append(Call("abort_capture", self._streams[stream], (stream,)))
        capture = self._captures.of(stream)
        if capture is not None:
            self._captures.close(capture)

    def instantiate(self, device: int, graph: int) -> int:
        """See `CudaDriver.instantiate`."""
        found = self._graphs[graph]
        self._require_home(self._streams[found.lead], device)
        return self._create(self._executables, "instantiate", device, found, graph)

    def destroy_graph(self, device: int, graph: int) -> None:
        """See `CudaDriver.destroy_graph`."""
        del self._graphs[graph]
        self._note("destroy_graph", device, graph)

    def destroy_executable(self, device: int, executable: int) -> None:
        """See `CudaDriver.destroy_executable`."""
        del self._executables[executable]
        self._note("destroy_executable", device, executable)

    def launch(self, executable: int, stream: int) -> None:
        """See `CudaDriver.launch`."""
        nodes = self._executables[executable].nodes
        self._guarded("launch", stream, executable)
        for node in nodes:
            node()

    def synchronize(self, stream: int) -> None:
        """See `CudaDriver.synchronize`."""
        self._guarded("synchronize", stream)
        capture = self._captures.of(stream)
        if capture is not None:
            capture.is_valid = False
            raise CudaError("synchronize", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def is_idle(self, stream: int) -> bool:
        """See `CudaDriver.is_idle`."""
        self._guarded("is_idle", stream)
        return True

    def locate(self, address: int) -> PointerInfo:
        """See `CudaDriver.locate`."""
        self._note("locate", -1, address)
        return self._memory.locate(address)

    def _note(self, verb: str, device: int, *operands: object) -> None:
        """Note a call, or let it fail."""
        number = len(self.calls)
        self.calls.append(Call(verb, device, operands))
        if number == self.fail_at:
            self._captures.invalidate()
            raise CudaError(verb, "CUDA_ERROR_UNKNOWN", f"call {number} was made to fail")

    def _guarded(self, verb: str, stream: int, *operands: object) -> None:
        """Note a call about a stream, whose capture must be valid if there is one."""
        self._note(verb, self._device_of(stream), stream, *operands)
        self._current()
        self._captures.require_valid(verb, stream)

    def _enqueue(
        self, verb: str, stream: int, work: Callable[[], object], *operands: object
    ) -> None:
        self._guarded(verb, stream, *operands)
        if self._current() != self._device_of(stream):
            raise CudaError(verb, "CUDA_ERROR_INVALID_CONTEXT")
        if self._captures.of(stream) is None:
            work()
        else:
            self._captures.add(stream, work)

    def _copy(self, verb: str, target: int, source: int, size_bytes: int, stream: int) -> None:
        for address in (target, source):
            if verb in {"copy_peer", "copy_on_device"}:
                self._memory.require(address, size_bytes)
        work = partial(ctypes.memmove, target, source, size_bytes)
        self._enqueue(verb, stream, work, target, source, size_bytes)

    def _stamp(self, event: RecordedEvent) -> None:
        self.now_ms += 0.001
        event.time_ms = self.now_ms

    def _device_of(self, stream: int) -> int:
        """Return a stream's device; that of a default stream is the current one."""
        return self._current() if stream in _DEFAULT_STREAMS else self._streams[stream]

    def _current(self) -> int:
        if not self._stack:
            raise CudaError("cuCtxGetCurrent", "CUDA_ERROR_INVALID_CONTEXT")
        return self._stack[-1]

    def _require_retained(self, device: int) -> None:
        if not self._retained[device]:
            raise CudaError("cuCtxSetCurrent", "CUDA_ERROR_INVALID_CONTEXT")

    def _require_home(self, home: int | None, device: int) -> None:
        if home != device:
            raise CudaError("cuCtxSetCurrent", "CUDA_ERROR_INVALID_CONTEXT")

    def _create(
        self, kept: dict[int, Any], verb: str, device: int, value: Any, *operands: object
    ) -> int:
        self._require_retained(device)
        handle = next(self._handles)
        self._note(verb, device, *operands, handle)
        kept[handle] = value
        return handle

    def _allocate(self, verb: str, device: int, size_bytes: int, *, owner: int | None) -> int:
        self._require_retained(device)
        address, backing = self._memory.prepare(size_bytes)
        self._note(verb, device, size_bytes, address)
        self._captures.require_none(verb)
        self._memory.keep(address, backing, size_bytes, owner)
        return address
