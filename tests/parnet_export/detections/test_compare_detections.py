from __future__ import annotations

import math

import numpy as np
import pytest

from parnet_export.detections.compare_detections import detections_error
from parnet_export.detections.detection_form import Suppression

SUPPRESSION = Suppression(0.4, 0.5, 4)


def outputs(*rows):
    """One image's detections: left, top, right, bottom, score, class."""
    table = np.zeros((1, 4, 6), np.float32)
    table[0, : len(rows)] = rows or np.zeros((0, 6))
    return {
        "num_detections": np.array([len(rows)]),
        "detection_boxes": table[..., :4],
        "detection_scores": table[..., 4],
        "detection_classes": table[..., 5].astype(np.int64),
    }


A = (10, 10, 50, 50, 0.9, 0)
B = (12, 10, 52, 50, 0.9, 0)  # overlaps A
C = (100, 100, 140, 150, 0.7, 1)
FAINT = (200, 10, 260, 50, 0.4001, 2)


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        ((A, C), (A, C), 0),
        ((), (), 0),
        ((A, C), ((*A[:4], 0.9004, 0), C), 4e-4),
        ((A, C), ((10.05, *A[1:]), C), 0.05 / 150),
        ((A, C), (B, C), 0),  # either of them suppresses the other
        ((A, C, FAINT), (A, C), 0),  # rounding decides about the threshold
        ((C, A), (A, C), 0),
        ((A, C), (A,), math.inf),
        ((A,), (A, C), math.inf),
        ((A, C), ((*A[:5], 1), C), math.inf),
        ((A, C), ((*A[:4], 0.8, 0), C), math.inf),
        ((A, C), ((*B[:4], 0.8, 0), C), math.inf),  # less certain, so it suppresses nothing
        ((A, C), ((*A[:4], math.nan, 0), C), math.inf),
    ],
)
def test_a_difference_needs_a_reason(one, other, error):
    for actual, reference in ((one, other), (other, one)):
        found = detections_error(outputs(*actual), outputs(*reference), SUPPRESSION, 1e-3)
        assert found == pytest.approx(error, rel=1e-2)


def test_where_there_is_no_room_the_least_certain_may_differ():
    rows = [(60 * i, 0, 60 * i + 40, 40, 0.8 - 0.1 * i, 0) for i in range(3)]
    last = [(300, y, 340, y + 40, 0.5, 1) for y in (0, 100)]
    full = [outputs(*rows, row) for row in last]
    assert detections_error(*full, SUPPRESSION, 1e-3) == 0
    assert detections_error(*full, Suppression(0.4, 0.5, 5), 1e-3) == math.inf
