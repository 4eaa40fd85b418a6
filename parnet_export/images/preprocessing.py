"""From a picture to what a classifier takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from parnet_export.images.input_form import InputForm

MAX_ASPECT_RATIO = 100
"""A longer picture would become huge before its middle is cut out."""

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
"""Pillow's names of interpolations."""


def resized_side(form: InputForm, side: int) -> int:
    """Return the pixels of the shorter side before the middle of `side` pixels is cut out."""
    if form.crop is None:
        raise ValueError(f"is prepared as a {form.fit}, of which nothing is cut out")
    return math.floor(side / form.crop)


def preprocess(pixels: NDArray[np.uint8], form: InputForm, side: int) -> NDArray[np.float32]:
    """Resize a picture, cut its middle out and normalise it.

    Parameters
    ----------
    pixels
        ``(height, width, 3)``, red, green and blue.
    form
        How; of the fit ``"crop"``.
    side
        Height and width of the result in pixels.

    Returns
    -------
    NDArray[np.float32]
        ``(3, side, side)``.

    Raises
    ------
    ValueError
        When the picture is longer than `MAX_ASPECT_RATIO` allows, or `form` is of another
        fit; the message is a clause.
    """
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"is {width} x {height} pixels, too long for its middle to be a picture")
    target, short = resized_side(form, side), min(height, width)
    # Rounded as torchvision does it, on which the authors' code stands.
    size = tuple(target * length // short for length in (width, height))
    resized = Image.fromarray(pixels).resize(size, RESAMPLING[form.interpolation])
    left, top = (round((length - side) / 2) for length in size)
    return normalise(np.asarray(resized)[top : top + side, left : left + side], form)


def normalise(pixels: NDArray[np.uint8], form: InputForm) -> NDArray[np.float32]:
    """Bring red, green and blue ``(H, W, 3)`` to the network's channels ``(3, H, W)``."""
    ordered = pixels if form.colour_order == "RGB" else pixels[:, :, ::-1]
    mean, std = np.array(form.mean, np.float32), np.array(form.std, np.float32)
    normalised = (ordered.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
