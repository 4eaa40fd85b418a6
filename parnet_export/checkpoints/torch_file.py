"""Files of ``torch.save``: state dicts, and training checkpoints that contain one.

Such a file is a pickle, and a pickle can run any command when it is read. Only
torch's restricted reader is used here, which builds tensors and plain
containers; the one class allowed beside them is `argparse.Namespace`, in which
training scripts keep their arguments.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from parnet_export.errors import InputError, name_some
from parnet_export.images.timm_arguments import picture_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
"""Starts the files of torch 1.6 and later."""

LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f920 6aa850192e")
"""Torch's own magic number as earlier versions pickled it, two bytes after the start."""

STATE_DICT_ENTRIES = ("state_dict", "model")
"""Where training checkpoints keep the weights: timm and its kin, YOLO and its kin."""

EMA_ENTRY = "state_dict_ema"
"""Where timm keeps the exponential moving average of the weights."""

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel and ``torch.compile`` put before every name."""

_FACTS = ("arch", "epoch", "metric", "version")

# What the readers raise on bytes that make no sense.
_ZIP_ERRORS = (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error)
_PICKLE_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)

_COPY_AGAIN = "It was probably cut short or changed on its way; copy or download it again"
_SAVE_WEIGHTS_ALONE = (
    "Where the file was made, save `model.state_dict()` by itself, with torch.save or as "
    "safetensors, and use that"
)


def looks_like_torch_file(head: bytes) -> bool:
    """Tell from a file's first bytes whether ``torch.save`` may have written it."""
    return head.startswith(ZIP_MAGIC) or head[2:].startswith(LEGACY_MAGIC)


def read_torch_file(path: Path, *, use_ema: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights in a file of ``torch.save``.

    Parameters
    ----------
    path
        A state dict, or a dict with one under an entry of `STATE_DICT_ENTRIES`.
    use_ema
        Take the moving average under `EMA_ENTRY` instead.

    Returns
    -------
    tensors, metadata
        CPU tensors in their stored types, by names freed from wrapper prefixes;
        and what the checkpoint says about itself: ``"weights_entry"``, the entry
        the weights were taken from (empty for a bare state dict), and those of
        arch, epoch, metric, version and arguments about pictures that it tells. Zip files
        back their tensors: a page is read when it is first used.

    Raises
    ------
    InputError
        When the file is damaged, asks for code to be run, or holds no state dict.
    """
    content = _load(path)
    entry, found = _choose_entry(path, content, use_ema=use_ema)
    tensors = _check_state_dict(path, entry, found)
    facts = {"weights_entry": entry}
    if entry and isinstance(content, Mapping):
        for name in _FACTS:
            if isinstance(content.get(name), str | int | float):
                facts[name] = str(content[name])
        facts |= picture_arguments(content)
    return tensors, facts


def _load(path: Path) -> object:
    # Only paths can be mapped; but torch takes every path that ends so for safetensors.
    mapped = _check_zip(path) and path.suffix != ".safetensors"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as stream:
            return torch.load(
                path if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped
            )
    except _PICKLE_ERRORS as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise InputError(
                path,
                f"holds a pickled {refused[1]}, which is not rebuilt because that can run code",
                _SAVE_WEIGHTS_ALONE,
            ) from error
        raise InputError(path, "is damaged: torch cannot read it", _COPY_AGAIN) from error


def _check_zip(path: Path) -> bool:
    """Tell whether `path` is a zip file, and refuse one that is not as torch writes them."""
    with path.open("rb") as stream:
        if stream.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except _ZIP_ERRORS as error:
        raise InputError(
            path, "is truncated or damaged: its table of contents is unreadable", _COPY_AGAIN
        ) from error
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            path, "is a TorchScript archive, a program and not weights", _SAVE_WEIGHTS_ALONE
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise InputError(
            path, "is a zip archive that torch.save did not write", "Name the checkpoint itself"
        )
    # Tensors are mapped straight from the file, so compressed ones would come out as noise.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(
            path,
            "has compressed members, which torch.save never writes",
            "Use the file as it was before it was packed again",
        )
    return True


def _choose_entry(path: Path, content: object, *, use_ema: bool) -> tuple[str, object]:
    """Return the entry that holds the weights, empty for a bare state dict, and its value."""
    if not isinstance(content, Mapping):
        raise InputError(
            path, f"holds a {type(content).__name__}, not a state dict", _SAVE_WEIGHTS_ALONE
        )
    if use_ema:
        if content.get(EMA_ENTRY) is None:
            raise InputError(
                path,
                f"holds no moving average of the weights (no entry {EMA_ENTRY!r})",
                "Leave --use-ema away",
            )
        return EMA_ENTRY, content[EMA_ENTRY]
    for entry in STATE_DICT_ENTRIES:
        # A bare state dict may name a tensor "model"; an entry is never a tensor.
        if entry in content and not isinstance(content[entry], torch.Tensor):
            return entry, content[entry]
    return "", content


def _check_state_dict(path: Path, entry: str, found: object) -> dict[str, Tensor]:
    """Return `found` as dense tensors by unwrapped names, or say why it is no state dict."""
    where = f"its entry {entry!r} is" if entry else "it is"
    if not isinstance(found, Mapping):
        raise InputError(
            path,
            f"holds no state dict: {where} a {type(found).__name__}",
            _SAVE_WEIGHTS_ALONE,
        )
    if not found:
        raise InputError(path, "holds no tensors", _SAVE_WEIGHTS_ALONE)
    others = [
        f"{name} ({type(value).__name__})"
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise InputError(
            path,
            f"holds no state dict: {where} a dict with more than tensors, {name_some(others)}",
            _SAVE_WEIGHTS_ALONE,
        )
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise InputError(
                path,
                f"its tensor {name} is sparse, quantised or without values",
                "Save dense tensors of floating type",
            )
        unwrapped = _unwrap(name)
        if unwrapped in tensors:
            raise InputError(
                path,
                f"holds two tensors that are both named {unwrapped} without wrapper prefixes",
                _SAVE_WEIGHTS_ALONE,
            )
        tensors[unwrapped] = value.detach()
    return tensors


def _unwrap(name: str) -> str:
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.partition(".")[2]
    return name
