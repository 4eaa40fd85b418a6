"""The structure of SeqConv networks, and how it is read off a state dict.

Source: Huang et al., "Sequentially Aggregated Convolutional Networks", arXiv 1811.10798,
and the authors' code for what the text leaves open.

A SeqConv layer makes its output in groups of k channels, one filter after another; each
filter also reads the groups that the filters before it have made. A *dense* layer's view
grows by a group each time. A *windowed* layer's view slides: it drops as many of its
oldest channels as it gains, so every filter reads as many channels as the layer has inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

FilterKind = Literal["plain", "bottleneck", "grouped"]
"""A 3x3 convolution (SeqResNet); 1x1 and 3x3 (SeqResNet-B); 1x1 and grouped 3x3 (SeqResNeXt)."""

Stem = Literal["cifar", "imagenet"]

STEM_WIDTHS: dict[Stem, int] = {"cifar": 16, "imagenet": 32}
"""Channels of the ordinary convolutions before the first SeqConv layer."""

_STEM_KEYS: dict[Stem, str] = {
    "cifar": "Init.LinearLayer.weight",
    "imagenet": "Head0.LinearLayer.weight",
}
_COMMON_KEYS = ("Blender.LinearLayer.weight", "Classifier.weight")
_BLOCK_KEY = re.compile(r"Stage(\d{1,4})\.(\d{1,4})\.LayerA\.(.+)\.LinearLayer\.weight")
# Where each kind of filter keeps the convolution that reads the view, and its 3x3 one.
_UNITS: dict[FilterKind, tuple[str, str]] = {
    "plain": ("Filters.{}", "Filters.{}"),
    "bottleneck": ("Filters.{}.BottleneckLayer", "Filters.{}.TransformationLayer"),
    "grouped": ("BottleneckLayers.{}", "TransformationLayers.{}"),
}


@dataclass(frozen=True, slots=True)
class SeqShape:
    """The shape of one SeqConv layer.

    Parameters
    ----------
    kind
        What each filter consists of.
    in_channels, out_channels
        Of the layer.
    filter_width
        Channels that each filter makes: the paper's k.
    cardinality
        Groups of each filter's 3x3 convolution.
    windowed
        Whether the view slides instead of growing.
    """

    kind: FilterKind
    in_channels: int
    out_channels: int
    filter_width: int
    cardinality: int = 1
    windowed: bool = True

    @property
    def filters(self) -> int:
        """Filters, one after another: the paper's g."""
        return self.out_channels // self.filter_width

    @property
    def kernel_size(self) -> int:
        """Of the convolution that reads the view."""
        return 3 if self.kind == "plain" else 1

    def old_channels(self, index: int) -> int:
        """Return how many of the layer's last input channels filter `index` reads."""
        gone = index * self.filter_width if self.windowed else 0
        return max(self.in_channels - gone, 0)

    def new_channels(self, index: int) -> int:
        """Return how many of the latest channels of earlier filters filter `index` reads."""
        made = index * self.filter_width
        return min(made, self.in_channels) if self.windowed else made


