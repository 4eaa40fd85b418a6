"""Draw boxes with their labels on an image."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_GOLDEN_RATIO = 0.618034
"""Steps around the colour circle by this share of it, and neighbours look different."""


def draw_boxes(
    image: NDArray[np.uint8],
    corners: NDArray[np.floating[Any]],
    labels: Sequence[str],
    classes: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """Return a copy of an image with boxes on it.

    Parameters
    ----------
    image
        ``(height, width, 3)``, RGB.
    corners
        ``(K, 4)``: left, top, right and bottom in pixels, the most important box first.
    labels
        What to write at each box.
    classes
        ``(K,)``: boxes of the same class have the same colour.

    Returns
    -------
    NDArray
        ``(height, width, 3)``, RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    height, width = image.shape[:2]
    thickness = max(1, round(min(height, width) / 250))
    font = ImageFont.load_default(max(10, round(min(height, width) / 35)))
    rows = list(zip(corners.tolist(), labels, classes.tolist(), strict=True))
    for box, label, number in reversed(rows):  # the most important box lies on top
        colour = _colour(number)
        left, top, right, bottom = box
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)), None, colour, thickness
        )
        _, _, text_width, text_height = draw.textbbox((0, 0), label, font)
        # Above the box where there is room, else below it, else inside.
        tall = text_height + 4
        x = max(0, min(left, width - text_width - 4))
        y = top - tall if top >= tall else bottom if bottom + tall <= height else top
        draw.rectangle((x, y, x + text_width + 4, y + tall), colour)
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        draw.text((x + 2, y + 2), label, (0, 0, 0) if bright else (255, 255, 255), font)
    return np.array(picture)


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
