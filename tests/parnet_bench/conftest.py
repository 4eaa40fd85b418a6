"""What the tests of the bench share: small graphs, and results that were never measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_bench.environment import Environment
from parnet_bench.measure import Procedure
from parnet_bench.result import Recording, Result, Row, RowDescription
from parnet_export.bundle import Provenance
from parnet_export.pipeline import make_bundle, read_graph
from parnet_export.stream_graph import TensorSpec


def write_forked_network(path, *, channels=16, batch=1, branches=2):
    """Write a stem, equal branches of two convolutions each, a sum and a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def convolution(name, read, inputs):
        weight = rng.normal(0, 0.1, (channels, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        nodes.append(
            helper.make_node(
                "Conv", [read, f"{name}.weight"], [name], name=name, pads=[1, 1, 1, 1]
            )
        )
        return name

    stem = convolution("stem", "image", 3)
    ends = []
    for index in range(branches):
        middle = convolution(f"branch{index}.0", stem, channels)
        ends.append(convolution(f"branch{index}.1", middle, channels))
    nodes.append(helper.make_node("Sum", ends, ["sum"], name="sum"))
    nodes.append(helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"))
    graph = helper.make_graph(
        nodes,
        "forked",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, channels])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def forked_onnx(tmp_path_factory):
    """An ONNX file of two parallel branches, batch 1, 32 x 32."""
    return write_forked_network(tmp_path_factory.mktemp("forked") / "forked.onnx")


@pytest.fixture(scope="session")
def dynamic_onnx(tmp_path_factory):
    """The same network with an open batch."""
    path = tmp_path_factory.mktemp("dynamic") / "dynamic.onnx"
    return write_forked_network(path, batch="batch")


@pytest.fixture(scope="session")
def straight_onnx(tmp_path_factory):
    """A network without parallel branches."""
    path = tmp_path_factory.mktemp("straight") / "straight.onnx"
    return write_forked_network(path, branches=1)


@pytest.fixture(scope="session")
def forked_bundle(forked_onnx, tmp_path_factory):
    """The bundle of `forked_onnx`."""
    return make_bundle(*read_graph(forked_onnx), tmp_path_factory.mktemp("bundles") / "forked")[0]


@pytest.fixture(scope="session")
def dynamic_bundle(dynamic_onnx, tmp_path_factory):
    """The bundle of `dynamic_onnx`."""
    return make_bundle(*read_graph(dynamic_onnx), tmp_path_factory.mktemp("bundles") / "dynamic")[0]
