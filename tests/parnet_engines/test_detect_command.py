from __future__ import annotations

import json
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from parnet_engines.detect import Detector
from parnet_export import cli, console
from parnet_export.bundle import Provenance, open_bundle
from parnet_export.detections.detection_form import AnchorLevel, DetectionOutput, Suppression
from parnet_export.errors import InputError
from parnet_export.export import export_onnx
from parnet_export.images.class_names import COCO_NAMES
from parnet_export.images.input_form import IMAGENET, LETTERBOX
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.parnet import ParNetConfig
from parnet_export.models.suppressed_detector import SuppressedDetector
from parnet_export.models.yolo_decode import DecodedDetector
from parnet_export.models.yolov4_csp import build_yolov4_csp
from parnet_export.models.yolov4_csp_layers import YOLOv4CSPConfig
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network

PIXELS = 128
LEVELS = (AnchorLevel(8, ((8, 8),)), AnchorLevel(32, ((48, 32),)))
NAMES = ("red", "green", "blue")
FORMS = ("raw", "decoded", "nms")
CLASSIFIER = ParNetConfig((8, 16, 32), (1, 1, 1), 16, num_classes=4, variant="cifar")
SUPPRESSION = Suppression(0.5, 0.5, 10)


class ColourDetector(nn.Module):
    """Finds cells of one colour: bright ones of 8 pixels, less bright ones of 32.

    The logits of a box are zero, so it has the anchor's size around the cell's centre.
    """

    @torch.no_grad()
    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 8, stride=8)
        self.coarse = nn.Conv2d(3, 8, 32, stride=32)
        for head, threshold in ((self.fine, 0.8), (self.coarse, 0.4)):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[4] = 9  # objectness
            head.bias[5:] = -60 * threshold
            mean = 60 / head.kernel_size[0] ** 2
            for label in range(3):
                head.weight[5 + label] = -mean
                head.weight[5 + label, label] = mean

    def forward(self, images):
        return self.fine(images), self.coarse(images)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same detector in its three forms."""
    folder = tmp_path_factory.mktemp("bundles")
    plain = ColourDetector().eval()
    modules = {
        "raw": plain,
        "decoded": DecodedDetector(plain, LEVELS).eval(),
        "nms": SuppressedDetector(plain, LEVELS, SUPPRESSION).eval(),
    }
    for form, module in modules.items():
        names = getattr(module, "output_names", ("fine", "coarse"))
        model = export_onnx(module, resolution=PIXELS, batch=1, name="colours", output_names=names)
        kept = SUPPRESSION if form == "nms" else None
        output = DetectionOutput(form, LEVELS, 3, kept)
        provenance = Provenance("colours", "test", detections=output)
        make_bundle(model, provenance, folder / form)
    return folder


# In an image of 256 x 192, which is halved and gets 16 lines above: 16 pixels are a fine cell.
OBJECTS = [
    ("green", 1, (48, 0, 64, 16)),
    ("red", 0, (16, 32, 32, 48)),
    ("blue", 2, (48, 96, 144, 160)),  # the coarse anchor around a square of 64 pixels
    ("red", 0, (224, 144, 240, 160)),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawing with objects at known places."""
    pixels = np.full((192, 256, 3), 60, np.uint8)
    for _, channel, (left, top, right, bottom) in (*OBJECTS[:2], OBJECTS[3]):
        pixels[top:bottom, left:right] = 0
        pixels[top:bottom, left:right, channel] = 255
    pixels[96:160, 64:128] = (0, 0, 150)
    path = tmp_path_factory.mktemp("images") / "drawn.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


