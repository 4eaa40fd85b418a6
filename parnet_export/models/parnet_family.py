"""ParNet in the catalogue: S to XL, other numbers of streams, and the CIFAR reconstructions."""

from __future__ import annotations

import math
from dataclasses import replace
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


ONE_STREAM = ParNetConfig((576,), (6,), 2048, stem=(64, 144, 288, 576))
"""ParNet-M-OneStream: the published size and depth, in the one stream that table 9 combines."""

ONE_STREAM_CHOICES = (
    "a stem that doubles its width from 144 to 576 channels, one stream of 6 blocks at 1/16 of the "
    "image's size, and 2048 channels before the classifier: 35.9 M fused (36.0 M published), depth "
    "12"
)
_TWO_STREAMS = ParNetConfig((262, 524), (5, 5), 2048, stem=(64, 131, 262))
_TWO_STREAMS_CHOICES = (
    "the streams at 1/8 and 1/16 of the image's size, 262 and 524 channels wide, with 5 blocks "
    "each, and 2048 channels before the classifier: 35.9 M fused, as ParNet-M, and depth 12"
)
_FOUR_STREAMS = ParNetConfig((64, 128, 256, 512), (4, 5, 5, 5), 2048, stem=(64,))
_FOUR_STREAMS_CHOICES = (
    "the fourth stream at 1/2 of the image's size, since at 1/32 the depth would be 13 and 224 "
    "pixels would not divide; 64 channels and 4 blocks in it, one more block in the next than "
    "ParNet-M has: 36.0 M fused, depth 12"
)


def choose_activation(tensors: Mapping[str, Tensor], wanted: str) -> tuple[Activation, str]:
    """Return the activation asked for, or the one that a state dict tells, and why.

    Raises
    ------
    ValueError
        When ParNets have no activation of that name.
    """
    if wanted == "auto":
        return detect_activation(tensors)
    chosen = cast("Activation", wanted)
    if chosen not in get_args(Activation):
        raise ValueError(f"cannot use the activation {wanted!r}; choose silu or relu")
    return chosen, "as asked"


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    chosen, reason = choose_activation(tensors, activation)
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
    # A fourth stream at 1/32 of the image's size would end at 3.5 pixels for 224.
    if config.variant == "cifar":
        return 32
    return math.ceil(224 / config.input_multiple) * config.input_multiple


def _describe(config: ParNetConfig) -> str:
    widths = "/".join(map(str, config.widths))
    blocks = "/".join(map(str, config.blocks))
    streams = "1 stream of width" if config.streams == 1 else f"{config.streams} streams of widths"
    kind = "CIFAR ParNet" if config.variant == "cifar" else "ParNet"
    return (
        f"{kind}, {streams} {widths} and {blocks} blocks, "
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


def _streams(number: str, config: ParNetConfig, source: str, choices: str) -> Entry:
    return Entry(
        f"parnet-m-{number.lower()}-stream{'' if config.streams == 1 else 's'}",
        f"ParNet-M, {number.lower()} streams" if config.streams > 1 else "ParNet-M-OneStream",
        config,
        224,
        "reconstruction",
        f"arXiv 2110.07641, {source}",
        choices,
    )


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


_XL = _imagenet("XL", (200, 400, 800), 3200)

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
        _XL,
        replace(
            _XL,
            name="parnet-xl-320",
            title="ParNet-XL (320 px)",
            resolution=320,
            source="arXiv 2110.07641, table 5",
        ),
        _streams("One", ONE_STREAM, "tables 8, 9 and 10", ONE_STREAM_CHOICES),
        _streams("Two", _TWO_STREAMS, "table 10", _TWO_STREAMS_CHOICES),
        _streams("Four", _FOUR_STREAMS, "table 10", _FOUR_STREAMS_CHOICES),
        _cifar("1.3", 32),
        _cifar("15.5", 112),
        _cifar("35", 168),
    ),
)
