from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from parnet_export.errors import InputError
from parnet_export.export import export_network, export_onnx
from parnet_export.fuse import fuse, fuse_network
from parnet_export.models.parnet import ParNetConfig
from parnet_export.source import load_network

SMALL = ParNetConfig((8, 12, 20), (2, 1, 3), 24, num_classes=10)


def run(model, image):
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": image.numpy()})[0]


def difference(actual, reference):
    return np.abs(actual - reference).max() / np.abs(reference).max()


def test_a_dynamic_batch_takes_every_batch(make_parnet):
    network = make_parnet(SMALL)
    model = export_onnx(fuse(network, "full"), resolution=64, batch=None, name="small")
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    assert str(model.graph.outputs[0].shape[0]) == "batch"
    for batch in (1, 2, 7):
        image = torch.randn(batch, 3, 64, 64)
        assert difference(run(model, image), network(image).numpy()) <= 1e-4


@pytest.mark.parametrize("name", ["parnet-s", "parnet-cifar-1.3m"])
@pytest.mark.parametrize("batch", [1, None])
def test_a_fully_fused_graph_holds_neither_batch_norm_nor_reordering(name, batch):
    network = fuse_network(load_network(name), "full")
    model = export_network(network, batch=batch)
    kinds = Counter(node.op_type for node in model.graph)
    assert not kinds.keys() & {"BatchNormalization", "Transpose", "Reshape"}
    # One regrouping remains between the two fusions.
    assert (kinds["Split"], kinds["Concat"]) == (1, 1)


def test_nodes_and_tensors_are_named_after_their_modules(make_parnet):
    model = export_onnx(fuse(make_parnet(SMALL), "full"), resolution=64, batch=1, name="small")
    assert model.graph.name == "small"
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    assert "streams.2.1.conv/Conv" in names
    convolution = next(node for node in model.graph if node.name == "streams.2.1.conv/Conv")
    assert convolution.outputs[0].name == "streams.2.1.conv/Conv"
    assert convolution.inputs[1].name == "streams.2.1.conv.weight"


def test_no_trace_of_the_exporting_machine_is_left(make_parnet):
    model = export_onnx(make_parnet(SMALL), resolution=64, batch=1, name="small")
    text = ir.to_proto(model).SerializeToString()
    assert b"site-packages" not in text
    assert b".py" not in text


@pytest.mark.parametrize(
    ("pixels", "advice"), [(100, "Use 96 or 128"), (31, "Use 32 or 64"), (-32, "Use 32 or 64")]
)
def test_a_resolution_that_the_network_cannot_take_is_refused(pixels, advice):
    network = load_network("parnet-s")
    with pytest.raises(InputError, match=f"multiple of 32 pixels.*{advice}"):
        export_network(network, resolution=pixels)


def test_a_batch_of_no_images_is_refused():
    with pytest.raises(InputError, match="--batch"):
        export_network(load_network("parnet-cifar-1.3m"), batch=0)
