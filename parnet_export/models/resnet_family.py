"""ResNet in the catalogue, with the parameter names of torchvision's published weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from parnet_export.models.family import Entry, Family, Restored
from parnet_export.models.resnet import (
    FusedResNet,
    ResNet,
    ResNetConfig,
    build_fused_resnet,
    build_resnet,
    fold_resnet,
    is_fused_resnet,
    is_resnet,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from parnet_export.models.resnet import BlockKind
    from parnet_export.network import Level


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    if activation not in ("auto", "relu"):
        raise ValueError(f"holds a ResNet, whose activation is relu, not {activation}")
    level: Level = "repvgg" if is_fused_resnet(tensors) else "none"
    return Restored(ResNetConfig.from_tensors(tensors), level, "relu (the only one a ResNet has)")


def _build(config: ResNetConfig, level: Level, _keys: Iterable[str]) -> nn.Module:
    return build_resnet(config) if level == "none" else build_fused_resnet(config)


def _fuse(module: nn.Module, _level: Level) -> nn.Module:
    # Nothing folds beyond the BatchNorms, so both levels are the same form.
    return module if isinstance(module, FusedResNet) else fold_resnet(cast("ResNet", module))


def _input_multiple(_config: ResNetConfig) -> int:
    return 1


def _resolution(_config: ResNetConfig) -> int:
    return 224


def _describe(config: ResNetConfig) -> str:
    blocks = "/".join(map(str, config.blocks))
    return (
        f"ResNet-{config.depth} of {blocks} {config.block} blocks and width {config.width}, "
        f"{config.num_classes} classes"
    )


def _entry(depth: int, block: BlockKind, blocks: tuple[int, ...]) -> Entry:
    return Entry(
        f"resnet{depth}",
        f"ResNet-{depth}",
        ResNetConfig(block, blocks),
        224,
        "official",
        "arXiv 1512.03385, table 1",
    )


FAMILY = Family(
    key="resnet",
    title="ResNet",
    config_type=ResNetConfig,
    module_types=(ResNet, FusedResNet),
    recognises=is_resnet,
    restore=_restore,
    build=_build,
    fuse=_fuse,
    input_multiple=_input_multiple,
    resolution=_resolution,
    describe=_describe,
    entries=(
        _entry(18, "basic", (2, 2, 2, 2)),
        _entry(34, "basic", (3, 4, 6, 3)),
        _entry(50, "bottleneck", (3, 4, 6, 3)),
        _entry(101, "bottleneck", (3, 4, 23, 3)),
    ),
)
