from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parnet_export.catalogue.census import take_census
from parnet_export.checkpoints.checkpoint import write_safetensors
from parnet_export.export import export_onnx
from parnet_export.fuse import fuse, fuse_network, prove_fusion
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.catalog import CATALOG
from parnet_export.models.seqconv import ConvUnit, SeqConv, SeqConvNet, build_seqconv
from parnet_export.models.seqconv_config import SeqConvConfig, SeqShape
from parnet_export.models.seqconv_fused import Rectifier, SeqConvFull, WideSeqConv
from parnet_export.network import Header
from parnet_export.source import load_network

LEVELS = ("repvgg", "full")
SMALL = {
    "plain": SeqConvConfig("cifar", "plain", (16, 32, 40), (2, 1, 3), (4, 8, 8), (1, 1, 1), 7),
    "bottleneck": SeqConvConfig(
        "imagenet", "bottleneck", (16, 32, 48), (1, 2, 1), (4, 8, 16), (1, 1, 1), 7
    ),
    "grouped": SeqConvConfig(
        "imagenet", "grouped", (16, 32, 40), (2, 1, 2), (4, 8, 8), (2, 4, 2), 7, aliased=True
    ),
    "dense": SeqConvConfig(
        "cifar", "bottleneck", (16, 24), (2, 1), (8, 8), (1, 1), 7, windowed=False
    ),
    # Filters of the transition that read nothing of the layer's own input any more.
    "steep": SeqConvConfig("cifar", "plain", (8, 32), (1, 2), (4, 8), (1, 1), 7),
}


def _random_network(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    net = build_seqconv(config).to(dtype)
    randomise_batch_norm(net, torch.Generator().manual_seed(seed))
    return net.requires_grad_(requires_grad=False)


def _difference(found, reference):
    return float((found - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 33, 23), (7, 8, 16)])
def test_fused_networks_compute_the_same(config, batch, height, width):
    single = _random_network(config, torch.float32, seed=batch)
    exact = copy.deepcopy(single).double()
    images = torch.randn(batch, 3, height, width)
    reference, expected = exact(images.double()), single(images)
    for level in LEVELS:
        assert _difference(fuse(exact, level)(images.double()), reference) <= 1e-10
        assert _difference(fuse(single, level)(images), expected) <= 1e-5
    both = fuse(fuse(exact, "repvgg"), "full")
    assert _difference(both(images.double()), reference) <= 1e-10


@st.composite
def structures(draw):
    kind = draw(st.sampled_from(["plain", "bottleneck", "grouped"]))
    stages = draw(st.integers(1, 3))
    ks = [draw(st.sampled_from([1, 2, 4, 6]))]
    widths = [ks[0] * draw(st.integers(1, 4))]
    for _ in range(stages - 1):
        widths.append(widths[-1] + ks[-1] * draw(st.integers(1, 5)))
        ks.append(draw(st.sampled_from([k for k in range(1, 9) if widths[-1] % k == 0])))
    groups = [
        draw(st.sampled_from([c for c in (1, 2, 3) if k % c == 0])) if kind == "grouped" else 1
        for k in ks
    ]
    windowed = draw(st.booleans())
    return SeqConvConfig(
        draw(st.sampled_from(["cifar", "imagenet"])),
        kind,
        tuple(widths),
        tuple(draw(st.integers(1, 3)) for _ in range(stages)),
        tuple(ks),
        tuple(groups),
        draw(st.integers(1, 4)),
        windowed,
        aliased=windowed and draw(st.booleans()),
    )


@settings(max_examples=20, deadline=None)
@given(config=structures(), seed=st.integers(0, 1000), height=st.integers(1, 12))
def test_any_structure_fuses_exactly(config, seed, height):
    net = _random_network(config, seed=seed)
    images = torch.randn(2, 3, height, 9, dtype=torch.float64)
    reference = net(images)
    for level in LEVELS:
        assert _difference(fuse(net, level)(images), reference) <= 1e-10
    assert _difference(fuse(fuse(net, "repvgg"), "full")(images), reference) <= 1e-10


def test_level_repvgg_folds_every_normalisation_that_nobody_reads_around():
    with torch.device("meta"):
        net = SeqConvNet(CATALOG["seqresnet-b22"][1].config, folded=True)
    forms = Counter(module.form for module in net.modules() if isinstance(module, ConvUnit))
    # 175 in all; of the second layers' 3x3s, 24 are in the last block of their stage. The
    # rest of them and the four convolutions of stride 2 hand their raw output on.
    assert forms == {"folded": 139, "scaled": 24, "normalised": 8 + 4}
    folded = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert len(folded) == 139 + 24


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_level_full_holds_no_normalisation(config):
    fused = fuse(_random_network(config), "full")
    assert isinstance(fused, SeqConvFull)
    assert fused.affine == frozenset()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_an_extreme_batch_norm_keeps_its_affine_step_and_stays_exact():
    net = _random_network(SMALL["bottleneck"])
    layer = net.get_submodule("Stage2.0.LayerB")
    layer.Filters[1].TransformationLayer.BatchNormalizationLayer.weight[2] = 0.0
    layer.Filters[3].TransformationLayer.BatchNormalizationLayer.weight[5] = 1e-6
    net.ShrinkingLayer.BatchNormalizationLayer.running_mean[0] = 1e3
    # Nobody reads the raw output of a stage's last block, so any scale folds there.
    last = net.get_submodule("Stage2.1.LayerB")
    last.Filters[0].TransformationLayer.BatchNormalizationLayer.weight[0] = 0.0
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    reference = net(images)
    for source in (net, fuse(net, "repvgg")):
        fused = fuse(source, "full")
        assert fused.affine == {
            "stages.1.0.second.acts.1",
            "stages.1.0.second.acts.3",
            "shrink.act",
        }
        steps = [m for m in fused.modules() if isinstance(m, Rectifier) and m.scale is not None]
        assert len(steps) == 3
        assert _difference(fused(images), reference) <= 1e-10


