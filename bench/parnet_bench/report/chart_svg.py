"""Pieces of SVG for the charts of a page.

Places across are percents of the chart's width, places down are pixels, so that a chart
takes any width without its letters or its lines growing. Colours come from the page's
style sheet through classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_bench.report.scale import Scale

AXIS_HEIGHT = 34


def canvas(height: float, label: str, css: str = "") -> ET.Element:
    """Return an empty chart as wide as its surroundings.

    Parameters
    ----------
    height
        In pixels.
    label
        What the chart shows, for those who do not see it; empty hides it from them.
    css
        Classes.
    """
    root = ET.Element("svg", {"class": f"chart {css}".strip(), "height": number(height)})
    if label:
        root.attrib |= {"role": "img", "aria-label": label}
    else:
        root.attrib["aria-hidden"] = "true"
    return root


def add(
    parent: ET.Element, tag: str, css: str, tip: str = "", /, **places: float | str
) -> ET.Element:
    """Append an element; numbers are pixels, texts are taken as they are.

    Parameters
    ----------
    parent, tag, css
        Where, what, and the classes that give its colour.
    tip
        What a pointer that rests on it is told.
    places
        Attributes; underscores stand for hyphens.
    """
    attributes = {
        name.replace("_", "-"): value if isinstance(value, str) else number(value)
        for name, value in places.items()
    }
    element = ET.SubElement(parent, tag, {"class": css, **attributes})
    if tip:
        ET.SubElement(element, "title").text = tip
    return element


def add_text(parent: ET.Element, text: str, css: str, **places: float | str) -> None:
    """Append a line of text."""
    add(parent, "text", css, "", **places).text = text


def add_area(
    parent: ET.Element, heights: Sequence[float], height: float, css: str, top: float = 0
) -> None:
    """Append a filled curve over the whole width.

    Parameters
    ----------
    parent
        The chart.
    heights
        Of the curve at equal distances from the left end to the right one, between 0 and 1.
    height, top
        Of the place for it, in pixels.
    css
        Classes.
    """
    inner = ET.SubElement(
        parent,
        "svg",
        {
            "y": number(top),
            "width": "100%",
            "height": number(height),
            "viewBox": f"0 0 {len(heights) - 1} 100",
            "preserveAspectRatio": "none",
        },
    )
    points = " ".join(f"{i} {number(100 - 100 * value)}" for i, value in enumerate(heights))
    add(inner, "path", css, d=f"M0 100L{points}L{len(heights) - 1} 100Z")


def add_grid(parent: ET.Element, scale: Scale, height: float) -> None:
    """Append vertical lines at the ticks of a scale."""
    for place, _ in scale.ticks():
        x = percent(place)
        add(parent, "line", "grid", x1=x, x2=x, y1=0, y2=height)


def axis(scale: Scale, unit: str) -> str:
    """Return the labels below charts that share a scale across."""
    root = canvas(AXIS_HEIGHT, "", "axis")
    for place, label in scale.ticks():
        anchor = "start" if place < 4 else "end" if place > 96 else "middle"
        add_text(root, label, "tick", x=percent(place), y=13, text_anchor=anchor)
    add_text(root, unit, "unit", x="50%", y=30, text_anchor="middle")
    return render(root)


def render(root: ET.Element) -> str:
    """Return a chart as text; equal charts give equal texts."""
    return ET.tostring(root, encoding="unicode")


def percent(value: float) -> str:
    """Return a place across, the same on every machine."""
    return f"{number(value)}%"


def number(value: float) -> str:
    """Return a number with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"
