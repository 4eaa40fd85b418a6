"""``parnet-export classify`` on pictures of digits, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from parnet_export import cli, console
from parnet_export.bundle import open_bundle
from parnet_export.images.class_names import imagenet_names
from parnet_export.images.input_form import IMAGENET, LETTERBOX, decode_form
from parnet_export.models.catalog import CATALOG
from parnet_export.models.parnet import ParNetConfig
from parnet_export.network import Network
from parnet_export.pipeline import export_graph, make_bundle, read_graph
from parnet_export.source import load_network

DIGITS = ["--crop", "1", "--mean", "0.305", "--std", "0.324", "--interpolation", "bilinear"]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def digits():
    """Grey 8x8 pictures, of values up to 16, and what they show."""
    return load_digits()


@pytest.fixture(scope="module")
def checkpoint(root):
    return root / "examples" / "digits" / "digits.pth.tar"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, checkpoint):
    path = tmp_path_factory.mktemp("classify") / "digits.bundle"
    model, provenance = export_graph(load_network(checkpoint), resolution=None, batch=2)
    make_bundle(model, provenance, path, prove=False)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index in (0, 1, 2, 3, 13):
        path = folder / f"{index}.png"
        Image.fromarray(np.round(digits.images[index] / 16 * 255).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def classify(capsys):
    def run(*arguments):
        code = console.run(cli.app, ["classify", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_digits_are_named_rightly_with_the_probabilities_of_the_trained_network(
    classify, bundle, pictures, digits, checkpoint, tmp_path
):
    labels, output = tmp_path / "names.txt", tmp_path / "out.json"
    labels.write_text("\n".join(NAMES) + "\n")
    options = [*DIGITS, "--labels", labels, "--json", "--output", output]
    code, out, err = classify(*pictures, "--bundle", bundle, *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result == json.loads(output.read_text())
    assert result["preprocessing"]["resolution"] == 32
    rows = result["images"]
    assert [row["image"] for row in rows] == list(map(str, pictures))
    module = load_network(checkpoint).module
    for row, path in zip(rows, pictures, strict=True):
        index = int(path.stem)
        grey = torch.from_numpy(digits.images[index]).float()[None, None] / 16
        image = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear")
        expected = module(((image - 0.305) / 0.324).repeat(1, 3, 1, 1)).softmax(1)[0]
        best = row["predictions"]
        assert len(best) == 5
        assert best[0]["number"] == digits.target[index]
        assert [p["number"] for p in best] == expected.argsort(descending=True)[:5].tolist()
        assert [p["label"] for p in best] == [NAMES[p["number"]] for p in best]
        for prediction in best:
            # The picture's grey has 8 bits, the data set's none to lose.
            assert prediction["probability"] == pytest.approx(
                float(expected[prediction["number"]]), abs=0.01
            )


def test_the_table_shows_classes_and_how_pictures_were_prepared(classify, bundle, pictures):
    code, out, _ = classify(pictures[0], "--bundle", bundle, *DIGITS, "--top", 1)
    assert code == 0
    assert "label" not in out
    assert "probability" in out
    assert "0.305/0.305/0.305" in out


@pytest.fixture(scope="module")
def stated(tmp_path_factory, checkpoint, root):
    """A bundle of a network whose preprocessing and labels were told to ``fuse``."""
    folder = tmp_path_factory.mktemp("stated")
    fused, path = folder / "digits.fused.safetensors", folder / "digits.bundle"
    labels = root / "examples" / "digits" / "labels.txt"
    for command in (
        ["fuse", "--ckpt", checkpoint, "--out", fused, *DIGITS, "--labels", labels],
        ["split-streams", fused, "--out", path, "--batch", "2", "--no-verify"],
    ):
        assert console.run(cli.app, list(map(str, command))) == 0
    return path


def test_what_fuse_was_told_classifies_without_options(classify, stated, bundle, pictures, digits):
    code, out, err = classify(*pictures, "--bundle", stated, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    first = [row["predictions"][0] for row in result["images"]]
    shown = [digits.target[int(path.stem)] for path in pictures]
    assert [prediction["number"] for prediction in first] == shown
    assert [prediction["label"] for prediction in first] == [NAMES[digit] for digit in shown]
    used = result["preprocessing"]
    assert (used["crop"], used["mean"], used["std"]) == (1.0, [0.305] * 3, [0.324] * 3)
    assert (used["resolution"], used["interpolation"]) == (32, "bilinear")
    assert used["source"] == "as the bundle states"
    # The same pictures through the options of classify.
    _, by_options, _ = classify(*pictures, "--bundle", bundle, *DIGITS, "--json")
    for row, other in zip(result["images"], json.loads(by_options)["images"], strict=True):
        pairs = zip(row["predictions"], other["predictions"], strict=True)
        assert all(a["number"] == b["number"] for a, b in pairs)


def test_preprocessing_and_names_go_from_graph_to_bundle(stated, tmp_path):
    manifest = open_bundle(stated).manifest
    whole = onnx.load(open_bundle(stated).whole_path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in whole.metadata_props}
    assert decode_form(metadata["parnet.preprocessing"]) == manifest.provenance.input_form
    again = tmp_path / "again.bundle"
    labels = tmp_path / "few.txt"
    labels.write_text("\n".join(name.upper() for name in NAMES))
    command = ["split-streams", stated / manifest.whole, "--out", again, "--no-verify"]
    options = ["--labels", labels, "--std", "0.3"]
    assert console.run(cli.app, list(map(str, [*command, *options]))) == 0
    opened = open_bundle(again)
    expected = replace(manifest.provenance.input_form, std=(0.3,) * 3)
    assert opened.manifest.provenance.input_form == expected
    assert opened.class_names == tuple(name.upper() for name in NAMES)
    labels.write_text("one\n")
    assert console.run(cli.app, list(map(str, [*command, *options]))) == 2
    assert open_bundle(again).manifest == opened.manifest


def test_options_replace_what_the_bundle_states_and_it_says_so(classify, stated, pictures):
    code, out, err = classify(pictures[0], "--bundle", stated, "--mean", "0.9", "--json")
    assert (code, err) == (0, "")
    used = json.loads(out)["preprocessing"]
    assert (used["mean"], used["std"]) == ([0.9] * 3, [0.324] * 3)
    assert used["source"] == "as the bundle states, but for --mean"


def test_a_bundle_that_states_nothing_gets_imagenets_and_says_so(classify, bundle, pictures):
    code, out, err = classify(pictures[0], "--bundle", bundle)
    assert code == 0
    shown = " ".join(out.split())
    assert "resized to 36: crop 0.875, bicubic" in shown
    assert "ImageNet's, as the bundle states none." in shown
    assert "states no preprocessing, so ParNet's for ImageNet is assumed" in " ".join(err.split())
    assert "zero" not in out


def test_a_network_of_1000_classes_names_imagenets(classify, pictures, tmp_path, make_parnet):
    config = ParNetConfig((4, 8, 12), (1, 1, 1), 16, num_classes=1000)
    checkpoint = tmp_path / "small.pth"
    torch.save(make_parnet(config).state_dict(), checkpoint)
    network = load_network(checkpoint)
    assert network.provenance.input_form == IMAGENET
    model, provenance = export_graph(network, resolution=32, batch=1)
    for kind, labels in (("usual", ()), ("own", tuple(f"thing {i}" for i in range(1000)))):
        path = tmp_path / kind
        make_bundle(model, provenance, path, prove=False, labels=labels)
        code, out, err = classify(pictures[0], "--bundle", path, "--json")
        assert (code, err) == (0, "")
        (row,) = json.loads(out)["images"]
        names = labels or imagenet_names()
        assert len(row["predictions"]) == 5
        assert all(p["label"] == names[p["number"]] for p in row["predictions"])


def test_a_bundle_that_letterboxes_is_no_classifiers(classify, bundle, pictures, tmp_path):
    model, provenance = read_graph(open_bundle(bundle).whole_path)
    path = tmp_path / "boxed"
    make_bundle(model, replace(provenance, input_form=LETTERBOX), path, prove=False)
    code, _, err = classify(pictures[0], "--bundle", path)
    assert code == 2
    assert "prepares pictures as a letterbox" in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--crop", "2"], "a crop of 2.0 is not above 0 and at most 1"),
        (["--mean", "a,b,c"], "--mean: 'a,b,c' is neither a number nor three"),
        (["--std", "1,2"], "--std: '1,2' is neither a number nor three"),
        (["--std", "0"], "standard deviations above 0"),
        (["--resolution", "64"], "takes images of 32 pixels, not 64"),
        (["--labels", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--devices", "gpu9"], "gpu9"),
    ],
)
def test_what_does_not_fit_is_named(classify, bundle, pictures, options, problem, tmp_path):
    code, out, err = classify(pictures[0], "--bundle", bundle, *options)
    assert (code, out) == (2, "")
    assert problem in " ".join(err.split())


def test_labels_of_another_number_and_broken_pictures_are_refused(
    classify, bundle, pictures, tmp_path
):
    labels = tmp_path / "names.txt"
    labels.write_text("zero\none\n")
    code, _, err = classify(pictures[0], "--bundle", bundle, "--labels", labels)
    assert code == 2
    assert "has 2 names, and the network 10 classes" in err
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    output = tmp_path / "out.json"
    output.write_text("before")
    code, _, err = classify(pictures[0], broken, "--bundle", bundle, "--output", output)
    assert code == 2
    assert "broken.png: is a damaged picture" in err
    assert output.read_text() == "before"
    long = tmp_path / "long.png"
    Image.fromarray(np.zeros((1, 200, 3), np.uint8)).save(long)
    code, _, err = classify(long, "--bundle", bundle)
    assert code == 2
    assert "long.png: is 200 x 1 pixels, too long" in err


def test_a_bundle_of_anything_else_is_refused(classify, pictures, tmp_path):
    class Detector(torch.nn.Module):
        def forward(self, image):
            return torch.nn.functional.max_pool2d(image, 8)

    family, entry = CATALOG["resnet18"]
    origin = load_network("parnet-cifar-1.3m").provenance
    network = Network(Detector().eval(), family.key, entry.config, "none", 32, 1, origin)
    model, provenance = export_graph(network, level="none", resolution=32, batch=1)
    path = tmp_path / "detector.bundle"
    make_bundle(model, provenance, path, prove=False)
    code, _, err = classify(pictures[0], "--bundle", path)
    assert code == 2
    assert "is no classifier of colour images" in err
