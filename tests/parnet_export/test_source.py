from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace

import pytest
import torch

from parnet_export.checkpoints.checkpoint import write_safetensors
from parnet_export.errors import InputError
from parnet_export.fuse import fuse_network
from parnet_export.images.input_form import IMAGENET, InputForm
from parnet_export.models.catalog import CATALOG
from parnet_export.models.parnet import ParNetConfig
from parnet_export.network import HEADER_KEY, Header
from parnet_export.source import load_network, name_of_file

SMALL = ParNetConfig((8, 12, 20), (2, 1, 3), 24, num_classes=10)


@pytest.fixture
def official_file(tmp_path, make_parnet):
    """A file as the authors' training script writes it, averaged weights included."""
    state = make_parnet(SMALL, seed=1).state_dict()
    averaged = make_parnet(SMALL, seed=2).state_dict()
    path = tmp_path / "parnet_small.pth.tar"
    torch.save(
        {
            "epoch": 119,
            "arch": "simplenet_repvgg",
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "state_dict_ema": averaged,
            "optimizer": {"state": {}, "param_groups": []},
            "version": 2,
            "args": argparse.Namespace(model="simplenet_repvgg", lr=0.001),
            "metric": 76.6,
        },
        path,
    )
    return path


def test_an_official_checkpoint_loads_with_its_structure_read_off(official_file, make_parnet):
    image = torch.randn(2, 3, 64, 64)
    for use_ema, seed in ((False, 1), (True, 2)):
        network = load_network(official_file, use_ema=use_ema)
        assert network.config == SMALL
        assert network.level == "none"
        assert network.name == "parnet_small"
        assert network.provenance.weights == "trained"
        assert network.provenance.activation.startswith("silu (detected: ")
        assert torch.equal(network.module(image), make_parnet(SMALL, seed=seed)(image))


def test_an_official_checkpoint_of_imagenet_is_prepared_for_as_its_authors_do(
    tmp_path, make_parnet
):
    for classes, expected in ((1000, IMAGENET), (10, None)):
        path = tmp_path / f"{classes}.pth"
        torch.save(make_parnet(replace(SMALL, num_classes=classes)).state_dict(), path)
        assert load_network(path).provenance.input_form == expected


def test_training_arguments_say_how_pictures_are_prepared(official_file, tmp_path):
    content = torch.load(official_file, weights_only=False)
    content["args"].mean, content["args"].crop_pct = [0.5, 0.4, 0.3], 0.95
    torch.save(content, official_file)
    network = load_network(official_file)
    expected = InputForm(crop=0.95, mean=(0.5, 0.4, 0.3))
    assert network.provenance.input_form == expected
    path = tmp_path / "fused.safetensors"
    named = replace(network, labels=tuple("abcdefghij"))
    fused = fuse_network(named, "full")
    write_safetensors(path, fused.module.state_dict(), Header.of(fused).encode())
    again = load_network(path)
    assert again.provenance.input_form == expected
    assert again.labels == tuple("abcdefghij")


def test_a_fused_file_of_before_preprocessing_is_read(official_file, tmp_path):
    fused = fuse_network(load_network(official_file), "full")
    header = json.loads(Header.of(fused).encode()[HEADER_KEY])
    del header["labels"]
    del header["provenance"]["input_form"]
    path = tmp_path / "old.safetensors"
    write_safetensors(path, fused.module.state_dict(), {HEADER_KEY: json.dumps(header)})
    assert load_network(path).provenance.input_form is None
    assert load_network(path).labels == ()


@pytest.mark.parametrize(
    ("name", "fit", "interpolation"),
    [
        ("parnet-s", "crop", "bicubic"),
        ("resnet18", "crop", "bilinear"),
        ("yolov4-csp", "letterbox", "bilinear"),
        ("parnet-xl-det", "letterbox", "bilinear"),
    ],
)
def test_families_have_the_preprocessing_of_their_authors(name, fit, interpolation):
    family, _ = CATALOG[name]
    assert (family.input_form.fit, family.input_form.interpolation) == (fit, interpolation)


def test_the_activation_can_be_given(official_file):
    network = load_network(official_file, activation="relu")
    assert network.config.activation == "relu"
    assert network.provenance.activation == "relu (as asked)"


@pytest.mark.parametrize("level", ["repvgg", "full"])
def test_a_fused_file_gives_back_the_network_that_was_written(level, official_file, tmp_path):
    network = load_network(official_file)
    fused = fuse_network(network, level)
    path = tmp_path / "again.fused.safetensors"
    write_safetensors(path, fused.module.state_dict(), Header.of(fused).encode())
    again = load_network(path)
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.module(image), fused.module(image))
    assert (again.level, again.config) == (level, SMALL)
    assert again.provenance == fused.provenance
    assert again.name == "parnet_small"


