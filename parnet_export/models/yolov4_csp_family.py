"""YOLOv4-CSP in the catalogue, with Mish and with SiLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from parnet_export.images.input_form import LETTERBOX
from parnet_export.models.family import Entry, Family, Restored
from parnet_export.models.yolov4_csp import (
    FusedYOLOv4CSP,
    YOLOv4CSP,
    build_fused_yolov4_csp,
    build_yolov4_csp,
    chain_pools,
    fold_yolov4_csp,
)
from parnet_export.models.yolov4_csp_layers import (
    LAYOUT_ACTIVATIONS,
    LEVELS,
    OUTPUT_NAMES,
    Activation,
    YOLOv4CSPConfig,
    is_fused_yolov4_csp,
    is_yolov4_csp,
    layout_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from parnet_export.network import Level


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    fused = is_fused_yolov4_csp(tensors)
    level: Level = "repvgg" if fused else "none"
    if activation != "auto":
        config = YOLOv4CSPConfig.from_tensors(tensors, cast("Activation", activation))
        return Restored(config, level, f"{activation} (as asked)")
    if fused:
        raise ValueError(
            "is a fused YOLOv4-CSP without a description, and nothing in it tells whether its "
            "activation is mish or silu"
        )
    layout = layout_of(tensors)
    chosen = LAYOUT_ACTIVATIONS[layout]
    config = YOLOv4CSPConfig.from_tensors(tensors, chosen)
    return Restored(config, level, f"{chosen} (detected: its layers are numbered as {layout}'s)")


def _build(config: YOLOv4CSPConfig, level: Level, keys: Iterable[str]) -> nn.Module:
    if level == "none":
        names = tuple(keys)
        return build_yolov4_csp(config, layout_of(names)) if names else build_yolov4_csp(config)
    return build_fused_yolov4_csp(config, chain_pools=level == "full")


def _fuse(module: nn.Module, level: Level) -> nn.Module:
    if not isinstance(module, FusedYOLOv4CSP):
        module = fold_yolov4_csp(cast("YOLOv4CSP", module))
    return chain_pools(module) if level == "full" else module


def _input_multiple(_config: YOLOv4CSPConfig) -> int:
    return 32


def _resolution(_config: YOLOv4CSPConfig) -> int:
    return 640


def _describe(config: YOLOv4CSPConfig) -> str:
    return (
        f"YOLOv4-CSP of width {config.width} with {config.activation}, {config.num_classes} classes"
    )


def _entry(name: str, title: str, activation: Activation, source: str) -> Entry:
    return Entry(name, title, YOLOv4CSPConfig(activation=activation), 640, "official", source)


FAMILY = Family(
    key="yolov4-csp",
    title="YOLOv4-CSP",
    config_type=YOLOv4CSPConfig,
    module_types=(YOLOv4CSP, FusedYOLOv4CSP),
    recognises=is_yolov4_csp,
    restore=_restore,
    build=_build,
    fuse=_fuse,
    input_multiple=_input_multiple,
    resolution=_resolution,
    describe=_describe,
    entries=(
        _entry(
            "yolov4-csp",
            "YOLOv4-CSP",
            "mish",
            "arXiv 2011.08036, section 3.1, and yolov4-csp.cfg of ScaledYOLOv4 and Darknet",
        ),
        _entry(
            "yolov4-csp-silu",
            "YOLOv4-CSP (SiLU)",
            "silu",
            "arXiv 2011.08036, section 3.1, and yolov4_csp.cfg of YOLOR",
        ),
    ),
    output_names=OUTPUT_NAMES,
    anchor_levels=LEVELS,
    input_form=LETTERBOX,
)
