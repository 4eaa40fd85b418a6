"""From the raw outputs of anchor-based heads to boxes in pixels.

Source: the decoding that ScaledYOLOv4 and YOLOR train with (arXiv 2011.08036 and
2105.04206, in their code): every value passes a sigmoid s; a centre is
``(2 s - 0.5 + cell) * stride``, a size ``(2 s)**2 * anchor``, a score objectness times class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from parnet_export.detections.detection_form import BOXES_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_export.detections.detection_form import AnchorLevel


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


class BoxDecoder(nn.Module):
    """`decode_boxes` as a module, so that its operators carry its name in a graph."""

    def __init__(self, levels: Sequence[AnchorLevel]) -> None:
        super().__init__()
        self.levels = tuple(levels)

    def forward(self, heads: Sequence[Tensor]) -> Tensor:
        """Map the raw outputs of the heads to boxes ``(N, boxes, 5 + classes)``."""
        return decode_boxes(heads, self.levels)


class DecodedDetector(nn.Module):
    """A detector whose output is boxes in pixels.

    Parameters
    ----------
    detector
        Maps images to the raw outputs of its heads.
    levels
        Strides and anchors of the heads.
    """

    output_names = (BOXES_NAME,)

    def __init__(self, detector: nn.Module, levels: Sequence[AnchorLevel]) -> None:
        super().__init__()
        self.detector = detector
        self.decode = BoxDecoder(levels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to boxes ``(N, boxes, 5 + classes)``: see `decode_boxes`."""
        boxes: Tensor = self.decode(self.detector(images))
        return boxes
