from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parnet_export.export import export_onnx
from parnet_export.models.yolo_decode import AnchorLevel, DecodedDetector, decode_boxes, suppress
from parnet_export.models.yolov4_csp_layers import LEVELS

SMALL_LEVELS = (
    AnchorLevel(8, ((12, 16), (40, 28))),
    AnchorLevel(32, ((142.5, 110), (459, 401))),
)


def decode_by_loops(heads, levels):
    """Boxes of one image from its heads, value by value."""
    boxes = []
    for head, level in zip(heads, levels, strict=True):
        values = head.shape[0] // len(level.anchors)
        for number, (anchor_width, anchor_height) in enumerate(level.anchors):
            for row in range(head.shape[1]):
                for column in range(head.shape[2]):
                    raw = head[number * values : (number + 1) * values, row, column]
                    s = [1 / (1 + math.exp(-value)) for value in raw]
                    x = (2 * s[0] - 0.5 + column) * level.stride
                    y = (2 * s[1] - 0.5 + row) * level.stride
                    width = (2 * s[2]) ** 2 * anchor_width
                    height = (2 * s[3]) ** 2 * anchor_height
                    boxes.append([x, y, width, height, *s[4:]])
    return np.array(boxes)


def suppress_by_loops(boxes, min_score, max_iou, max_detections):
    """Greedy suppression, each class by itself, with lists."""
    found = []
    for label in range(boxes.shape[1] - 5):
        scored = [(box[4] * box[5 + label], index) for index, box in enumerate(boxes)]
        kept = []
        for score, index in sorted(scored, key=lambda entry: (-entry[0], entry[1])):
            if score <= min_score:
                break
            x, y, width, height = boxes[index][:4]
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if all(overlap(corners, other) <= max_iou for _, _, other in kept):
                kept.append((score, index, corners))
        found += [(-score, index, label, corners) for score, index, corners in kept]
    return sorted(found)[:max_detections]


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("hundred", range(10))
def test_decoding_is_the_formula_of_the_authors(hundred):
    for case in range(100 * hundred, 100 * hundred + 100):
        random = np.random.default_rng(case)
        images, classes, height, width = random.integers(1, 4, 4)
        shape = (images, 2 * (5 + classes), height, width)
        heads = [random.normal(0, 3, (*shape[:2], scale * height, width)) for scale in (2, 1)]
        decoded = decode_boxes([torch.from_numpy(head) for head in heads], SMALL_LEVELS).numpy()
        for index in range(images):
            reference = decode_by_loops([head[index] for head in heads], SMALL_LEVELS)
            assert decoded[index].shape == reference.shape
            assert np.allclose(decoded[index], reference, rtol=1e-12, atol=1e-12)


def random_boxes(random, *, ties):
    """Boxes of one image that overlap a lot; with ties, on a grid and with few scores."""
    count, classes = int(random.integers(0, 40)), int(random.integers(1, 4))
    boxes = random.uniform(0, 1, (count, 5 + classes))
    boxes[:, :2] *= 60
    boxes[:, 2:4] = boxes[:, 2:4] * 40 + 1
    if ties:
        boxes[:, :4] = boxes[:, :4].round()
        boxes[:, 4:] = (4 * boxes[:, 4:]).round() / 4
    return boxes


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("hundred", range(5))
def test_suppression_keeps_what_the_definition_keeps(hundred, ties):
    for case in range(100 * hundred, 100 * hundred + 100):
        random = np.random.default_rng(case)
        boxes = random_boxes(random, ties=ties)
        min_score, max_iou = random.choice([0, 0.1, 0.4]), random.choice([0, 0.3, 0.65])
        limit = int(random.choice([1, 5, 300]))
        found = suppress(boxes, min_score=min_score, max_iou=max_iou, max_detections=limit)
        reference = suppress_by_loops(boxes, min_score, max_iou, limit)
        assert found.classes.tolist() == [label for _, _, label, _ in reference]
        assert np.allclose(found.scores, [-score for score, *_ in reference], rtol=1e-12)
        corners = np.array([corners for *_, corners in reference]).reshape(-1, 4)
        assert np.allclose(found.corners, corners, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), max_iou=st.floats(0.05, 0.95))
