from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from parnet_export.bundle import Provenance, open_bundle
from parnet_export.detections.detection_form import (
    DETECTION_NAMES,
    AnchorLevel,
    DetectionOutput,
    Suppression,
)
from parnet_export.export import export_onnx
from parnet_export.models.suppressed_detector import NO_CLASS, SuppressedDetector
from parnet_export.pipeline import make_bundle

SMALL_LEVELS = (
    AnchorLevel(8, ((12, 16), (40, 28))),
    AnchorLevel(32, ((142.5, 110), (459, 401))),
)
PIXELS = 32
HEADS = ((16, 4, 4), (16, 1, 1))
BOXES = 2 * (16 + 1)


class FedHeads(nn.Module):
    """Takes the values of its heads from the image, so that a test can choose them."""

    def forward(self, images):
        fine, coarse = images.flatten(1)[:, : 256 + 16].split((256, 16), 1)
        return fine.unflatten(1, HEADS[0]), coarse.unflatten(1, HEADS[1])


def feed(heads):
    """Lay the heads of some images out as images."""
    images = np.zeros((len(heads[0]), 3 * PIXELS * PIXELS), np.float32)
    images[:, : 256 + 16] = np.concatenate([h.reshape(len(h), -1) for h in heads], 1)
    return images.reshape(-1, 3, PIXELS, PIXELS)


def random_heads(random, images):
    """Heads whose boxes overlap a lot; the larger ones suppress many."""
    heads = [random.normal(0, 2, (images, *shape)).astype(np.float32) for shape in HEADS]
    for head in heads:
        head[:, 4::8] += 2  # objectness
    return heads


def export(suppression, batch=None):
    detector = SuppressedDetector(FedHeads(), SMALL_LEVELS, suppression).eval()
    model = export_onnx(
        detector,
        resolution=PIXELS,
        batch=batch,
        name="detections",
        output_names=detector.output_names,
    )
    return detector, model


def run(model, images):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(DETECTION_NAMES), {"image": images})


@pytest.mark.parametrize(
    "suppression",
    [
        Suppression(),
        Suppression(0.1, 0.3, 20),
        Suppression(0.001, 0.65, 3),
        Suppression(0, 0, 200),
    ],
    ids=str,
)
def test_the_graph_finds_what_the_definition_finds(suppression, decode_by_loops, suppress_by_loops):
    """Of each of the four, 250 images."""
    heads = random_heads(np.random.default_rng(0), 250)
    _, model = export(suppression)
    assert Counter(node.op_type for node in model.graph)["NonMaxSuppression"] == 1
    counts, corners, scores, classes = run(model, feed(heads))
    room = suppression.max_detections
    assert corners.shape == (250, room, 4)
    assert scores.shape == classes.shape == (250, room)
    for image in range(250):
        boxes = decode_by_loops([head[image] for head in heads], SMALL_LEVELS)
        reference = suppress_by_loops(
            boxes, suppression.min_score, suppression.max_iou, suppression.max_detections
        )
        count = counts[image]
        assert count == len(reference)
        assert classes[image, :count].tolist() == [label for _, _, label, _ in reference]
        # A float32 sigmoid near zero is off by 1e-8, which is much relative to such a score.
        found = scores[image, :count]
        assert np.allclose(found, [-s for s, *_ in reference], rtol=1e-5, atol=1e-6)
        expected = np.array([box for *_, box in reference]).reshape(-1, 4)
        assert np.allclose(corners[image, :count], expected, rtol=1e-5, atol=1e-3)
        assert not corners[image, count:].any()
        assert not scores[image, count:].any()
        assert (classes[image, count:] == NO_CLASS).all()
    assert counts.max() > min(room, BOXES) / 4


@pytest.mark.parametrize("batch", [1, 2])
def test_torch_and_graph_return_the_same_tensors(batch):
    detector, model = export(Suppression(0.1, 0.3, 50), batch)
    images = feed(random_heads(np.random.default_rng(1), batch))
    found = run(model, images)
    for actual, expected in zip(found, detector(torch.from_numpy(images)), strict=True):
        assert actual.dtype.name == str(expected.dtype).removeprefix("torch.")
        assert np.allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-4)
    declared = [tuple(output.shape) for output in model.graph.outputs]
    assert declared == [array.shape for array in found]


def test_equal_scores_come_in_the_order_of_boxes_and_classes(decode_by_loops):
    heads = [np.full((1, *shape), 5, np.float32) for shape in HEADS]
    for head in heads:
        head[:, 2::8] = head[:, 3::8] = -9  # boxes too small to overlap
    _, model = export(Suppression(0.4, 0.5, 200), 1)
    (counts,), (corners,), (scores,), (classes,) = run(model, feed(heads))
    assert counts == 3 * BOXES
    assert len(set(scores[:counts])) == 1
    assert classes[:counts].tolist() == [0, 1, 2] * BOXES
    centres = (corners[:counts:3, :2] + corners[:counts:3, 2:]) / 2
    expected = decode_by_loops([head[0] for head in heads], SMALL_LEVELS)[:, :2]
    assert np.allclose(centres, expected, atol=1e-3)


def test_what_depends_on_the_image_in_size_stays_in_one_segment(tmp_path):
    """Also in half precision, where boxes are decoded in float32."""
    suppression = Suppression(0.1, 0.3, 20)
    _, model = export(suppression)
    output = DetectionOutput("nms", SMALL_LEVELS, 3, suppression)
    for precision in ("fp32", "fp16"):
        provenance = Provenance("fed", "test", detections=output)
        make_bundle(model, provenance, tmp_path / precision, precision=precision)
        bundle = open_bundle(tmp_path / precision)
        assert bundle.manifest.provenance.detections == output
        for segment in bundle.stream_graph.segments:
            for spec in (*segment.inputs, *segment.outputs):
                assert {size for size in spec.shape if isinstance(size, str)} <= {"batch"}
        whole = ir.load(bundle.whole_path).graph
        floats = {
            v.dtype
            for n in whole
            if n.name.startswith(("decoded.decode/", "suppress/"))
            for v in n.outputs
        }
        assert ir.DataType.FLOAT16 not in floats
