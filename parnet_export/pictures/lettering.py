"""How much room text takes in a picture whose reader brings the fonts.

Widths are those of DejaVu Sans, one of the widest fonts in common use, so that what fits
by this estimate fits with any usual font.
"""

from __future__ import annotations

import math
from typing import Literal

Style = Literal["title", "name", "text"]

SIZES: dict[Style, int] = {"title": 18, "name": 13, "text": 11}
"""Font size of each style, in SVG user units; titles and names are bold."""

_EM_BY_LETTER = {
    letter: em
    for letters, em in (
        ("'Iijl", 0.30),
        (" !(),-./:;[]\\frt|", 0.41),
        ("ABCDEFGHJKLNOPQRSTUVXYZ", 0.76),
        ("#&+<=>^w~", 0.84),
        ("%@MWm", 1.00),
    )
    for letter in letters
}
_EM_OF_OTHER_ASCII = 0.64
_EM_OF_FOREIGN = 1.05
_BOLD = 1.15
_ELLIPSIS = "..."


def text_width(text: str, style: Style = "text") -> float:
    """Return the room that one line of text needs, in SVG user units."""
    em = sum(
        _EM_BY_LETTER.get(letter, _EM_OF_OTHER_ASCII if letter.isascii() else _EM_OF_FOREIGN)
        for letter in text
    )
    return math.ceil(em * SIZES[style] * (1.0 if style == "text" else _BOLD))


def shorten(text: str, room: float, style: Style = "text") -> str:
    """Return `text`, or as much of it as fits into `room` with an ellipsis."""
    if text_width(text, style) <= room:
        return text
    while text and text_width(text + _ELLIPSIS, style) > room:
        text = text[:-1]
    return text + _ELLIPSIS
