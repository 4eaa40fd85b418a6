"""The whole way, from a network to a split bundle, over the grid that users meet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from parnet_export.bundle import Provenance, open_bundle
from parnet_export.errors import InputError
from parnet_export.export import export_onnx
from parnet_export.fuse import fuse
from parnet_export.images.input_form import INPUT_FORM_KEY, LETTERBOX, encode_form
from parnet_export.models.parnet import ParNetConfig
from parnet_export.pipeline import beside, count_classes, export_graph, make_bundle, read_graph
from parnet_export.source import load_network

SEGMENTS = ("stem1", "stem2", "stream1", "stream2", "stream3", "fusion", "head")
WIDTHS = {"s": (24, 48, 96), "l": (40, 80, 160)}


def difference(actual, reference):
    return np.abs(actual - reference).max() / np.abs(reference).max()


def run(path, feeds, names=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(names, feeds)


def run_split(bundle, image):
    """Run the segments one after another, each as ONNX Runtime optimises it."""
    known = {"image": image}
    for segment in bundle.stream_graph.segments:
        feeds = {tensor.name: known[tensor.name] for tensor in segment.inputs}
        names = [tensor.name for tensor in segment.outputs]
        known |= dict(zip(names, run(bundle.segment_path(segment.name), feeds, names), strict=True))
    return known["logits"]


def check(network, level, batch, pixels, folder):
    module = network if level == "none" else fuse(network, level)
    model = export_onnx(module, resolution=pixels, batch=batch, name="grid")
    bundle, _ = make_bundle(model, Provenance(network="grid", source="test"), folder / "b.bundle")
    assert tuple(segment.name for segment in bundle.stream_graph.segments) == SEGMENTS
    assert bundle.manifest.whole_cost.depth == 12
    image = torch.randn(batch, 3, pixels, pixels)
    (whole,) = run(bundle.whole_path, {"image": image.numpy()})
    assert difference(whole, network(image).numpy()) <= 1e-4
    assert difference(run_split(bundle, image.numpy()), whole) <= 1e-6


# Every pair of values of two factors occurs: level, activation, classes, batch, resolution.
@pytest.mark.parametrize(
    ("size", "level", "activation", "classes", "batch", "pixels"),
    [
        ("s", "full", "silu", 10, 1, 224),
        ("s", "full", "relu", 1000, 2, 256),
        ("l", "full", "silu", 1000, 7, 320),
        ("s", "repvgg", "relu", 10, 7, 224),
        ("l", "repvgg", "silu", 1000, 1, 256),
        ("s", "repvgg", "relu", 10, 2, 320),
        ("l", "none", "relu", 1000, 1, 320),
        ("s", "none", "silu", 10, 7, 256),
        ("l", "none", "silu", 10, 2, 224),
    ],
)
def test_whole_and_split_graph_agree_with_torch(
    size, level, activation, classes, batch, pixels, make_parnet, tmp_path
):
    config = ParNetConfig(WIDTHS[size], (4, 5, 5), 320, num_classes=classes, activation=activation)
    check(make_parnet(config, seed=batch), level, batch, pixels, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parnet-s", "parnet-m", "parnet-l", "parnet-xl"])
@pytest.mark.parametrize("level", ["repvgg", "full"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("pixels", [224, 256, 320])
def test_real_sizes_agree_with_torch(
    name, level, activation, classes, batch, pixels, make_parnet, tmp_path
):
    catalogue = load_network(name).config
    config = ParNetConfig(
        catalogue.widths,
        catalogue.blocks,
        catalogue.last_width,
        num_classes=classes,
        activation=activation,
    )
    check(make_parnet(config, seed=batch), level, batch, pixels, tmp_path)


@pytest.mark.parametrize("widths", [(32, 64, 128), (96, 192, 384)])
@pytest.mark.parametrize("pixels", [64, 224])
def test_small_and_large_networks_split_where_a_person_would(widths, pixels, tmp_path, make_parnet):
    network = make_parnet(ParNetConfig(widths, (4, 5, 5), 4 * widths[1]))
    model = export_onnx(fuse(network, "full"), resolution=pixels, batch=None, name="net")
    provenance = Provenance(network="net", source="test")
    bundle, _ = make_bundle(model, provenance, tmp_path / "b.bundle", prove=False)
    graph = bundle.stream_graph
    assert tuple(segment.name for segment in graph.segments) == SEGMENTS
    assert {name: set(before) for name, before in graph.predecessors.items()} == {
        "stem1": set(),
        "stem2": {"stem1"},
        "stream1": {"stem1"},
        "stream2": {"stem2"},
        "stream3": {"stem2"},
        "fusion": {"stream1", "stream2"},
        "head": {"stream3", "fusion"},
    }


def test_a_bundle_shares_one_copy_of_the_weights(tmp_path):
    network = load_network("parnet-s")
    model, provenance = export_graph(network, level="full", resolution=None, batch=1)
    bundle, _ = make_bundle(model, provenance, tmp_path / "s.bundle", prove=False)
    stored = sum(path.stat().st_size for path in bundle.path.iterdir())
    assert bundle.manifest.whole_cost.parameters == 19_179_912
    assert stored < 1.05 * 4 * bundle.manifest.whole_cost.parameters


def test_every_tensor_of_every_graph_has_a_type_and_a_shape(tmp_path):
    network = load_network("parnet-cifar-1.3m")
    for batch in (1, "dynamic"):
        model, provenance = export_graph(network, level="full", resolution=None, batch=batch)
        bundle, _ = make_bundle(model, provenance, tmp_path / f"{batch}.bundle")
        paths = [
            bundle.whole_path,
            *(bundle.segment_path(s.name) for s in bundle.stream_graph.segments),
        ]
        for path in paths:
            graph = onnx.load(path, load_external_data=False).graph
            described = {
                value.name
                for value in (*graph.input, *graph.output, *graph.value_info)
                if value.type.tensor_type.elem_type and value.type.tensor_type.HasField("shape")
            }
            produced = {name for node in graph.node for name in node.output}
            assert produced <= described


def test_graphs_say_where_they_come_from(tmp_path):
    network = load_network("parnet-cifar-1.3m", seed=7)
    model, provenance = export_graph(network, level="repvgg", resolution=None, batch=1)
    bundle, _ = make_bundle(model, provenance, tmp_path / "b.bundle")
    facts = {
        entry.key: entry.value for entry in onnx.load(bundle.segment_path("stream2")).metadata_props
    }
    text = " ".join(facts.values())
    assert "parnet-cifar-1.3m" in text
    assert "random" in text
    assert "stream2" in text
    assert open_bundle(bundle.path).manifest.provenance.seed == 7


def test_results_go_beside_their_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights" / "parnet_l.pth.tar"
    weights.parent.mkdir()
    weights.touch()
    assert beside(str(weights), ".bundle") == weights.parent / "parnet_l.bundle"
    assert str(beside("parnet-l", ".bundle")) == "parnet-l.bundle"


def _graph_of_free_size(path):
    """Two convolutions of stride 2, side by side, added: heights and widths are free."""
    rng = np.random.default_rng(0)
    shape = ["N", 3, "H", "W"]
    nodes = [
        onnx.helper.make_node("Conv", ["image", f"w{i}"], [f"y{i}"], strides=[2, 2], pads=[1] * 4)
        for i in range(2)
    ]
    nodes += [onnx.helper.make_node("Add", ["y0", "y1"], ["sum"])]
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((4, 3, 3, 3), np.float32), f"w{i}")
        for i in range(2)
    ]
    inputs = [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)]
    outputs = [
        onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, ["N", 4, "h", "w"])
    ]
    graph = onnx.helper.make_graph(nodes, "free", inputs, outputs, weights)
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_a_resolution_fixes_what_an_onnx_file_leaves_free(tmp_path):
    path = tmp_path / "free.onnx"
    _graph_of_free_size(path)
    model, provenance = read_graph(path, resolution=48)
    bundle, _ = make_bundle(model, provenance, tmp_path / "free.bundle")
    assert [tensor.shape for tensor in bundle.manifest.inputs] == [("N", 3, 48, 48)]
    assert [tensor.shape for tensor in bundle.manifest.outputs] == [("N", 4, 24, 24)]
    # The work is that of 48 pixels, where a free size would count as one.
    assert bundle.manifest.whole_cost.macs == 2 * 24 * 24 * 4 * 27
    image = np.random.default_rng(1).standard_normal((2, 3, 48, 48), np.float32)
    (fixed,) = run(bundle.whole_path, {"image": image})
    (free,) = run(path, {"image": image})
    assert difference(fixed, free) <= 1e-6
    onnx.save(onnx.load(bundle.whole_path), tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match="whose height and width are fixed"):
        read_graph(tmp_path / "fixed.onnx", resolution=48)


def _one_layer(path, shape, metadata=None):
    """Write a graph that gives a tensor of a shape for one image."""
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)]
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "one", [image], outputs
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def test_the_preprocessing_in_a_graphs_metadata_is_read(tmp_path):
    assert read_graph(_one_layer(tmp_path / "a.onnx", [1, 3]))[1].input_form is None
    form = replace(LETTERBOX, padding=0)
    stated = _one_layer(tmp_path / "b.onnx", [1, 3], {INPUT_FORM_KEY: encode_form(form)})
    assert read_graph(stated)[1].input_form == form
    for damage in ("{", '{"crop": 7}', '{"mean": [1, 2]}'):
        damaged = _one_layer(tmp_path / "c.onnx", [1, 3], {INPUT_FORM_KEY: damage})
        with pytest.raises(InputError, match=r"c\.onnx: has a damaged description"):
            read_graph(damaged)


def test_classes_are_counted_where_there_are_any(tmp_path):
    assert count_classes(read_graph(_one_layer(tmp_path / "a.onnx", ["n", 7]))[0]) == 7
    for shape in ([1, 3, 8, 8], [1, "classes"]):
        model, _ = read_graph(_one_layer(tmp_path / "b.onnx", shape))
        with pytest.raises(InputError, match="no classifier with a known number of classes"):
            count_classes(model)
