"""An engine that only takes time: what schedules are tried out with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parnet_engines.clock import Clock, MonotonicClock
from parnet_engines.engine import NullEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_export.stream_graph import Segment


class DelayEngine(NullEngine):
    """Takes a given time and computes nothing; other threads run meanwhile.

    Parameters
    ----------
    segment
        The segment whose interface it has.
    latency_ms
        How long every run takes.
    clock
        By which it waits; the machine's by default.
    sizes
        As for `NullEngine`.
    """

    def __init__(
        self,
        segment: Segment,
        latency_ms: float,
        *,
        clock: Clock | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(segment, sizes)
        self.latency_ms = latency_ms
        self._clock = clock or MonotonicClock()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return zeros, the same arrays every time, when the time has passed."""
        self._wait()
        return super().run(inputs)

    def bind(
        self,
        inputs: Sequence[NDArray[Any]],  # noqa: ARG002 - the protocol's signature
        outputs: Sequence[NDArray[Any]],  # noqa: ARG002
    ) -> Callable[[], None]:
        """Return what lets the time pass; the outputs stay as they are."""
        return self._wait

    def _wait(self) -> None:
        self._clock.sleep_until(self._clock.now_ns() + round(self.latency_ms * 1e6))
