"""What a detector returns: the form of its outputs, and what it takes to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["raw", "decoded", "nms"]
"""``"raw"``: what the heads compute, one tensor for each stride. ``"decoded"``: every box
that a head's cell predicts, in pixels. ``"nms"``: the boxes that non-maximum suppression
keeps, as a fixed number of rows and the count of those that are filled."""

DETECTION_NAMES = (
    "num_detections",
    "detection_boxes",
    "detection_scores",
    "detection_classes",
)
"""Names of the outputs of form ``"nms"``, in order."""

BOXES_NAME = "boxes"
"""Name of the output of form ``"decoded"``."""

BOX_CHANNELS = 5
"""Numbers before the classes: x, y, width, height and objectness."""


@dataclass(frozen=True, slots=True)
class AnchorLevel:
    """One scale of a detector.

    Parameters
    ----------
    stride
        Pixels between two cells of the head's map.
    anchors
        Width and height in pixels of the boxes that each cell starts from.
    """

    stride: int
    anchors: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Suppression:
    """Which boxes non-maximum suppression keeps.

    The defaults of the first two are those with which the authors of YOLOv4-CSP and YOLOR
    show images; they measure accuracy with 0.001 and 0.65.

    Parameters
    ----------
    min_score
        Objectness times class probability must be greater.
    max_iou
        A box goes when its intersection over union with a kept one of its class is greater.
    max_detections
        At most as many boxes are kept in an image, the most certain ones.

    Raises
    ------
    ValueError
        When a threshold is outside of [0, 1] or there is no room for a box.
    """

    min_score: float = 0.4
    max_iou: float = 0.5
    max_detections: int = 300

    def __post_init__(self) -> None:
        if not (0 <= self.min_score <= 1 and 0 <= self.max_iou <= 1):
            raise ValueError(f"thresholds are between 0 and 1: {self}")
        if self.max_detections < 1:
            raise ValueError(f"there must be room for a box: {self}")


@dataclass(frozen=True, slots=True)
class DetectionOutput:
    """How the outputs of a detector's graph are to be read.

    Parameters
    ----------
    form
        What the graph returns.
    levels
        Strides and anchors of the heads, in the order of the raw outputs.
    num_classes
        Classes of objects.
    suppression
        What the graph keeps; None unless the form is ``"nms"``.

    Raises
    ------
    ValueError
        When form and suppression contradict each other, or there are no heads or classes.
    """

    form: Form
    levels: tuple[AnchorLevel, ...]
    num_classes: int
    suppression: Suppression | None = None

    def __post_init__(self) -> None:
        if (self.form == "nms") != (self.suppression is not None):
            raise ValueError(f"the form {self.form!r} has suppression {self.suppression}")
        if not self.levels or self.num_classes < 1:
            raise ValueError("a detector has heads and classes")

    @property
    def description(self) -> str:
        """What the graph returns, for people."""
        if self.suppression is None:
            return {"raw": "the raw outputs of its heads", "decoded": "every box"}[self.form]
        kept = self.suppression
        return (
            f"at most {kept.max_detections} objects of scores above {kept.min_score:g}, those of "
            f"a class overlapping by at most {kept.max_iou:g}"
        )
