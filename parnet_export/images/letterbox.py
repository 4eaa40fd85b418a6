"""Letterboxing: an image of any size on a canvas of the network's, with its proportions kept.

Source: the preprocessing of ScaledYOLOv4 and YOLOR in their code. The image is resized by
bilinear interpolation between the four nearest pixels, also where it shrinks, and centred on
a canvas of grey 114; then RGB in [0, 1]. An `InputForm` may say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from parnet_export.images.input_form import LETTERBOX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from parnet_export.images.input_form import InputForm


@dataclass(frozen=True, slots=True)
class Letterbox:
    """Where an image lies on a canvas; all lengths in pixels.

    Parameters
    ----------
    image_width, image_height
        Of the image.
    canvas_width, canvas_height
        Of the network's input.
    width, height
        Of the resized image.
    left, top
        Its upper left corner on the canvas.
    """

    image_width: int
    image_height: int
    canvas_width: int
    canvas_height: int
    width: int
    height: int
    left: int
    top: int

    @classmethod
    def fit(cls, image_size: tuple[int, int], canvas_size: tuple[int, int]) -> Self:
        """Place an image of one size on a canvas of another one, widths first."""
        scale = min(canvas_size[0] / image_size[0], canvas_size[1] / image_size[1])
        # A line of a single pixel must not vanish.
        width, height = (max(1, round(size * scale)) for size in image_size)
        # Of an odd number of padded lines, the right and the bottom get one more.
        left, top = (canvas_size[0] - width) // 2, (canvas_size[1] - height) // 2
        return cls(*image_size, *canvas_size, width, height, left, top)

    def apply(self, image: NDArray[np.uint8], form: InputForm = LETTERBOX) -> NDArray[np.float32]:
        """Return the network's input.

        Parameters
        ----------
        image
            ``(image_height, image_width, 3)``, RGB.
        form
            Of the fit ``"letterbox"``: the canvas's grey, and the network's channels.

        Returns
        -------
        NDArray
            ``(1, 3, canvas_height, canvas_width)``, float32; by default RGB in [0, 1].

        Raises
        ------
        ValueError
            When `form` is of another fit; the message is a clause.
        """
        from PIL import Image

        from parnet_export.images.preprocessing import RESAMPLING, normalise

        if form.padding is None:
            raise ValueError(f"is prepared as a {form.fit}, which gives no letterbox")

        # Pillow's own resizing averages over more pixels where an image shrinks; its affine
        # transformation interpolates between the nearest, as the authors' preprocessing does.
        across, down = self.image_width / self.width, self.image_height / self.height
        resized = Image.fromarray(image).transform(
            (self.width, self.height),
            Image.Transform.AFFINE,
            (across, 0, 0, 0, down, 0),
            resample=RESAMPLING[form.interpolation],
        )
        canvas = np.full((self.canvas_height, self.canvas_width, 3), form.padding, np.uint8)
        rows = slice(self.top, self.top + self.height)
        columns = slice(self.left, self.left + self.width)
        canvas[rows, columns] = np.asarray(resized)
        return normalise(canvas, form)[None]

    def to_image(self, corners: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Bring boxes on the canvas to the image, cut off at its border.

        Parameters
        ----------
        corners
            ``(K, 4)``: left, top, right and bottom in pixels of the canvas.

        Returns
        -------
        NDArray
            ``(K, 4)``: the same in pixels of the image.
        """
        offset = np.array([self.left, self.top] * 2)
        scale = np.array([self.image_width / self.width, self.image_height / self.height] * 2)
        size = np.array([self.image_width, self.image_height] * 2, np.float64)
        placed: NDArray[np.float64] = (corners.astype(np.float64) - offset) * scale
        return placed.clip(0, size)
