"""SeqConv networks in training form and with their normalisations folded.

Source: Huang et al., "Sequentially Aggregated Convolutional Networks", arXiv 1811.10798,
section 3, and the authors' code. The attributes are named as there, so that their state
dicts load strictly. The authors' dropout before each filter has no part in an inference
and no parameters, so it is left out.

The networks are residual ones with the normalisation before each activation: the second
layer of a block adds the *raw* output of the block before, taken ahead of its
normalisation, so a normalisation folds into its convolution only where nobody else reads
what lies between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from parnet_export.models.seqconv_config import STEM_WIDTHS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_export.models.seqconv_config import SeqConvConfig, SeqShape

UnitForm = Literal["normalised", "folded", "scaled"]
"""Convolution and BatchNorm; a convolution with bias; the same with a scale for the shortcut."""


class ConvUnit(nn.Module):
    """Convolution, sum with a shortcut, normalisation and ReLU.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, groups
        Of the convolution; borders are padded with zeros to keep the size of the map.
    form
        How the normalisation is represented.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        form: UnitForm = "normalised",
    ) -> None:
        super().__init__()
        self.form = form
        self.LinearLayer = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=form != "normalised",
        )
        self.BatchNormalizationLayer = (
            nn.BatchNorm2d(out_channels) if form == "normalised" else nn.Identity()
        )
        self.ShortcutScale = (
            nn.Parameter(torch.ones(out_channels, 1, 1)) if form == "scaled" else None
        )

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to two maps of ``out_channels``, smaller by the stride.

        Returns
        -------
        raw, activated
            Before the normalisation, and after it and the ReLU. Once a normalisation is
            folded, what is called raw is normalised; nobody reads it.
        """
        raw = self.LinearLayer(x)
        if shortcut is not None:
            raw = raw + (shortcut if self.ShortcutScale is None else self.ShortcutScale * shortcut)
        return raw, torch.relu(self.BatchNormalizationLayer(raw))


class BottleneckFilter(nn.Module):
    """A 1x1 and a 3x3 convolution, as SeqResNet-B names them."""

    def __init__(self, bottleneck: ConvUnit, transformation: ConvUnit) -> None:
        super().__init__()
        self.BottleneckLayer = bottleneck
        self.TransformationLayer = transformation


class SeqConv(nn.Module):
    """A layer whose filters run one after another, each also reading what those before it made.

    Parameters
    ----------
    shape
        Its shape.
    inner, last
        Form of each filter's units: of those whose activations alone are read, and of the
        one that the shortcut joins.
    """

    def __init__(
        self, shape: SeqShape, *, inner: UnitForm = "normalised", last: UnitForm = "normalised"
    ) -> None:
        super().__init__()
        self.shape = shape
        inputs = [
            shape.old_channels(index) + shape.new_channels(index) for index in range(shape.filters)
        ]
        k = shape.filter_width
        if shape.kind == "plain":
            self.Filters = nn.ModuleList(ConvUnit(channels, k, form=last) for channels in inputs)
            return
        bottlenecks = [ConvUnit(channels, k, 1, form=inner) for channels in inputs]
        transformations = [
            ConvUnit(k, k, groups=shape.cardinality, form=last) for _ in range(shape.filters)
        ]
        if shape.kind == "grouped":
            self.BottleneckLayers = nn.ModuleList(bottlenecks)
            self.TransformationLayers = nn.ModuleList(transformations)
        else:
            pairs = zip(bottlenecks, transformations, strict=True)
            self.Filters = nn.ModuleList(BottleneckFilter(*pair) for pair in pairs)

    @property
    def reducing_units(self) -> list[ConvUnit]:
        """The 1x1 convolution of each filter; empty where filters have none."""
        if self.shape.kind == "plain":
            return []
        if self.shape.kind == "grouped":
            return cast("list[ConvUnit]", list(self.BottleneckLayers))
        return [cast("BottleneckFilter", pair).BottleneckLayer for pair in self.Filters]

    @property
    def closing_units(self) -> list[ConvUnit]:
        """The 3x3 convolution of each filter, which the shortcut joins."""
        if self.shape.kind == "plain":
            return cast("list[ConvUnit]", list(self.Filters))
        if self.shape.kind == "grouped":
            return cast("list[ConvUnit]", list(self.TransformationLayers))
        return [cast("BottleneckFilter", pair).TransformationLayer for pair in self.Filters]

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to two tensors ``(N, out_channels, H, W)``.

        Returns
        -------
        raw, activated
            As `ConvUnit` gives them.
        """
        k, windowed = self.shape.filter_width, self.shape.windowed
        reducing, closing = self.reducing_units, self.closing_units
        parts = [None] * len(closing) if shortcut is None else shortcut.split(k, 1)
        groups = list(x.split(k, 1)) if windowed else [x]
        seen, raws = len(groups), []
        for index, (unit, part) in enumerate(zip(closing, parts, strict=True)):
            view = torch.cat(groups[-seen:] if windowed else groups, 1)
            raw, activated = unit(reducing[index](view)[1] if reducing else view, part)
            raws.append(raw)
            groups.append(activated)
        return torch.cat(raws, 1), torch.cat(groups[-len(closing) :], 1)


