"""Find objects in images of any size with a bundle of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from parnet_engines.session import Session
from parnet_export.detections.detection_form import BOXES_NAME, Suppression
from parnet_export.detections.suppression import Detections, read_detections, suppress
from parnet_export.errors import InputError
from parnet_export.images.input_form import LETTERBOX
from parnet_export.images.letterbox import Letterbox

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from parnet_engines.base_session import AnySession
    from parnet_engines.session import Plan
    from parnet_export.bundle import Bundle
    from parnet_export.detections.detection_form import DetectionOutput
    from parnet_export.images.input_form import InputForm


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Which boxes are wanted; None for what the bundle has, or the usual ones.

    Parameters
    ----------
    min_score
        Scores must be greater.
    max_iou
        A box goes when it overlaps a more certain one of its class by more.
    """

    min_score: float | None = None
    max_iou: float | None = None


class Detector:
    """A session with what stands before and after it.

    `Detector.open` makes one from a bundle. It owns its session.

    Parameters
    ----------
    session
        Takes one image and returns what `output` describes.
    output
        How to read the outputs.
    suppression
        Which boxes are returned.
    input_form
        How images become the network's input: as a letterbox.
    """

    def __init__(
        self,
        session: AnySession,
        output: DetectionOutput,
        suppression: Suppression,
        input_form: InputForm = LETTERBOX,
    ) -> None:
        self._session = session
        self._output = output
        self.suppression = suppression
        self.input_form = input_form

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        devices: str = "cpu",
        *,
        plan: Plan | Path = "streams",
        thresholds: Thresholds | None = None,
        input_form: InputForm | None = None,
    ) -> Self:
        """Load a bundle of a detector.

        Parameters
        ----------
        bundle
            A bundle that says how its outputs are to be read, for square images.
        devices, plan
            As `Session.open` takes them.
        thresholds
            Which boxes are wanted. A graph with suppression has made its choice already:
            of what it returns, only a higher score can be asked for.
        input_form
            How images are prepared, as a letterbox; by default as the bundle states, or
            else as YOLOv4-CSP's authors do it.

        Raises
        ------
        InputError
            When the bundle is of no detector, its images are not one of a fixed size, the
            thresholds are not between 0 and 1, or the graph has dropped what they ask for.
        MissingBackendError
            When ONNX Runtime is not installed.
        """
        output = bundle.manifest.provenance.detections
        if output is None:
            raise InputError(
                bundle.path,
                "is no bundle of a detector",
                "Make one: `parnet-export split-streams yolov4-csp --detections decoded`",
            )
        _require_one_image(bundle)
        suppression = _choose(bundle, output, thresholds or Thresholds())
        form = input_form or bundle.manifest.provenance.input_form or LETTERBOX
        if form.fit != "letterbox":
            problem = f"prepares its images as a {form.fit}, of which boxes are not brought back"
            raise InputError(bundle.path, problem, "Make it again with split-streams")
        return cls(Session.open(bundle, devices, plan=plan), output, suppression, form)

    def detect(self, image: NDArray[np.uint8]) -> Detections:
        """Find the objects in an image.

        Parameters
        ----------
        image
            ``(height, width, 3)``, RGB, of any size.

        Returns
        -------
        Detections
            In pixels of the image, the most certain first.
        """
        spec = self._session.inputs[0]
        height, width = (int(size) for size in spec.shape[2:])
        letterbox = Letterbox.fit((image.shape[1], image.shape[0]), (width, height))
        found = self._read(self._session.run({spec.name: letterbox.apply(image, self.input_form)}))
        return Detections(letterbox.to_image(found.corners), found.scores, found.classes)

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, outputs: Mapping[str, NDArray[Any]]) -> Detections:
        """Return the detections in one image's outputs, in pixels of the network's input."""
        if self._output.form == "nms":
            (found,) = read_detections(outputs)
            return found.above(self.suppression.min_score)
        if self._output.form == "decoded":
            return suppress(outputs[BOXES_NAME][0], self.suppression)
        import torch

        from parnet_export.models.yolo_decode import decode_boxes

        heads = [torch.from_numpy(outputs[spec.name]) for spec in self._session.outputs]
        return suppress(decode_boxes(heads, self._output.levels)[0].numpy(), self.suppression)


def _require_one_image(bundle: Bundle) -> None:
    inputs = bundle.stream_graph.inputs
    shape = inputs[0].shape
    fits = len(inputs) == 1 and len(shape) == 4 and shape[1] == 3
    if not (fits and (shape[0] == 1 or isinstance(shape[0], str))):
        problem = f"takes {list(shape)}, and images are given one at a time"
        raise InputError(bundle.path, problem, "Make a bundle with --batch 1 or dynamic")


def _choose(bundle: Bundle, output: DetectionOutput, wanted: Thresholds) -> Suppression:
    """Return which boxes the detector is to return."""
    known = output.suppression or Suppression()
    score = known.min_score if wanted.min_score is None else wanted.min_score
    iou = known.max_iou if wanted.max_iou is None else wanted.max_iou
    if output.suppression is not None:
        again = "Make the bundle with another threshold, or with --detections decoded"
        if score < known.min_score:
            problem = f"the graph of {bundle.path} drops scores up to {known.min_score:g}"
            raise InputError("--score-threshold", problem, again)
        if iou != known.max_iou:
            problem = f"the graph of {bundle.path} suppresses at {known.max_iou:g} already"
            raise InputError("--iou-threshold", problem, again)
    return Suppression(score, iou, known.max_detections)
