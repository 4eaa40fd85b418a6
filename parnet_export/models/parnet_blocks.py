"""The blocks of ParNet, in training form and with their branches fused.

One class serves both forms: a block in training form holds a dense 3x3 branch
and a 1x1 branch, each followed by BatchNorm; `fuse` returns a new block whose
dense branch is a plain convolution with bias and whose 1x1 branch is gone. The
parameter names are those of the authors' code, so that their state dicts,
trained and fused, load strictly.

Sources: arXiv 2110.07641, section 3.1 and appendix A; where paper and released
code differ (the factor of two in the gate, the BatchNorm pair before a
concatenation, the channel shuffle), the code is followed, because published
weights only mean anything there.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from parnet_export.models.batch_norm import fold_into_conv

Activation = Literal["silu", "relu"]

GATE_FACTOR = 2.0
"""Downsampling and fusion blocks multiply by twice the sigmoid (in the authors' code only)."""


def make_activation(name: Activation) -> nn.Module:
    """Return a new module for an activation's name."""
    return {"silu": nn.SiLU, "relu": nn.ReLU}[name]()


def global_average(x: Tensor) -> Tensor:
    """Average ``(N, C, H, W)`` over space to ``(N, C, 1, 1)``."""
    return x.mean((2, 3), keepdim=True)


def shuffle_order(channels: int, groups: int = 2) -> Tensor:
    """Return the old channel that each new channel of a channel shuffle takes, ``(channels,)``.

    New channel ``groups * c + g`` is old channel ``g * channels / groups + c``.
    """
    return torch.arange(channels).reshape(groups, channels // groups).t().reshape(-1)


class ConvBatchNorm(nn.Module):
    """A convolution without bias, followed by BatchNorm."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        normalised: Tensor = self.bn(self.conv(x))
        return normalised

    def as_3x3(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the 3x3 convolution with padding 1 that computes the same."""
        weight, bias = _folded(self.conv, self.bn)
        return functional.pad(weight, [1 - self.conv.kernel_size[0] // 2] * 4), bias


class PooledConvBatchNorm(nn.Sequential):
    """Average over 2x2 windows, then a 1x1 convolution and BatchNorm: a 1x1 branch of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__(nn.AvgPool2d(2), ConvBatchNorm(in_channels, out_channels, 1, 1, groups))

    def as_3x3(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the 3x3 stride-2 convolution with padding 1 that is the same.

        A quarter of the weight goes to each tap that meets the window, the lower right four.
        """
        one = cast("ConvBatchNorm", self[1])
        weight, bias = _folded(one.conv, one.bn)
        return functional.pad((weight / 4).expand(-1, -1, 2, 2), [1, 0, 1, 0]), bias


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    folded = fold_into_conv(conv, bn)
    if folded.bias is None:
        raise AssertionError("folding a BatchNorm always leaves a bias")
    return folded.weight.detach(), folded.bias.detach()


class Pointwise(nn.Module):
    """Holds the gate's convolution under the name ``conv``, as the authors' state dicts have it."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, 1, 1)`` to ``(N, out_channels, 1, 1)``."""
        out: Tensor = self.conv(x)
        return out


class SqueezeExcite(nn.Module):
    """The single-layer squeeze-and-excite gate: average, 1x1 convolution without bias, sigmoid."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.cvsig = Pointwise(in_channels, out_channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to a gate ``(N, out_channels, 1, 1)`` in (0, 1)."""
        return torch.sigmoid(self.cvsig(global_average(x)))


class RepVGGBlock(nn.Module):
    """The convolution branches that every ParNet block has.

    Parameters
    ----------
    in_channels, out_channels, stride, groups
        Of the dense 3x3 convolution. With stride 2 the 1x1 branch averages 2x2
        windows first, so the input's height and width must be even.
    activation
        The activation at the block's end.
    fused
        Build one convolution with bias instead of the branches.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        activation: Activation,
        *,
        fused: bool,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.groups = groups
        self.activation: Activation = activation
        self.rbr_dense: ConvBatchNorm | nn.Conv2d
        self.rbr_1x1: ConvBatchNorm | PooledConvBatchNorm | None
        if fused:
            self.rbr_dense = nn.Conv2d(
                in_channels, out_channels, 3, stride=stride, padding=1, groups=groups
            )
            self.rbr_1x1 = None
        else:
            self.rbr_dense = ConvBatchNorm(in_channels, out_channels, 3, stride, groups)
            self.rbr_1x1 = (
                ConvBatchNorm(in_channels, out_channels, 1, 1, groups)
                if stride == 1
                else PooledConvBatchNorm(in_channels, out_channels, groups)
            )
        self.act = make_activation(activation)

    def branches(self, x: Tensor) -> Tensor:
        """Return the sum of the convolution branches, ``(N, out_channels, ...)``."""
        dense: Tensor = self.rbr_dense(x)
        return dense if self.rbr_1x1 is None else dense + self.rbr_1x1(x)

    def fused_weight(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one 3x3 convolution that equals the sum of the branches."""
        if isinstance(self.rbr_dense, nn.Conv2d) or self.rbr_1x1 is None:
            return _plain(self.rbr_dense)
        dense, one = self.rbr_dense.as_3x3(), self.rbr_1x1.as_3x3()
        return dense[0] + one[0], dense[1] + one[1]

    def _take_fused_weight_of(self, other: RepVGGBlock) -> None:
        weight, bias = other.fused_weight()
        self.rbr_dense.weight = nn.Parameter(weight, requires_grad=False)
        self.rbr_dense.bias = nn.Parameter(bias, requires_grad=False)


def _plain(conv: nn.Module) -> tuple[Tensor, Tensor]:
    if not isinstance(conv, nn.Conv2d) or conv.bias is None:
        raise AssertionError("a fused block holds one convolution with bias")
    return conv.weight.detach(), conv.bias.detach()


class RepVGGSSEBlock(RepVGGBlock):
    """RepVGG block with skip-squeeze-excitation (paper section 3.1): stride 1, equal widths.

    ``act(dense(x) + one(x) + u * gate(u))`` with ``u`` the BatchNorm of ``x``.
    """

    def __init__(self, channels: int, activation: Activation, *, fused: bool = False) -> None:
        super().__init__(channels, channels, 1, 1, activation, fused=fused)
        self.rbr_identity = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        identity = self.rbr_identity(x)
        out: Tensor = self.act(self.branches(x) + identity * self.se(identity))
        return out

    def fuse(self) -> RepVGGSSEBlock:
        """Return a new block with one convolution that computes the same."""
        fused = RepVGGSSEBlock(self.in_channels, self.activation, fused=True)
        fused._take_fused_weight_of(self)
        fused.rbr_identity = deepcopy(self.rbr_identity)
        fused.se = deepcopy(self.se)
        return fused.train(self.training)


class DownsamplingBlock(RepVGGBlock):
    """Downsampling and fusion block (paper appendix A): the gate acts on the sum of the branches.

    ``act((dense(x) + one(x)) * 2 * gate(x))``; with several groups (fusion) the
    output's channels are shuffled.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: Activation,
        *,
        stride: int = 2,
        groups: int = 1,
        fused: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, groups, activation, fused=fused)
        self.se = SqueezeExcite(in_channels, out_channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        out: Tensor = self.act(self.branches(x) * (GATE_FACTOR * self.se(x)))
        return functional.channel_shuffle(out, self.groups) if self.groups > 1 else out

    def fuse(self) -> DownsamplingBlock:
        """Return a new block with one convolution that computes the same."""
        fused = DownsamplingBlock(
            self.in_channels,
            self.out_channels,
            self.activation,
            stride=self.stride,
            groups=self.groups,
            fused=True,
        )
        fused._take_fused_weight_of(self)
        fused.se = deepcopy(self.se)
        return fused.train(self.training)


class PointwiseBlock(nn.Module):
    """1x1 convolution, BatchNorm, activation: the last block of the CIFAR networks."""

    def __init__(
        self, in_channels: int, out_channels: int, activation: Activation, *, fused: bool = False
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=fused)
        self.bn = None if fused else nn.BatchNorm2d(out_channels)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``."""
        y = self.conv(x)
        out: Tensor = self.act(y if self.bn is None else self.bn(y))
        return out

    def fused_weight(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the convolution that equals convolution and BatchNorm."""
        return _plain(self.conv) if self.bn is None else _folded(self.conv, self.bn)

    def fuse(self) -> PointwiseBlock:
        """Return a new block without BatchNorm that computes the same."""
        conv = self.conv
        fused = PointwiseBlock(conv.in_channels, conv.out_channels, self.activation, fused=True)
        weight, bias = self.fused_weight()
        fused.conv.weight = nn.Parameter(weight, requires_grad=False)
        fused.conv.bias = nn.Parameter(bias, requires_grad=False)
        return fused.train(self.training)


class BatchNormPair(nn.Module):
    """One BatchNorm for each of the two tensors that a fusion joins."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.b1 = nn.BatchNorm2d(channels)
        self.b2 = nn.BatchNorm2d(channels)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalise a stream's output and the fused path, ``(N, channels, H, W)`` each."""
        return self.b1(pair[0]), self.b2(pair[1])


class Interleave(nn.Module):
    """Concatenate two tensors, alternating their channels."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Map two tensors ``(N, C, H, W)`` to ``(N, 2 C, H, W)``; even channels from the first."""
        return functional.channel_shuffle(torch.cat(pair, 1), 2)


class Boxed(nn.Module):
    """Holds a block under the name ``block``, as the authors' state dicts have it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        out: Tensor = self.block(x)
        return out