class Ran(NamedTuple):
    exit_code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command of `parnet-export`."""
    monkeypatch.setenv("COLUMNS", "120")
    console.stdout.cache_clear()
    console.stderr.cache_clear()

    def run(*arguments: object) -> Ran:
        exit_code = console.run(cli.app, list(map(str, arguments)))
        return Ran(exit_code, *capsys.readouterr())

    return run


def check_objects(found):
    found = sorted(found, key=lambda thing: thing["box"][1])
    assert [thing["label"] for thing in found] == [label for label, *_ in OBJECTS]
    assert [thing["class_number"] for thing in found] == [number for _, number, _ in OBJECTS]
    for thing, (*_, box) in zip(found, OBJECTS, strict=True):
        assert thing["box"] == pytest.approx(box, abs=1e-3)
        assert 0.99 < thing["score"] < 1


@pytest.mark.parametrize("form", FORMS)
def test_objects_are_found_where_they_were_drawn(form, run, bundles, drawn, names, tmp_path):
    boxes, picture = tmp_path / "boxes.json", tmp_path / "out.png"
    where = ("--bundle", bundles / form, "--devices", "cpu", "--classes", names)
    ran = run("detect", drawn, *where, "--output", boxes, "--draw", picture)
    assert ran.exit_code == 0
    for text in ("colours", "drawn.png", "green", "red", "blue"):
        assert text in ran.out
    assert str(picture) in ran.err
    result = json.loads(boxes.read_text())
    assert (result["network"], result["weights"]) == ("colours", "unknown")
    default = SUPPRESSION if form == "nms" else Suppression()
    assert (result["score_threshold"], result["iou_threshold"]) == (
        default.min_score,
        default.max_iou,
    )
    (image,) = result["images"]
    assert (image["image"], image["width"], image["height"]) == (str(drawn), 256, 192)
    check_objects(image["objects"])
    before, after = np.array(Image.open(drawn)), np.array(Image.open(picture))
    assert before.shape == after.shape
    changed = (before != after).any(2)
    for _, _, (left, top, right, bottom) in OBJECTS:
        for row, column in ((top, left), (bottom - 1, right - 1)):
            assert changed[row, column]
    assert not changed[170:].any()  # nothing is there


def test_several_images_are_drawn_into_a_folder(run, bundles, drawn, names, tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.open(drawn).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif, quality=100)
    empty = tmp_path / "empty.png"
    Image.new("L", (50, 500), 90).save(empty)
    folder = tmp_path / "drawings"
    ran = run(
        "detect", drawn, turned, empty, "--bundle", bundles / "nms", "--classes", names,
        "--draw", folder, "--json",
    )  # fmt: skip
    assert ran.exit_code == 0
    first, second, third = json.loads(ran.out)["images"]
    check_objects(first["objects"])
    check_objects(second["objects"])
    assert third["objects"] == []
    assert (third["width"], third["height"]) == (50, 500)
    assert sorted(path.name for path in folder.iterdir()) == [
        "drawn.png",
        "empty.png",
        "turned.png",
    ]
    assert np.array(Image.open(folder / "empty.png")).max() == 90


def test_thresholds_choose(run, bundles, drawn):
    def count(form, *options):
        ran = run("detect", drawn, "--bundle", bundles / form, "--json", *options)
        assert ran.exit_code == 0, ran.err
        return len(json.loads(ran.out)["images"][0]["objects"])

    for form in FORMS:
        assert count(form, "--score-threshold", 1) == 0
        assert count(form, "--score-threshold", 0.9) == 4
    # The background is every class a little.
    assert count("raw", "--score-threshold", 0, "--iou-threshold", 1) == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/damaged.png --bundle {b}/raw", "damaged.png: "),
        ("{drawn} {tmp}/none.png --bundle {b}/raw --draw {tmp}/folder", "none.png: "),
        ("{drawn} --bundle {tmp}", "bundle"),
        ("{drawn} --bundle {b}/raw --devices cpu:999", "999"),
        ("{drawn} --bundle {b}/raw --draw {tmp}/x.jpg", ".png"),
        ("{drawn} --bundle {b}/raw --draw {drawn}", "would be lost"),
        ("{drawn} --bundle {b}/raw --draw {tmp}/no/x.png", "no/x.png"),
        ("{drawn} --bundle {b}/raw --draw {tmp}/boxes.json", ".png"),
        ("{drawn} --bundle {b}/raw --classes {tmp}/none.txt", "none.txt: "),
        ("{drawn} --bundle {b}/raw --classes {drawn}", "no text in UTF-8"),
        ("{drawn} --bundle {b}/nms --score-threshold 0.3", "drops scores"),
        ("{drawn} --bundle {b}/nms --iou-threshold 0.3", "suppresses at 0.5"),
    ],
)
def test_bad_input_is_one_message_and_leaves_everything_as_it_was(
    arguments, message, run, bundles, drawn, tmp_path
):
    content = drawn.read_bytes()
    (tmp_path / "damaged.png").write_bytes(content[: len(content) // 2])
    boxes = tmp_path / "boxes.json"
    boxes.write_text("earlier")
    words = arguments.format(tmp=tmp_path, b=bundles, drawn=drawn).split()
    ran = run("detect", *words, "--output", boxes)
    assert ran.exit_code == 2
    assert (ran.out, ran.err.count("\n")) == ("", 1)
    assert ran.err.startswith("error: ")
    assert message in ran.err
    assert drawn.read_bytes() == content
    assert boxes.read_text() == "earlier"
    assert not list(tmp_path.glob("folder/*"))


def test_images_are_prepared_as_the_bundle_says(run, drawn, tmp_path, names):
    """A network that takes colours from -1 to 1, blue first, finds what the plain one does."""
    plain = ColourDetector().eval()

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain

        def forward(self, images):
            return self.plain((images * 0.5 + 0.5).flip(1))

    model = export_onnx(
        Shifted().eval(), resolution=PIXELS, batch=1, name="s", output_names=("fine", "coarse")
    )
    output = DetectionOutput("raw", LEVELS, 3)
    form = replace(LETTERBOX, mean=(0.5,) * 3, std=(0.5,) * 3, colour_order="BGR")
    boxes = {}
    for kind, stated in (("stated", form), ("unstated", None)):
        provenance = Provenance("shifted", "test", detections=output, input_form=stated)
        labels = NAMES if stated else ()
        make_bundle(model, provenance, tmp_path / kind, prove=False, labels=labels)
        ran = run("detect", drawn, "--bundle", tmp_path / kind, "--json")
        assert ran.exit_code == 0, ran.err
        boxes[kind] = json.loads(ran.out)
    check_objects(boxes["stated"]["images"][0]["objects"])
    assert boxes["stated"]["preprocessing"]["colour_order"] == "BGR"
    assert boxes["unstated"]["preprocessing"]["mean"] == [0, 0, 0]
    assert len(boxes["unstated"]["images"][0]["objects"]) != len(OBJECTS)
    options = ("--mean", 0.5, "--std", 0.5, "--colour-order", "BGR")
    ran = run("detect", drawn, "--bundle", tmp_path / "unstated", *options, "--json")
    by_options = json.loads(ran.out)
    found = [thing["box"] for thing in by_options["images"][0]["objects"]]
    assert found == [thing["box"] for thing in boxes["stated"]["images"][0]["objects"]]
    used = by_options["preprocessing"]
    assert used["source"].endswith("states none, but for --mean, --std, --colour-order")
    ran = run("detect", drawn, "--bundle", tmp_path / "unstated", "--std", 0)
    assert (ran.exit_code, ran.out) == (2, "")
    assert "standard deviations above 0" in ran.err
    shown = " ".join(run("detect", drawn, "--bundle", tmp_path / "stated").out.split())
    assert "BGR, mean 0.5/0.5/0.5, std 0.5/0.5/0.5; as the bundle states." in shown
    shown = " ".join(run("detect", drawn, "--bundle", tmp_path / "unstated").out.split())
    assert "YOLOv4-CSP's, as the bundle states none." in shown


def test_a_bundle_whose_images_are_cropped_is_refused(tmp_path):
    model = export_onnx(
        ColourDetector().eval(), resolution=PIXELS, batch=1, name="c", output_names=("a", "b")
    )
    output = DetectionOutput("raw", LEVELS, 3)
    provenance = Provenance("cropped", "test", detections=output, input_form=IMAGENET)
    make_bundle(model, provenance, tmp_path / "c", prove=False)
    with pytest.raises(InputError, match="prepares its images as a crop"):
        Detector.open(open_bundle(tmp_path / "c"))


def test_names_of_another_number_of_classes_are_refused(run, bundles, drawn, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    ran = run("detect", drawn, "--bundle", bundles / "raw", "--classes", few)
    assert ran.exit_code == 2
    assert "has 2 names, and the network 3 classes" in ran.err


def test_a_bundle_of_another_network_or_of_several_images_is_refused(
    bundles, tmp_path, make_parnet
):
    torch.save(make_parnet(CLASSIFIER).state_dict(), tmp_path / "classifier.pth")
    classifier = load_network(tmp_path / "classifier.pth")
    make_bundle(
        *export_graph(classifier, resolution=None, batch=1), tmp_path / "classifier", prove=False
    )
    with pytest.raises(InputError, match="is no bundle of a detector"):
        Detector.open(open_bundle(tmp_path / "classifier"))
    with pytest.raises(InputError, match="classifier is no detector"):
        export_graph(classifier, resolution=None, batch=1, form="decoded")
    model = export_onnx(
        ColourDetector().eval(), resolution=PIXELS, batch=2, name="two", output_names=("a", "b")
    )
    provenance = Provenance("two", "test", detections=DetectionOutput("raw", LEVELS, 3))
    make_bundle(model, provenance, tmp_path / "two", prove=False)
    with pytest.raises(InputError, match="images are given one at a time"):
        Detector.open(open_bundle(tmp_path / "two"))


def test_a_detector_of_the_catalogue_goes_all_the_way(run, drawn, tmp_path):
    """From a checkpoint to detections in the graph, proven against torch, to boxes in a file."""
    config = YOLOv4CSPConfig(width=2, num_classes=80)
    torch.manual_seed(0)
    network = build_yolov4_csp(config)
    randomise_batch_norm(network, torch.Generator().manual_seed(0))
    checkpoint, bundle = tmp_path / "small.pt", tmp_path / "b"
    torch.save({"model": network.state_dict()}, checkpoint)
    nms = ("--detections", "nms", "--score-threshold", 0.3, "--max-detections", 7)
    ran = run("split-streams", checkpoint, "--resolution", 64, *nms, "--out", bundle)
    assert ran.exit_code == 0, ran.err
    assert open_bundle(bundle).manifest.provenance.input_form == LETTERBOX
    output = open_bundle(bundle).manifest.provenance.detections
    assert output.suppression == Suppression(0.3, 0.5, 7)
    assert "at most 7 objects of scores above 0.3" in run("inspect", bundle).out
    ran = run("verify", bundle, "--ckpt", checkpoint, "--samples", 1, "--json")
    assert ran.exit_code == 0, ran.err
    assert {check["name"] for check in json.loads(ran.out)["checks"]} == {
        "split against whole",
        "whole against source",
        "split against source",
    }
    for name, tensor in network.state_dict().items():
        if name.endswith("Conv2d.bias"):  # only the heads have one
            tensor.add_(0.1)
    other = tmp_path / "other.pt"
    torch.save({"model": network.state_dict()}, other)
    ran = run("verify", bundle, "--ckpt", other, "--samples", 1)
    assert ran.exit_code == 1
    assert "other objects are found" in ran.err
    ran = run("detect", drawn, "--bundle", bundle, "--json")
    assert ran.exit_code == 0, ran.err
    (image,) = json.loads(ran.out)["images"]
    assert 0 < len(image["objects"]) <= 7
    assert {thing["label"] for thing in image["objects"]} <= set(COCO_NAMES)
    for thing in image["objects"]:
        left, top, right, bottom = thing["box"]
        assert 0 <= left <= right <= 256
        assert 0 <= top <= bottom <= 192


def test_options_of_suppression_need_it(run, tmp_path):
    for option in ("--score-threshold", "--iou-threshold"):
        ran = run("split-streams", "yolov4-csp", option, 0.3, "--out", tmp_path / "b")
        assert ran.exit_code == 2
        assert ran.err.startswith(f"error: {option}: ")


def test_coco_has_its_classes():
    assert len(set(COCO_NAMES)) == 80
    assert (COCO_NAMES[0], COCO_NAMES[17], COCO_NAMES[79]) == ("person", "horse", "toothbrush")
