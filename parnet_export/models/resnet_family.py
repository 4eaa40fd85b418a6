"""ResNet in the catalogue, with the parameter names of torchvision's published weights.

The wide networks are the baselines of ParNet's table 8, reconstructed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from parnet_export.images.input_form import IMAGENET
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
    config = ResNetConfig.from_tensors(tensors, activation)
    level: Level = "repvgg" if is_fused_resnet(tensors) else "none"
    if not config.gated:
        reason = "the only one a ResNet has"
    elif activation == "auto":
        reason = "that of the network we reconstruct"
    else:
        reason = "as asked"
    return Restored(config, level, f"{config.activation} ({reason})")


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
    gates = " with gated shortcuts" if config.gated else ""
    return (
        f"ResNet-{config.depth} of {blocks} {config.block} blocks{gates} and width {config.width}, "
        f"{config.num_classes} classes"
    )


WIDE_CHOICES = (
    "the fifth block is in the last stage; every stage is twice as wide as the one before, and the "
    "first 127 channels wide, whose 38.9 M parameters are nearest to the published 39.0 M"
)
"""What the paper does not say about ResNet12-Wide and this reconstruction assumes."""

WIDE_BN_CHOICES = (
    "one bottleneck block in each stage, which is what 14 layers leave room for; every stage is "
    "twice as wide as the one before, and the 3x3 convolution of the first 133 channels wide, "
    "whose 38.8 M parameters are nearest to the published 39.0 M"
)
"""What the paper does not say about ResNet14-Wide-BN and this reconstruction assumes."""

WIDE_SSE_CHOICES = (
    "as ResNet12-Wide with SiLU for every ReLU and a gate on every shortcut: an identity shortcut "
    "is normalised before its gate, as in ParNet's blocks, and one with a convolution has its own "
    "BatchNorm; a first stage of 123 channels, whose 38.8 M parameters are nearest to the "
    "published 39.0 M; table 8 prints its name as ResNet12-Wide-BN"
)
"""What the paper does not say about ResNet12-Wide-SSE and this reconstruction assumes."""


def _wide(name: str, config: ResNetConfig, choices: str) -> Entry:
    return Entry(
        name.lower(), name, config, 224, "reconstruction", "arXiv 2110.07641, table 8", choices
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
        _wide("ResNet12-Wide", ResNetConfig("basic", (1, 1, 1, 2), 127), WIDE_CHOICES),
        _wide("ResNet14-Wide-BN", ResNetConfig("bottleneck", (1,) * 4, 133), WIDE_BN_CHOICES),
        _wide(
            "ResNet12-Wide-SSE",
            ResNetConfig("basic", (1, 1, 1, 2), 123, gated=True, activation="silu"),
            WIDE_SSE_CHOICES,
        ),
    ),
    # As torchvision, whose names and layout the family has, evaluates its weights.
    input_form=replace(IMAGENET, interpolation="bilinear"),
)
