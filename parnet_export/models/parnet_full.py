"""ParNet with everything folded that can be: the inference form of level ``full``.

No BatchNorm, Transpose or Reshape is left. Beyond the authors' rule:

* the skip branch's BatchNorm ``s * x + t`` goes into its gate:
  ``act(conv(x) + (g * s) * x + g * t)`` with ``g = sigmoid(W (s * mean(x) + t))``;
* the factor of two in the gates of the other blocks goes into their convolutions;
* a fusion is distributed over its two inputs: BatchNorm pair, interleaving,
  concatenation and grouped convolution of ``(y, f)`` equal
  ``conv_y(y + t_y / s_y) + conv_f(f + t_f / s_f)``, two grouped convolutions with the
  scales in their weights and ordinary zero padding, because the shift is applied
  before the padding. So a stream can compute its contribution before the other
  input exists, and what crosses between devices is already downsampled;
* channel shuffles become permutations of the next weights. Between two fusions
  one split and concatenation stay: each group of the second reads half of each
  group of the first, which no order of grouped weights can give.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from parnet_export.models.batch_norm import scale_and_shift
from parnet_export.models.parnet_blocks import (
    GATE_FACTOR,
    Activation,
    BatchNormPair,
    Boxed,
    DownsamplingBlock,
    PointwiseBlock,
    RepVGGSSEBlock,
    global_average,
    make_activation,
    shuffle_order,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_export.models.parnet import ParNet, ParNetConfig

MAX_RELATIVE_SHIFT = 8.0
"""Largest |t / s| of a folded BatchNorm, in standard deviations of its input.

