"""Host memory in the place of a GPU's, for a driver without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from parnet_engines.cuda.driver import CudaError, PointerInfo

_ALIGNMENT_BYTES = 256


@dataclass(slots=True)
class _Block:
    device: int | None
    size_bytes: int
    backing: Any


class RecordedMemory:
    """Blocks of memory, of devices or page-locked, by their addresses."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}

    def count(self, *, pinned: bool) -> int:
        """Return how many blocks are not released, of devices or page-locked ones."""
        return sum((block.device is None) == pinned for block in self._blocks.values())

    def size_bytes(self, device: int) -> int:
        """Return how much memory of a device is not released."""
        return sum(b.size_bytes for b in self._blocks.values() if b.device == device)

    def prepare(self, size_bytes: int) -> tuple[int, Any]:
        """Return an address and what keeps the memory there alive."""
        backing = np.zeros(size_bytes + _ALIGNMENT_BYTES, np.uint8)
        return backing.ctypes.data + (-backing.ctypes.data % _ALIGNMENT_BYTES), backing

    def keep(self, address: int, backing: Any, size_bytes: int, device: int | None) -> None:
        """Have prepared memory be that of a device, or page-locked memory."""
        self._blocks[address] = _Block(device, size_bytes, backing)

    def release(self, address: int) -> int | None:
        """Release a block, and return the device that it was of."""
        return self._blocks.pop(address).device

    def require(self, address: int, size_bytes: int) -> None:
        """Refuse memory that does not lie within one block."""
        if not any(
            start <= address and address + size_bytes <= start + block.size_bytes
            for start, block in self._blocks.items()
        ):
            raise CudaError("cuMemcpyAsync", "CUDA_ERROR_INVALID_VALUE")

    def locate(self, address: int) -> PointerInfo:
        """Return where an address lies."""
        for start, block in self._blocks.items():
            if start <= address < start + max(1, block.size_bytes):
                return PointerInfo(block.device, is_primary=block.device is not None)
        return PointerInfo(None, is_primary=False)
