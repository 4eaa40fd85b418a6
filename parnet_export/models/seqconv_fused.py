"""SeqConv networks with everything folded that can be: the inference form of level ``full``.

No BatchNorm is left, and less work waits in line:

* the convolution that reads a filter's view is linear, and part of what it reads, the
  layer's own input, is there from the start. One wide convolution does that part for all
  filters of a layer. When a filter has made its group, one convolution of that group adds
  to the sums of all later filters. Of the multiply-accumulates of a windowed layer with g
  groups in and out, the share ``(g + 1) / (2 g)`` so leaves the chain of dependent steps.
  The convolutions in the chain read k channels each, where the original ones read the
  whole view. The price: a windowed layer's wide convolution also multiplies the zeros in
  place of what the later filters no longer read;
* what a block hands on beside its activations is the *normalised* sum ``z = s * raw + t``
  in place of the raw one. The next block needs ``s' * (conv + raw) + t'``, which is
  ``s' * conv + (s' / s) * z + (t' - t * s' / s)``: a convolution with bias, and the
  shortcut scaled. So the normalisations behind shortcuts fold as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from parnet_export.models.seqconv import widen
from parnet_export.models.seqconv_config import STEM_WIDTHS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_export.models.seqconv_config import SeqConvConfig, SeqShape


class Rectifier(nn.Module):
    """ReLU, of ``scale * x + shift`` where the raw sum is handed on."""

    def __init__(self, channels: int, *, affine: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.scale = nn.Parameter(torch.ones(channels, 1, 1)) if affine else None
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        if self.scale is not None and self.shift is not None:
            x = self.scale * x + self.shift
        return torch.relu(x)


class RectifiedConv(nn.Module):
    """Convolution with bias and ReLU, which also hands on what lies between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
        )
        self.act = Rectifier(out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to two maps of ``out_channels``, smaller by the stride.

        Returns
        -------
        carried, activated
            Before and after the ReLU.
        """
        carried = self.conv(x)
        return carried, self.act(carried)


class WideSeqConv(nn.Module):
    """A SeqConv layer with the part over its own input done for all filters at once.

    Parameters
    ----------
    shape
        The layer's shape.
    shortcut
        Whether it adds a scaled shortcut.
    """

    def __init__(self, shape: SeqShape, *, shortcut: bool = False) -> None:
        super().__init__()
        self.shape = shape
        g, k, size = shape.filters, shape.filter_width, shape.kernel_size
        self.wide = nn.Conv2d(shape.in_channels, g * k, size, padding=size // 2)
        self.updates = nn.ModuleList(
            nn.Conv2d(k, later * k, size, padding=size // 2, bias=False)
            for later in range(g - 1, 0, -1)
        )
        self.closing = nn.ModuleList()
        if shape.kind != "plain":
            self.closing.extend(
                nn.Conv2d(k, k, 3, padding=1, groups=shape.cardinality) for _ in range(g)
            )
        self.acts = nn.ModuleList(Rectifier(k) for _ in range(g))
        self.shortcut_scale = nn.Parameter(torch.ones(g * k, 1, 1)) if shortcut else None

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to two tensors ``(N, out_channels, H, W)``.

        Returns
        -------
        carried, activated
            Before and after the last ReLU of each filter.
        """
        k, sums = self.shape.filter_width, self.wide(x)
        parts: tuple[Tensor, ...] = ()
        if shortcut is not None and self.shortcut_scale is not None:
            shortcut = self.shortcut_scale * shortcut
            if self.closing:
                parts = shortcut.split(k, 1)
            else:  # the wide convolution's sums are those that the shortcut joins
                sums = sums + shortcut
        carried, outputs = [], []
        for index, act in enumerate(self.acts):
            later = len(self.updates) - index
            group, sums = sums.split((k, later * k), 1) if later else (sums, sums)
            if self.closing:
                group = self.closing[index](torch.relu(group))
                group = group + parts[index] if parts else group
            activated = act(group)
            carried.append(group)
            outputs.append(activated)
            if later:
                sums = sums + self.updates[index](activated)
        return torch.cat(carried, 1), torch.cat(outputs, 1)


class WideResidualBlock(nn.Module):
    """Two layers; what the block before handed on joins the second."""

    def __init__(self, shape: SeqShape) -> None:
        super().__init__()
        self.first = WideSeqConv(shape)
        self.second = WideSeqConv(shape, shortcut=True)

    def forward(self, carried: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Map two tensors ``(N, channels, H, W)`` to two of the same shape."""
        return cast("tuple[Tensor, Tensor]", self.second(self.first(activated)[1], carried))


class WideTransition(nn.Module):
    """Widen the map, then halve its height and width."""

    def __init__(self, config: SeqConvConfig, stage: int) -> None:
        super().__init__()
        self.aliased = config.aliased
        self.extension = WideSeqConv(config.extension(stage))
        width, groups = config.widths[stage], config.shrinking_groups(stage)
        self.shrink = RectifiedConv(width, width, stride=2, groups=groups)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to two tensors ``(N, out_channels, H / 2, W / 2)``."""
        widened = widen(x, self.extension(x)[1], aliased=self.aliased)
        return cast("tuple[Tensor, Tensor]", self.shrink(widened))


class SeqConvFull(nn.Module):
    """A SeqConv network at level ``full``.

    Parameters
    ----------
    config
        The structure.
    affine
        Names of the `Rectifier` modules that keep their affine step.
    """

    def __init__(self, config: SeqConvConfig, affine: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.config = config
        self.affine = affine
        stem, width = STEM_WIDTHS[config.stem], config.widths[0]
        is_large = config.stem == "imagenet"
        self.stem = nn.ModuleList([RectifiedConv(3, stem, stride=2 if is_large else 1)])
        if is_large:
            self.stem.append(RectifiedConv(stem, stem))
        self.head = WideSeqConv(config.head)
        groups = config.shrinking_groups(0)
        self.shrink = RectifiedConv(width, width, stride=2, groups=groups) if is_large else None
        self.transitions = nn.ModuleList(
            WideTransition(config, stage) for stage in range(1, len(config.widths))
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(WideResidualBlock(config.stage_layer(stage)) for _ in range(count))
            for stage, count in enumerate(config.blocks)
        )
        self.blender = RectifiedConv(config.widths[-1], config.widths[-1], 1)
        self.classifier = nn.Linear(config.widths[-1], config.num_classes)
        for name, module in list(self.named_modules()):
            if name in affine and isinstance(module, Rectifier):
                self.set_submodule(name, Rectifier(module.channels, affine=True))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        x = images
        for unit in self.stem:
            x = unit(x)[1]
        carried, x = self.head(x)
        if self.shrink is not None:
            carried, x = self.shrink(x)
        for stage, blocks in enumerate(self.stages):
            if stage:
                carried, x = self.transitions[stage - 1](x)
            for block in cast("nn.ModuleList", blocks):
                carried, x = block(carried, x)
        logits: Tensor = self.classifier(self.blender(x)[1].mean((2, 3)))
        return logits


def affine_steps(keys: Iterable[str]) -> frozenset[str]:
    """Return the rectifiers that keep their affine step, read off state-dict keys."""
    return frozenset(key.removesuffix(".scale") for key in keys if key.endswith(".scale"))
