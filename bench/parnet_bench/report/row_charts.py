"""Charts of which every row has its own strip: distributions, ratios, rounds.

Strips of one chart share a scale across; the page puts the row's name beside each, and
the axis below the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.report import chart_svg as svg
from parnet_bench.report.scale import Scale, scale_for
from parnet_export.console import format_ms, format_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parnet_bench.stats.statistics import Interval

DISTRIBUTION_HEIGHT = 54
RATIO_HEIGHT = 30
ROUNDS_HEIGHT = 40

_CURVE_POINTS = 161
_MOST_DASHES = 160
_SHOWN_PERCENT = 99.0  # of the slowest row; what lies beyond is counted
_CURVE_HEIGHT = 42
_DOT_WIDTH = 4.0  # of a ratio, in percent of a phone's width
_LEAST_DEVIATION = 0.02  # at either end of a strip, or noise would look large


def latency_scale(rows_ms: Sequence[npt.NDArray[np.float64]]) -> Scale:
    """Return the scale of latencies of all rows, without the slowest percent of each."""
    lows = [float(samples.min()) for samples in rows_ms]
    highs = [float(np.percentile(samples, _SHOWN_PERCENT)) for samples in rows_ms]
    return scale_for([*lows, *highs])


def distribution_strip(
    samples_ms: npt.NDArray[np.float64],
    interval: Interval | None,
    scale: Scale,
    name: str,
    css: str,
) -> str:
    """Return how often a row took how long: a density, its median, and samples as dashes.

    Parameters
    ----------
    samples_ms
        Latencies in milliseconds, shape ``(n,)``.
    interval
        Of the median.
    scale
        Of latencies.
    name, css
        The row's name, and the class of its colour.
    """
    median_ms = float(np.median(samples_ms))
    label = f"{name}: latencies around {format_ms(median_ms)}"
    root = svg.canvas(DISTRIBUTION_HEIGHT, label, css)
    svg.add_grid(root, scale, DISTRIBUTION_HEIGHT)
    svg.add_area(root, _density(samples_ms, scale), _CURVE_HEIGHT, "density")
    ordered = np.sort(samples_ms)
    kept = np.linspace(0, len(ordered) - 1, min(len(ordered), _MOST_DASHES)).round().astype(int)
    for value in ordered[kept]:
        if scale.low <= value <= scale.high:
            x = svg.percent(scale.place(float(value)))
            svg.add(root, "line", "dash", x1=x, x2=x, y1=_CURVE_HEIGHT + 3, y2=_CURVE_HEIGHT + 9)
    if interval is not None:
        low, high = scale.place(interval.low), scale.place(interval.high)
        hint = f"interval of the median: {format_ms(interval.low)} to {format_ms(interval.high)}"
        places = {"x": svg.percent(low), "width": svg.percent(max(high - low, 0.2))}
        svg.add(root, "rect", "interval", hint, **places, y=0, height=_CURVE_HEIGHT)
    x = svg.percent(scale.place(median_ms))
    hint = f"median {format_ms(median_ms)}"
    svg.add(root, "line", "median", hint, x1=x, x2=x, y1=0, y2=_CURVE_HEIGHT + 10)
    return svg.render(root)


def beyond(samples_ms: npt.NDArray[np.float64], scale: Scale) -> int:
    """Return how many samples are slower than the scale shows."""
    return int((samples_ms > scale.high).sum())


def ratio_scale(ratios: Sequence[float], intervals: Sequence[Interval | None]) -> Scale:
    """Return the scale of ratios and their intervals, with 1 on it."""
    ends = [end for interval in intervals if interval for end in (interval.low, interval.high)]
    return scale_for([*ratios, *ends], include=[1.0])


def ratio_strip(
    ratio: float, interval: Interval | None, scale: Scale, name: str, *, is_reference: bool = False
) -> str:
    """Return a ratio as a dot with its interval as a line, and where 1 is."""
    verdict = "" if is_reference else verdict_of(interval)
    root = svg.canvas(RATIO_HEIGHT, f"{name}: {format_ratio(ratio)}", verdict)
    svg.add_grid(root, scale, RATIO_HEIGHT)
    one, middle = svg.percent(scale.place(1.0)), RATIO_HEIGHT / 2
    svg.add(root, "line", "one", x1=one, x2=one, y1=0, y2=RATIO_HEIGHT)
    if interval is not None:
        places = [scale.place(end) for end in (interval.low, interval.high)]
        low, high = map(svg.percent, places)
        svg.add(root, "line", "range", x1=low, x2=high, y1=middle, y2=middle)
        if places[1] - places[0] > _DOT_WIDTH:  # behind the dot they would look like a cross
            for end in (low, high):
                svg.add(root, "line", "range", x1=end, x2=end, y1=middle - 6, y2=middle + 6)
    x = svg.percent(scale.place(ratio))
    if is_reference:
        svg.add(root, "circle", "dot hollow", cx=x, cy=middle, r=5)
    else:
        svg.add(root, "circle", "dot", format_ratio(ratio), cx=x, cy=middle, r=5.5)
    return svg.render(root)


def verdict_of(interval: Interval | None) -> str:
    """Return ``"faster"`` or ``"slower"`` where an interval excludes 1, else ``"unclear"``."""
    if interval is None or interval.contains(1.0):
        return "unclear"
    return "faster" if interval.low > 1 else "slower"


def rounds_strip(
    medians_ms: Sequence[float], first_of_process: Sequence[int], name: str
) -> tuple[str, float]:
    """Return each round's median against the median of all rounds, in the order of time.

    Parameters
    ----------
    medians_ms
        Of each round.
    first_of_process
        Indices of the rounds with which a new process began, the first one left out.
    name
        The row's name.

    Returns
    -------
    svg, limit
        The strip, and the relative deviation at its upper and lower ends.
    """
    center = float(np.median(medians_ms))
    deviations = [value / center - 1 for value in medians_ms]
    limit = max(_LEAST_DEVIATION, *map(abs, deviations))
    scale = Scale(-limit, limit)
    root = svg.canvas(ROUNDS_HEIGHT, f"{name}: medians of its rounds, in the order of time")
    middle = ROUNDS_HEIGHT / 2
    svg.add(root, "line", "grid", x1="0%", x2="100%", y1=middle, y2=middle)
    for index in first_of_process:
        x = svg.percent(100 * index / len(deviations))
        svg.add(root, "line", "process", x1=x, x2=x, y1=0, y2=ROUNDS_HEIGHT)
    for index, (deviation, median_ms) in enumerate(zip(deviations, medians_ms, strict=True)):
        hint = f"round {index + 1}: {format_ms(median_ms)}"
        y = 4 + (ROUNDS_HEIGHT - 8) * (1 - scale.place(deviation) / 100)
        x = svg.percent(100 * (index + 0.5) / len(deviations))
        svg.add(root, "circle", "round", hint, cx=x, cy=y, r=2.5)
    return svg.render(root), limit


def _density(samples_ms: npt.NDArray[np.float64], scale: Scale) -> list[float]:
    """Return a Gaussian kernel density at equal distances of the scale; 1 at its highest.

    The kernel is half as wide as Silverman's rule of thumb has it (*Density Estimation*,
    1986, equation 3.31), which is made for one mode: latencies often have two.
    """
    places = np.array([scale.place(float(value)) for value in samples_ms if value <= scale.high])
    quartiles = np.percentile(places, [25, 75])
    spreads = [float(places.std()), float(quartiles[1] - quartiles[0]) / 1.34]
    spread = min([value for value in spreads if value > 0], default=0.0)
    width = max(0.45 * spread * len(places) ** -0.2, 0.4)
    edges = np.linspace(0, 100, _CURVE_POINTS)
    counts, _ = np.histogram(places, bins=np.linspace(0, 100, 1001))
    centers = np.linspace(0.05, 99.95, 1000)
    kernels = np.exp(-0.5 * ((edges[:, None] - centers[None, :]) / width) ** 2)
    heights = kernels @ counts
    return [float(value) for value in heights / heights.max()]