``y + t / s`` keeps the absolute precision of ``t / s``: at eight standard deviations it
loses three of the bits that ``y`` has. Beyond, the affine step ``s * y + t`` is kept.
"""


class GatedConv(nn.Module):
    """``act(conv(x) * sigmoid(gate(mean(x))))``: a downsampling block, its factor of two folded."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, activation: Activation
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.gate = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H / stride, W / stride)``."""
        gate = torch.sigmoid(self.gate(global_average(x)))
        out: Tensor = self.act(self.conv(x) * gate)
        return out


class SkipGatedConv(nn.Module):
    """``act(conv(x) + g * scale * x + g * shift)``: a RepVGG-SSE block with one convolution."""

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        gate = torch.sigmoid(self.gate(global_average(x)))
        out: Tensor = self.act(self.conv(x) + (gate * self.scale) * x + gate * self.shift)
        return out


class Contribution(nn.Module):
    """What one of a fusion's two inputs adds to it.

    Parameters
    ----------
    in_channels, out_channels, stride
        Of the grouped 3x3 convolution (two groups).
    bias
        Whether this contribution carries the fusion's biases; one of the two does.
    affine
        Keep ``scale * x + shift`` instead of ``x + shift`` with the scale in the weights.
    regroup
        The input comes from another fusion: bring half of each of its groups together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        bias: bool,
        affine: bool,
        regroup: bool,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, 3, stride=stride, padding=1, groups=2, bias=bias
        )
        self.gate = nn.Conv2d(in_channels, out_channels, 1, groups=2, bias=bias)
        self.shift = nn.Parameter(torch.zeros(in_channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(in_channels, 1, 1)) if affine else None
        self.quarters = quarters(in_channels) if regroup else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, in_channels, H, W)`` to the sum's part and the gate logit's part.

        Returns
        -------
        part, gate_part
            ``(N, out_channels, H / stride, W / stride)`` and ``(N, out_channels, 1, 1)``.
        """
        if self.quarters is not None:
            first, second, third, fourth = torch.split(x, self.quarters, 1)
            x = torch.cat((first, third, second, fourth), 1)
        gate_part = self.gate(global_average(x))
        shifted = (x if self.scale is None else x * self.scale) + self.shift
        return self.conv(shifted), gate_part


def quarters(channels: int) -> list[int]:
    """Return the sizes into which two shuffled groups are split, so that halves can be swapped.

    The first half of the shuffled channels holds the first and third of these parts.
    """
    half = channels // 2
    return [(half + 1) // 2, half // 2, half // 2, (half + 1) // 2]


def regrouped_order(channels: int) -> Tensor:
    """Return the shuffled channel that each channel takes after `quarters` are swapped."""
    first, second, third, fourth = torch.split(torch.arange(channels), quarters(channels))
    swapped = torch.cat((first, third, second, fourth))
    return torch.argsort(shuffle_order(channels))[swapped]


class ParNetFull(nn.Module):
    """ParNet at level ``full``.

    Parameters
    ----------
    config
        The structure.
    affine
        Names of the contributions (``"stream_parts.0"``) that keep their affine step.
    """

    def __init__(self, config: ParNetConfig, affine: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.config = config
        self.affine = affine
        act, widths = config.activation, config.widths
        self.stems = nn.ModuleList([_first_stem(config)])
        self.stems.extend(GatedConv(before, width, 2, act) for before, width in pairwise(widths))
        self.streams = nn.ModuleList(
            nn.Sequential(*(SkipGatedConv(width, act) for _ in range(count)))
            for width, count in zip(widths, config.blocks, strict=True)
        )
        self.downsample = GatedConv(widths[0], widths[1], 2, act) if config.streams > 1 else None
        self.stream_parts = nn.ModuleList()
        self.path_parts = nn.ModuleList()
        for index, width in enumerate(widths[1:]):
            is_last = index == config.streams - 2
            after, stride = (width, 1) if is_last else (widths[index + 2], 2)
            for parts, name in (
                (self.stream_parts, "stream_parts"),
                (self.path_parts, "path_parts"),
            ):
                parts.append(
                    Contribution(
                        width,
                        after,
                        stride,
                        bias=parts is self.stream_parts,
                        affine=f"{name}.{index}" in affine,
                        regroup=parts is self.path_parts and index > 0,
                    )
                )
        self.act = make_activation(act)
        self.last: nn.Module
        if config.variant == "imagenet":
            self.last = GatedConv(widths[-1], config.last_width, 2, act)
        else:
            self.last = PointwiseBlock(widths[-1], config.last_width, act, fused=True)
        self.fc = nn.Linear(config.last_width, config.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        features = [self.stems[0](image)]
        for stem in list(self.stems)[1:]:
            features.append(stem(features[-1]))
        path = self.streams[0](features[0])
        if self.downsample is not None:
            path = self.downsample(path)
        for index in range(1, self.config.streams):
            stream = self.streams[index](features[index])
            part, gate_part = self.stream_parts[index - 1](stream)
            other, gate_other = self.path_parts[index - 1](path)
            path = self.act((part + other) * torch.sigmoid(gate_part + gate_other))
        logits: Tensor = self.fc(self.last(path).mean((2, 3)))
        return logits


def affine_parts(keys: Iterable[str]) -> frozenset[str]:
    """Return the contributions that keep their affine step, read off state-dict keys."""
    names = (key.removesuffix(".scale") for key in keys if key.endswith(".scale"))
    return frozenset(name for name in names if name.startswith(("stream_parts", "path_parts")))


def _first_stem(config: ParNetConfig) -> nn.Sequential:
    act, width = config.activation, config.widths[0]
    if config.variant == "imagenet":
        return nn.Sequential(*(GatedConv(*pair, 2, act) for pair in pairwise((3, *config.stem))))
    return nn.Sequential(
        GatedConv(3, width, 1, act), SkipGatedConv(width, act), SkipGatedConv(width, act)
    )


@torch.no_grad()
def fuse_full(network: ParNet) -> ParNetFull:
    """Return the form of level ``full`` of a ParNet in training form or of level ``repvgg``.

    The arithmetic is float64; the result has the network's dtype.
    """
    state, affine = full_state(network)
    state |= {f"fc.{key}": value for key, value in network.head.fc.state_dict().items()}
    fused = ParNetFull(network.config, affine)
    fused.to(dtype=network.head.fc.weight.dtype).load_state_dict(state)
    return fused.train(network.training).requires_grad_(requires_grad=False)


class Body(Protocol):
    """What a ParNet has before its classifier."""

    config: ParNetConfig
    inits: nn.ModuleList
    streams: nn.ModuleList
    downsamples_2: nn.ModuleList
    combine: nn.Sequential


@torch.no_grad()
def full_state(network: Body) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the state of level ``full`` without a classifier's, float64.

    With it come the names of the contributions that keep their affine step. The last fusion's
    output is left unshuffled: other readers than the last block have to take the permutation.
    """
    config = network.config
    state: dict[str, Tensor] = {}
    affine: set[str] = set()
    for index, stem in enumerate(network.inits):
        state |= _chain_state(f"stems.{index}", stem)
    for index, stream in enumerate(network.streams):
        state |= _chain_state(f"streams.{index}", stream)
    fusions: list[nn.Module] = []
    if config.streams > 1:
        state |= _prefixed("downsample", _block_state(_unbox(network.downsamples_2[0])))
        fusions = [*list(network.downsamples_2)[1:], network.combine]
    for index, fusion in enumerate(fusions):
        halves = _distribute(cast("nn.Sequential", fusion), shuffled_path=index > 0)
        for name, half in zip(("stream_parts", "path_parts"), halves, strict=True):
            state |= _prefixed(f"{name}.{index}", half)
            if "scale" in half:
                affine.add(f"{name}.{index}")
    last = _block_state(_unbox(network.combine[-1]))
    if fusions:
        # The last fusion's output stays unshuffled: the block that reads it takes the permutation.
        unshuffle = torch.argsort(shuffle_order(config.widths[-1]))
        for key in last.keys() & {"conv.weight", "gate.weight"}:
            last[key] = last[key][:, unshuffle]
    state |= _prefixed("last", last)
    return state, frozenset(affine)


