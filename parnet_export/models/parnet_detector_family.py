"""The ParNet detectors in the catalogue; both are reconstructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

from parnet_export.images.input_form import LETTERBOX
from parnet_export.models.family import Entry, Family, Restored
from parnet_export.models.parnet import detect_activation
from parnet_export.models.parnet_blocks import Activation
from parnet_export.models.parnet_detector import (
    CSP_CHOICES,
    DETECTOR_CHOICES,
    ParNetDetector,
    ParNetDetectorConfig,
    build_parnet_detector,
    is_fused_parnet_detector,
    is_parnet_detector,
)
from parnet_export.models.yolov4_csp_layers import LEVELS, OUTPUT_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from parnet_export.network import Level


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    if activation == "auto":
        chosen, reason = detect_activation(tensors)
    else:
        chosen, reason = cast("Activation", activation), "as asked"
        if chosen not in get_args(Activation):
            raise ValueError(f"cannot use the activation {activation!r}; choose silu or relu")
    config = ParNetDetectorConfig.from_tensors(tensors, chosen)
    level: Level = "repvgg" if is_fused_parnet_detector(tensors) else "none"
    return Restored(config, level, f"{chosen} ({reason})")


def _fuse(module: nn.Module, level: Level) -> nn.Module:
    return cast("ParNetDetector", module).fuse(level)


def _input_multiple(_config: ParNetDetectorConfig) -> int:
    return 32


def _resolution(_config: ParNetDetectorConfig) -> int:
    return 640


def _describe(config: ParNetDetectorConfig) -> str:
    widths = "/".join(map(str, config.widths))
    neck = "/".join(map(str, config.neck_widths))
    streams = "streams with a bypass" if config.partial else "streams"
    return (
        f"ParNet detector, 3 {streams} of widths {widths}, a neck of {neck} channels, "
        f"{config.num_classes} classes"
    )


def _entry(name: str, title: str, choices: str, *, partial: bool) -> Entry:
    config = ParNetDetectorConfig(partial=partial)
    source = "arXiv 2110.07641, section 4.2 and table 4"
    return Entry(name, title, config, 640, "reconstruction", source, choices)


FAMILY = Family(
    key="parnet-detector",
    title="ParNet detector",
    config_type=ParNetDetectorConfig,
    module_types=(ParNetDetector,),
    recognises=is_parnet_detector,
    restore=_restore,
    build=build_parnet_detector,
    fuse=_fuse,
    input_multiple=_input_multiple,
    resolution=_resolution,
    describe=_describe,
    entries=(
        _entry("parnet-xl-det", "ParNet-XL detector", DETECTOR_CHOICES, partial=False),
        _entry(
            "parnet-xl-csp-det",
            "ParNet-XL-CSP detector",
            f"{DETECTOR_CHOICES}; {CSP_CHOICES}",
            partial=True,
        ),
    ),
    output_names=OUTPUT_NAMES,
    anchor_levels=LEVELS,
    input_form=LETTERBOX,
)
