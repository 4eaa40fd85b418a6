"""Scales of charts: from values to places between 0 and 100 percent, and round ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOG_FROM = 4.0
"""A largest value so many times the smallest takes a logarithmic scale."""

_MARGIN = 0.04
_MOST_STEPS = 7
# Multiples of powers of ten, ever fewer: the first ones that are not too many are the ticks.
_PER_DECADE: tuple[tuple[float, ...], ...] = (
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
    (1, 1.5, 2, 3, 4, 6),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to percent of a chart's width or height.

    Parameters
    ----------
    low, high
        The values at 0 and at 100 percent; `low` is below `high`, and positive on a
        logarithmic scale.
    logarithmic
        Whether equal distances stand for equal ratios.
    """

    low: float
    high: float
    logarithmic: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.logarithmic and self.low <= 0):
            raise ValueError(f"no scale from {self.low} to {self.high}")

    def place(self, value: float) -> float:
        """Return where a value lies, in percent; values beyond the ends lie on them."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return 100 * (math.log(value / self.low) / math.log(self.high / self.low))
        # A share of at most 1 first: multiplied first, rounding can lead beyond 100.
        return 100 * ((value - self.low) / (self.high - self.low))

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Return a few round values on the scale as places and labels."""
        values = self._log_ticks() if self.logarithmic else self._linear_ticks()
        return tuple((self.place(value), _label(value, values)) for value in values)

    def _linear_ticks(self) -> list[float]:
        step = _round_step((self.high - self.low) / _MOST_STEPS)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [count * step for count in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for multiples in _PER_DECADE:
            candidates = [m * 10.0**decade for decade in decades for m in multiples]
            found = [value for value in candidates if self.low <= value <= self.high]
            if len(found) <= _MOST_STEPS:
                break
        # Few round numbers lie on a scale that spans little.
        return found if len(found) > 1 else self._linear_ticks()


def scale_for(
    values: Iterable[float], *, include: Iterable[float] = (), room: float = _MARGIN
) -> Scale:
    """Return a scale on which all values lie, with some room at both ends.

    Parameters
    ----------
    values
        At least one; on the way to a logarithmic scale all must be positive.
    include
        Further values that must be on the scale, such as the 1 of ratios.
    room
        Left free at either end, as a part of what lies between the values.
    """
    inside = sorted([*values, *include])
    low, high = inside[0], inside[-1]
    if low == high:
        spread = abs(low) / 10 or 1.0  # one value lies in the middle
        return Scale(low - spread, high + spread)
    if low > 0 and high / low >= _LOG_FROM:
        factor = (high / low) ** room
        return Scale(low / factor, high * factor, logarithmic=True)
    free = room * (high - low)
    return Scale(low - free if low < 0 else max(low - free, 0.0), high + free)


def _round_step(least: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def _label(value: float, values: list[float]) -> str:
    """Return a number with as many decimals as tell all ticks apart."""
    gaps = [b - a for a, b in pairwise(values)] or [abs(value) or 1.0]
    digits = max(0, -math.floor(math.log10(min(*gaps, abs(value) or gaps[0])) + 1e-9))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
