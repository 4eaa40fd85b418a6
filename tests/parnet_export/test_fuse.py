from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.fuse import fuse, fuse_network, prove_fusion
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.parnet import ParNet, ParNetConfig
from parnet_export.models.parnet_full import ParNetFull, quarters, regrouped_order
from parnet_export.source import load_network

LEVELS = ("repvgg", "full")
NARROW = {  # ParNet-S, -L and CIFAR with a quarter of the channels or less
    "s": ParNetConfig((24, 48, 96), (4, 5, 5), 320),
    "l": ParNetConfig((40, 80, 160), (4, 5, 5), 640),
    "cifar": ParNetConfig((16, 32, 64), (3, 4, 4), 80, variant="cifar"),
}
# Every pair of values of two factors occurs: size, activation, classes, batch, resolution.
PAIRWISE = [
    ("s", "silu", 1000, 1, 224),
    ("s", "relu", 10, 2, 256),
    ("s", "silu", 10, 7, 320),
    ("l", "relu", 1000, 7, 224),
    ("l", "silu", 10, 1, 256),
    ("l", "relu", 1000, 2, 320),
    ("cifar", "silu", 10, 2, 224),
    ("cifar", "relu", 1000, 1, 320),
    ("cifar", "silu", 1000, 7, 256),
    ("s", "relu", 1000, 1, 320),
    ("cifar", "relu", 10, 7, 224),
]


def difference(actual, reference):
    return float((actual - reference).abs().max() / reference.abs().max())


def with_settings(config, activation, classes):
    return ParNetConfig(
        config.widths,
        config.blocks,
        config.last_width,
        num_classes=classes,
        activation=activation,
        variant=config.variant,
    )


