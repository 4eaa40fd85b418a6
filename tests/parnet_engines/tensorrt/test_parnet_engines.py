"""ParNet-S through TensorRT-RTX, which parses and builds without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.tensorrt.build_place import BuildPlace
from parnet_engines.tensorrt.bundle_engines import build_engines, names_of
from parnet_engines.tensorrt.engine_cache import require_plan
from parnet_engines.tensorrt.options import EngineOptions, SizeRange, Target
from parnet_export import pipeline
from parnet_export.bundle import open_bundle
from parnet_export.export import export_network
from parnet_export.fuse import fuse_network
from parnet_export.source import load_network

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
pytestmark = pytest.mark.tensorrt

SEGMENTS = ("stem1", "stem2", "stream1", "stream2", "stream3", "fusion", "head")
QUICK = EngineOptions(optimization_level=0)
BATCH = {"batch": SizeRange(1, 2, 4)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """ParNet-S with a fixed and a dynamic batch, in both precisions."""
    network = load_network("parnet-s")
    fused = fuse_network(network, "full")
    folder = tmp_path_factory.mktemp("parnet-s")
    made = {}
    for batch in (1, None):
        graph = export_network(fused, batch=batch)
        for precision in ("fp32", "fp16"):
            path = folder / f"{precision}-{batch or 'dynamic'}"
            pipeline.make_bundle(graph, fused.provenance, path, precision=precision, prove=False)
            made[precision, batch] = open_bundle(path)
    return made


def built(bundle, target, options, *, whole=False):
    reports = list(build_engines(bundle, [BuildPlace(target)], options, whole=whole))
    assert [report.segment for report in reports] == list(names_of(bundle, whole=whole))
    for report in reports:
        sidecar = report.sidecar
        assert report.status == "built"
        assert len(require_plan(report.path, sidecar)) == sidecar.plan_bytes > 100_000
        assert (sidecar.audit, sidecar.is_verified, sidecar.driver) == (None, False, "")
    return {report.segment: report.sidecar for report in reports}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_segment_and_the_whole_graph_build(bundles, precision):
    bundle = bundles[precision, 1]
    sidecars = built(bundle, Target("tensorrt-rtx"), EngineOptions(), whole=True)
    assert set(sidecars) == {*SEGMENTS, WHOLE}
    for name, sidecar in sidecars.items():
        whole = name == WHOLE
        segment = bundle.stream_graph if whole else bundle.stream_graph[name]
        specs = [*segment.inputs, *segment.outputs]
        assert [(t.name, t.dtype, t.shape) for t in sidecar.tensors] == [
            (spec.name, spec.dtype, spec.shape) for spec in specs
        ]
        assert all(t.layout == "linear" for t in sidecar.tensors)
        assert [t.size_bytes for t in sidecar.tensors] == [spec.size_bytes() for spec in specs]
        assert sidecar.recipe.options.max_aux_streams == (None if whole else 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_segment_builds_for_gpus_that_are_not_here(bundles, precision):
    target = Target("tensorrt-rtx", ("8.0", "8.9"))
    sidecars = built(bundles[precision, 1], target, QUICK)
    assert set(sidecars) == set(SEGMENTS)
    assert {s.recipe.target.compute_capabilities for s in sidecars.values()} == {("8.0", "8.9")}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_segment_builds_with_a_dynamic_batch(bundles, precision):
    bundle = bundles[precision, None]
    target = Target("tensorrt-rtx", ("8.9",))
    sidecars = built(bundle, target, replace(QUICK, sizes=BATCH))
    for name, sidecar in sidecars.items():
        specs = (*bundle.stream_graph[name].inputs, *bundle.stream_graph[name].outputs)
        assert [t.size_bytes for t in sidecar.tensors] == [
            s.size_bytes({"batch": 4}) for s in specs
        ]


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3, 5])
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize(
    ("precision", "boundary"), [("fp32", "linear"), ("fp16", "linear"), ("fp16", "vector")]
)
def test_every_combination_builds(bundles, precision, boundary, batch, capability, level):
    options = EngineOptions(
        sizes={} if batch else BATCH, optimization_level=level, boundary=boundary
    )
    target = Target("tensorrt-rtx", (capability,))
    for report in build_engines(bundles[precision, batch], [BuildPlace(target)], options):
        assert report.sidecar.plan_bytes > 100_000


def test_tensors_between_engines_lie_in_vectors_if_asked(bundles):
    bundle = bundles["fp16", 1]
    options = replace(QUICK, boundary="vector")
    sidecars = built(bundle, Target("tensorrt-rtx"), options)
    layouts = {}
    for sidecar in sidecars.values():
        for tensor in sidecar.tensors:
            layouts.setdefault(tensor.name, set()).add(tensor.tensor_layout)
            assert tensor.size_bytes == tensor.tensor_layout.size_bytes(tensor.shape, tensor.dtype)
    # Both sides of every boundary agree.
    assert all(len(found) == 1 for found in layouts.values())
    maps = {
        edge.tensor.name
        for edge in bundle.stream_graph.edges
        if len(edge.tensor.shape) == 4 and edge.tensor.shape[2] > 1
    }
    assert len(maps) >= 6
    assert {name for name, found in layouts.items() if found == {TensorLayout.HWC8}} == maps
    assert layouts["image"] == layouts["logits"] == {TensorLayout.LINEAR}
    linear = built(bundle, Target("tensorrt-rtx"), QUICK)
    assert {s.recipe.options.boundary for s in linear.values()} == {"linear"}
    assert all(s.plan_sha256 != sidecars[name].plan_sha256 for name, s in linear.items())


def test_fp16_segments_keep_pooling_and_classifier_in_fp32(bundles):
    """TensorRT gets the types as the graph has them, and its parser keeps them."""
    import tensorrt_rtx

    from parnet_engines.tensorrt.log import logger_of
    from parnet_engines.tensorrt.module import import_tensorrt

    trt = import_tensorrt("tensorrt-rtx")
    bundle = bundles["fp16", 1]
    builder = tensorrt_rtx.Builder(logger_of(tensorrt_rtx))
    kinds = {}
    for segment in bundle.stream_graph.segments:
        network = builder.create_network(trt.network_flags())
        parser = tensorrt_rtx.OnnxParser(network, logger_of(tensorrt_rtx))
        assert parser.parse_from_file(str(bundle.segment_path(segment.name)))
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type.name in {"CONVOLUTION", "REDUCE", "MATRIX_MULTIPLY"}:
                dtype = layer.get_output(0).dtype.name
                kinds.setdefault(layer.type.name, []).append(dtype)
    assert set(kinds["CONVOLUTION"]) == {"HALF"}
    assert set(kinds["REDUCE"]) == {"FLOAT"}
    assert kinds["MATRIX_MULTIPLY"] == ["FLOAT"]
    assert len(kinds["REDUCE"]) > 15


def test_a_sidecar_names_the_graph_that_it_was_built_from(bundles):
    bundle = bundles["fp32", 1]
    (report, *_) = build_engines(bundle, [BuildPlace(Target("tensorrt-rtx"))], EngineOptions())
    written = json.loads(report.path.read_text())
    path = bundle.segment_path("stem1")
    assert written["recipe"]["onnx_sha256"] == bundle.manifest.files[path.name].sha256
    assert (written["recipe"]["segment"], written["recipe"]["precision"]) == ("stem1", "fp32")
    # The graph names its weights by their content, so its digest stands for them as well.
    data = {
        entry.value
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert data == {bundle.manifest.weights}
    assert np.isfinite(written["build_s"])
    assert written["build_s"] > 0
