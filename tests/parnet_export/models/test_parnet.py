from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.nn import functional

from parnet_export.models.parnet import (
    ParNet,
    ParNetConfig,
    config_from_tensors,
    detect_activation,
    is_fused_state,
    is_parnet,
)

SMALL = ParNetConfig((8, 12, 20), (2, 1, 3), 24, num_classes=10)
FOUR_STREAMS = ParNetConfig((8, 12, 14, 22), (1, 2, 1, 1), 24, num_classes=10)
TWO_STREAMS = ParNetConfig((8, 12), (2, 1), 24, num_classes=10, activation="relu")
ONE_STREAM = ParNetConfig((12,), (3,), 20, num_classes=10, stem=(4, 6, 8, 12))
ONE_CIFAR = ParNetConfig((12,), (2,), 20, num_classes=10, variant="cifar")
SHORT_STEM = ParNetConfig((8, 12, 20), (1, 2, 1), 24, num_classes=10, stem=(8,))
CIFAR = ParNetConfig((8, 16, 32), (1, 1, 2), 24, num_classes=10, variant="cifar")
ALL = [SMALL, FOUR_STREAMS, TWO_STREAMS, ONE_STREAM, ONE_CIFAR, SHORT_STEM, CIFAR]


def forward_by_the_specification(state, image, config):
    """ParNet's forward pass written from the published description with functional calls only."""

    def norm(x, prefix):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{prefix}.{key}"] for key in keys)
        return functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def act(x):
        return x * torch.sigmoid(x) if config.activation == "silu" else x.clamp(min=0)

    def branches(x, prefix, stride, groups):
        dense = functional.conv2d(
            x, state[f"{prefix}.rbr_dense.conv.weight"], None, stride, 1, 1, groups
        )
        total = norm(dense, f"{prefix}.rbr_dense.bn")
        inner = f"{prefix}.rbr_1x1" if stride == 1 else f"{prefix}.rbr_1x1.1"
        pooled = x if stride == 1 else functional.avg_pool2d(x, 2, 2)
        one = functional.conv2d(pooled, state[f"{inner}.conv.weight"], groups=groups)
        return total + norm(one, f"{inner}.bn")

    def gate(x, prefix, groups):
        pooled = functional.adaptive_avg_pool2d(x, 1)
        weight = state[f"{prefix}.se.cvsig.conv.weight"]
        return torch.sigmoid(functional.conv2d(pooled, weight, groups=groups))

    def down(x, prefix, stride=2, groups=1):
        prefix = f"{prefix}.block"
        out = act(branches(x, prefix, stride, groups) * 2 * gate(x, prefix, groups))
        if groups == 1:
            return out
        half = out.shape[1] // 2
        return torch.stack((out[:, :half], out[:, half:]), 2).flatten(1, 2)

    def skip(x, prefix):
        prefix = f"{prefix}.block"
        identity = norm(x, f"{prefix}.rbr_identity")
        return act(branches(x, prefix, 1, 1) + identity * gate(identity, prefix, 1))

    def fusion(first, second, prefix, stride):
        pair = norm(first, f"{prefix}.0.b1"), norm(second, f"{prefix}.0.b2")
        interleaved = torch.stack(pair, 2).flatten(1, 2)
        return down(interleaved, f"{prefix}.2", stride, 2)

    last = len(config.widths) - 1
    if config.variant == "imagenet":
        features = [image]
        for index in range(len(config.stem)):
            features = [down(features[0], f"inits.0.{index}")]
    else:
        features = [skip(skip(down(image, "inits.0.0", 1), "inits.0.1"), "inits.0.2")]
    for index in range(1, last + 1):
        features.append(down(features[-1], f"inits.{index}"))
    for index, blocks in enumerate(config.blocks):
        for block in range(blocks):
            features[index] = skip(features[index], f"streams.{index}.{block}")
    path, final = features[0], "combine.0"
    if last:
        path, final = down(path, "downsamples_2.0"), "combine.3"
        for index in range(1, last):
            path = fusion(features[index], path, f"downsamples_2.{index}", 2)
        path = fusion(features[last], path, "combine", 1)
    if config.variant == "imagenet":
        path = down(path, final)
    else:
        conv = functional.conv2d(path, state[f"{final}.block.conv.weight"])
        path = act(norm(conv, f"{final}.block.bn"))
    pooled = path.mean((2, 3))
    return pooled @ state["head.fc.weight"].T + state["head.fc.bias"]


