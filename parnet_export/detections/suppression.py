"""Greedy non-maximum suppression in NumPy, which the graphs with suppression are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_export.detections.detection_form import BOX_CHANNELS, DETECTION_NAMES, Suppression

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Objects found in one image, the most certain first.

    Parameters
    ----------
    corners
        ``(K, 4)``: left, top, right and bottom in pixels.
    scores
        ``(K,)``: objectness times class probability.
    classes
        ``(K,)``: int64.
    """

    corners: Floats
    scores: Floats
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, min_score: float) -> Detections:
        """Return those whose score is greater."""
        kept = self.scores > min_score
        return Detections(self.corners[kept], self.scores[kept], self.classes[kept])


def read_detections(outputs: Mapping[str, NDArray[Any]]) -> tuple[Detections, ...]:
    """Return the detections of each image from the outputs of a graph with suppression."""
    counts, corners, scores, classes = (outputs[name] for name in DETECTION_NAMES)
    return tuple(
        Detections(corners[i, :count], scores[i, :count], classes[i, :count])
        for i, count in enumerate(counts)
    )


def suppress(boxes: Floats, options: Suppression | None = None) -> Detections:
    """Keep the most certain of the boxes that overlap, separately for each class.

    This is greedy non-maximum suppression. A box may be found for several classes, as
    in the authors' evaluation and in the ONNX operator ``NonMaxSuppression``.

    Parameters
    ----------
    boxes
        ``(boxes, 5 + classes)``: one image of what
        `parnet_export.models.yolo_decode.decode_boxes` returns.
    options
        Which boxes are kept; by default those of `Suppression`.

    Returns
    -------
    Detections
        By falling score; of equal scores the earlier box, then the lower class, comes first.
    """
    options = options or Suppression()
    candidates = boxes[boxes[:, 4] > options.min_score]  # class probabilities are at most 1
    scores = candidates[:, 4:5] * candidates[:, BOX_CHANNELS:]
    place, classes = np.nonzero(scores > options.min_score)
    scores = scores[place, classes]
    order = np.argsort(-scores, kind="stable")
    scores, classes = scores[order], classes[order]
    corners = _corners(candidates[place[order], :4])

    kept: list[int] = []
    left = np.arange(len(scores))
    while left.size and len(kept) < options.max_detections:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        same = classes[left] == classes[best]
        left = left[~(same & (overlap(corners[best], corners[left]) > options.max_iou))]
    return Detections(corners[kept], scores[kept], classes[kept].astype(np.int64))


def _corners(boxes: Floats) -> Floats:
    """Turn centre and size into left, top, right and bottom; ``(K, 4)`` both."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def overlap(one: Floats, others: Floats) -> Floats:
    """Return the intersection over union of a box ``(4,)`` with each of ``(K, 4)``."""
    shared = (np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])).clip(min=0)
    intersection = shared[:, 0] * shared[:, 1]
    union = _areas(one[None]) + _areas(others) - intersection
    # Boxes without an area overlap nothing.
    iou: Floats = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def _areas(corners: Floats) -> Floats:
    """Return the areas ``(K,)`` of boxes ``(K, 4)``."""
    areas: Floats = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return areas
