from __future__ import annotations

from dataclasses import replace

import pytest

from parnet_export.errors import InputError
from parnet_export.images.input_form import IMAGENET, LETTERBOX, InputForm
from parnet_export.images.input_options import InputOptions


@pytest.mark.parametrize("form", [None, IMAGENET, LETTERBOX], ids=str)
def test_without_options_nothing_changes(form):
    assert InputOptions().given == ()
    assert InputOptions().note_on(form) is form


def test_options_replace_what_they_name_and_nothing_else():
    form = InputForm(crop=0.5, mean=(0.1, 0.2, 0.3), colour_order="BGR")
    options = InputOptions(std="2", interpolation="bilinear")
    assert options.given == ("--std", "--interpolation")
    assert not options.is_complete
    expected = replace(form, std=(2.0, 2.0, 2.0), interpolation="bilinear")
    assert options.override(form) == expected
    everything = InputOptions(1.0, "0.1,0.2,0.3", "1,2,3", "bicubic", "BGR")
    assert everything.is_complete
    assert everything.note_on(None) == InputForm(
        "crop", 1.0, None, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bicubic", "BGR"
    )


def test_a_detector_keeps_its_letterbox():
    shifted = InputOptions(mean="0.5", std="0.5").override(LETTERBOX)
    assert shifted == replace(LETTERBOX, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(InputError, match=r"--crop: .*letterbox"):
        InputOptions(crop=0.9).override(LETTERBOX)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (InputOptions(mean="a,b,c"), "--mean: 'a,b,c' is neither a number nor three"),
        (InputOptions(std="1,2"), "--std: '1,2' is neither"),
        (InputOptions(std="0"), "standard deviations above 0. Check --std"),
        (InputOptions(crop=2.0), "a crop of 2.0 is not above 0 and at most 1. Check --crop"),
        (InputOptions(mean="nan"), "means are finite"),
    ],
    ids=str,
)
def test_options_without_sense_are_named(options, message):
    with pytest.raises(InputError) as caught:
        options.note_on(None)
    assert message in str(caught.value)


def test_it_is_said_who_says_how_pictures_are_prepared():
    form = InputForm(crop=1.0)
    assert InputOptions().choose(form, IMAGENET, "ImageNet's") == (form, "as the bundle states")
    assert InputOptions().choose(None, IMAGENET, "ImageNet's") == (
        IMAGENET,
        "ImageNet's, as the bundle states none",
    )
    options = InputOptions(std="1", colour_order="BGR")
    found, source = options.choose(form, IMAGENET, "ImageNet's")
    assert found == replace(form, std=(1.0,) * 3, colour_order="BGR")
    assert source == "as the bundle states, but for --std, --colour-order"
