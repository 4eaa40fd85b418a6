from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from parnet_export.images.input_form import IMAGENET, LETTERBOX, InputForm
from parnet_export.images.preprocessing import MAX_ASPECT_RATIO, preprocess, resized_side

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _reference(pixels, side, crop, mean, std, mode, first):
    """The authors' validation transform written with torch, in floating point."""
    height, width = pixels.shape[:2]
    target = int(side / crop)
    if height < width:
        size = (target, int(target * width / height))
    else:
        size = (int(target * height / width), target)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    # Pictures hold whole numbers from 0 to 255, also between the two passes of a resize.
    for step in ((height, size[1]) if first == "width" else (size[0], width), size):
        image = functional.interpolate(image, size=step, mode=mode, antialias=True)
        image = image.round().clamp(0, 255)
    top, left = round((size[0] - side) / 2.0), round((size[1] - side) / 2.0)
    cut = image[0, :, top : top + side, left : left + side] / 255
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return ((cut - mean) / std).numpy()


@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (400, 300), (256, 256), (37, 50), (31, 90), (1000, 333)]
)
@pytest.mark.parametrize(
    ("side", "crop", "mode"),
    [(224, 0.875, "bicubic"), (32, 0.875, "bicubic"), (33, 1.0, "bilinear"), (320, 0.9, "bicubic")],
)
def test_pictures_become_what_the_authors_validate_with(height, width, side, crop, mode):
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    pixels = coarse.repeat(1 + height // 7, 0).repeat(1 + width // 9, 1)[:height, :width]
    found = preprocess(pixels, InputForm(crop=crop, interpolation=mode), side)
    assert (found.shape, found.dtype) == ((3, side, side), np.float32)
    # Pillow chooses which side it resizes first by what is quicker.
    difference = min(
        (
            abs(found - _reference(pixels, side, crop, MEAN, STD, mode, first))
            for first in ("width", "height")
        ),
        key=np.max,
    )
    # Where a value lies between two whole numbers, rounding may go either way.
    assert difference.max() <= 1.01 / 255 / min(STD)
    assert difference.mean() <= 0.02 / 255 / min(STD)


def test_the_size_before_the_crop_is_the_usual_one():
    assert resized_side(IMAGENET, 224) == 256
    assert resized_side(IMAGENET, 320) == 365
    assert resized_side(InputForm(crop=1), 32) == 32
    with pytest.raises(ValueError, match="prepared as a letterbox"):
        resized_side(LETTERBOX, 32)


def test_each_colour_has_its_own_statistics():
    pixels = np.full((40, 40, 3), (10, 100, 200), np.uint8)
    form = InputForm(crop=1.0, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    expected = [(10 / 255 - 0.1) / 0.5, 100 / 255 - 0.2, (200 / 255 - 0.3) / 2]
    assert np.allclose(preprocess(pixels, form, 8), np.array(expected)[:, None, None], atol=1e-6)
    blue_first = replace(form, colour_order="BGR")
    expected = [(200 / 255 - 0.1) / 0.5, 100 / 255 - 0.2, (10 / 255 - 0.3) / 2]
    found = preprocess(pixels, blue_first, 8)
    assert np.allclose(found, np.array(expected)[:, None, None], atol=1e-6)


def test_digits_are_prepared_as_they_were_for_training():
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    image = torch.from_numpy(grey).float()[None, None] / 255
    enlarged = functional.interpolate(image, size=(32, 32), mode="bilinear", align_corners=False)
    expected = ((enlarged - 0.305) / 0.324).repeat(1, 3, 1, 1)[0].numpy()
    form = InputForm(crop=1, mean=(0.305,) * 3, std=(0.324,) * 3, interpolation="bilinear")
    found = preprocess(np.stack([grey] * 3, 2), form, 32)
    assert abs(found - expected).max() <= 1.01 / 255 / 0.324


def test_a_picture_that_is_all_length_is_refused():
    longest = np.zeros((2, 2 * MAX_ASPECT_RATIO, 3), np.uint8)
    assert preprocess(longest, IMAGENET, 8).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="is 201 x 2 pixels, too long"):
        preprocess(np.zeros((2, 201, 3), np.uint8), IMAGENET, 8)
