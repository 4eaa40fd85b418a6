"""The squeeze-and-excite gate of a shortcut, and how its normalisation folds.

Source: arXiv 2110.07641, section 3.1 (Skip-Squeeze-Excitation). With ``bn(x) = s * x + t``
the normalised, gated shortcut ``bn(x) * g`` equals ``(g * s) * x + g * t``, and its gate
``g = sigmoid(W mean(bn(x)))`` equals ``sigmoid((W s) mean(x) + W t)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from parnet_export.models.batch_norm import scale_and_shift

if TYPE_CHECKING:
    from torch.nn.parameter import Parameter


class SkipGate(nn.Module):
    """``u * sigmoid(conv(mean(u)))``, with ``u`` the normalised input, or the input itself.

    Parameters
    ----------
    channels
        Of the shortcut.
    normalised
        Whether the input is normalised first.
    fused
        Build the form whose normalisation is folded.
    """

    scale: Parameter | None
    shift: Parameter | None

    def __init__(self, channels: int, *, normalised: bool, fused: bool) -> None:
        super().__init__()
        is_folded = normalised and fused
        self.conv = nn.Conv2d(channels, channels, 1, bias=is_folded)
        self.norm = nn.BatchNorm2d(channels) if normalised and not fused else nn.Identity()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1)) if is_folded else None
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1)) if is_folded else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        u = self.norm(x)
        gate = torch.sigmoid(self.conv(u.mean((2, 3), keepdim=True)))
        if self.scale is None or self.shift is None:
            gated: Tensor = u * gate
            return gated
        return (gate * self.scale) * x + gate * self.shift


@torch.no_grad()
def fold_gate(gate: SkipGate) -> SkipGate:
    """Return a new gate in the fused form that computes the same.

    The arithmetic is float64; the result has the gate's dtype.
    """
    weight = gate.conv.weight.detach()
    bn = gate.norm
    normalised = isinstance(bn, nn.BatchNorm2d)
    with torch.device("meta"):  # every value is about to be replaced
        folded = SkipGate(weight.shape[0], normalised=normalised, fused=True)
    if not isinstance(bn, nn.BatchNorm2d):
        state = {"conv.weight": weight}
    else:
        scale, shift = scale_and_shift(bn)
        exact = weight.double()
        state = {
            "conv.weight": exact * scale[:, None, None],
            "conv.bias": exact[:, :, 0, 0] @ shift,
            "scale": scale[:, None, None],
            "shift": shift[:, None, None],
        }
    copies = {key: value.to(weight.dtype, copy=True) for key, value in state.items()}
    folded.load_state_dict(copies, assign=True)
    return folded.eval()
