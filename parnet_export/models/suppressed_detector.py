"""A detector with non-maximum suppression at its end, in torch and in ONNX.

Torch has no operator for suppression, so there is one here. In torch it is computed by
`parnet_export.detections.suppression`; in an exported graph it becomes ``NonMaxSuppression``
and what brings its result, whose length depends on the image, into tensors of a fixed size.
A session, a device and a CUDA graph can then have memory for them before the image is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnxscript import opset20
from torch import Tensor, nn

from parnet_export.detections.detection_form import BOX_CHANNELS, DETECTION_NAMES, Suppression
from parnet_export.detections.suppression import suppress
from parnet_export.models.yolo_decode import DecodedDetector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parnet_export.detections.detection_form import AnchorLevel

_Detections = tuple[Tensor, Tensor, Tensor, Tensor]

op: Any = opset20  # its annotations know tensors of a single type, not of what is traced

NO_CLASS = -1
"""The class in rows that hold no detection; their boxes and scores are zero."""


class SuppressedDetector(nn.Module):
    """A detector whose output is the objects it finds.

    Parameters
    ----------
    detector
        Maps images to the raw outputs of its heads.
    levels
        Strides and anchors of the heads.
    suppression
        Which boxes are kept.
    """

    output_names = DETECTION_NAMES

    def __init__(
        self, detector: nn.Module, levels: Sequence[AnchorLevel], suppression: Suppression
    ) -> None:
        super().__init__()
        self.decoded = DecodedDetector(detector, levels)
        self.suppress = BoxSuppressor(suppression)

    def forward(self, images: Tensor) -> _Detections:
        """Map images ``(N, 3, H, W)`` to detections: see `BoxSuppressor`."""
        found: _Detections = self.suppress(self.decoded(images))
        return found


class BoxSuppressor(nn.Module):
    """Greedy non-maximum suppression, separately for each image and class."""

    def __init__(self, suppression: Suppression) -> None:
        super().__init__()
        self.suppression = suppression

    def forward(self, boxes: Tensor) -> _Detections:
        """Keep the most certain of the boxes that overlap.

        Parameters
        ----------
        boxes
            ``(N, boxes, 5 + classes)``, as `decode_boxes` returns them.

        Returns
        -------
        counts, corners, scores, classes
            With M for `max_detections`: int64 ``(N,)``, how many rows are filled; ``(N, M, 4)``,
            left, top, right and bottom in pixels of the input; ``(N, M)``, objectness times
            class probability, falling; int64 ``(N, M)``. Rows without a detection are zero,
            and their class is `NO_CLASS`.
        """
        options = self.suppression
        found: _Detections = torch.ops.parnet_export.suppress(
            boxes, options.min_score, options.max_iou, options.max_detections
        )
        return found


@torch.library.custom_op("parnet_export::suppress", mutates_args=())
def _suppress(
    boxes: Tensor, min_score: float, max_iou: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Suppression(min_score, max_iou, max_detections)
    values = boxes.cpu().numpy()
    images = len(values)
    counts = np.zeros(images, np.int64)
    corners = np.zeros((images, max_detections, 4), values.dtype)
    scores = np.zeros((images, max_detections), values.dtype)
    classes = np.full((images, max_detections), NO_CLASS, np.int64)
    for index, image in enumerate(values):
        found = suppress(image, options)
        count = counts[index] = len(found)
        corners[index, :count] = found.corners
        scores[index, :count] = found.scores
        classes[index, :count] = found.classes
    tensors = (torch.from_numpy(array) for array in (counts, corners, scores, classes))
    return tuple(tensor.to(boxes.device) for tensor in tensors)  # type: ignore[return-value]  # four


@_suppress.register_fake
def _(
    boxes: Tensor,
    min_score: float,  # noqa: ARG001 - the operator's signature
    max_iou: float,  # noqa: ARG001
    max_detections: int,
) -> _Detections:
    images = boxes.shape[0]
    return (
        boxes.new_empty((images,), dtype=torch.int64),
        boxes.new_empty((images, max_detections, 4)),
        boxes.new_empty((images, max_detections)),
        boxes.new_empty((images, max_detections), dtype=torch.int64),
    )


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as its custom translation table."""
    return {torch.ops.parnet_export.suppress.default: _suppress_in_onnx}


def _suppress_in_onnx(
    boxes: Any, min_score: float, max_iou: float, max_detections: int
) -> tuple[Any, Any, Any, Any]:
    """Write `_suppress` in operators of ONNX; ``(N, boxes, ...)`` is written NB below.

    ``NonMaxSuppression`` returns image, class and box of each kept score, ordered by image
    and class. All other scores are set to zero, and the largest of what is left are the
    detections: of equal ones the earlier box, then the lower class, as `suppress` has it.
    """
    xywh = op.Slice(boxes, _ints(0), _ints(4), _ints(2))
    objectness = op.Slice(boxes, _ints(4), _ints(BOX_CHANNELS), _ints(2))
    probabilities = op.Slice(boxes, _ints(BOX_CHANNELS), _ints(np.iinfo(np.int64).max), _ints(2))
    scores = op.Mul(objectness, probabilities)  # NBC
    kept = op.NonMaxSuppression(
        xywh,
        op.Transpose(scores, perm=[0, 2, 1]),
        _ints(max_detections),
        _floats(max_iou),
        _floats(min_score),
        center_point_box=1,
    )
    places = op.Gather(kept, _ints(0, 2, 1), axis=1)  # image, box, class
    nothing = op.ConstantOfShape(op.Shape(scores))
    kept_scores = op.ScatterND(nothing, places, op.GatherND(scores, places))
    # Room for as many detections as are asked for, also where there are fewer boxes.
    flat = op.Pad(op.Reshape(kept_scores, _ints(0, -1)), _ints(0, 0, 0, max_detections))
    top_scores, order = op.TopK(flat, _ints(max_detections), axis=1)
    found = op.Greater(top_scores, op.Constant(value_float=0.0))
    counts = op.ReduceSum(op.Cast(found, to=_INT64), _ints(1), keepdims=0)
    num_classes = op.Shape(scores, start=2)
    rows = op.Where(found, op.Div(order, num_classes), op.Constant(value_int=0))
    classes = op.Where(found, op.Mod(order, num_classes), op.Constant(value_int=NO_CLASS))
    centre_and_size = op.GatherND(xywh, op.Unsqueeze(rows, _ints(2)), batch_dims=1)
    centre, size = op.Split(centre_and_size, num_outputs=2, axis=2)
    half = op.Mul(size, op.Constant(value_float=0.5))
    corners = op.Concat(op.Sub(centre, half), op.Add(centre, half), axis=2)
    filled = op.Cast(op.Unsqueeze(found, _ints(2)), to=_FLOAT)
    return counts, op.Mul(corners, filled), top_scores, classes


_FLOAT, _INT64 = 1, 7  # onnx.TensorProto


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _floats(*values: float) -> Any:
    return op.Constant(value_floats=list(values))
