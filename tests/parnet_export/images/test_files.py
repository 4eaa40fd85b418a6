from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pytest
from PIL import Image

from parnet_export.errors import InputError
from parnet_export.images.files import load_image

# Orientation tag: how the stored picture must be changed to be seen as meant (EXIF 2.3, 4.6.4).
AS_MEANT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def _random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_a_lossless_picture_comes_back_as_it_was(tmp_path, suffix):
    pixels = _random_pixels(5, 7, 3)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    loaded = load_image(path)
    assert loaded.dtype == np.uint8
    assert np.array_equal(loaded, pixels)


@pytest.mark.parametrize("orientation", AS_MEANT)
def test_a_picture_is_turned_as_its_orientation_says(tmp_path, orientation):
    pixels = _random_pixels(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path, exif=exif)
    assert np.array_equal(load_image(path), AS_MEANT[orientation](pixels))


def test_grey_palette_and_transparent_pictures_become_three_channels(tmp_path):
    path = tmp_path / "a.png"
    grey = _random_pixels(4, 5)
    Image.fromarray(grey).save(path)
    assert np.array_equal(load_image(path), np.stack([grey] * 3, 2))
    clear = _random_pixels(4, 5, 4)
    Image.fromarray(clear, "RGBA").save(path)
    assert np.array_equal(load_image(path), clear[:, :, :3])
    palette = Image.fromarray(grey % 3, "P")
    palette.putpalette([9, 8, 7, 90, 80, 70, 200, 201, 202])
    palette.save(path)
    colours = np.array([[9, 8, 7], [90, 80, 70], [200, 201, 202]], np.uint8)
    assert np.array_equal(load_image(path), colours[grey % 3])


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    path = tmp_path / "a.png"
    wide = np.array([[0, 255, 256], [30000, 65280, 65535]], np.uint16)
    Image.fromarray(wide).save(path)
    assert np.array_equal(load_image(path)[:, :, 0], [[0, 0, 1], [117, 255, 255]])


def test_a_picture_of_floats_is_refused(tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.ones((3, 3), np.float32)).save(path)
    with pytest.raises(InputError, match=r"a\.tiff: has 32 bits per pixel"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"", "is no picture"), (b"hello", "is no picture")],
)
def test_what_is_no_picture_is_named(tmp_path, content, problem):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"a\\.jpg: {problem}"):
        load_image(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path)


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(_random_pixels(20, 20, 3)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="too many pixels"):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_no_damage_ends_in_anything_but_an_error_for_people(tmp_path, kind):
    stream = io.BytesIO()
    Image.fromarray(_random_pixels(16, 16, 3)).save(stream, kind)
    intact = stream.getvalue()
    path = tmp_path / "a"
    path.write_bytes(intact[: len(intact) // 2])
    if kind != "GIF":  # a GIF that breaks off shows what is there
        with pytest.raises(InputError, match=r"damaged|no picture"):
            load_image(path)
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(intact)
        for _ in range(3):
            damaged[rng.randrange(min(len(intact), 400))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):  # some damage leaves a picture
            assert load_image(path).shape[2] == 3
