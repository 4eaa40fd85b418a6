"""Safetensors files: a JSON header, then the tensors' bytes.

The format is the one described at https://github.com/huggingface/safetensors.
Files are read with that library. They are written here, because the library's
own writer puts metadata in a random order (two runs give two digests) and
creates files that only their owner may read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from parnet_export import files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def looks_like_safetensors(head: bytes) -> bool:
    """Tell from a file's first bytes whether it is meant to be a safetensors file."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{" and length <= _MAX_HEADER_BYTES


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Returns
    -------
    tensors, metadata
        CPU tensors in their stored types, backed by the file: a page is read
        when it is first used. The metadata is empty where the header has none.

    Raises
    ------
    InputError
        When the file is truncated or damaged, or holds a type that torch lacks.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as stored:
            names = stored.keys()
            return {name: stored.get_tensor(name) for name in names}, stored.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            path,
            f"is no complete safetensors file ({error})",
            "It was probably cut short or changed on its way; copy or download it again",
        ) from error


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    The same tensors and metadata always give the same bytes. Tensors that
    share memory are written once each.

    Parameters
    ----------
    path
        Destination; an earlier file there is replaced only by a complete new one.
    tensors
        Dense real tensors of any floating, integer or boolean type, on any device.
    metadata
        Text for the file's header.

    Raises
    ------
    InputError
        When the place cannot be written to or the disk is full.
    ValueError
        When a tensor is of a type that the format lacks.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES or tensor.layout is not torch.strided:
            raise ValueError(f"{name} cannot be stored as {tensor.dtype}, {tensor.layout}")
    # Wide types first: every tensor then starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with files.open_replacing(path) as stream:
        stream.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        stream.write(text)
        for name in order:
            flat = tensors[name].detach().cpu().reshape(-1).contiguous()
            stream.write(flat.view(torch.uint8).numpy().data)
