"""Fold the normalisations of a SeqConv network: levels ``repvgg`` and ``full``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from parnet_export.models.batch_norm import fold_into_conv, scale_and_shift
from parnet_export.models.seqconv import ConvUnit, SeqConvNet
from parnet_export.models.seqconv_fused import SeqConvFull, affine_steps

if TYPE_CHECKING:
    from parnet_export.models.seqconv import SeqConv, Transition, UnitForm
    from parnet_export.models.seqconv_config import SeqShape

MAX_RELATIVE_SHIFT = 8.0
"""Largest |t / s| of a normalised shortcut, in standard deviations of the raw one.

``s * raw + t`` keeps the absolute precision of ``t``: at eight standard deviations it
loses three of the bits that ``raw`` has. Beyond, the raw sum is handed on.
"""


@torch.no_grad()
def fold_seqconv(net: SeqConvNet) -> SeqConvNet:
    """Return a new network that computes the same, with normalisations folded where they can be.

    A normalisation folds into its convolution where the raw output between them is not
    read; in a stage's last block it also scales the shortcut. Of those that remain, one
    per group, each reads a raw output that a later block adds.

    Parameters
    ----------
    net
        Evaluated with its running statistics, whatever its mode; it stays as it is.
    """
    # Built on the meta device: every value is about to be replaced.
    with torch.device("meta"):
        folded = SeqConvNet(net.config, folded=True)
    state = {f"Classifier.{key}": value for key, value in net.Classifier.state_dict().items()}
    for name, unit in net.named_modules():
        if isinstance(unit, ConvUnit):
            form = cast("ConvUnit", folded.get_submodule(name)).form
            state |= {f"{name}.{key}": value for key, value in _state_of(unit, form).items()}
    copies = {key: value.clone() for key, value in state.items()}
    folded.load_state_dict(copies, assign=True)
    return folded.eval().requires_grad_(requires_grad=False)


def _state_of(unit: ConvUnit, form: UnitForm) -> dict[str, Tensor]:
    """Return the state of a unit once it is in `form`."""
    bn = unit.BatchNormalizationLayer
    if form == unit.form or not isinstance(bn, nn.BatchNorm2d):
        return unit.state_dict()
    conv = fold_into_conv(unit.LinearLayer, bn)
    state = {f"LinearLayer.{key}": value for key, value in conv.state_dict().items()}
    if form == "scaled":
        state["ShortcutScale"] = scale_and_shift(bn)[0][:, None, None].to(conv.weight.dtype)
    return state


@dataclass(frozen=True, slots=True)
class _Carried:
    """The map ``scale * raw + shift`` from a raw sum to what is handed on, per channel."""

    scale: Tensor
    shift: Tensor

    def of(self, channels: slice) -> _Carried:
        """Return the map of some channels."""
        return _Carried(self.scale[channels], self.shift[channels])


@dataclass(frozen=True, slots=True)
class _Folded:
    """A unit's convolution once its normalisation is folded, in float64.

    Parameters
    ----------
    weight, bias
        Of the convolution.
    shortcut_scale
        Of what is added to its output, where there is a shortcut.
    carried
        What that sum is of the raw one.
    affine
        Scale and shift between the sum and the ReLU, where the sum is the raw one.
    """

    weight: Tensor
    bias: Tensor
    shortcut_scale: Tensor
    carried: _Carried
    affine: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def fuse_seqconv(net: SeqConvNet) -> SeqConvFull:
    """Return the form of level ``full`` of a network in training form or of level ``repvgg``.

    The arithmetic is float64; the result has the network's dtype.
    """
    state = {f"classifier.{key}": value for key, value in net.Classifier.state_dict().items()}
    if net.config.stem == "cifar":
        _add_unit(state, "stem.0", net.Init)
        carried = _add_layer(state, "head", net.Head, is_read=True)
    else:
        _add_unit(state, "stem.0", net.Head0)
        _add_unit(state, "stem.1", net.Head1)
        _add_layer(state, "head", net.Head2)
        carried = _add_unit(state, "shrink", net.ShrinkingLayer, is_read=True)
    for stage, blocks in enumerate(net.stages):
        if stage:
            name = f"transitions.{stage - 1}"
            transition = cast("Transition", net.get_submodule(f"Downsample{stage}"))
            _add_layer(state, f"{name}.extension", transition.ExtensionLayer)
            carried = _add_unit(state, f"{name}.shrink", transition.ShrinkingLayer, is_read=True)
        for number, block in enumerate(blocks):
            name = f"stages.{stage}.{number}"
            is_read = block is not blocks[-1]
            _add_layer(state, f"{name}.first", block.LayerA)
            carried = _add_layer(
                state, f"{name}.second", block.LayerB, is_read=is_read, shortcut=carried
            )
    _add_unit(state, "blender", net.Blender)

    # Built on the meta device: every value is about to be replaced.
    with torch.device("meta"):
        fused = SeqConvFull(net.config, affine_steps(state))
    dtype = net.Classifier.weight.dtype
    copies = {key: value.to(dtype, copy=True) for key, value in state.items()}
    fused.load_state_dict(copies, assign=True)
    return fused.eval().requires_grad_(requires_grad=False)


def _add_unit(
    state: dict[str, Tensor], name: str, unit: ConvUnit, *, is_read: bool = False
) -> _Carried:
    """Add the state of the `RectifiedConv` called `name`; return what it hands on.

    Parameters
    ----------
    state
        Of the whole network.
    name
        The module's.
    unit
        Its counterpart, in any form.
    is_read
        Whether a later layer adds what this one hands on.
    """
    folded = _fold(unit, is_read=is_read)
    state[f"{name}.conv.weight"] = folded.weight
    state[f"{name}.conv.bias"] = folded.bias
    _add_affine_step(state, f"{name}.act", folded)
    return folded.carried


def _add_layer(
    state: dict[str, Tensor],
    name: str,
    layer: SeqConv,
    *,
    is_read: bool = False,
    shortcut: _Carried | None = None,
) -> _Carried:
    """Add the state of the `WideSeqConv` called `name`; return what it hands on.

    Parameters
    ----------
    state, name, layer, is_read
        As for `_add_unit`.
    shortcut
        What the layer itself adds.
    """
    k = layer.shape.filter_width
    closing = []
    for index, unit in enumerate(layer.closing_units):
        channels = slice(index * k, (index + 1) * k)
        part = None if shortcut is None else shortcut.of(channels)
        closing.append(_fold(unit, is_read=is_read, shortcut=part))
        _add_affine_step(state, f"{name}.acts.{index}", closing[-1])
    readers = [_fold(unit) for unit in layer.reducing_units]
    for index, folded in enumerate(closing if readers else ()):
        state[f"{name}.closing.{index}.weight"] = folded.weight
        state[f"{name}.closing.{index}.bias"] = folded.bias
    if shortcut is not None:
        scales = torch.cat([folded.shortcut_scale for folded in closing])
        state[f"{name}.shortcut_scale"] = scales[:, None, None]
    _add_readers(state, name, layer.shape, readers or closing)
    return _Carried(
        torch.cat([folded.carried.scale for folded in closing]),
        torch.cat([folded.carried.shift for folded in closing]),
    )


def _add_readers(
    state: dict[str, Tensor], name: str, shape: SeqShape, readers: list[_Folded]
) -> None:
    """Deal the weights that read each filter's view out to wide convolution and updates."""
    k, size = shape.filter_width, shape.kernel_size
    zeros = readers[0].weight.new_zeros
    wide = zeros((shape.out_channels, shape.in_channels, size, size))
    updates = [zeros((later * k, k, size, size)) for later in range(shape.filters - 1, 0, -1)]
    for index, reader in enumerate(readers):
        old = shape.old_channels(index)
        wide[index * k : (index + 1) * k, shape.in_channels - old :] = reader.weight[:, :old]
        # The view ends in the latest group, which its maker hands to the next filter first.
        for later in range(shape.new_channels(index) // k):
            end = reader.weight.shape[1] - later * k
            update = updates[index - 1 - later]
            update[later * k : (later + 1) * k] = reader.weight[:, end - k : end]
    state[f"{name}.wide.weight"] = wide
    state[f"{name}.wide.bias"] = torch.cat([reader.bias for reader in readers])
    state |= {f"{name}.updates.{index}.weight": update for index, update in enumerate(updates)}


def _add_affine_step(state: dict[str, Tensor], name: str, folded: _Folded) -> None:
    if folded.affine is not None:
        scale, shift = folded.affine
        state[f"{name}.scale"] = scale[:, None, None]
        state[f"{name}.shift"] = shift[:, None, None]


def _fold(unit: ConvUnit, *, is_read: bool = False, shortcut: _Carried | None = None) -> _Folded:
    """Fold a unit's normalisation, and the one in the shortcut that joins it."""
    bn = unit.BatchNormalizationLayer
    weight = unit.LinearLayer.weight.double()
    affine = None
    if isinstance(bn, nn.BatchNorm2d):
        scale, shift = scale_and_shift(bn)
        if is_read and not _is_precise(bn):
            affine = (scale, shift)
            scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
        weight = weight * scale[:, None, None, None]
    else:  # folded before; the scale matters only where a shortcut joins
        shift = cast("Tensor", unit.LinearLayer.bias).double()
        given = unit.ShortcutScale
        scale = torch.ones_like(shift) if given is None else given.double().flatten()
    bias, shortcut_scale = shift, scale
    if shortcut is not None:
        shortcut_scale = scale / shortcut.scale
        bias = shift - shortcut_scale * shortcut.shift
    return _Folded(weight, bias, shortcut_scale, _Carried(scale, shift), affine)


def _is_precise(bn: nn.BatchNorm2d) -> bool:
    """Tell whether ``s * raw + t`` keeps the precision of the raw sum in every channel."""
    scale, shift = scale_and_shift(bn)
    spread = (cast("Tensor", bn.running_var).double() + bn.eps).sqrt()
    return bool((shift.abs() <= MAX_RELATIVE_SHIFT * spread * scale.abs()).all() and scale.all())
