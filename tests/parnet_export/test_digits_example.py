from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from parnet_export import cli, console
from parnet_export.checkpoints.checkpoint import read_checkpoint
from parnet_export.errors import InputError
from parnet_export.fuse import fuse_network
from parnet_export.models.parnet import ParNet, ParNetConfig
from parnet_export.source import load_network

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
CHECKPOINT = EXAMPLE / "digits.pth.tar"
MODULES = ("dataset", "train", "evaluate", "pictures")

# Of the places of the test images. Another split would test on images trained on.
TEST_SPLIT_SHA256 = "a18a99c68d6d634f466a1043abdea6f85b1af3f0a63da33ca9bc39d1e71b5e34"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def digits(example):
    return example.dataset.load_split()[1]


@pytest.fixture(scope="module")
def network():
    return load_network(CHECKPOINT)


@pytest.fixture(scope="module")
def logits(network, digits):
    with torch.no_grad():
        return network.module(digits.images)


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "digits.fused.safetensors"
    assert console.run(cli.app, ["fuse", "--ckpt", str(CHECKPOINT), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def bundle(fused):
    return split(fused, "dynamic")


def split(fused, batch, *options):
    path = fused.with_name(f"digits.{batch}.bundle")
    arguments = ["split-streams", str(fused), "--out", str(path), "--batch", batch, *options]
    assert console.run(cli.app, arguments) == 0
    return path


def evaluate(example, capsys, *arguments):
    """Return the exit code, the rows and the error of the evaluation script."""
    capsys.readouterr()
    exit_code = console.run(example.evaluate.app, [*map(str, arguments), "--json"])
    streams = capsys.readouterr()
    return exit_code, json.loads(streams.out)["rows"], streams.err


# ------------------------------------------------------------------------------- images


def test_the_split_never_changes_and_no_image_is_on_both_sides(example):
    labels = load_digits().target
    training, test = example.dataset.split_indices(labels)
    assert sorted([*training, *test]) == list(range(1797))
    assert len(test) == 450
    assert hashlib.sha256(test.astype("<i8").tobytes()).hexdigest() == TEST_SPLIT_SHA256
    # Stratified: every digit has a quarter of its images in the test set, to within one.
    share = np.bincount(labels[test]) - np.bincount(labels) / 4
    assert np.abs(share).max() < 1


def test_images_are_normalised_and_show_the_digits_of_their_labels(example):
    training, test = example.dataset.load_split()
    assert training.images.shape == (1347, 3, 32, 32)
    assert training.images.dtype == torch.float32
    assert abs(float(training.images.mean())) < 0.01
    assert abs(float(training.images.std()) - 1) < 0.01
    assert bool((test.images[:, :1] == test.images).all())
    # Averaging the 4x4 pixels of each enlarged one comes near the picture it was made of.
    source = load_digits()
    _, places = example.dataset.split_indices(source.target)
    small = torch.nn.functional.avg_pool2d(test.images[:, 0], 4)
    original = torch.from_numpy(source.images[places]).flatten(1)
    both = torch.stack([small.flatten(1).double(), original], 1)
    assert all(float(torch.corrcoef(pair)[0, 1]) > 0.95 for pair in both)
    assert test.labels.tolist() == source.target[places].tolist()


def test_test_images_can_be_had_as_files(example, tmp_path):
    folder = tmp_path / "pictures"
    assert console.run(example.pictures.app, [str(folder), "--count", "3"]) == 0
    _, places = example.dataset.split_indices(load_digits().target)
    written = {int(file.stem.split("-")[1]): file for file in folder.iterdir()}
    assert set(written) == set(places[:3].tolist())
    for place, file in written.items():
        assert file.name.startswith(f"{load_digits().target[place]}-")
        grey = np.asarray(Image.open(file)).astype(np.float64)
        assert abs(grey / 255 * 16 - load_digits().images[place]).max() < 0.04


# --------------------------------------------------------------------------- checkpoint


def test_the_checkpoint_has_the_layout_of_the_authors_training_script():
    assert CHECKPOINT.stat().st_size < 2_000_000
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(CHECKPOINT, weights_only=True)
    assert set(content) == {"epoch", "arch", "state_dict", "version", "args", "metric"}
    assert content["version"] == 2
    assert content["args"].epochs == content["epoch"] + 1
    floats = [t for t in content["state_dict"].values() if t.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in floats)


def test_the_checkpoint_was_trained_as_the_script_would_train_it(example, network):
    content = read_checkpoint(CHECKPOINT)
    with torch.serialization.safe_globals([argparse.Namespace]):
        settings = vars(torch.load(CHECKPOINT, weights_only=True)["args"])
    assert settings == {name: getattr(example.train.Settings(), name) for name in settings}
    assert set(settings) == set(example.train.Settings.__dataclass_fields__)
    assert content.metadata["arch"] == example.train.ARCH
    structure = ("widths", "blocks", "last_width", "num_classes", "variant", "stem")
    for name in structure:
        assert getattr(network.config, name) == getattr(example.train.CONFIG, name)


def test_the_checkpoint_loads_strictly_and_its_activation_is_detected(network):
    assert set(network.module.state_dict()) == set(read_checkpoint(CHECKPOINT).tensors)
    assert network.config.activation == "silu"
    assert network.provenance.activation.startswith("silu (detected: ")
    assert network.provenance.weights == "trained"
    assert (network.level, network.resolution) == ("none", 32)


def test_the_trained_network_names_98_percent_of_the_test_images(digits, logits):
    accuracy = float((logits.argmax(1) == digits.labels).double().mean())
    assert accuracy >= 0.98
    assert float(read_checkpoint(CHECKPOINT).metadata["metric"]) == pytest.approx(100 * accuracy)


def test_digits_moved_a_little_are_still_recognised(example, network, digits):
    shifted = example.train.augment(digits.images, torch.Generator().manual_seed(0))
    assert not torch.equal(shifted, digits.images)
    moved = example.dataset.Digits(shifted, digits.labels)
    assert example.train.accuracy(network.module, moved) > 0.95


@pytest.mark.parametrize("level", ["repvgg", "full"])
def test_fusing_changes_no_prediction(network, digits, logits, level):
    with torch.no_grad():
        fused = fuse_network(network, level).module(digits.images)
    assert torch.equal(fused.argmax(1), logits.argmax(1))
    assert float((fused - logits).abs().max() / logits.abs().max()) < 1e-5


# ----------------------------------------------------------------------------- training


def test_training_again_gives_the_same_weights_and_a_checkpoint_that_loads(example, tmp_path):
    training, _ = example.dataset.load_split()
    few = example.dataset.Digits(training.images[:48], training.labels[:48])
    config = ParNetConfig((4, 8), (1, 1), 12, num_classes=10, variant="cifar", dropout=0.1)
    settings = example.train.Settings(epochs=2, batch=16, seed=3)
    first, again = (example.train.train(few, settings, config) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    untrained = ParNet(config)
    assert not torch.equal(first.head.fc.weight, untrained.head.fc.weight)

    path = tmp_path / "digits.pth.tar"
    example.train.write_checkpoint(path, first, settings, 0.5)
    loaded = load_network(path, activation="silu")
    with torch.no_grad():
        assert torch.equal(loaded.module(few.images), first(few.images))


# --------------------------------------------------------------------------- evaluation


def test_no_form_of_the_network_changes_a_prediction(example, fused, bundle, logits, capsys):
    code, rows, _ = evaluate(example, capsys, "--fused", fused, "--bundle", bundle)
    assert code == 0
    assert [row["form"].split()[0] for row in rows] == ["torch,", "torch,", "ONNX,", "ONNX,"]
    assert rows[3]["form"] == "ONNX, 7 segments"
    assert {row["changed"] for row in rows} == {0}
    assert {row["accuracy"] for row in rows} == {rows[0]["accuracy"]}
    assert rows[0]["accuracy"] >= 0.98
    assert rows[0]["logit_difference"] == 0
    largest = float(logits.abs().max())
    assert 0 < max(row["logit_difference"] for row in rows) < 1e-4 * largest


@pytest.mark.parametrize("batch", [pytest.param("1", marks=pytest.mark.slow), "64"])
def test_a_bundle_of_a_fixed_batch_can_be_evaluated(example, fused, digits, logits, capsys, batch):
    # 450 images are no multiple of 64.
    ours = split(fused, batch, "--no-verify")
    code, rows, _ = evaluate(example, capsys, "--fused", fused, "--bundle", ours)
    assert code == 0
    correct = int((logits.argmax(1) == digits.labels).sum())
    assert [row["correct"] for row in rows] == [correct] * 4


def test_evaluation_fails_when_a_prediction_changes(example, fused, bundle, tmp_path, capsys):
    content = {name: t.clone() for name, t in read_checkpoint(CHECKPOINT).tensors.items()}
    # Swapping two digits of the classifier leaves everything else right.
    for name in ("head.fc.weight", "head.fc.bias"):
        content[name][[3, 8]] = content[name][[8, 3]]
    other = tmp_path / "other.pth.tar"
    torch.save({"state_dict": content}, other)
    code, rows, error = evaluate(
        example, capsys, "--ckpt", other, "--fused", fused, "--bundle", bundle
    )
    assert code == 1
    assert rows[1]["changed"] >= 80
    assert rows[1]["correct"] > rows[0]["correct"]
    assert "predictions differ from the trained network's" in error


def test_a_network_with_other_classes_is_refused(example, digits):
    forms = iter([("torch, as trained", Path("other.pth.tar"), np.zeros((450, 1000)))])
    with pytest.raises(
        InputError, match=r"other\.pth\.tar: gives 1000 logits for an image, not 10"
    ):
        example.evaluate.compare(forms, digits)