def _layer_macs(module, images):
    """Count multiply-accumulates of each convolution while a module runs."""
    macs = Counter()

    def count(name):
        def hook(conv, _inputs, output):
            macs[name] += output[0].numel() * conv.weight[0].numel()

        return hook

    for name, conv in module.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(count(name))
    module(images)
    return macs


@pytest.mark.parametrize(("groups", "percent"), [(4, 62.5), (8, 56.25), (16, 53.125)])
@pytest.mark.parametrize("kind", ["plain", "bottleneck"])
def test_the_share_of_work_that_leaves_the_chain_is_the_formula(groups, percent, kind):
    shape = SeqShape(kind, 2 * groups, 2 * groups, filter_width=2)
    images = torch.randn(1, 2 * groups, 5, 5)
    before = _layer_macs(SeqConv(shape), images)
    after = _layer_macs(WideSeqConv(shape), images)
    reads_view = {name: macs for name, macs in before.items() if "TransformationLayer" not in name}
    in_chain = sum(macs for name, macs in after.items() if name.startswith("updates"))
    share = 1 - in_chain / sum(reads_view.values())
    assert len(reads_view) == groups
    assert share == (groups + 1) / (2 * groups) == percent / 100
    # What has left is one convolution; the filters' own 3x3s stay as they were.
    left = {name for name in after if not name.startswith(("updates", "closing"))}
    assert left == {"wide"}
    own = sum(macs for name, macs in before.items() if "TransformationLayer" in name)
    assert sum(macs for name, macs in after.items() if name.startswith("closing")) == own


def test_a_dense_layers_wide_convolution_multiplies_no_zeros():
    shape = SeqShape("plain", 6, 8, filter_width=2, windowed=False)
    before = _layer_macs(SeqConv(shape), torch.randn(1, 6, 4, 4))
    after = _layer_macs(WideSeqConv(shape), torch.randn(1, 6, 4, 4))
    assert sum(after.values()) == sum(before.values())


@pytest.mark.parametrize("name", ["seqresnet-k8r4", "seqresnet-b22"])
def test_fusing_makes_no_chain_longer(name):
    family, entry = CATALOG[name]
    depths = set()
    for level in ("none", *LEVELS):
        with torch.device("meta"):
            module = family.build(entry.config, level, ())
        depths.add(take_census(module, 32).depth)
    assert len(depths) == 1


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_fusing_leaves_the_original_as_it_was(config):
    net = _random_network(config).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    for level in LEVELS:
        fused = fuse(net, level)
        assert not fused.training
        for tensor in fused.state_dict().values():
            tensor.zero_()
    after = net.state_dict()
    assert net.training
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_fully_fused_module_is_not_fused_back():
    fused = fuse(_random_network(SMALL["dense"]), "full")
    assert fuse(fused, "full") is fused
    with pytest.raises(ValueError, match="already fused at level full"):
        fuse(fused, "repvgg")


@pytest.mark.parametrize("level", LEVELS)
def test_a_fused_network_comes_back_from_its_file(level, tmp_path):
    network = fuse_network(load_network("seqresnet-k8r4", seed=3), level)
    path = tmp_path / "seqresnet.safetensors"
    write_safetensors(path, network.module.state_dict(), Header.of(network).encode())
    loaded = load_network(path)
    assert (loaded.level, loaded.config) == (level, network.config)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.module(images), network.module(images))


def test_affine_steps_come_back_from_a_file(tmp_path):
    network = load_network("seqresnet-k8r4")
    network.module.Head.Filters[2].BatchNormalizationLayer.weight[1] = 0.0
    fused = fuse_network(network, "full")
    assert fused.module.affine == {"head.acts.2"}
    path = tmp_path / "seqresnet.safetensors"
    write_safetensors(path, fused.module.state_dict(), Header.of(fused).encode())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_network(path).module(images), fused.module(images))


def test_the_proof_of_a_fusion_holds_and_fails_for_a_wrong_one():
    network = load_network("seqresnet-k8r4", seed=1)
    for level in LEVELS:
        assert prove_fusion(network, fuse_network(network, level)).holds
    wrong = fuse_network(network, "full")
    wrong.module.stages[1][0].second.shortcut_scale *= 1.01
    assert not prove_fusion(network, wrong).holds


@pytest.mark.parametrize(
    "config",
    [
        SeqConvConfig("cifar", "plain", (16, 24), (2, 1), (8, 8), (1, 1), 7),
        SeqConvConfig("imagenet", "grouped", (8, 16), (1, 1), (4, 8), (2, 4), 7, aliased=True),
    ],
    ids=["plain", "grouped"],
)
@pytest.mark.parametrize("level", LEVELS)
def test_the_exported_graph_computes_the_same(config, level):
    net = _random_network(config, torch.float32)
    model = export_onnx(fuse(net, level), resolution=16, batch=None, name="seqconv")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16)
        found = session.run(None, {"image": images.numpy()})[0]
        reference = net(images).numpy()
        assert np.abs(found - reference).max() <= 1e-4 * np.abs(reference).max()
    kinds = Counter(node.op_type for node in model.graph)
    if level == "full":
        assert not kinds.keys() & {"BatchNormalization", "Reshape", "Transpose"}
