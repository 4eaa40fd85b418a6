"""Clocks: the time, and waiting for it, so that tests need not wait.

Whatever measures or waits takes a `Clock`. `MonotonicClock` is the machine's;
`FakeClock` stands still until it is told, or asked to sleep.
"""

from __future__ import annotations

import time
from typing import Protocol

_OVERSLEEP_NS = 150_000


class Clock(Protocol):
    """Tells the time and lets it pass."""

    def now_ns(self) -> int:
        """Return nanoseconds since some fixed moment; they never decrease."""

    def sleep_until(self, deadline_ns: int) -> None:
        """Return as soon after `deadline_ns` as possible, at once if it has passed."""


class MonotonicClock:
    """The machine's monotonic clock. Other Python threads run while it sleeps."""

    def now_ns(self) -> int:
        """Return nanoseconds since the machine started."""
        return time.monotonic_ns()

    def sleep_until(self, deadline_ns: int) -> None:
        """Sleep most of the time, since sleeps end late, and look again and again at last."""
        remaining_ns = deadline_ns - time.monotonic_ns()
        if remaining_ns > _OVERSLEEP_NS:
            time.sleep((remaining_ns - _OVERSLEEP_NS) / 1e9)
        while time.monotonic_ns() < deadline_ns:
            time.sleep(0)  # lets other threads have the interpreter


class FakeClock:
    """A clock in which time passes only by sleeping.

    Parameters
    ----------
    start_ns
        What it shows at first.

    Notes
    -----
    Made for one thread at a time: threads that sleep side by side add up.
    """

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """Return what the sleeps so far add up to."""
        return self._now_ns

    def sleep_until(self, deadline_ns: int) -> None:
        """Show `deadline_ns` from now on, unless it has passed."""
        self._now_ns = max(self._now_ns, deadline_ns)

    def advance_ms(self, milliseconds: float) -> None:
        """Let time pass."""
        self._now_ns += round(milliseconds * 1e6)
