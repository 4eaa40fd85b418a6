"""What a graph's torch calls work on: one device, and the layout that its kernels want."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parnet_engines.runtimes.torch_graph import TorchGraph
from parnet_export.checkpoints.checkpoint import write_safetensors
from parnet_export.models.catalog import FAMILIES
from parnet_export.models.resnet import ResNetConfig
from parnet_export.models.seqconv_config import SeqConvConfig
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network

NETWORKS = {
    "resnet": ResNetConfig("basic", (1, 1), 16, 10, gated=True, activation="silu"),
    "seqconv": SeqConvConfig("cifar", "bottleneck", (32, 48), (1, 1), (16, 16), (1, 1), 10),
}


class Calls(TorchDispatchMode):
    """Notes the tensors of every call of a torch operator."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.seen.append((function.name(), _tensors((args, kwargs)), _tensors(found)))
        return found


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def parnet():
    return export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch=1)


def run(bundle, segment, device, *, channels_last):
    """Return the calls of one execution."""
    graph = TorchGraph(
        bundle.segment_path(segment.name), segment.name, device, channels_last=channels_last
    )
    inputs = {
        spec.name: torch.ones(spec.resolve({}), dtype=getattr(torch, spec.dtype), device=device)
        for spec in segment.inputs
    }
    with torch.inference_mode(), Calls() as calls:
        graph(inputs)
    return calls.seen


def calls_elsewhere(bundle, *, channels_last):
    """Run everything on the meta device, which has no numbers that the host could wait for.

    Returns the calls that work on another one too.
    """
    return [
        f"{segment.name}: {name}"
        for segment in bundle.stream_graph.segments
        for name, given, found in run(bundle, segment, "meta", channels_last=channels_last)
        if {tensor.device.type for tensor in (*given, *found)} != {"meta"}
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_forward_stays_on_its_device_and_never_waits(tmp_path, parnet, precision):
    bundle, _ = make_bundle(*parnet, tmp_path / "b", precision=precision, prove=False)
    assert calls_elsewhere(bundle, channels_last=precision == "fp16") == []


@pytest.mark.parametrize("key", NETWORKS)
def test_other_families_stay_on_their_device(tmp_path, key):
    path = tmp_path / "network.safetensors"
    write_safetensors(path, FAMILIES[key].build(NETWORKS[key], "none", ()).state_dict(), {})
    model, provenance = export_graph(load_network(path), resolution=32, batch=1)
    bundle, _ = make_bundle(model, provenance, tmp_path / "b", precision="fp16", prove=False)
    assert calls_elsewhere(bundle, channels_last=True) == []


def test_convolutions_of_half_precision_read_channels_last(tmp_path, parnet):
    bundle, _ = make_bundle(*parnet, tmp_path / "b", precision="fp16", prove=False)
    operands = [
        (segment.name, tensor)
        for segment in bundle.stream_graph.segments
        for name, given, _ in run(bundle, segment, "cpu", channels_last=True)
        if "conv" in name
        for tensor in given
        if tensor.dim() == 4
    ]
    assert len(operands) > 40
    for segment, tensor in operands:
        assert tensor.is_contiguous(memory_format=torch.channels_last), segment
