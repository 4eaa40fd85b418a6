from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from parnet_export.detections.detection_form import AnchorLevel
from parnet_export.detections.suppression import suppress
from parnet_export.export import export_onnx
from parnet_export.models.yolo_decode import DecodedDetector, decode_boxes
from parnet_export.models.yolov4_csp_layers import LEVELS

SMALL_LEVELS = (
    AnchorLevel(8, ((12, 16), (40, 28))),
    AnchorLevel(32, ((142.5, 110), (459, 401))),
)


@pytest.mark.parametrize("hundred", range(10))
def test_decoding_is_the_formula_of_the_authors(hundred, decode_by_loops):
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
def test_a_decoded_detector_is_one_graph_that_onnx_runtime_runs(batch, decode_by_loops):
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