@pytest.mark.parametrize(("size", "activation", "classes", "batch", "pixels"), PAIRWISE)
def test_fused_networks_compute_the_same(size, activation, classes, batch, pixels, make_parnet):
    config = with_settings(NARROW[size], activation, classes)
    network = make_parnet(config, seed=batch)
    image = torch.randn(batch, 3, pixels, pixels)
    if size == "cifar":
        image = image[..., : pixels // 4, : pixels // 4]
    single = network(image)
    exact = copy.deepcopy(network).double()
    reference = exact(image.double())
    for level in LEVELS:
        assert difference(fuse(exact, level)(image.double()), reference) <= 1e-10
        assert difference(fuse(network, level)(image), single) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("name", ["parnet-s", "parnet-m", "parnet-l", "parnet-xl"])
@pytest.mark.parametrize("pixels", [224, 256, 320])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_real_sizes_compute_the_same_when_fused(
    name, activation, classes, batch, pixels, make_parnet
):
    config = with_settings(load_network(name).config, activation, classes)
    network = make_parnet(config, seed=batch)
    image = torch.randn(batch, 3, pixels, pixels)
    single = network(image)
    for level in LEVELS:
        assert difference(fuse(network, level)(image), single) <= 1e-5
    if batch == 1 and pixels == 224:
        exact = network.double()
        reference = exact(image.double())
        for level in LEVELS:
            assert difference(fuse(exact, level)(image.double()), reference) <= 1e-10


@st.composite
def structures(draw):
    streams = draw(st.integers(1, 4))
    widths = [draw(st.integers(1, 9))] + [2 * draw(st.integers(1, 7)) for _ in range(streams - 1)]
    variant = draw(st.sampled_from(["imagenet", "cifar"]))
    before = draw(st.lists(st.integers(1, 8), max_size=2)) if variant == "imagenet" else []
    return ParNetConfig(
        tuple(widths),
        tuple(draw(st.integers(1, 2)) for _ in range(streams)),
        draw(st.integers(1, 12)),
        num_classes=draw(st.integers(1, 5)),
        activation=draw(st.sampled_from(["silu", "relu"])),
        variant=variant,
        stem=(*before, widths[0]),
    )


@settings(max_examples=40, deadline=None)
@given(config=structures(), seed=st.integers(0, 1000), height=st.integers(1, 2))
def test_any_structure_fuses_exactly(config, seed, height):
    torch.manual_seed(seed)
    network = ParNet(config).double().eval()
    randomise_batch_norm(network, torch.Generator().manual_seed(seed))
    side = config.input_multiple
    image = torch.randn(2, 3, height * side, 2 * side, dtype=torch.float64)
    with torch.no_grad():
        reference = network(image)
        for level in LEVELS:
            assert difference(fuse(network, level)(image), reference) <= 1e-10
        assert difference(fuse(fuse(network, "repvgg"), "full")(image), reference) <= 1e-10


def test_fusing_leaves_the_original_as_it_was(make_parnet):
    network = make_parnet(NARROW["cifar"])
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for level in LEVELS:
        fused = fuse(network, level)
        for parameter in fused.parameters():
            parameter.data.add_(1)
        for buffer in fused.buffers():
            buffer.add_(1)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_extreme_batch_norm_keeps_its_affine_step_and_stays_exact(make_parnet):
    network = make_parnet(NARROW["cifar"]).double()
    pair = network.downsamples_2[1][0]
    pair.b1.weight.data[3] = 1e-6  # t / s of a million standard deviations
    pair.b2.weight.data[5] = 0.0  # no t / s at all
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = fuse(network, "full")
    assert isinstance(fused, ParNetFull)
    assert fused.affine == {"stream_parts.0", "path_parts.0"}
    assert difference(fused(image), network(image)) <= 1e-10


def test_ordinary_batch_norms_need_no_affine_step(make_parnet):
    assert fuse(make_parnet(NARROW["s"]), "full").affine == frozenset()


@pytest.mark.parametrize("channels", [2, 4, 6, 10, 16, 34])
def test_swapping_quarters_gives_each_group_the_channels_of_the_shuffle(channels):
    half = channels // 2
    shuffled = torch.stack((torch.arange(half), torch.arange(half, channels)), 1).flatten()
    first, second, third, fourth = torch.split(torch.arange(channels), quarters(channels))
    regrouped = torch.cat((first, third, second, fourth))
    # The same channels meet in each half, and the order names their places in the shuffle.
    assert set(regrouped[:half].tolist()) == set(shuffled[:half].tolist())
    assert torch.equal(shuffled[regrouped_order(channels)], regrouped)


def test_the_walk_of_reparameterising_tools_fuses_our_blocks(make_parnet):
    """Tools such as timm replace every child that has `fuse` by what it returns."""

    def walk(module):
        for name, child in module.named_children():
            if hasattr(child, "fuse"):
                setattr(module, name, child.fuse())
            else:
                walk(child)

    network = make_parnet(NARROW["cifar"])
    image = torch.randn(2, 3, 32, 32)
    reference = network(image)
    copied = copy.deepcopy(network)
    walk(copied)
    assert copied.is_fused
    assert not network.is_fused
    assert difference(copied(image), reference) <= 1e-5
    assert copied.state_dict().keys() == fuse(network, "repvgg").state_dict().keys()


def test_the_proof_holds_for_an_exact_fusion_and_fails_for_a_wrong_one():
    network = load_network("parnet-cifar-1.3m", seed=3)
    fused = fuse_network(network, "full")
    proof = prove_fusion(network, fused)
    assert proof.holds
    assert 0 < proof.float32_error <= 1e-5
    fused.module.fc.bias.data[0] += 0.05
    assert not prove_fusion(network, fused).holds


def test_a_proof_with_nan_does_not_hold():
    network = load_network("parnet-cifar-1.3m")
    fused = fuse_network(network, "repvgg")
    fused.module.head.fc.bias.data[0] = float("nan")
    assert not prove_fusion(network, fused).holds


def test_a_fused_network_is_not_fused_back():
    network = fuse_network(load_network("parnet-cifar-1.3m"), "full")
    assert fuse_network(network, "full") is network
    with pytest.raises(ValueError, match="already fused at level full"):
        fuse_network(network, "repvgg")


def test_a_module_of_no_family_is_refused():
    with pytest.raises(ValueError, match="Linear"):
        fuse(torch.nn.Linear(2, 2), "full")


def test_a_classifier_of_zeros_is_still_proven():
    network = load_network("parnet-cifar-1.3m")
    network.module.head.fc.weight.data.zero_()
    network.module.head.fc.bias.data.zero_()
    proof = prove_fusion(network, fuse_network(network, "full"))
    assert proof.holds
    assert proof.float64_error == 0
