from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from parnet_export.images.input_form import IMAGENET, LETTERBOX, InputForm
from parnet_export.images.timm_arguments import picture_arguments, stated_form

GIVEN = {"mean": [0.1, 0.2, 0.3], "std": (0.5,), "crop_pct": 0.95, "interpolation": "bilinear"}


@pytest.mark.parametrize("kind", [dict, lambda values: argparse.Namespace(**values)])
def test_arguments_that_were_given_are_taken(kind):
    content = {"args": kind({**GIVEN, "lr": 0.1, "model": "net"})}
    expected = InputForm(
        crop=0.95, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), interpolation="bilinear"
    )
    found = picture_arguments(content)
    assert set(found) == {"args.mean", "args.std", "args.crop_pct", "args.interpolation"}
    assert stated_form(found, IMAGENET) == expected


def test_what_arguments_leave_open_is_the_default():
    content = {"args": {"mean": None, "std": None, "crop_pct": 1, "interpolation": ""}}
    assert stated_form(picture_arguments(content), IMAGENET) == replace(IMAGENET, crop=1)
    detector = {"args": {"std": [0.5]}}
    form = stated_form(picture_arguments(detector), LETTERBOX)
    assert form == replace(LETTERBOX, std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        3,
        {},
        {"mean": None, "std": None, "crop_pct": None, "interpolation": ""},
        {"mean": [1, 2], "std": "wide", "crop_pct": "most", "interpolation": "random"},
        {"std": [0.0]},
        {"crop_pct": 7},
        pytest.param({"mean": [object()]}, id="mean of an object"),
    ],
    ids=str,
)
def test_without_sense_nothing_is_stated(arguments):
    found = picture_arguments({"args": arguments, "epoch": 1})
    assert stated_form(found, IMAGENET) is None


@pytest.mark.parametrize("text", ["{", "[[1]]", "null", "true", "[" * 5000, '"x"', "NaN", "[1,2]"])
def test_metadata_that_somebody_else_wrote_is_no_argument(text):
    names = ("args.mean", "args.std", "args.crop_pct", "args.interpolation")
    assert stated_form(dict.fromkeys(names, text), IMAGENET) is None