@dataclass(frozen=True, slots=True)
class SeqConvConfig:
    """The structure of a SeqConv network.

    Parameters
    ----------
    stem
        ``"cifar"``: one convolution and a dense layer at full resolution; ``"imagenet"``:
        the same after a first convolution of stride 2, and before a grouped one of stride 2.
    filters
        What each filter consists of.
    widths
        Channels of each stage. Each stage after the first halves height and width of the map.
    blocks
        Residual blocks of two layers in each stage.
    filter_widths
        Channels per filter in each stage: the paper's k.
    cardinality
        Groups of each filter's 3x3 convolution in each stage; 1 unless the filters are grouped.
    num_classes
        Logits.
    windowed
        Whether the views of the stages' layers slide. The stem's layer is always dense.
    aliased
        As the authors' SeqResNeXt computes: the layer that widens a stage's end slides its
        window over the very list that its output is then appended to, so the transition
        sees the window instead of the stage's output. Weights trained with that code need it.

    Raises
    ------
    ValueError
        When the numbers do not fit together; the message is a clause.
    """

    stem: Stem
    filters: FilterKind
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    filter_widths: tuple[int, ...]
    cardinality: tuple[int, ...]
    num_classes: int = 10
    windowed: bool = True
    aliased: bool = False

    def __post_init__(self) -> None:
        if self.stem not in get_args(Stem) or self.filters not in get_args(FilterKind):
            raise ValueError(f"has the unknown stem {self.stem!r} or filters {self.filters!r}")
        lists = (self.widths, self.blocks, self.filter_widths, self.cardinality)
        if len({len(numbers) for numbers in lists}) != 1 or not self.widths:
            raise ValueError(f"needs one width, block count, k and cardinality per stage: {self}")
        if min(min(numbers) for numbers in lists) < 1 or self.num_classes < 1:
            raise ValueError(f"needs at least one channel, block, group and class: {self}")
        for width, k, groups in zip(self.widths, self.filter_widths, self.cardinality, strict=True):
            if width % k or k % groups:
                raise ValueError(f"cannot make {width} channels of {k} in {groups} groups each")
            if groups > 1 and self.filters != "grouped":
                raise ValueError(f"has {groups} groups in {self.filters} filters")
        for (width, after), k in zip(pairwise(self.widths), self.filter_widths, strict=False):
            if after <= width or (after - width) % k:
                raise ValueError(f"cannot widen {width} to {after} channels by {k} at a time")
        if self.aliased and not self.windowed:
            raise ValueError("is aliased without a window")

    @property
    def head(self) -> SeqShape:
        """The dense layer of the stem."""
        return SeqShape(
            self.filters,
            STEM_WIDTHS[self.stem],
            self.widths[0],
            self.filter_widths[0],
            self.cardinality[0],
            windowed=False,
        )

    def stage_layer(self, stage: int) -> SeqShape:
        """Return the shape of both layers of a block of stage `stage`, counted from 0."""
        return self._layer(stage, self.widths[stage])

    def extension(self, stage: int) -> SeqShape:
        """Return the shape of the layer that makes what stage `stage` is wider than the last."""
        return self._layer(stage - 1, self.widths[stage] - self.widths[stage - 1])

    def shrinking_groups(self, stage: int) -> int:
        """Return the groups of the convolution of stride 2 before stage `stage`."""
        return self.widths[stage] // self.filter_widths[stage] * self.cardinality[stage]

    def _layer(self, stage: int, out_channels: int) -> SeqShape:
        return SeqShape(
            self.filters,
            self.widths[stage],
            out_channels,
            self.filter_widths[stage],
            self.cardinality[stage],
            self.windowed,
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read the structure off the names and shapes of a state dict.

        Tensors cannot tell `aliased`: it is taken to be as in the authors' code, which
        has it where filters are grouped.

        Parameters
        ----------
        tensors
            The state dict of a `SeqConvNet`, in either form.

        Raises
        ------
        ValueError
            When the names or shapes are not those of a SeqConv network; the message is a clause.
        """
        missing = [key for key in _COMMON_KEYS if key not in tensors]
        if missing:
            raise ValueError(f"holds no SeqConv network: {missing[0]} is missing")
        stem = next((name for name, key in _STEM_KEYS.items() if key in tensors), None)
        if stem is None:
            raise ValueError("holds no SeqConv network: neither Init nor Head0 is there")
        stages = [_Stage.of(blocks) for blocks in _stages(tensors)]
        kind = stages[0].kind
        classifier = tensors["Classifier.weight"]
        if classifier.ndim != 2:
            raise ValueError("holds no SeqConv network: its Classifier is no linear layer")
        return cls(
            stem,
            kind,
            tuple(stage.filters * stage.filter_width for stage in stages),
            tuple(stage.blocks for stage in stages),
            tuple(stage.filter_width for stage in stages),
            tuple(stage.groups for stage in stages),
            classifier.shape[0],
            windowed=not any(stage.grows for stage in stages),
            aliased=kind == "grouped",
        )


def is_seqconv(keys: Iterable[str]) -> bool:
    """Tell from the names in a state dict whether it is a SeqConv network's."""
    names = set(keys)
    return names.issuperset(_COMMON_KEYS) and any(key in names for key in _STEM_KEYS.values())


def is_folded_seqconv(keys: Iterable[str]) -> bool:
    """Tell from the names in a SeqConv network's state dict whether normalisations are folded."""
    return "Blender.BatchNormalizationLayer.weight" not in set(keys)


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the convolutions in the first layer of a stage's first block tell."""

    blocks: int
    kind: FilterKind
    filters: int
    filter_width: int
    groups: int
    grows: bool

    @classmethod
    def of(cls, blocks: list[dict[str, Tensor]]) -> Self:
        weights = blocks[0]
        kind = next((k for k, (reader, _) in _UNITS.items() if reader.format(0) in weights), None)
        if kind is None:
            raise ValueError("holds no SeqConv network: a stage has no first filter")
        reader, closing = _UNITS[kind]
        filters = len(weights) if kind == "plain" else len(weights) // 2
        names = (reader.format(0), reader.format(filters - 1), closing.format(0))
        shapes = []
        for name in names:
            shape = weights[name].shape if name in weights else ()
            if len(shape) != 4 or 0 in shape:
                raise ValueError(f"holds no SeqConv network: {name} of a stage is no convolution")
            shapes.append(shape)
        first, last, (width, group_inputs, _, _) = shapes
        return cls(
            blocks=len(blocks),
            kind=kind,
            filters=filters,
            filter_width=width,
            groups=1 if kind == "plain" else max(1, width // group_inputs),
            grows=last[1] > first[1],
        )


def _stages(tensors: Mapping[str, Tensor]) -> list[list[dict[str, Tensor]]]:
    """Return the weights in the first layer of each block of each stage, by their names there."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if match := _BLOCK_KEY.fullmatch(key):
            blocks = found.setdefault(int(match[1]), {})
            blocks.setdefault(int(match[2]), {})[match[3]] = tensor
    if not found:
        raise ValueError("holds no SeqConv network: it has no stages")
    if sorted(found) != list(range(1, len(found) + 1)):
        raise ValueError(f"holds no SeqConv network: its stages are numbered {sorted(found)}")
    for stage, blocks in found.items():
        if sorted(blocks) != list(range(len(blocks))):
            raise ValueError(
                f"holds no SeqConv network: blocks of Stage{stage} are numbered {sorted(blocks)}"
            )
    return [[found[stage][block] for block in sorted(found[stage])] for stage in sorted(found)]
