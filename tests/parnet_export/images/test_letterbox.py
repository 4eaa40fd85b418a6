from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.images.input_form import IMAGENET, LETTERBOX
from parnet_export.images.letterbox import Letterbox

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


def bilinear(image, width, height):
    """Between the four nearest pixels, half-pixel centres, borders repeated."""

    def weights(size, target):
        place = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, size - 1), place - low

    top, bottom, down = weights(image.shape[0], height)
    left, right, across = weights(image.shape[1], width)
    pixels = image.astype(np.float64)
    across = across[None, :, None]
    upper = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across
    lower = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    return upper * (1 - down[:, None, None]) + lower * down[:, None, None]


@pytest.mark.parametrize(
    ("size", "place"),
    [
        ((640, 480), (640, 480, 0, 80)),
        ((1920, 1080), (640, 360, 0, 140)),
        ((480, 640), (480, 640, 80, 0)),
        ((320, 320), (640, 640, 0, 0)),
        ((501, 375), (640, 479, 0, 80)),  # 161 lines of padding: 80 above, 81 below
        ((10_000, 1), (640, 1, 0, 319)),
    ],
)
def test_images_are_centred_as_the_authors_do_it(size, place):
    box = Letterbox.fit(size, (640, 640))
    assert (box.width, box.height, box.left, box.top) == place


@settings(max_examples=30, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99))
def test_pixels_are_interpolated_between_four(size, seed):
    image = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    box = Letterbox.fit(size, (96, 64))
    planes = box.apply(image)
    assert planes.shape == (1, 3, 64, 96)
    assert planes.dtype == np.float32
    pixels = planes[0].transpose(1, 2, 0) * 255
    inside = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    assert np.abs(inside - bilinear(image, box.width, box.height)).max() <= 1.01
    pixels[box.top : box.top + box.height, box.left : box.left + box.width] = 114
    assert np.allclose(pixels, 114)


@settings(max_examples=50, deadline=None)
@given(size=SIZES, canvas=SIZES)
def test_boxes_come_back_to_where_they_were(size, canvas):
    box = Letterbox.fit(size, canvas)
    assert box.width <= canvas[0]
    assert box.height <= canvas[1]
    whole = np.array([[box.left, box.top, box.left + box.width, box.top + box.height]], np.float32)
    assert np.allclose(box.to_image(whole), [[0, 0, *size]], atol=1e-3)
    beyond = np.array([[-1e4, -1e4, 1e4, 1e4]], np.float32)
    assert box.to_image(beyond).tolist() == [[0, 0, *size]]


def test_channels_keep_their_order():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:] = (255, 51, 0)
    planes = Letterbox.fit((4, 4), (8, 8)).apply(image)
    assert planes[0, :, 3, 3].tolist() == pytest.approx([1, 0.2, 0])


def test_a_network_may_want_another_canvas_and_other_channels():
    image = np.zeros((2, 4, 3), np.uint8)
    image[:] = (255, 51, 0)
    form = replace(
        LETTERBOX, padding=0, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 2.0), colour_order="BGR"
    )
    planes = Letterbox.fit((4, 2), (8, 8)).apply(image, form)
    assert planes[0, :, 3, 3].tolist() == pytest.approx([-1, 0.2, 0.5])
    assert planes[0, :, 0, 0].tolist() == pytest.approx([-1, 0, 0])
    with pytest.raises(ValueError, match="is prepared as a crop"):
        Letterbox.fit((4, 2), (8, 8)).apply(image, IMAGENET)
