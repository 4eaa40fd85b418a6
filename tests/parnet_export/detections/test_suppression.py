from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.detections.detection_form import AnchorLevel, DetectionOutput, Suppression
from parnet_export.detections.suppression import suppress


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
def test_suppression_keeps_what_the_definition_keeps(hundred, ties, suppress_by_loops):
    for case in range(100 * hundred, 100 * hundred + 100):
        random = np.random.default_rng(case)
        boxes = random_boxes(random, ties=ties)
        min_score, max_iou = random.choice([0, 0.1, 0.4]), random.choice([0, 0.3, 0.65])
        limit = int(random.choice([1, 5, 300]))
        found = suppress(
            boxes, Suppression(min_score=min_score, max_iou=max_iou, max_detections=limit)
        )
        reference = suppress_by_loops(boxes, min_score, max_iou, limit)
        assert found.classes.tolist() == [label for _, _, label, _ in reference]
        assert np.allclose(found.scores, [-score for score, *_ in reference], rtol=1e-12)
        corners = np.array([corners for *_, corners in reference]).reshape(-1, 4)
        assert np.allclose(found.corners, corners, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), max_iou=st.floats(0.05, 0.95))
def test_what_is_kept_does_not_overlap_and_what_goes_does(overlap, seed, max_iou):
    boxes = random_boxes(np.random.default_rng(seed), ties=False)
    found = suppress(boxes, Suppression(min_score=0.1, max_iou=max_iou))
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
    again = suppress(kept, Suppression(min_score=0.1, max_iou=max_iou + 1e-9))
    assert np.array_equal(again.scores, found.scores)


def test_classes_do_not_suppress_each_other():
    boxes = np.array([[50, 50, 20, 20, 1, 0.9, 0.8], [50, 50, 20, 20, 1, 0.7, 0.6]], np.float32)
    found = suppress(boxes, Suppression(min_score=0.5))
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
    ("values", "message"),
    [
        ((-0.1, 0.5, 300), "between 0 and 1"),
        ((0.4, 1.1, 300), "between 0 and 1"),
        ((float("nan"), 0.5, 300), "between 0 and 1"),
        ((0.4, 0.5, 0), "room for a box"),
    ],
)
def test_impossible_thresholds_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Suppression(*values)


def test_a_description_of_outputs_cannot_contradict_itself():
    levels = (AnchorLevel(8, ((8, 8),)),)
    DetectionOutput("nms", levels, 3, Suppression())
    for form, suppression in (("nms", None), ("raw", Suppression()), ("decoded", Suppression())):
        with pytest.raises(ValueError, match="has suppression"):
            DetectionOutput(form, levels, 3, suppression)
    for arguments in (((), 3), (levels, 0)):
        with pytest.raises(ValueError, match="heads and classes"):
            DetectionOutput("raw", *arguments)
