"""What a network takes: how pictures become its input. It belongs to the trained weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import msgspec

Fit = Literal["crop", "letterbox"]
"""``"crop"``: the shorter side is resized to the input's divided by the crop's share, and
the middle is cut out. ``"letterbox"``: the whole picture is resized into the middle of a grey
canvas."""

Interpolation = Literal["bicubic", "bilinear"]
ColourOrder = Literal["RGB", "BGR"]
Colours = tuple[float, float, float]

INPUT_FORM_KEY = "parnet.preprocessing"
"""Key of an `InputForm` as JSON in the metadata of an ONNX file."""


@dataclass(frozen=True, slots=True)
class InputForm:
    """How pictures of any size become a network's input, whose own size its tensor tells.

    The defaults are those that ParNet's authors validate with: timm's for a network that
    states none (``validate.py`` of their code).

    Parameters
    ----------
    fit
        How the picture is brought to the size of the input.
    crop
        Share of the shorter side that is kept, in (0, 1]; None for a letterbox.
    padding
        Grey of the canvas, of 255; None for a crop.
    mean, std
        Of the channels in the network's order, for values between 0 and 1.
    interpolation
        How pictures are resized: for a crop with antialiasing, for a letterbox between the
        nearest pixels alone.
    colour_order
        Order of the channels.

    Raises
    ------
    ValueError
        When a number is out of its range, or `fit` and the others contradict each other;
        the message is a clause.
    """

    fit: Fit = "crop"
    crop: float | None = 0.875
    padding: int | None = None
    mean: Colours = (0.485, 0.456, 0.406)
    std: Colours = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    colour_order: ColourOrder = "RGB"

    def __post_init__(self) -> None:
        given = (self.crop is not None, self.padding is not None)
        if given != (self.fit == "crop", self.fit == "letterbox"):
            problem = f"a {self.fit} with a crop of {self.crop} and a padding of {self.padding}"
            raise ValueError(problem)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"a crop of {self.crop} is not above 0 and at most 1")
        if self.padding is not None and not 0 <= self.padding <= 255:
            raise ValueError(f"a padding of {self.padding} is no grey from 0 to 255")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError("means are finite and standard deviations above 0")

    @property
    def description(self) -> str:
        """All of it, for people."""
        box = f"letterbox on a canvas of grey {self.padding}"
        how = box if self.crop is None else f"crop {self.crop:g}"
        mean, std = ("/".join(f"{value:g}" for value in part) for part in (self.mean, self.std))
        return f"{how}, {self.interpolation}, {self.colour_order}, mean {mean}, std {std}"


def encode_form(form: InputForm) -> str:
    """Return a form as JSON."""
    return msgspec.json.encode(form).decode()


def decode_form(text: str) -> InputForm:
    """Read a form from JSON.

    Raises
    ------
    ValueError
        When the text is no form; the message is a clause.
    """
    try:
        return msgspec.json.decode(text, type=InputForm)
    except msgspec.DecodeError as error:
        raise ValueError(f"has a damaged description of its preprocessing ({error})") from error


IMAGENET = InputForm()
"""Of ParNet's ImageNet networks."""

LETTERBOX = InputForm(
    "letterbox",
    crop=None,
    padding=114,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    interpolation="bilinear",
)
"""Of YOLOv4-CSP and YOLOR, as their authors' code shows images."""
