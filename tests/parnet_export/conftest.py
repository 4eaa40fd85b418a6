"""References for detection, written value by value with lists and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest


@pytest.fixture(scope="session")
def decode_by_loops():
    return _decode_by_loops


@pytest.fixture(scope="session")
def suppress_by_loops():
    return _suppress_by_loops


@pytest.fixture(scope="session")
def overlap():
    return _overlap


def _decode_by_loops(heads, levels):
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


def _suppress_by_loops(boxes, min_score, max_iou, max_detections):
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
            if all(_overlap(corners, other) <= max_iou for _, _, other in kept):
                kept.append((score, index, corners))
        found += [(-score, index, label, corners) for score, index, corners in kept]
    return sorted(found)[:max_detections]


def _overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
