"""ParNet as a detector's backbone: the maps of strides 8, 16 and 32 instead of a classifier.

Both forms are made of the parts of `ParNet` and `ParNetFull`, so that what is known of those
(their names, and how they fuse) holds here. In the partial form (CSP, arXiv 1911.11929) half
of each stream's channels goes around its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from parnet_export.models.parnet import ParNet
from parnet_export.models.parnet_blocks import Boxed, RepVGGSSEBlock
from parnet_export.models.parnet_full import ParNetFull, SkipGatedConv

if TYPE_CHECKING:
    from parnet_export.models.parnet import ParNetConfig

Maps = tuple[Tensor, Tensor, Tensor]


class PartialStream(nn.Sequential):
    """Blocks that the second half of the channels goes through, and the first half around."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        around, through = x.chunk(2, 1)
        for block in self:
            through = block(through)
        return torch.cat((around, through), 1)


class ParNetBackbone(nn.Module):
    """A backbone in training form, or with the branches of its blocks fused.

    Parameters
    ----------
    config
        A ParNet of three streams.
    project
        Makes the coarsest map of what the last block returns.
    partial
        Whether half of each stream's channels goes around its blocks.
    fused
        Build one convolution per block.
    """

    def __init__(
        self, config: ParNetConfig, project: nn.Module, *, partial: bool, fused: bool
    ) -> None:
        super().__init__()
        network = ParNet(config, fused=fused)
        self.config = config
        self.inits = network.inits
        self.streams = network.streams
        if partial:
            self.streams = nn.ModuleList(
                PartialStream(
                    *(
                        Boxed(RepVGGSSEBlock(width // 2, config.activation, fused=fused))
                        for _ in range(blocks)
                    )
                )
                for width, blocks in zip(config.widths, config.blocks, strict=True)
            )
        self.downsamples_2 = network.downsamples_2
        self.combine = network.combine
        self.project = project

    def forward(self, image: Tensor) -> Maps:
        """Map images ``(N, 3, H, W)`` to maps of strides 8, 16 and 32.

        Returns
        -------
        tuple of Tensor
            ``(N, widths[1], H / 8, W / 8)``, ``(N, widths[2], H / 16, W / 16)``, and what
            `project` makes of ``(N, last_width, H / 32, W / 32)``.
        """
        first = self.inits[0](image)
        second = self.inits[1](first)
        third = self.inits[2](second)
        fine = self.streams[1](second)
        path = self.downsamples_2[1]((fine, self.downsamples_2[0](self.streams[0](first))))
        *fusion, last = self.combine
        middle = self.streams[2](third), path
        for part in fusion:
            middle = part(middle)
        joined = cast("Tensor", middle)
        return fine, joined, self.project(last(joined))


class FullParNetBackbone(nn.Module):
    """A backbone of level ``full``. Its middle map has the order of channels before a shuffle.

    Parameters
    ----------
    config
        A ParNet of three streams.
    project
        Makes the coarsest map of what the last block returns.
    partial
        Whether half of each stream's channels goes around its blocks.
    affine
        Names of the contributions that keep their affine step.
    """

    def __init__(
        self,
        config: ParNetConfig,
        project: nn.Module,
        *,
        partial: bool,
        affine: frozenset[str],
    ) -> None:
        super().__init__()
        network = ParNetFull(config, affine)
        self.stems = network.stems
        self.streams = network.streams
        if partial:
            self.streams = nn.ModuleList(
                PartialStream(
                    *(SkipGatedConv(width // 2, config.activation) for _ in range(blocks))
                )
                for width, blocks in zip(config.widths, config.blocks, strict=True)
            )
        self.downsample = cast("nn.Module", network.downsample)
        self.stream_parts = network.stream_parts
        self.path_parts = network.path_parts
        self.act = network.act
        self.last = network.last
        self.project = project

    def forward(self, image: Tensor) -> Maps:
        """Map images to maps of strides 8, 16 and 32; see `ParNetBackbone.forward`."""
        first = self.stems[0](image)
        second = self.stems[1](first)
        third = self.stems[2](second)
        fine = self.streams[1](second)
        path = self.downsample(self.streams[0](first))
        for index, stream in enumerate((fine, self.streams[2](third))):
            part, gate_part = self.stream_parts[index](stream)
            other, gate_other = self.path_parts[index](path)
            path = self.act((part + other) * torch.sigmoid(gate_part + gate_other))
        return fine, path, self.project(self.last(path))