def _unbox(module: nn.Module) -> nn.Module:
    return cast("Boxed", module).block


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def _chain_state(prefix: str, chain: nn.Module) -> dict[str, Tensor]:
    """Return the state of a sequence of boxed blocks, or of a single one."""
    if not isinstance(chain, nn.Sequential):
        return _prefixed(prefix, _block_state(_unbox(chain)))
    state: dict[str, Tensor] = {}
    for position, boxed in enumerate(chain):
        state |= _prefixed(f"{prefix}.{position}", _block_state(_unbox(boxed)))
    return state


def _block_state(block: nn.Module) -> dict[str, Tensor]:
    """Return the state of the block's counterpart at level ``full``, in float64."""
    if isinstance(block, PointwiseBlock):
        weight, bias = block.fused_weight()
        return {"conv.weight": weight, "conv.bias": bias}
    if isinstance(block, DownsamplingBlock):
        weight, bias = block.fused_weight()
        return {
            "conv.weight": GATE_FACTOR * weight.double(),
            "conv.bias": GATE_FACTOR * bias.double(),
            "gate.weight": block.se.cvsig.conv.weight.double(),
        }
    skip = cast("RepVGGSSEBlock", block)
    weight, bias = skip.fused_weight()
    scale, shift = scale_and_shift(skip.rbr_identity)
    gate = skip.se.cvsig.conv.weight.double()
    return {
        "conv.weight": weight,
        "conv.bias": bias,
        "gate.weight": gate * scale[:, None, None],
        "gate.bias": gate[:, :, 0, 0] @ shift,
        "scale": scale[:, None, None],
        "shift": shift[:, None, None],
    }


def _distribute(fusion: nn.Sequential, *, shuffled_path: bool) -> tuple[dict[str, Tensor], ...]:
    """Return the states of the two contributions that a fusion's inputs make to it.

    Even channels of the interleaved tensor come from the stream, odd ones from the path.
    """
    pair = cast("BatchNormPair", fusion[0])
    block = cast("DownsamplingBlock", _unbox(fusion[2]))
    weight, bias = block.fused_weight()
    gate = block.se.cvsig.conv.weight.double()
    parts: list[dict[str, Tensor]] = []
    gate_bias = torch.zeros(block.out_channels, dtype=torch.float64)
    for position, bn in enumerate((pair.b1, pair.b2)):
        scale, shift = scale_and_shift(bn)
        order = torch.arange(bn.num_features)
        if position == 1 and shuffled_path:
            order = regrouped_order(bn.num_features)
        conv_part = _take_in_groups(GATE_FACTOR * weight.double()[:, position::2], order)
        gate_part = _take_in_groups(gate[:, position::2], order)
        scale, shift = scale[order], shift[order]
        gate_bias += (gate_part * _per_group(shift, gate_part)).sum((1, 2, 3))
        part = {"gate.weight": gate_part * _per_group(scale, gate_part)}
        if _is_precise(bn):
            part["conv.weight"] = conv_part * _per_group(scale, conv_part)
            part["shift"] = (shift / scale)[:, None, None]
        else:
            part["conv.weight"] = conv_part
            part["shift"] = shift[:, None, None]
            part["scale"] = scale[:, None, None]
        parts.append(part)
    parts[0]["conv.bias"] = GATE_FACTOR * bias.double()
    parts[0]["gate.bias"] = gate_bias
    return tuple(parts)


def _is_precise(bn: nn.BatchNorm2d) -> bool:
    """Tell whether ``y + t / s`` keeps the precision of ``y`` in every channel."""
    scale, shift = scale_and_shift(bn)
    spread = (cast("Tensor", bn.running_var).double() + bn.eps).sqrt()
    return bool((shift.abs() <= MAX_RELATIVE_SHIFT * spread * scale.abs()).all() and scale.all())


def _take_in_groups(weight: Tensor, order: Tensor) -> Tensor:
    """Reorder the inputs of a two-group convolution; `order` maps each half onto itself."""
    half = weight.shape[1]
    orders = (order[:half], order[half:] - half)
    groups = weight.chunk(2)
    return torch.cat([group[:, o] for group, o in zip(groups, orders, strict=True)])


def _per_group(values: Tensor, weight: Tensor) -> Tensor:
    """Arrange one value per input channel to multiply the weight of a two-group convolution."""
    halves = values.reshape(2, 1, -1, 1, 1).expand(-1, weight.shape[0] // 2, -1, -1, -1)
    return halves.reshape(weight.shape[0], weight.shape[1], 1, 1)
