"""ParNet in the catalogue: S, M, L and XL, and the CIFAR reconstructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

from parnet_export.models.family import Entry, Family, Restored
from parnet_export.models.parnet import (
    CIFAR_CHOICES,
    ParNet,
    ParNetConfig,
    config_from_tensors,
    detect_activation,
    is_fused_state,
    is_parnet,
)
from parnet_export.models.parnet_blocks import Activation
from parnet_export.models.parnet_full import ParNetFull, affine_parts, fuse_full

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from parnet_export.network import Level


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    if activation == "auto":
        chosen, reason = detect_activation(tensors)
    else:
        chosen, reason = cast("Activation", activation), "as asked"
        if chosen not in get_args(Activation):
            raise ValueError(f"cannot use the activation {activation!r}; choose silu or relu")
    config = config_from_tensors(tensors, chosen)
    level: Level = "repvgg" if is_fused_state(tensors) else "none"
    return Restored(config, level, f"{chosen} ({reason})")


def _build(config: ParNetConfig, level: Level, keys: Iterable[str]) -> nn.Module:
    if level == "full":
        return ParNetFull(config, affine_parts(keys))
    return ParNet(config, fused=level == "repvgg")


def _fuse(module: nn.Module, level: Level) -> nn.Module:
    if isinstance(module, ParNetFull):
        return module  # nothing is left to fuse
    network = cast("ParNet", module)
    return fuse_full(network) if level == "full" else network.fuse()


def _input_multiple(config: ParNetConfig) -> int:
    return config.input_multiple


def _resolution(config: ParNetConfig) -> int:
    # The fourth stream of an ImageNet network would end at 3.5 pixels for 224.
    return 32 if config.variant == "cifar" else 224 if config.streams <= 3 else 256


def _describe(config: ParNetConfig) -> str:
    widths = "/".join(map(str, config.widths))
    blocks = "/".join(map(str, config.blocks))
    kind = "CIFAR ParNet" if config.variant == "cifar" else "ParNet"
    return (
        f"{kind}, {config.streams} streams of widths {widths} and {blocks} blocks, "
        f"{config.last_width} channels before {config.num_classes} classes"
    )


def _imagenet(
    size: str,
    widths: tuple[int, int, int],
    last_width: int,
    source: str = "arXiv 2110.07641, table A1",
) -> Entry:
    config = ParNetConfig(widths, (4, 5, 5), last_width)
    return Entry(f"parnet-{size.lower()}", f"ParNet-{size}", config, 224, "official", source)


def _cifar(size: str, width: int) -> Entry:
    widths = (width, 2 * width, 4 * width)
    config = ParNetConfig(widths, (3, 4, 4), 5 * width, num_classes=10, variant="cifar")
    return Entry(
        f"parnet-cifar-{size}m",
        f"ParNet {size} M (CIFAR)",
        config,
        32,
        "reconstruction",
        "arXiv 2110.07641, section 3.3 and table 6",
        CIFAR_CHOICES,
    )


FAMILY = Family(
    key="parnet",
    title="ParNet",
    config_type=ParNetConfig,
    module_types=(ParNet, ParNetFull),
    recognises=is_parnet,
    restore=_restore,
    build=_build,
    fuse=_fuse,
    input_multiple=_input_multiple,
    resolution=_resolution,
    describe=_describe,
    entries=(
        _imagenet("S", (96, 192, 384), 1280),
        _imagenet("S-92", (92, 192, 384), 1280, "the authors' released configuration of ParNet-S"),
        _imagenet("M", (128, 256, 512), 2048),
        _imagenet("L", (160, 320, 640), 2560),
        _imagenet("XL", (200, 400, 800), 3200),
        _cifar("1.3", 32),
        _cifar("15.5", 112),
        _cifar("35", 168),
    ),
)
