"""The neck of YOLOR-D6: pyramid pooling, a way down to the finest map and a way up again.

Source: the ``paper`` branch of YOLOR (arXiv 2105.04206) in its code; the blocks are those of
Scaled-YOLOv4 (arXiv 2011.08036, section 3.1) in the form of its ``yaml`` files, which
normalise the concatenation at the end of each CSP block. Levels are numbered from the finest
map to the coarsest.

Every module takes the level that it is fused to: at ``"none"`` each convolution has a
BatchNorm; at ``"repvgg"`` it has a bias instead, and the normalised concatenations stay, as
the authors' own fusing leaves them; at ``"full"`` no BatchNorm is left. `fused_state` returns
the state of a module's own tensors at a higher level.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from parnet_export.models.batch_norm import fold_into_conv, scale_and_shift
from parnet_export.models.parnet_blocks import Activation, make_activation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_export.network import Level

NORM_EPS = 1e-3
"""Of every normalisation, as YOLOR's training sets it (torch's own default is 1e-5)."""


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, activation.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride
        Of the convolution, which keeps the size of the map at stride 1.
    activation
        At the end.
    level
        With ``"none"`` there is a BatchNorm, else the convolution has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        activation: Activation,
        level: Level,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=level != "none",
        )
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.bn = nn.BatchNorm2d(out_channels, eps=NORM_EPS) if level == "none" else None
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        y = self.conv(x)
        out: Tensor = self.act(y if self.bn is None else self.bn(y))
        return out

    def fused_state(self, level: Level) -> dict[str, Tensor]:  # noqa: ARG002 - one form for both
        """Return the state with the BatchNorm in the convolution."""
        conv = self.conv if self.bn is None else fold_into_conv(self.conv, self.bn)
        return {f"conv.{name}": tensor for name, tensor in conv.state_dict().items()}


class NormalisedJoin(nn.Module):
    """The end of a CSP block: a bypass, concatenated with the main path, normalised, activated.

    The main path comes activated, so its half of the normalisation folds into nothing; the
    bypass is a plain convolution, which takes the other half at level ``"full"``.

    Parameters
    ----------
    in_channels
        Of what the bypass reads.
    channels
        Of the main path, and of what the bypass makes.
    activation
        At the end.
    level
        With ``"full"`` the halves are apart, and the main path's is a scale and a shift.
    """

    def __init__(
        self, in_channels: int, channels: int, *, activation: Activation, level: Level
    ) -> None:
        super().__init__()
        self.channels = channels
        self.bypass = nn.Conv2d(in_channels, channels, 1, bias=level == "full")
        nn.init.kaiming_normal_(self.bypass.weight, nonlinearity="relu")
        self.norm: nn.BatchNorm2d | None = None
        if level == "full":
            self.scale = nn.Parameter(torch.ones(channels, 1, 1))
            self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        else:
            self.norm = nn.BatchNorm2d(2 * channels, eps=NORM_EPS)
        self.act = make_activation(activation)

    def forward(self, main: Tensor, x: Tensor) -> Tensor:
        """Join ``(N, channels, H, W)`` and ``(N, in_channels, H, W)``: ``(N, 2 channels, ...)``."""
        bypass = self.bypass(x)
        if self.norm is None:
            return torch.cat((self.act(main * self.scale + self.shift), self.act(bypass)), 1)
        out: Tensor = self.act(self.norm(torch.cat((main, bypass), 1)))
        return out

    def fused_state(self, level: Level) -> dict[str, Tensor]:
        """Return the state with the bypass's half of the normalisation in its convolution."""
        if self.norm is None or level != "full":
            return dict(self.state_dict())
        scale, shift = scale_and_shift(self.norm)
        main_scale, bypass_scale = scale.split(self.channels)
        main_shift, bypass_shift = shift.split(self.channels)
        return {
            "bypass.weight": self.bypass.weight.double() * bypass_scale[:, None, None, None],
            "bypass.bias": bypass_shift,
            "scale": main_scale[:, None, None],
            "shift": main_shift[:, None, None],
        }


class CSPBlock(nn.Module):
    """Mixes two concatenated maps by pairs of convolutions, without shortcuts."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        *,
        activation: Activation,
        level: Level,
    ) -> None:
        super().__init__()

        def conv(before: int, after: int, kernel_size: int = 1) -> ConvBlock:
            return ConvBlock(before, after, kernel_size, activation=activation, level=level)

        self.reduce = conv(in_channels, channels)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(conv(channels, channels), conv(channels, channels, 3))
                for _ in range(blocks)
            )
        )
        self.join = NormalisedJoin(channels, channels, activation=activation, level=level)
        self.merge = conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H, W)``."""
        y = self.reduce(x)
        out: Tensor = self.merge(self.join(self.blocks(y), y))
        return out


