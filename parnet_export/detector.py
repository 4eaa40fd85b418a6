"""Give a detector the form of outputs that is asked for: raw heads, boxes, or detections."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from parnet_export.detections.detection_form import DetectionOutput, Suppression
from parnet_export.errors import InputError
from parnet_export.models.catalog import CATALOG, FAMILIES

if TYPE_CHECKING:
    from parnet_export.detections.detection_form import Form
    from parnet_export.network import Network


FULL_PRECISION_MODULES = ("decode", "suppress")
"""Modules that turn heads into boxes. Neighbouring numbers in half precision are half a pixel
apart where coordinates are, so these modules compute in float32."""


def is_detector(network: Network) -> bool:
    """Tell whether a network returns the raw heads of a detector."""
    return bool(FAMILIES[network.family].anchor_levels)


def detection_output(
    network: Network, form: Form, suppression: Suppression | None = None
) -> DetectionOutput:
    """Describe a form of a detector's outputs.

    Parameters
    ----------
    network
        A detector.
    form
        What its graph is to return.
    suppression
        For the form ``"nms"``; the default `Suppression` where it is None.

    Raises
    ------
    InputError
        When the network is no detector.
    """
    levels = FAMILIES[network.family].anchor_levels
    if not levels:
        detectors = sorted(name for name, (family, _) in CATALOG.items() if family.anchor_levels)
        problem = f"{network.name} is no detector, so it has no form of detections"
        raise InputError("--detections", problem, f"Detectors are {', '.join(detectors)}")
    kept = (suppression or Suppression()) if form == "nms" else None
    return DetectionOutput(form, levels, network.config.num_classes, kept)


def with_output(network: Network, output: DetectionOutput) -> Network:
    """Return a detector that returns what `output` describes.

    Parameters
    ----------
    network
        A detector that returns its raw heads, in any form.
    output
        What `detection_output` gives for it.
    """
    from parnet_export.models.suppressed_detector import SuppressedDetector
    from parnet_export.models.yolo_decode import DecodedDetector

    provenance = replace(network.provenance, detections=output)
    if output.form == "raw":
        return replace(network, provenance=provenance)
    detector: DecodedDetector | SuppressedDetector
    if output.suppression is None:
        detector = DecodedDetector(network.module, output.levels)
    else:
        detector = SuppressedDetector(network.module, output.levels, output.suppression)
    return replace(
        network,
        module=detector.eval(),
        output_names=detector.output_names,
        provenance=provenance,
    )
