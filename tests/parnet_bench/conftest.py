"""What the tests of the bench share: small graphs, and results that were never measured."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_bench.environment import Environment
from parnet_bench.procedure import Procedure
from parnet_bench.result import ProcessRecording, Recording, Result, Row, RowDescription
from parnet_export.bundle import Provenance
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.models.family import Entry
from parnet_export.models.parnet import ParNetConfig
from parnet_export.models.resnet import ResNetConfig
from parnet_export.pipeline import make_bundle, read_graph
from parnet_export.stream_graph import TensorSpec


def write_forked_network(path, *, channels=48, batch=1, branches=2):
    """Write a stem, equal branches of two convolutions each, a sum and a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def convolution(name, read, inputs):
        weight = rng.normal(0, 0.1, (channels, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        nodes.append(
            helper.make_node("Conv", [read, f"{name}.weight"], [name], name=name, pads=[1, 1, 1, 1])
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


@pytest.fixture(scope="module")
def tiny_catalogue(tmp_path_factory):
    """A catalogue with a tiny ParNet and a tiny ResNet, and an empty cache of graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARNET_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        parnet = ParNetConfig((48, 96), (1, 1), 64, num_classes=10, variant="cifar")
        resnet = ResNetConfig("basic", (1, 1), width=8, num_classes=10)
        for family, name, config in (
            (FAMILIES["parnet"], "parnet-tiny", parnet),
            (FAMILIES["resnet"], "resnet-tiny", resnet),
        ):
            entry = Entry(name, name, config, 32, "reconstruction", "for tests")
            patch.setitem(CATALOG, name, (family, entry))
        yield Path(os.environ["PARNET_EXPORT_CACHE"])


@pytest.fixture(scope="session")
def make_result():
    """Make a result of rows given as ``{name: rounds in nanoseconds}``."""

    def make(rounds_by_row, *, forms=("unfused", "whole", "streams"), stopped="rounds", **options):
        rows = []
        for name, form in zip(rounds_by_row, forms, strict=False):
            provenance = Provenance(
                network="net",
                source="net",
                weights=options.get("weights", "random"),
                seed=0,
                level="none" if form == "unfused" else "full",
            )
            description = RowDescription(
                name=name,
                network="net",
                form=form,
                target="net",
                provenance=provenance,
                precision="fp32",
                batch=options.get("batch", 1),
                inputs=(TensorSpec("image", "float32", (1, 3, 32, 32)),),
                parameters=1_267_146,
                flops=306_632_000,
                depth=12,
                devices="cpu",
                cores=(0, 1),
            )
            rounds = tuple(map(tuple, rounds_by_row[name]))
            recording = Recording(
                (ProcessRecording(options.get("settled", True), (900, 500), rounds),)
            )
            rows.append(Row(description, recording))
        count = len(rows[0].recording.rounds_ns)
        return Result(
            environment=Environment(
                created="2030-01-02T03:04:05+00:00",
                command=("parnet-bench", "latency", "net"),
                cpu_model="Some CPU",
                logical_cores=4,
                physical_cores=2,
                affinity=(0, 1, 2, 3),
                governors=("performance",),
                load_average=(0.5, 0.25, 0.125),
                memory_bytes=1 << 34,
                available_memory_bytes=1 << 33,
                system="Linux",
                python="CPython 3.11.7",
                libraries={"numpy": "2.0", "onnxruntime": "1.22.0"},
            ),
            procedure=Procedure(rounds=count),
            stopped=stopped,
            orders=(tuple(tuple(range(len(rows))) for _ in range(count)),),
            rows=tuple(rows),
            notes=options.get("notes", ()),
        )

    return make