@pytest.mark.parametrize("config", ALL, ids=str)
def test_the_training_form_computes_what_the_specification_says(config, make_parnet):
    network = make_parnet(config).double()
    pixels = 2 * config.input_multiple
    image = torch.randn(2, 3, pixels, pixels, dtype=torch.float64)
    expected = forward_by_the_specification(network.state_dict(), image, config)
    difference = (network(image) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-13


def test_state_dicts_have_the_sizes_of_the_authors_networks():
    config = ParNetConfig((96, 192, 384), (4, 5, 5), 1280)
    with torch.device("meta"):
        assert len(ParNet(config).state_dict()) == 378
        assert len(ParNet(config, fused=True).state_dict()) == 158


def test_state_dict_keys_are_those_of_the_authors_code():
    with torch.device("meta"):
        network = ParNet(ParNetConfig((128, 256, 512), (4, 5, 5), 2048))
    state = network.state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def block(prefix, stride, *, skip):
        one = "rbr_1x1" if stride == 1 else "rbr_1x1.1"
        for branch in ("rbr_dense", one):
            yield f"{prefix}.block.{branch}.conv.weight"
            yield from (f"{prefix}.block.{branch}.bn.{key}" for key in norm)
        if skip:
            yield from (f"{prefix}.block.rbr_identity.{key}" for key in norm)
        yield f"{prefix}.block.se.cvsig.conv.weight"

    expected = {"head.fc.weight", "head.fc.bias"}
    for prefix in ("inits.0.0", "inits.0.1", "inits.1", "inits.2", "downsamples_2.0", "combine.3"):
        expected |= set(block(prefix, 2, skip=False))
    expected |= set(block("downsamples_2.1.2", 2, skip=False))
    expected |= set(block("combine.2", 1, skip=False))
    for stream, blocks in enumerate((4, 5, 5)):
        for index in range(blocks):
            expected |= set(block(f"streams.{stream}.{index}", 1, skip=True))
    for pair, member, key in itertools.product(
        ("downsamples_2.1.0", "combine.0"), ("b1", "b2"), norm
    ):
        expected.add(f"{pair}.{member}.{key}")
    assert set(state) == expected
    assert state["downsamples_2.1.2.block.rbr_dense.conv.weight"].shape == (512, 256, 3, 3)
    assert state["downsamples_2.1.2.block.se.cvsig.conv.weight"].shape == (512, 256, 1, 1)
    assert state["combine.2.block.rbr_dense.conv.weight"].shape == (512, 512, 3, 3)


@pytest.mark.parametrize("config", ALL, ids=str)
def test_the_structure_is_read_off_the_tensors_of_both_forms(config, make_parnet):
    network = make_parnet(config)
    fused = network.fuse()
    for form, is_fused in ((network, False), (fused, True)):
        state = form.state_dict()
        assert is_parnet(state)
        assert is_fused_state(state) is is_fused
        assert config_from_tensors(state, config.activation) == config
        again = ParNet(config, fused=is_fused)
        assert again.load_state_dict(state, strict=True) is not None


def test_a_missing_tensor_that_fixes_the_structure_is_named(make_parnet):
    state = make_parnet(SMALL).state_dict()
    del state["head.fc.weight"]
    with pytest.raises(ValueError, match=re.escape("head.fc.weight")):
        config_from_tensors(state, "silu")


def test_a_gap_in_the_numbering_of_streams_is_refused(make_parnet):
    state = {
        key: tensor
        for key, tensor in make_parnet(SMALL).state_dict().items()
        if not key.startswith("streams.1.")
    }
    with pytest.raises(ValueError, match="gaps"):
        config_from_tensors(state, "silu")


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_activation_is_told_from_what_the_skip_branches_saw(activation, make_parnet):
    config = ParNetConfig((8, 12, 20), (2, 1, 3), 24, num_classes=10, activation=activation)
    network = make_parnet(config).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.bias -= 0.5  # so that SiLU's negative part is in use, as training leaves it
    torch.manual_seed(0)
    for _ in range(30):
        network(torch.randn(8, 3, 64, 64))
    found, reason = detect_activation(network.state_dict())
    assert found == activation
    # Skip branches: 2 x 8 + 1 x 12 + 3 x 20 channels; pairs before fusions: 2 x 12 + 2 x 20.
    assert "of 152 running means" in reason


def test_without_statistics_the_papers_activation_is_taken():
    found, reason = detect_activation(ParNet(SMALL).state_dict())
    assert found == "silu"
    assert "no statistics" in reason


@pytest.mark.parametrize(
    "bad",
    [
        {"widths": (), "blocks": ()},
        {"widths": (8,), "blocks": (1,), "stem": (8, 6)},
        {"widths": (8,), "blocks": (1,), "stem": (4, 8), "variant": "cifar"},
        {"widths": (8, 12), "blocks": (1,)},
        {"widths": (8, 13), "blocks": (1, 1)},
        {"widths": (8, 12), "blocks": (1, 0)},
        {"widths": (8, 12), "blocks": (1, 1), "num_classes": 0},
    ],
    ids=str,
)
def test_impossible_structures_are_refused(bad):
    with pytest.raises(ValueError, match=r"stream|positive|even|stem"):
        ParNetConfig(**{"last_width": 16, **bad})


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        (SMALL, 32),
        (FOUR_STREAMS, 64),
        (TWO_STREAMS, 16),
        (ONE_STREAM, 32),
        (SHORT_STEM, 16),
        (CIFAR, 4),
    ],
    ids=str,
)
def test_the_training_form_runs_at_every_input_multiple_and_not_between(
    config, multiple, make_parnet
):
    network = make_parnet(config)
    assert config.input_multiple == multiple
    for factor in (1, 2, 3):
        pixels = factor * multiple
        assert network(torch.randn(1, 3, pixels, pixels)).shape == (1, 10)
    odd = 2 * multiple + multiple // 2
    with pytest.raises(RuntimeError, match="must match"):
        network(torch.randn(1, 3, odd, odd))