class ResidualBlock(nn.Module):
    """Two SeqConv layers; the raw output of the block before joins the second's.

    Parameters
    ----------
    shape
        Of both layers.
    folded
        Whether normalisations are folded where they can be.
    is_last
        Whether the block is its stage's last: then nobody reads its raw output.
    """

    def __init__(self, shape: SeqShape, *, folded: bool, is_last: bool) -> None:
        super().__init__()
        inner: UnitForm = "folded" if folded else "normalised"
        last: UnitForm = "scaled" if folded and is_last else "normalised"
        self.LayerA = SeqConv(shape, inner=inner, last=inner)
        self.LayerB = SeqConv(shape, inner=inner, last=last)

    def forward(self, raw: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Map both forms of ``(N, channels, H, W)`` to both forms of the same shape."""
        return cast("tuple[Tensor, Tensor]", self.LayerB(self.LayerA(activated)[1], raw))


class Transition(nn.Module):
    """Widen the map by a SeqConv layer, then halve it by a grouped convolution."""

    def __init__(self, config: SeqConvConfig, stage: int, *, folded: bool) -> None:
        super().__init__()
        form: UnitForm = "folded" if folded else "normalised"
        self.aliased = config.aliased
        self.ExtensionLayer = SeqConv(config.extension(stage), inner=form, last=form)
        width = config.widths[stage]
        self.ShrinkingLayer = ConvUnit(
            width, width, stride=2, groups=config.shrinking_groups(stage)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to two tensors ``(N, out_channels, H / 2, W / 2)``."""
        widened = widen(x, self.ExtensionLayer(x)[1], aliased=self.aliased)
        return cast("tuple[Tensor, Tensor]", self.ShrinkingLayer(widened))


def widen(x: Tensor, extension: Tensor, *, aliased: bool) -> Tensor:
    """Return what a transition's last convolution reads.

    Parameters
    ----------
    x
        The stage's output ``(N, C, H, W)``.
    extension
        What its extension layer makes of it, ``(N, D, H, W)``.
    aliased
        Put the window as it stands after the extension layer's last filter in place of
        the stage's output.

    Returns
    -------
    Tensor
        ``(N, C + D, H, W)``.
    """
    joined = torch.cat((x, extension), 1)
    return torch.cat((joined[:, -x.shape[1] :], extension), 1) if aliased else joined


class SeqConvNet(nn.Module):
    """A SeqConv network with the authors' names.

    Parameters
    ----------
    config
        The structure.
    folded
        Whether normalisations are folded where they can be; the others stay as they are.
    """

    def __init__(self, config: SeqConvConfig, *, folded: bool = False) -> None:
        super().__init__()
        self.config = config
        self.is_folded = folded
        form: UnitForm = "folded" if folded else "normalised"
        stem = STEM_WIDTHS[config.stem]
        if config.stem == "cifar":
            self.Init = ConvUnit(3, stem, form=form)
            self.Head = SeqConv(config.head, inner=form)
        else:
            self.Head0 = ConvUnit(3, stem, stride=2, form=form)
            self.Head1 = ConvUnit(stem, stem, form=form)
            self.Head2 = SeqConv(config.head, inner=form, last=form)
            self.ShrinkingLayer = ConvUnit(
                config.widths[0], config.widths[0], stride=2, groups=config.shrinking_groups(0)
            )
        for stage, count in enumerate(config.blocks):
            if stage:
                self.add_module(f"Downsample{stage}", Transition(config, stage, folded=folded))
            blocks = (
                ResidualBlock(config.stage_layer(stage), folded=folded, is_last=number == count - 1)
                for number in range(count)
            )
            self.add_module(f"Stage{stage + 1}", nn.ModuleList(blocks))
        self.Blender = ConvUnit(config.widths[-1], config.widths[-1], 1, form=form)
        self.Classifier = nn.Linear(config.widths[-1], config.num_classes)

    @property
    def stages(self) -> Iterator[list[ResidualBlock]]:
        """The blocks of each stage."""
        for stage in range(1, len(self.config.blocks) + 1):
            yield cast("list[ResidualBlock]", list(self.get_submodule(f"Stage{stage}").children()))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        if self.config.stem == "cifar":
            raw, x = self.Head(self.Init(images)[1])
        else:
            x = self.Head2(self.Head1(self.Head0(images)[1])[1])[1]
            raw, x = self.ShrinkingLayer(x)
        for stage, blocks in enumerate(self.stages):
            if stage:
                raw, x = self.get_submodule(f"Downsample{stage}")(x)
            for block in blocks:
                raw, x = block(raw, x)
        x = self.Blender(x)[1]
        # A mean instead of a pooling layer: what follows needs no reshape to (N, channels).
        logits: Tensor = self.Classifier(x.mean((2, 3)))
        return logits


def build_seqconv(config: SeqConvConfig) -> SeqConvNet:
    """Return the training form with random weights, in evaluation mode.

    Weights are normal, with the variance that keeps a signal's size on its way forward
    (He et al., arXiv 1502.01852, section 2.2). The convolutions that meet a shortcut are
    divided by the root of the number of blocks in their stage, so that the sum keeps its
    size too; the authors start them at zero, which would hide half of the network.
    """
    net = SeqConvNet(config).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        for blocks in net.stages:
            for block in blocks:
                for unit in block.LayerB.closing_units:
                    unit.LinearLayer.weight /= math.sqrt(len(blocks))
    return net