def test_what_is_kept_does_not_overlap_and_what_goes_does(seed, max_iou):
    boxes = random_boxes(np.random.default_rng(seed), ties=False)
    found = suppress(boxes, min_score=0.1, max_iou=max_iou)
    assert (np.diff(found.scores) <= 0).all()
    for index in range(len(found.scores)):
        for other in range(index):
            if found.classes[index] == found.classes[other]:
                assert overlap(found.corners[index], found.corners[other]) <= max_iou + 1e-12
    # Suppressing again changes nothing.
    kept = np.zeros((len(found.scores), boxes.shape[1]))
    kept[:, :2] = (found.corners[:, :2] + found.corners[:, 2:]) / 2
    kept[:, 2:4] = found.corners[:, 2:] - found.corners[:, :2]
    kept[:, 4] = 1
    kept[np.arange(len(kept)), 5 + found.classes] = found.scores
    again = suppress(kept, min_score=0.1, max_iou=max_iou + 1e-9)
    assert np.array_equal(again.scores, found.scores)


def test_classes_do_not_suppress_each_other():
    boxes = np.array([[50, 50, 20, 20, 1, 0.9, 0.8], [50, 50, 20, 20, 1, 0.7, 0.6]], np.float32)
    found = suppress(boxes, min_score=0.5)
    assert found.classes.tolist() == [0, 1]
    assert np.allclose(found.scores, [0.9, 0.8])
    assert found.corners.tolist() == [[40, 40, 60, 60]] * 2
    assert found.corners.dtype == found.scores.dtype == np.float32


def test_nothing_certain_gives_no_detection():
    found = suppress(np.full((7, 85), 0.3, np.float32))
    assert (found.corners.shape, found.scores.shape, found.classes.shape) == ((0, 4), (0,), (0,))
    assert found.classes.dtype == np.int64


def test_boxes_without_an_area_overlap_nothing():
    boxes = np.array([[5, 5, 0, 0, 1, 0.9], [5, 5, 0, 0, 1, 0.8]], np.float32)
    assert len(suppress(boxes).scores) == 2


@pytest.mark.parametrize(
    ("head", "anchor", "row", "column", "size"),
    [(0, 2, 3, 9, (40, 28)), (1, 0, 30, 5, (36, 75)), (2, 1, 19, 0, (192, 243))],
)
def test_an_object_that_the_heads_see_is_found_where_it_is(head, anchor, row, column, size):
    heads = [torch.full((1, 255, s, s), -9.0) for s in (80, 40, 20)]
    # Sigmoid 1/2: the middle of the cell, the anchor's size; then objectness and class 17.
    heads[head][0, 85 * anchor : 85 * anchor + 4, row, column] = 0
    heads[head][0, 85 * anchor + 4, row, column] = 9
    heads[head][0, 85 * anchor + 5 + 17, row, column] = 9
    boxes = decode_boxes(heads, LEVELS)
    assert boxes.shape == (1, 25_200, 85)
    found = suppress(boxes[0].numpy())
    assert found.classes.tolist() == [17]
    stride = (8, 16, 32)[head]
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    width, height = size
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    assert found.corners[0].tolist() == pytest.approx(corners)
    assert found.scores[0] == pytest.approx(1 / (1 + math.exp(-9)) ** 2)


class TwoHeads(nn.Module):
    """The least that has heads of two strides."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 2 * 8, 8, stride=8)
        self.coarse = nn.Conv2d(3, 2 * 8, 32, stride=32)

    def forward(self, images):
        return self.fine(images), self.coarse(images)


@pytest.mark.parametrize("batch", [2, None])
def test_a_decoded_detector_is_one_graph_that_onnx_runtime_runs(batch):
    torch.manual_seed(0)
    detector = DecodedDetector(TwoHeads(), SMALL_LEVELS).eval().requires_grad_(requires_grad=False)
    model = export_onnx(
        detector, resolution=96, batch=batch, name="boxes", output_names=detector.output_names
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for size in (2,) if batch else (1, 5):
        image = torch.randn(size, 3, 96, 96)
        (boxes,) = session.run(["boxes"], {"image": image.numpy()})
        assert boxes.shape == (size, 2 * (144 + 9), 8)
        raw = detector.detector(image)
        for index in range(size):
            heads = [head[index].double().numpy() for head in raw]
            reference = decode_by_loops(heads, SMALL_LEVELS)
            assert np.abs(boxes[index] - reference).max() < 1e-5 * np.abs(reference).max()
