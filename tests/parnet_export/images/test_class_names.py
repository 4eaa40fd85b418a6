from __future__ import annotations

import pytest

from parnet_export.errors import InputError
from parnet_export.images.class_names import COCO_NAMES, imagenet_names, read_names, usual_names


def test_imagenet_has_its_classes_in_their_order():
    names = imagenet_names()
    assert (len(names), len(set(names))) == (1000, 1000)
    spots = {
        0: "tench",
        1: "goldfish",
        134: "crane (bird)",
        207: "golden retriever",
        281: "tabby",
        407: "ambulance",
        517: "crane (machine)",
        639: "tank suit",
        817: "sports car",
        954: "banana",
        999: "toilet tissue",
    }
    assert {number: names[number] for number in spots} == spots
    assert all(name == name.strip() and name.isascii() and name for name in names)


def test_wordnets_notice_comes_with_the_names(root):
    text = (root / "parnet_export" / "imagenet_names.txt").read_text()
    notice = "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved."
    assert notice.replace("3.0 ", "3.0, ") in text
    licence = (root / "parnet_export" / "LICENSE-WordNet.txt").read_text()
    assert notice in licence
    assert 'PROVIDED "AS IS"' in licence


def test_usual_names_are_those_of_the_task():
    assert usual_names(1000, detector=False) == imagenet_names()
    assert usual_names(80, detector=True) == COCO_NAMES
    assert usual_names(80, detector=False) == usual_names(1000, detector=True) == ()


def test_a_file_names_each_class(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \r\n")
    assert read_names(file, 2) == ("one", "two")
    with pytest.raises(InputError, match="has 2 names, and the network 3 classes"):
        read_names(file, 3)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no text in UTF-8"):
        read_names(file, 1)
    with pytest.raises(InputError, match="cannot be read"):
        read_names(tmp_path / "absent.txt", 1)
