"""Batch normalisation at inference is an affine map, and folds into its convolution.

With frozen statistics, ``bn(x) = s * x + t`` per channel, where ``s = gamma /
sqrt(var + eps)`` and ``t = beta - mean * s``. The arithmetic here is float64
throughout, so that the only rounding is the one into the result's own type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def scale_and_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the affine map that a batch normalisation applies at inference.

    Parameters
    ----------
    bn
        A normalisation of C channels with running statistics, affine or not.

    Returns
    -------
    scale, shift
        Two float64 tensors of shape (C,), detached: ``bn(x) = scale * x + shift``.

    Raises
    ------
    ValueError
        When `bn` keeps no running statistics, and so is no affine map.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("a BatchNorm2d without running statistics is no affine map")
    mean = bn.running_mean.detach().double()
    scale = (bn.running_var.detach().double() + bn.eps).rsqrt()
    if bn.affine:
        scale = bn.weight.detach().double() * scale
        return scale, bn.bias.detach().double() - mean * scale
    return scale, -mean * scale


def fold_into_conv(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Return one convolution that computes ``bn(conv(x))`` at inference.

    Parameters
    ----------
    conv
        Any 2-D convolution, with or without bias; it stays as it is.
    bn
        The normalisation that reads its output.

    Returns
    -------
    nn.Conv2d
        A new module with bias, in the geometry, type and device of `conv`, in evaluation mode.

    Raises
    ------
    ValueError
        When the channels differ or `bn` keeps no running statistics.
    """
    if conv.out_channels != bn.num_features:
        raise ValueError(
            f"a convolution of {conv.out_channels} channels feeds no BatchNorm2d "
            f"of {bn.num_features}"
        )
    scale, shift = scale_and_shift(bn)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else conv.bias.detach().double() * scale + shift
    # Built on the meta device: values that are about to be replaced need no initialisation.
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        stride=(conv.stride[0], conv.stride[1]),
        padding=conv.padding
        if isinstance(conv.padding, str)
        else (conv.padding[0], conv.padding[1]),
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
        bias=True,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype))
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return folded.eval()


def randomise_batch_norm(module: nn.Module, generator: torch.Generator) -> None:
    """Give every `nn.BatchNorm2d` inside `module` random statistics and affine terms, in place.

    A fresh normalisation is the identity, so nothing that mistreats it shows. The
    ranges are wide enough that every term matters, and the mean square of the
    scale is 1, so that signals neither die nor explode on their way through
    a deep network: variance uniform in [0.5, 2], gamma uniform in [0.5, 1.5],
    mean and beta normal with standard deviation 0.3.

    Parameters
    ----------
    module
        Its normalisations are changed in the order of ``module.modules()``.
    generator
        A CPU generator. Draws are float64 whatever the module's type, so one seed
        gives one network in every precision, up to rounding.
    """

    def uniform(low: float, high: float, size: int) -> Tensor:
        draw = torch.rand(size, generator=generator, dtype=torch.float64)
        return low + (high - low) * draw

    def normal(size: int) -> Tensor:
        return 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for bn in module.modules():
            if not isinstance(bn, nn.BatchNorm2d):
                continue
            if bn.running_mean is not None and bn.running_var is not None:
                bn.running_mean.copy_(normal(bn.num_features))
                bn.running_var.copy_(uniform(0.5, 2.0, bn.num_features))
            if bn.affine:
                bn.weight.copy_(uniform(0.5, 1.5, bn.num_features))
                bn.bias.copy_(normal(bn.num_features))
