"""From the raw outputs of anchor-based heads to boxes in pixels, and to detections.

Source: the decoding that ScaledYOLOv4 and YOLOR train with (arXiv 2011.08036 and
2105.04206, in their code): every value passes a sigmoid s; a centre is
``(2 s - 0.5 + cell) * stride``, a size ``(2 s)**2 * anchor``, a score objectness times class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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


def decode_boxes(heads: Sequence[Tensor], levels: Sequence[AnchorLevel]) -> Tensor:
    """Turn the raw outputs of the heads into boxes.

    Parameters
    ----------
    heads
        For each level ``(N, anchors * (5 + classes), H, W)``, as the network returns them.
    levels
        Strides and anchors of the heads, in the same order.

    Returns
    -------
    Tensor
        ``(N, boxes, 5 + classes)``: centre x and y, width and height in pixels of the
        input, then objectness and class probabilities in [0, 1]. Boxes are ordered by
        level, anchor, row and column.
    """
    return torch.cat(
        [_decode_level(head, level) for head, level in zip(heads, levels, strict=True)], 1
    )


def _decode_level(head: Tensor, level: AnchorLevel) -> Tensor:
    # (N, anchors * values, H, W) -> (N, anchors, H, W, values)
    values = head.unflatten(1, (len(level.anchors), -1)).permute(0, 1, 3, 4, 2).sigmoid()
    centre, size, scores = values.split((2, 2, values.shape[-1] - 4), -1)
    rows = torch.arange(head.shape[2], dtype=head.dtype, device=head.device)
    columns = torch.arange(head.shape[3], dtype=head.dtype, device=head.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    cells = torch.stack((x, y), -1)
    anchors = torch.tensor(level.anchors, dtype=head.dtype, device=head.device)[:, None, None]
    # Constants are gathered, so that a compiled graph has two operators here and two there.
    centre = centre * (2 * level.stride) + (cells - 0.5) * level.stride
    size = size * size * (4 * anchors)
    return torch.cat((centre, size, scores), -1).flatten(1, 3)


class DecodedDetector(nn.Module):
    """A detector whose output is boxes in pixels.

    Parameters
    ----------
    detector
        Maps images to the raw outputs of its heads.
    levels
        Strides and anchors of the heads.
    """

    output_names = ("boxes",)

    def __init__(self, detector: nn.Module, levels: Sequence[AnchorLevel]) -> None:
        super().__init__()
        self.detector = detector
        self.levels = tuple(levels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to boxes ``(N, boxes, 5 + classes)``: see `decode_boxes`."""
        return decode_boxes(self.detector(images), self.levels)


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Objects found in one image, the most certain first.

    Parameters
    ----------
    corners
        ``(K, 4)``: left, top, right and bottom in pixels of the network's input.
    scores
        ``(K,)``: objectness times class probability.
    classes
        ``(K,)``: int64.
    """

    corners: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    classes: NDArray[np.int64]


def suppress(
    boxes: NDArray[np.floating[Any]],
    *,
    min_score: float = 0.4,
    max_iou: float = 0.5,
    max_detections: int = 300,
) -> Detections:
    """Keep the most certain of the boxes that overlap, separately for each class.

    This is greedy non-maximum suppression. A box may be found for several classes, as
    in the authors' evaluation and in the ONNX operator ``NonMaxSuppression``.

    Parameters
    ----------
    boxes
        ``(boxes, 5 + classes)``: one image of what `decode_boxes` returns.
    min_score
        Scores must be greater. The default and the next are the authors' for showing
        images; they measure accuracy with 0.001 and 0.65.
    max_iou
        A box goes when its intersection over union with a kept one of its class is greater.
    max_detections
        At most as many are returned.

    Returns
    -------
    Detections
        By falling score; of equal scores the earlier box, then the lower class, comes first.
    """
    candidates = boxes[boxes[:, 4] > min_score]  # class probabilities are at most 1
    scores = candidates[:, 4:5] * candidates[:, BOX_CHANNELS:]
    place, classes = np.nonzero(scores > min_score)
    scores = scores[place, classes]
    order = np.argsort(-scores, kind="stable")
    scores, classes = scores[order], classes[order]
    corners = _corners(candidates[place[order], :4])

    kept: list[int] = []
    left = np.arange(len(scores))
    while left.size and len(kept) < max_detections:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        same = classes[left] == classes[best]
        left = left[~(same & (_iou(corners[best], corners[left]) > max_iou))]
    return Detections(corners[kept], scores[kept], classes[kept].astype(np.int64))


def _corners(boxes: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Turn centre and size into left, top, right and bottom; ``(K, 4)`` both."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def _iou(
    one: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Return the intersection over union of a box ``(4,)`` with each of ``(K, 4)``."""
    shared = (np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])).clip(min=0)
    intersection = shared[:, 0] * shared[:, 1]
    union = _areas(one[None]) + _areas(others) - intersection
    # Boxes without an area overlap nothing.
    iou: NDArray[np.floating[Any]] = np.divide(
        intersection, union, out=np.zeros_like(union), where=union > 0
    )
    return iou


def _areas(corners: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the areas ``(K,)`` of boxes ``(K, 4)``."""
    areas: NDArray[np.floating[Any]] = (corners[:, 2] - corners[:, 0]) * (
        corners[:, 3] - corners[:, 1]
    )
    return areas
