"""Checkpoints: trained weights on disk, read without ever running code from the file."""

from __future__ import annotations

import codecs
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from parnet_export import files
from parnet_export.checkpoints.darknet_file import looks_like_darknet_file, read_darknet_file
from parnet_export.checkpoints.safetensors_file import (
    looks_like_safetensors,
    read_safetensors,
    write_safetensors,
)
from parnet_export.checkpoints.torch_file import looks_like_torch_file, read_torch_file
from parnet_export.errors import InputError, name_some

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["Checkpoint", "load_strictly", "read_checkpoint", "write_safetensors"]

_HEAD_BYTES = 512
_TAR_MARK = slice(257, 262)
_BLANKS = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and white space
_FORMATS = "Give a checkpoint written by torch.save, or a safetensors file"

# What people give by mistake: how it starts, in lower case, what it is, and what to do.
_KNOWN_STARTS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml"),
        "looks like a web page, so its download has failed",
        "Download the file that the page leads to",
    ),
    (
        (b"version https://git-lfs",),
        "is a Git LFS pointer to the checkpoint",
        "Fetch the file itself: git lfs pull",
    ),
    (
        (b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf"),
        "is compressed",
        "Unpack it first",
    ),
    (
        tuple(bytes((0x80, protocol)) for protocol in range(2, 6)),
        "is a pickle without the marks of torch; it stays closed, because reading one can run code",
        _FORMATS,
    ),
)

# A batch counter is bookkeeping of training; checkpoints older than torch 0.4.1 have none.
_UNUSED_SUFFIX = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights as a file stores them.

    Parameters
    ----------
    path
        The file they were read from.
    sha256
        Digest of the file's content.
    tensors
        CPU tensors in their stored types, by their names in the module. Most are
        backed by the file, so holding them costs no memory of its own.
    metadata
        The header of a safetensors or Darknet file; or for a torch file
        ``"weights_entry"``, the entry that the weights were taken from
        (``"state_dict"``, ``"state_dict_ema"``, ``"model"``, or empty for a bare
        state dict), and those of arch, epoch, metric and version that it tells.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: Path, *, use_ema: bool = False) -> Checkpoint:
    """Read the weights in a torch, safetensors or Darknet file.

    The type is told by the content, whatever the file is called: a state dict or a
    training checkpoint of ``torch.save``, of any torch version, safetensors, or
    Darknet's ``.weights``. ``module.`` prefixes of parallel training are removed
    from torch files.

    Parameters
    ----------
    path
        The file.
    use_ema
        Take the exponential moving average of the weights, which some training
        checkpoints hold beside the weights themselves.

    Raises
    ------
    InputError
        When the file cannot be read, is no checkpoint, is damaged, would run code,
        holds no tensors, or has no moving average where one is asked for.
    """
    head = _first_bytes(path)
    if looks_like_safetensors(head):
        _refuse_average(path, "safetensors", use_ema=use_ema)
        tensors, metadata = read_safetensors(path)
        if not tensors:
            raise InputError(path, "holds no tensors", _FORMATS)
    elif looks_like_torch_file(head):
        tensors, metadata = read_torch_file(path, use_ema=use_ema)
    elif looks_like_darknet_file(head):
        _refuse_average(path, "Darknet", use_ema=use_ema)
        tensors, metadata = read_darknet_file(path)
    else:
        raise _not_a_checkpoint(path, head)
    return Checkpoint(path, files.sha256_of(path), tensors, metadata)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], subject: str | Path) -> None:
    """Copy `tensors` into a module whose names and shapes they match exactly.

    Batch counters (``num_batches_tracked``) may be missing, as in checkpoints
    older than torch 0.4.1: nothing at inference reads them.

    Parameters
    ----------
    module
        Takes the values, in its own types. It is left as it was when anything is wrong.
    tensors
        What ``module.state_dict()`` names, in any floating type where it is floating.
    subject
        Where the tensors come from, for the message.

    Raises
    ------
    InputError
        When names are missing or unexpected, shapes or kinds differ, or values are
        not finite in the module's type. Each fault is named, at most ten of a kind.
    """
    expected: dict[str, Tensor] = module.state_dict()
    faults = {
        "missing": [
            name for name in expected if name not in tensors and not name.endswith(_UNUSED_SUFFIX)
        ],
        "unexpected": [name for name in tensors if name not in expected],
        "misshapen": [
            misfit
            for name, target in expected.items()
            if name in tensors and (misfit := _misfit(name, tensors[name], target))
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {name_some(names)}" for kind, names in faults.items() if names)
        raise InputError(
            subject,
            f"does not fit {type(module).__name__} ({told})",
            "Check that the file holds the network that was asked for",
        )
    broken = [
        name
        for name, target in expected.items()
        if name in tensors and not _is_finite(tensors[name], target.dtype)
    ]
    if broken:
        raise InputError(
            subject,
            f"holds NaN or infinite values in {name_some(broken)}",
            "The training run probably diverged; use an earlier checkpoint",
        )
    with torch.no_grad():
        for name, target in expected.items():
            if name in tensors:
                target.copy_(tensors[name])
            else:
                target.zero_()


def _misfit(name: str, tensor: Tensor, target: Tensor) -> str:
    """Return how a tensor differs from the one it is meant for; empty if it fits."""
    if tensor.shape != target.shape:
        return f"{name} {tuple(tensor.shape)} instead of {tuple(target.shape)}"
    if tensor.is_complex() or (target.is_floating_point() and not tensor.is_floating_point()):
        return f"{name} {_dtype_name(tensor)} instead of {_dtype_name(target)}"
    return ""


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a tensor is finite, both as it is and in the type it is cast to."""
    if not tensor.is_floating_point():
        return True
    cast = tensor.to(dtype) if dtype.is_floating_point else tensor.double()
    return bool(cast.isfinite().all())


def _refuse_average(path: Path, kind: str, *, use_ema: bool) -> None:
    if use_ema:
        raise InputError(
            path,
            f"is a {kind} file, which holds one set of weights and no moving average",
            "Leave --use-ema away",
        )


def _first_bytes(path: Path) -> bytes:
    """Return the start of a regular file, or say why there is none."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(path, "is a directory", "Name the checkpoint file in it")
        if not stat.S_ISREG(mode):
            raise InputError(path, "is no regular file", _FORMATS)
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise InputError(path, "does not exist", "Check the path") from error
    except PermissionError as error:
        raise InputError(
            path, "may not be read by you", "Ask for permission, or copy it where you have it"
        ) from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "Check the path") from error
    if not head:
        raise InputError(path, "is empty", "Copy or download it again")
    return head


def _not_a_checkpoint(path: Path, head: bytes) -> InputError:
    """Return the message for a file that is neither a torch file nor safetensors."""
    start = head.lstrip(_BLANKS).lower()
    for starts, problem, remedy in _KNOWN_STARTS:
        if start.startswith(starts):
            return InputError(path, problem, remedy)
    if head[_TAR_MARK] == b"ustar":
        return InputError(path, "is a tar archive", "Unpack it and name the checkpoint in it")
    if _is_text(head):
        return InputError(path, "is a text file", _FORMATS)
    return InputError(path, "is neither a torch file nor safetensors, or is damaged", _FORMATS)


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
