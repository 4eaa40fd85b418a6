"""From a picture to what a classifier takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

Interpolation = Literal["bicubic", "bilinear"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_ASPECT_RATIO = 100
"""A longer picture would become huge before its middle is cut out."""

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pictures become a classifier's input.

    The defaults are those that ParNet's authors validate with: timm's for a network that
    states none (``validate.py`` of their code).

    Parameters
    ----------
    resolution
        Height and width of the result in pixels.
    crop
        Share of the shorter side that is kept, in (0, 1].
    mean, std
        Of red, green and blue, for values between 0 and 1.
    interpolation
        How pictures are resized, with antialiasing.

    Raises
    ------
    ValueError
        When a number is out of its range; the message is a clause.
    """

    resolution: int
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"{self.resolution} is not a number of pixels")
        if not 0 < self.crop <= 1:
            raise ValueError(f"a crop of {self.crop} is not above 0 and at most 1")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError("means are finite and standard deviations above 0")

    @property
    def resized(self) -> int:
        """Pixels of the shorter side before the middle is cut out."""
        return math.floor(self.resolution / self.crop)


def preprocess(pixels: NDArray[np.uint8], settings: Preprocessing) -> NDArray[np.float32]:
    """Resize a picture, cut its middle out and normalise it.

    Parameters
    ----------
    pixels
        ``(height, width, 3)``, red, green and blue.
    settings
        How.

    Returns
    -------
    NDArray[np.float32]
        ``(3, resolution, resolution)``.

    Raises
    ------
    ValueError
        When the picture is longer than `MAX_ASPECT_RATIO` allows; the message is a clause.
    """
    height, width = pixels.shape[:2]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"is {width} x {height} pixels, too long for its middle to be a picture")
    side, short = settings.resolution, min(height, width)
    # Rounded as torchvision does it, on which the authors' code stands.
    size = tuple(settings.resized * length // short for length in (width, height))
    resized = Image.fromarray(pixels).resize(size, _RESAMPLING[settings.interpolation])
    left, top = (round((length - side) / 2) for length in size)
    middle = np.asarray(resized)[top : top + side, left : left + side]
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    normalised = (middle.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
