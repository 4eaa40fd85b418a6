"""TensorRT-RTX parses and builds detectors on any machine; running them needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from torch import nn

from parnet_export.detections.detection_form import Suppression
from parnet_export.export import export_onnx
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.models.parnet_detector import ParNetDetectorConfig
from parnet_export.models.suppressed_detector import SuppressedDetector
from parnet_export.models.yolov4_csp_layers import LEVELS, YOLOv4CSPConfig
from parnet_export.pack import write_onnx
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError)

pytestmark = pytest.mark.tensorrt

PARNET = ParNetDetectorConfig(
    widths=(8, 16, 16),
    blocks=(1, 1, 1),
    last_width=24,
    pyramid_width=16,
    neck_widths=(8, 8, 16),
    neck_blocks=1,
    num_classes=3,
)


class Messages(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def build(path):
    """Return the plan, or None, what the parser refuses, and the errors that were logged."""
    messages = Messages()
    builder = trt.Builder(messages)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, messages)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    return builder.build_serialized_network(network, config), messages.errors


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Make a bundle in half precision of a small network under a catalogue name."""

    def make(name, config, form, resolution=64):
        family, entry = CATALOG[name]
        monkeypatch.setitem(CATALOG, name, (family, replace(entry, config=config)))
        graph = export_graph(load_network(name), resolution=resolution, batch=1, form=form)
        return make_bundle(*graph, tmp_path / "b", precision="fp16", prove=False)[0]

    return make


YOLO = ("yolov4-csp", YOLOv4CSPConfig(width=4, num_classes=3))
CSP = ("parnet-xl-csp-det", replace(PARNET, partial=True))


def test_every_family_of_detectors_is_built():
    detectors = {key for key, family in FAMILIES.items() if family.anchor_levels}
    assert {CATALOG[name][0].key for name, _ in (YOLO, CSP)} == detectors


@pytest.mark.parametrize(
    ("name", "config", "form"),
    [
        (*YOLO, "decoded"),
        (*CSP, "decoded"),
        pytest.param(*YOLO, "raw", marks=pytest.mark.slow),
        pytest.param(*CSP, "raw", marks=pytest.mark.slow),
        pytest.param("parnet-xl-det", PARNET, "decoded", marks=pytest.mark.slow),
    ],
    ids=["yolov4-csp", "parnet-csp", "yolov4-csp-raw", "parnet-csp-raw", "parnet"],
)
def test_detectors_build_in_half_precision(make, name, config, form):
    bundle = make(name, config, form)
    whole = onnx.load(bundle.whole_path, load_external_data=False)
    halves = [t.name for t in whole.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 50
    plan, errors = build(bundle.whole_path)
    assert errors == []
    assert plan.nbytes > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov4-csp", "yolov4-csp-silu", "parnet-xl-det"])
def test_detectors_of_full_width_build_in_half_precision(make, name):
    bundle = make(name, CATALOG[name][1].config, "decoded", 640)
    plan, errors = build(bundle.whole_path)
    assert errors == []
    assert plan.nbytes > 50e6


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 3 * 8, 8, stride=8)

    def forward(self, images):
        return (self.head(images),)


def test_suppression_in_the_graph_is_parsed_and_not_built(tmp_path):
    """When this fails, a version of TensorRT-RTX has learned it, and docs/detectors.md is old."""
    detector = SuppressedDetector(OneHead(), LEVELS[:1], Suppression()).eval()
    model = export_onnx(
        detector.requires_grad_(requires_grad=False),
        resolution=64,
        batch=1,
        name="d",
        output_names=detector.output_names,
    )
    write_onnx(model, tmp_path / "d.onnx")
    plan, errors = build(tmp_path / "d.onnx")
    assert plan is None
    assert any("NonMaxSuppression" in message for message in errors)