def test_a_file_fused_by_the_authors_rule_needs_no_header(official_file, tmp_path):
    fused = fuse_network(load_network(official_file), "repvgg")
    path = tmp_path / "fused.pth"
    torch.save(fused.module.state_dict(), path)
    again = load_network(path)
    assert again.level == "repvgg"
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.module(image), fused.module(image))


def test_random_weights_depend_on_the_seed_alone_and_are_labelled():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_network("parnet-cifar-1.3m", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second = load_network("parnet-cifar-1.3m", seed=3)
    other = load_network("parnet-cifar-1.3m", seed=4)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(first.module(image), second.module(image))
    assert not torch.equal(first.module(image), other.module(image))
    assert first.label == "parnet-cifar-1.3m (random weights)"
    statistics = first.module.state_dict()["streams.0.0.block.rbr_identity.running_mean"]
    assert statistics.std() > 0.1


@pytest.mark.parametrize(
    ("name", "near"),
    [("parnet-q", "parnet-s"), ("resnet-55", "resnet50"), ("ParNet-LX", "parnet-xl")],
)
def test_an_unknown_name_offers_the_nearest_ones(name, near):
    with pytest.raises(InputError, match=f"Did you mean .*{near}"):
        load_network(name)


def test_an_unknown_arch_offers_the_nearest_ones(official_file):
    with pytest.raises(InputError, match=r"--arch: 'parnet-x'.*Did you mean .*parnet-xl"):
        load_network(official_file, arch="parnet-x")


def test_arch_is_checked_against_the_tensors(official_file):
    with pytest.raises(InputError, match=re.escape("widths 8/12/20")) as raised:
        load_network(official_file, arch="parnet-l")
    assert "not the ParNet-L that --arch asks for" in str(raised.value)


def test_arch_leaves_the_number_of_classes_free(tmp_path, make_parnet):
    config = load_network("parnet-cifar-1.3m").config
    hundred = ParNetConfig(
        config.widths, config.blocks, config.last_width, num_classes=100, variant="cifar"
    )
    path = tmp_path / "cifar100.pth"
    torch.save(make_parnet(hundred).state_dict(), path)
    assert load_network(path, arch="parnet-cifar-1.3m").config.num_classes == 100


def test_a_resnet_given_as_parnet_is_named_as_what_it_is(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(load_network("resnet18").module.state_dict(), path)
    with pytest.raises(InputError, match=r"holds a ResNet-18 .*, not the ParNet-M"):
        load_network(path, arch="parnet-m")
    assert load_network(path).family == "resnet"


def test_tensors_of_no_known_family_are_named(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({f"encoder.{i}.weight": torch.zeros(2) for i in range(30)}, path)
    with pytest.raises(InputError, match=r"none of the networks.*encoder\.9.* and 20 more"):
        load_network(path)


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen", "nan"])
def test_keys_that_do_not_fit_are_named(change, tmp_path, make_parnet):
    state = make_parnet(SMALL).state_dict()
    key = "streams.2.1.block.se.cvsig.conv.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        key = "streams.2.1.block.se.second.weight"
        state[key] = torch.zeros(3)
    elif change == "misshapen":
        state[key] = state[key][:-1]
    else:
        state[key] = state[key] * float("nan")
    path = tmp_path / "damaged.pth"
    torch.save(state, path)
    with pytest.raises(InputError, match=re.escape(key)) as raised:
        load_network(path)
    assert str(path) in str(raised.value)


def test_a_damaged_header_is_refused(official_file, tmp_path):
    fused = fuse_network(load_network(official_file), "full")
    header = Header.of(fused).encode()
    for damaged in (
        {HEADER_KEY: header[HEADER_KEY][:-9]},
        {HEADER_KEY: header[HEADER_KEY].replace('"parnet"', '"nothing"', 1)},
        {HEADER_KEY: header[HEADER_KEY].replace('"widths":[8', '"widths":["8"', 1)},
    ):
        path = tmp_path / "damaged.safetensors"
        write_safetensors(path, fused.module.state_dict(), damaged)
        with pytest.raises(InputError, match=r"damaged|unknown family"):
            load_network(path)


def test_a_fused_file_is_not_used_with_another_activation(official_file, tmp_path):
    fused = fuse_network(load_network(official_file), "full")
    path = tmp_path / "a.safetensors"
    write_safetensors(path, fused.module.state_dict(), Header.of(fused).encode())
    with pytest.raises(InputError, match="fused with silu"):
        load_network(path, activation="relu")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("parnet_l.pth.tar", "parnet_l"),
        ("a/b/parnet_l.fused.safetensors", "parnet_l"),
        ("net.onnx", "net"),
        ("v1.2.pth", "v1.2"),
        (".pth", ".pth"),
    ],
)
def test_a_file_gives_its_name_without_the_suffixes(file, name, tmp_path):
    assert name_of_file(tmp_path / file) == name
