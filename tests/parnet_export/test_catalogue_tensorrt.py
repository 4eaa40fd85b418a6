"""TensorRT-RTX takes a network of each family in half precision; building needs no GPU."""

from __future__ import annotations

import pytest
import torch

from parnet_export.checkpoints.checkpoint import write_safetensors
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.models.parnet import ParNetConfig
from parnet_export.models.parnet_ensemble import EnsembleConfig
from parnet_export.models.resnet import ResNetConfig
from parnet_export.models.seqconv_config import SeqConvConfig
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network

pytestmark = pytest.mark.tensorrt

NETWORKS = {
    "parnet": ("parnet", ParNetConfig((16, 32, 64), (1, 2, 1), 64, 10)),
    "ensemble": ("parnet-ensemble", EnsembleConfig((32,), (2,), 64, 10, stem=(16, 32))),
    "resnet": ("resnet", ResNetConfig("basic", (1, 1, 1), 16, 10)),
    "gated resnet": (
        "resnet",
        ResNetConfig("basic", (1, 1), 16, 10, gated=True, activation="silu"),
    ),
    "seqconv": (
        "seqconv",
        SeqConvConfig("cifar", "bottleneck", (32, 48), (1, 1), (16, 16), (1, 1), 10),
    ),
}

REAL = ("parnet-s", "parnet-m-one-stream-x2", "resnet18", "seqresnet-b-k16r7")


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx cannot be imported: pip install tensorrt-rtx"
    )


def test_every_family_is_built():
    """Of detectors see test_detectors_tensorrt.py, which also builds their boxes."""
    classifiers = {key for key, family in FAMILIES.items() if not family.anchor_levels}
    assert {key for key, _ in NETWORKS.values()} == classifiers
    assert {CATALOG[name][0].key for name in REAL} == classifiers


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_graph_in_half_precision_is_parsed_and_built(trt, kind, tmp_path):
    key, config = NETWORKS[kind]
    torch.manual_seed(0)
    path = tmp_path / "network.safetensors"
    write_safetensors(path, FAMILIES[key].build(config, "none", ()).state_dict(), {})
    engine = _build(trt, load_network(path), 64, tmp_path / "a.bundle")
    assert engine.nbytes > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_network_of_each_family_is_built_in_its_real_size(trt, name, tmp_path):
    network = load_network(name)
    engine = _build(trt, network, network.resolution, tmp_path / "a.bundle")
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    assert engine.nbytes > parameters  # two bytes each, of almost all of them


def _build(trt, network, resolution, path):
    """Return the engine of a network in half precision."""
    model, provenance = export_graph(network, resolution=resolution, batch=1)
    bundle, _ = make_bundle(model, provenance, path, precision="fp16", prove=False)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse_from_file(str(bundle.whole_path))
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    assert parsed, errors
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    # Gates act on averages, which stay in single precision; everything on maps is half.
    maps = [layer for layer in convolutions if layer.get_output(0).shape[-1] > 1]
    assert maps
    assert {layer.get_output(0).dtype for layer in maps} == {trt.float16}
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    assert engine is not None
    return engine
