"""The head of YOLOR: a convolution between two learned vectors, its implicit knowledge.

Source: arXiv 2105.04206, section 3, and the class ``IDetect`` of its code. For each level the
output is ``m * (W (x + a) + b)`` with a vector a over the channels that it reads and a vector
m over the channels that it makes. At inference both are constants: the convolution with the
weight ``m W`` and the bias ``m (b + W a)`` computes the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_export.network import Level


class ImplicitVector(nn.Module):
    """A learned vector that does not depend on the image, as ``(1, C, 1, 1)``."""

    def __init__(self, channels: int, mean: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.normal_(self.implicit, mean, 0.02)


class ImplicitHead(nn.Module):
    """The last layers of a detector; the names of its parameters are those of ``IDetect``.

    Parameters
    ----------
    in_channels
        Of each map that it reads.
    out_channels
        Of each output.
    level
        With ``"none"`` there are implicit vectors, else they are in the convolutions.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, level: Level) -> None:
        super().__init__()
        self.m = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.ia: nn.ModuleList | None = None
        self.im: nn.ModuleList | None = None
        if level == "none":
            self.ia = nn.ModuleList(ImplicitVector(channels, 0.0) for channels in in_channels)
            self.im = nn.ModuleList(ImplicitVector(out_channels, 1.0) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map ``(N, in_channels[i], H_i, W_i)`` to ``(N, out_channels, H_i, W_i)``."""
        if self.ia is None:
            return tuple(conv(x) for conv, x in zip(self.m, maps, strict=True))
        parts = zip(self._parts(), maps, strict=True)
        return tuple(m * conv(x + a) for (conv, a, m), x in parts)

    def fused_state(self, level: Level) -> dict[str, Tensor]:  # noqa: ARG002 - one form for both
        """Return the state with the vectors in the convolutions, computed in float64."""
        if self.ia is None:
            return dict(self.state_dict())
        state = {}
        for index, (conv, a, m) in enumerate(self._parts()):
            weight, bias = conv.weight.double(), cast("Tensor", conv.bias).double()
            factor = m.double().flatten()
            offset = weight[:, :, 0, 0] @ a.double().flatten()
            state[f"m.{index}.weight"] = factor[:, None, None, None] * weight
            state[f"m.{index}.bias"] = factor * (bias + offset)
        return state

    def _parts(self) -> Iterator[tuple[nn.Conv2d, Tensor, Tensor]]:
        """Yield the convolution of each level, and the vectors before and after it."""
        for conv, a, m in zip(self.m, self.ia or (), self.im or (), strict=True):
            before, after = cast("ImplicitVector", a), cast("ImplicitVector", m)
            yield cast("nn.Conv2d", conv), before.implicit, after.implicit
