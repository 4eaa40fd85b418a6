"""What a capture makes of calls, and when CUDA refuses it: for a driver without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parnet_engines.cuda.driver import CudaError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(slots=True, eq=False)
class RecordedCapture:
    """A graph in the making; streams know which of its nodes precede what they do next."""

    lead: int
    nodes: list[Callable[[], object]] = field(default_factory=list)
    before: dict[int, set[int]] = field(default_factory=dict)
    is_valid: bool = True


@dataclass(slots=True, eq=False)
class RecordedEvent:
    """An event: where it was recorded last, and when."""

    device: int
    is_timed: bool = True
    capture: RecordedCapture | None = None
    before: set[int] = field(default_factory=set)
    time_ms: float | None = None

    def reached_ms(self, device: int) -> float:
        """Return when it was reached, as far as CUDA would tell: outside captures, if timed."""
        if self.capture is not None:
            raise CudaError("elapsed_ms", "CUDA_ERROR_CAPTURED_EVENT")
        if self.time_ms is None or self.device != device or not self.is_timed:
            raise CudaError("elapsed_ms", "CUDA_ERROR_INVALID_HANDLE")
        return self.time_ms


class OpenCaptures:
    """The captures that are open, by the streams that take part.

    Parameters
    ----------
    may_join
        Whether a stream may take part in a capture that another one leads.
    """

    def __init__(self, may_join: Callable[[int, int], bool]) -> None:
        self._may_join = may_join
        self._by_stream: dict[int, RecordedCapture] = {}

    def __len__(self) -> int:
        return len(set(self._by_stream.values()))

    def of(self, stream: int) -> RecordedCapture | None:
        """Return the capture that a stream takes part in."""
        return self._by_stream.get(stream)

    def invalidate(self) -> None:
        """Let nothing come of any of them."""
        for capture in self._by_stream.values():
            capture.is_valid = False

    def require_none(self, verb: str) -> None:
        """Refuse what a thread may not do while it captures, which spoils what it captures."""
        if self._by_stream:
            self.invalidate()
            raise CudaError(verb, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def require_valid(self, verb: str, stream: int) -> None:
        """Refuse a call about a stream whose capture has been refused something before."""
        capture = self.of(stream)
        if capture is not None and not capture.is_valid:
            raise CudaError(verb, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")

    def begin(self, stream: int) -> None:
        """Open a capture on a stream."""
        if stream in self._by_stream:
            raise CudaError("begin_capture", "CUDA_ERROR_ILLEGAL_STATE")
        self._by_stream[stream] = RecordedCapture(stream, before={stream: set()})

    def add(self, stream: int, node: Callable[[], object]) -> None:
        """Add a node at the end of what a captured stream has been given."""
        capture = self._by_stream[stream]
        capture.before[stream].add(len(capture.nodes))
        capture.nodes.append(node)

    def record(self, event: RecordedEvent, stream: int) -> None:
        """Note in an event what precedes it."""
        capture = self.of(stream)
        event.capture = capture
        event.before = set(capture.before[stream]) if capture else set()

    def wait(self, stream: int, event: RecordedEvent) -> None:
        """Order a stream after an event, and let it join the event's capture."""
        awaited, own = event.capture, self.of(stream)
        if awaited is None and own is None:
            return
        if awaited is None or self.of(awaited.lead) is not awaited:
            if own is None:
                raise CudaError("wait_event", "CUDA_ERROR_CAPTURED_EVENT")
            own.is_valid = False
            raise CudaError("wait_event", "CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
        if own is None:
            self._join(stream, awaited)
        elif own is not awaited:
            own.is_valid = awaited.is_valid = False
            raise CudaError("wait_event", "CUDA_ERROR_STREAM_CAPTURE_MERGE")
        awaited.before[stream] |= event.before

    def require_lead(self, stream: int) -> RecordedCapture:
        """Return the capture that a stream leads."""
        capture = self.of(stream)
        if capture is None or capture.lead != stream:
            raise CudaError("end_capture", "CUDA_ERROR_ILLEGAL_STATE")
        return capture

    def end(self, capture: RecordedCapture) -> None:
        """Close a capture, of which a graph can be made."""
        self.close(capture)
        if not capture.is_valid:
            raise CudaError("end_capture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        if not set().union(*capture.before.values()) <= capture.before[capture.lead]:
            raise CudaError("end_capture", "CUDA_ERROR_STREAM_CAPTURE_UNJOINED")

    def close(self, capture: RecordedCapture) -> None:
        """Close a capture, whatever becomes of it."""
        for stream in [s for s, found in self._by_stream.items() if found is capture]:
            del self._by_stream[stream]

    def _join(self, stream: int, capture: RecordedCapture) -> None:
        if not self._may_join(stream, capture.lead):
            capture.is_valid = False
            raise CudaError("wait_event", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self._by_stream[stream] = capture
        capture.before.setdefault(stream, set())
