"""SeqConv networks in the catalogue, with the parameter names of the authors' code."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from parnet_export.models.family import Entry, Family, Restored
from parnet_export.models.seqconv import SeqConvNet, build_seqconv
from parnet_export.models.seqconv_config import SeqConvConfig, is_folded_seqconv, is_seqconv
from parnet_export.models.seqconv_folding import fold_seqconv, fuse_seqconv
from parnet_export.models.seqconv_fused import SeqConvFull, affine_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from parnet_export.models.seqconv_config import FilterKind
    from parnet_export.network import Level

_TITLES: dict[FilterKind, str] = {
    "plain": "SeqResNet",
    "bottleneck": "SeqResNet-B",
    "grouped": "SeqResNeXt",
}


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    if activation not in ("auto", "relu"):
        raise ValueError(f"holds a SeqConv network, whose activation is relu, not {activation}")
    level: Level = "repvgg" if is_folded_seqconv(tensors) else "none"
    config = SeqConvConfig.from_tensors(tensors)
    return Restored(config, level, "relu (the only one a SeqConv network has)")


def _build(config: SeqConvConfig, level: Level, keys: Iterable[str]) -> nn.Module:
    if level == "full":
        return SeqConvFull(config, affine_steps(keys)).eval()
    return SeqConvNet(config, folded=True).eval() if level == "repvgg" else build_seqconv(config)


def _fuse(module: nn.Module, level: Level) -> nn.Module:
    if isinstance(module, SeqConvFull):
        if level == "full":
            return module
        raise ValueError(f"is already fused at level full; level {level} is below it")
    net = cast("SeqConvNet", module)
    return fuse_seqconv(net) if level == "full" else fold_seqconv(net)


def _input_multiple(_config: SeqConvConfig) -> int:
    return 1


def _resolution(config: SeqConvConfig) -> int:
    return 32 if config.stem == "cifar" else 224


def _describe(config: SeqConvConfig) -> str:
    def per_stage(numbers: tuple[int, ...]) -> str:
        return "/".join(map(str, numbers))

    return (
        f"{_TITLES[config.filters]} of widths {per_stage(config.widths)}, "
        f"{per_stage(config.blocks)} blocks and {per_stage(config.filter_widths)} channels a "
        f"filter{'' if config.windowed else ', dense'}"
        f"{', groups aliased as in the code of the authors' if config.aliased else ''}, "
        f"{config.num_classes} classes"
    )


def _cifar(filters: FilterKind, k: int, r: int, blocks: int) -> Entry:
    title = _TITLES[filters]
    return Entry(
        f"{title.lower()}-k{k}r{r}",
        f"{title} k{k} r{r}",
        SeqConvConfig(
            "cifar",
            filters,
            (16 * r, 32 * r, 48 * r),
            (blocks,) * 3,
            (k,) * 3,
            (1,) * 3,
        ),
        32,
        "official",
        "arXiv 1811.10798, table 3, and the authors' code",
    )


def _imagenet(
    name: str,
    filters: FilterKind,
    blocks: tuple[int, ...],
    width: int,
    cardinality: tuple[int, ...],
) -> Entry:
    title = f"{_TITLES[filters]}{name}"
    return Entry(
        title.lower(),
        title,
        SeqConvConfig(
            "imagenet",
            filters,
            (width, 2 * width, 4 * width, 8 * width),
            blocks,
            (32, 64, 64, 128),
            cardinality,
            num_classes=1000,
            aliased=filters == "grouped",
        ),
        224,
        "official",
        "arXiv 1811.10798, table 4, and the authors' code",
    )


_NEXT = _imagenet("-24", "grouped", (1, 1, 3, 1), 256, (8, 8, 4, 4))
_NEXT_AS_PRINTED = replace(
    _NEXT,
    name="seqresnext-24-text",
    title="SeqResNeXt-24 (as the text has it)",
    config=replace(_NEXT.config, aliased=False),
    origin="reconstruction",
    source="arXiv 1811.10798, section 3 and table 4",
    choices="a transition reads the stage's output, as the text says; the authors' code overwrites "
    "it with the extension, so weights trained with that code need seqresnext-24",
)


FAMILY = Family(
    key="seqconv",
    title="SeqConv",
    config_type=SeqConvConfig,
    module_types=(SeqConvNet, SeqConvFull),
    recognises=is_seqconv,
    restore=_restore,
    build=_build,
    fuse=_fuse,
    input_multiple=_input_multiple,
    resolution=_resolution,
    describe=_describe,
    entries=(
        _cifar("plain", 8, 4, 1),
        _cifar("plain", 16, 10, 1),
        _cifar("bottleneck", 16, 7, 1),
        _cifar("bottleneck", 32, 12, 3),
        _imagenet("22", "bottleneck", (1, 1, 2, 1), 128, (1, 1, 1, 1)),
        _imagenet("42", "bottleneck", (3, 4, 5, 3), 128, (1, 1, 1, 1)),
        _NEXT,
        _NEXT_AS_PRINTED,
    ),
    untold=("aliased",),
)