class CSPPyramidPool(nn.Module):
    """Looks around at four scales: the maxima over 5x5, 9x9 and 13x13, and the map itself."""

    def __init__(
        self, in_channels: int, channels: int, *, activation: Activation, level: Level
    ) -> None:
        super().__init__()

        def conv(before: int, after: int, kernel_size: int = 1) -> ConvBlock:
            return ConvBlock(before, after, kernel_size, activation=activation, level=level)

        self.before = nn.Sequential(
            conv(in_channels, channels), conv(channels, channels, 3), conv(channels, channels)
        )
        # The maximum over 5x5 of maxima over 5x5 is the one over 9x9; again, over 13x13.
        self.chain_pools = level == "full"
        self.after = nn.Sequential(conv(4 * channels, channels), conv(channels, channels, 3))
        self.join = NormalisedJoin(in_channels, channels, activation=activation, level=level)
        self.merge = conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H, W)``."""
        scales = [self.before(x)]
        for size in (5, 9, 13):
            source, kernel = (scales[-1], 5) if self.chain_pools else (scales[0], size)
            scales.append(functional.max_pool2d(source, kernel, 1, kernel // 2))
        out: Tensor = self.merge(self.join(self.after(torch.cat(scales, 1)), x))
        return out


class DownBlock(nn.Module):
    """Halves the resolution twice over: by a convolution, and by a maximum; half of each."""

    def __init__(
        self, in_channels: int, out_channels: int, *, activation: Activation, level: Level
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.reduce = ConvBlock(in_channels, in_channels, activation=activation, level=level)
        self.down = ConvBlock(in_channels, half, 3, 2, activation=activation, level=level)
        self.pooled = ConvBlock(in_channels, half, activation=activation, level=level)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / 2, W / 2)``."""
        down = self.down(self.reduce(x))
        return torch.cat((down, self.pooled(functional.max_pool2d(x, 2))), 1)


class Neck(nn.Module):
    """Mixes the maps of a backbone: from the coarsest to the finest, and back.

    Parameters
    ----------
    in_channels
        Of the backbone's maps, each of half the resolution of the one before.
    widths
        Channels of the neck at each level, even after the first.
    blocks
        Pairs of convolutions in each CSP block.
    activation
        After every convolution.
    level
        How far the neck is fused.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        widths: Sequence[int],
        blocks: int,
        *,
        activation: Activation,
        level: Level,
    ) -> None:
        super().__init__()

        def conv(before: int, after: int, kernel_size: int = 1) -> ConvBlock:
            return ConvBlock(before, after, kernel_size, activation=activation, level=level)

        def csp(width: int) -> CSPBlock:
            return CSPBlock(2 * width, width, blocks, activation=activation, level=level)

        steps = list(pairwise(widths))
        self.pyramid_pool = CSPPyramidPool(
            in_channels[-1], widths[-1], activation=activation, level=level
        )
        self.ups = nn.ModuleList(conv(coarse, fine) for fine, coarse in steps)
        self.laterals = nn.ModuleList(
            conv(before, width) for before, width in zip(in_channels[:-1], widths, strict=False)
        )
        self.top_down = nn.ModuleList(csp(fine) for fine, _ in steps)
        self.downs = nn.ModuleList(
            DownBlock(fine, coarse, activation=activation, level=level) for fine, coarse in steps
        )
        self.bottom_up = nn.ModuleList(csp(coarse) for _, coarse in steps)
        self.outputs = nn.ModuleList(conv(width, 2 * width, 3) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map ``(N, in_channels[i], H_i, W_i)`` to ``(N, 2 * widths[i], H_i, W_i)``."""
        merged = [self.pyramid_pool(maps[-1])]
        for index in reversed(range(len(self.ups))):
            up = functional.interpolate(
                self.ups[index](merged[0]), scale_factor=2.0, mode="nearest"
            )
            lateral = self.laterals[index](maps[index])
            merged.insert(0, self.top_down[index](torch.cat((lateral, up), 1)))
        mixed = [merged[0]]
        for index, down in enumerate(self.downs):
            both = torch.cat((down(mixed[-1]), merged[index + 1]), 1)
            mixed.append(self.bottom_up[index](both))
        return tuple(output(x) for output, x in zip(self.outputs, mixed, strict=True))
