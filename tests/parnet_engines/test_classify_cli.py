"""``parnet-export classify`` on pictures of digits, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from parnet_export import cli, console
from parnet_export.models.catalog import CATALOG
from parnet_export.network import Network
from parnet_export.pipeline import export_graph, make_bundle
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
    assert "has 2 lines, but the network knows 10 classes" in err
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
