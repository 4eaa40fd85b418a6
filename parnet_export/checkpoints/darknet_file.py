"""Darknet's ``.weights`` files of YOLOv4-CSP: a header, then every value in layer order.

Format, little-endian: the version as three int32 (major, minor, revision), the number of
images seen in training as int64, then float32 without names or shapes. A normalised
convolution stores its bias, scale, running mean and running variance, then its weights;
one without normalisation stores its bias, then its weights. Only a list of layers tells
what is what, and two are in use, with equally many values.

Darknet itself adds 1e-5 to variances; networks read from its files add the 1e-4 of those
who trained and published this one.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, get_args

import torch

from parnet_export.errors import InputError
from parnet_export.models.yolov4_csp_layers import Layout, YOLOv4CSPConfig, list_layers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

_HEADER = struct.Struct("<3iq")
_WORD_BYTES = 4
_HEADER_WORDS = _HEADER.size // _WORD_BYTES
_NORM_PARTS = ("bias", "weight", "running_mean", "running_var")
_COCO_CLASSES = 80


def looks_like_darknet_file(head: bytes) -> bool:
    """Tell from a file's first bytes whether Darknet, or a tool of its kin, may have written it.

    The format has no mark but its version, and that has been 0.2 and a one-digit revision
    since before this network existed.
    """
    if len(head) < _HEADER.size:
        return False
    major, minor, revision, seen = _HEADER.unpack_from(head)
    return (major, minor) == (0, 2) and 0 <= revision < 10 and seen >= 0


def read_darknet_file(
    path: Path, *, layout: Layout | None = None, num_classes: int | None = None, width: int = 32
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights of a YOLOv4-CSP in a ``.weights`` file.

    Parameters
    ----------
    path
        The file.
    layout
        Whose list the layers are in the order of. By default the one in which every
        running variance is positive or zero: in the other order, some of the values in
        their places are weights of either sign.
    num_classes
        Classes of objects; by default as many as the file's length fits.
    width
        Channels of the first convolution.

    Returns
    -------
    tensors, metadata
        CPU float32 tensors by their names in the training form of that layout, backed by
        the file: a page is read when it is first used. Batch counters are absent, as
        Darknet has none. And the ``"version"``, the ``"images_seen"`` and the ``"layout"``.

    Raises
    ------
    InputError
        When the file is no Darknet file, has another length than the network, or its
        order is unclear.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if not looks_like_darknet_file(head):
        raise InputError(path, "does not start as a Darknet file", "Give a .weights file")
    major, minor, revision, seen = _HEADER.unpack(head)
    words, rest = divmod(path.stat().st_size, _WORD_BYTES)
    count = words - _HEADER_WORDS
    if num_classes is None:
        num_classes = _fitting_classes(count, width) or _COCO_CLASSES
    config = YOLOv4CSPConfig(width, num_classes)
    _check_length(path, count, rest, config)

    # The header is as long as five values, so that the values can be mapped as they are.
    values = torch.from_file(str(path), shared=False, size=words)[_HEADER_WORDS:]
    layouts = get_args(Layout) if layout is None else (layout,)
    readings = {name: _name_values(values, config, name) for name in layouts}
    plausible = [name for name, tensors in readings.items() if _has_variances(tensors)]
    if not plausible:
        raise InputError(
            path,
            "has variances that are negative or no numbers when its layers are in the order of "
            f"{' or '.join(layouts)}",
            "It is damaged, of another network, or has another number of classes",
        )
    if len(plausible) > 1:
        raise InputError(
            path,
            f"could have its layers in the order of {' or '.join(plausible)}",
            "Load it with `read_darknet_file` and name the layout",
        )
    (found,) = plausible
    metadata = {
        "version": f"{major}.{minor}.{revision}",
        "images_seen": str(seen),
        "layout": found,
    }
    return readings[found], metadata


def _fitting_classes(count: int, width: int) -> int | None:
    """Return the number of classes with which a network has `count` values, if there is one."""
    one, two = (_value_count(YOLOv4CSPConfig(width, classes)) for classes in (1, 2))
    more, rest = divmod(count - one, two - one)
    return 1 + more if more >= 0 and not rest else None


def _check_length(path: Path, count: int, rest_bytes: int, config: YOLOv4CSPConfig) -> None:
    needed = _value_count(config)
    if count == needed and not rest_bytes:
        return
    if count < needed:
        difference = f"values missing: {needed - count:,}"
    elif count > needed:
        difference = f"values left over: {count - needed:,}"
    else:
        difference = f"bytes left over: {rest_bytes}"
    raise InputError(
        path,
        f"holds {count:,} values, but a YOLOv4-CSP of {config.num_classes} classes has "
        f"{needed:,} ({difference})",
        "It was cut short, or is of another network or another number of classes",
    )


def _value_count(config: YOLOv4CSPConfig) -> int:
    return sum(math.prod(shape) for _, shape in _stored(config, "yolor"))


def _stored(config: YOLOv4CSPConfig, layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor, in the order of the file."""
    for index, layer in enumerate(list_layers(config, layout)):
        if not layer.has_weights:
            continue
        unit = f"module_list.{index}"
        if layer.predicts:
            yield f"{unit}.Conv2d.bias", (layer.channels,)
        else:
            for part in _NORM_PARTS:
                yield f"{unit}.BatchNorm2d.{part}", (layer.channels,)
        shape = (layer.channels, layer.in_channels, layer.kernel, layer.kernel)
        yield f"{unit}.Conv2d.weight", shape


def _name_values(values: Tensor, config: YOLOv4CSPConfig, layout: Layout) -> dict[str, Tensor]:
    stored = list(_stored(config, layout))
    parts = values.split([math.prod(shape) for _, shape in stored])
    return {name: part.view(shape) for (name, shape), part in zip(stored, parts, strict=True)}


def _has_variances(tensors: dict[str, Tensor]) -> bool:
    """Tell whether what stands in the places of running variances can be variances."""
    return all(
        bool((tensor >= 0).all())  # NaN is not
        for name, tensor in tensors.items()
        if name.endswith("running_var")
    )
