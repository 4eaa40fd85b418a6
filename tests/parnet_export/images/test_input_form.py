from __future__ import annotations

import msgspec
import pytest

from parnet_export.images.input_form import IMAGENET, LETTERBOX, InputForm


@pytest.mark.parametrize(
    "bad",
    [
        {"crop": 0.0},
        {"crop": 1.1},
        {"crop": float("nan")},
        {"crop": None},
        {"padding": 114},
        {"fit": "letterbox"},
        {"fit": "letterbox", "crop": None},
        {"fit": "letterbox", "crop": None, "padding": 256},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (float("inf"), 0.0, 0.0)},
    ],
    ids=str,
)
def test_impossible_forms_are_refused(bad):
    with pytest.raises(ValueError, match=r"crop|letterbox|padding|finite"):
        InputForm(**bad)


@pytest.mark.parametrize("form", [IMAGENET, LETTERBOX, InputForm(colour_order="BGR")], ids=str)
def test_a_form_survives_json(form):
    assert msgspec.json.decode(msgspec.json.encode(form), type=InputForm) == form


def test_people_read_all_of_it():
    assert IMAGENET.description == (
        "crop 0.875, bicubic, RGB, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"
    )
    assert LETTERBOX.description == (
        "letterbox on a canvas of grey 114, bilinear, RGB, mean 0/0/0, std 1/1/1"
    )
