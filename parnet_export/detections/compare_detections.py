"""Compare what two forms of a detector keep after non-maximum suppression.

Suppression decides, and rounding can turn a close decision: of two overlapping boxes whose
scores differ by less than the arithmetic's error either may stay, and with the other one go
the boxes that only that one overlapped. So detections are compared as sets. One that the
other side lacks must have a reason there: its score is at the threshold, or too low for the
room there is, or a box that is at least as certain overlaps it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_export.detections.suppression import overlap, read_detections

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_export.detections.detection_form import Suppression
    from parnet_export.detections.suppression import Detections
    from parnet_export.samples import Sample


def detections_error(
    actual: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
    suppression: Suppression,
    limit: float,
) -> float:
    """Return how far the detections of two graphs are apart.

    Parameters
    ----------
    actual, reference
        Outputs of two graphs that have read the same images.
    suppression
        Which boxes both of them keep.
    limit
        Relative error that scores (of 1) and coordinates (of the largest one) may have.

    Returns
    -------
    float
        The largest relative error of detections that both sides have; infinite when one side
        lacks a detection of the other without a reason, or has values that are not finite.
    """
    worst = 0.0
    for found, expected in zip(read_detections(actual), read_detections(reference), strict=True):
        for detections in (found, expected):
            values = (*detections.corners.ravel(), *detections.scores)
            if not np.isfinite(values).all():
                return math.inf
        scale = max(1.0, *(float(np.abs(d.corners).max(initial=0)) for d in (found, expected)))
        for one, other in ((found, expected), (expected, found)):
            for error in _errors(one, other, suppression, limit, scale):
                worst = max(worst, error)
    return worst


def compared_detections(
    samples: Sequence[Sample],
    actual: Sequence[Mapping[str, NDArray[Any]]],
    reference: Sequence[Mapping[str, NDArray[Any]]],
    suppression: Suppression,
    limit: float,
) -> dict[str, float]:
    """Return the largest `detections_error` for each kind of sample."""
    errors: dict[str, float] = {}
    for sample, found, expected in zip(samples, actual, reference, strict=True):
        error = detections_error(found, expected, suppression, limit)
        errors[sample.name] = max(error, errors.get(sample.name, 0.0))
    return errors


def _errors(
    found: Detections, others: Detections, suppression: Suppression, limit: float, scale: float
) -> Iterator[float]:
    """Yield the error of each detection that the other side has or has no reason to lack."""
    for corners, score, label in zip(found.corners, found.scores, found.classes, strict=True):
        same = others.classes == label
        off = np.maximum(
            np.abs(others.corners[same] - corners).max(1, initial=0) / scale,
            np.abs(others.scores[same] - score),
        )
        nearest = float(off.min(initial=math.inf))
        if nearest <= limit:
            yield nearest
        elif not _may_lack(
            corners, score, others, same=same, suppression=suppression, limit=limit, scale=scale
        ):
            yield math.inf


def _may_lack(
    corners: NDArray[Any],
    score: float,
    others: Detections,
    *,
    same: NDArray[np.bool_],
    suppression: Suppression,
    limit: float,
    scale: float,
) -> bool:
    """Tell whether suppression on the other side may have decided against a detection."""
    if score <= suppression.min_score + limit:
        return True
    if len(others) == suppression.max_detections and score <= others.scores[-1] + limit:
        return True
    certain = same & (others.scores >= score - limit)
    # Errors of coordinates change an overlap the more, the smaller the box.
    side = float((corners[2:] - corners[:2]).min())
    slack = 4 * limit * scale / side if side > 0 else math.inf
    return bool((overlap(corners, others.corners[certain]) > suppression.max_iou - slack).any())
