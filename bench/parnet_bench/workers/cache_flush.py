"""Emptying the last-level cache, so that an inference finds its weights in main memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_DEFAULT_BYTES = 64 << 20
_MULTIPLE = 2
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class CacheFlush:
    """Writes more memory than the caches hold, whenever it is called.

    Parameters
    ----------
    size_bytes
        Size of the last-level cache; by default what the system tells, or 64 MiB.
    """

    def __init__(self, size_bytes: int | None = None) -> None:
        size = _MULTIPLE * (size_bytes or last_level_cache_bytes() or _DEFAULT_BYTES)
        self._memory = np.zeros(size // 8)

    def __call__(self) -> None:
        """Empty the cache."""
        self._memory += 1.0


def last_level_cache_bytes(caches: Path = _CACHES) -> int | None:
    """Return the size of the largest cache that the first core has a part in, on Linux."""
    sizes = []
    for entry in caches.glob("index*/size"):
        try:
            text = entry.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(sizes, default=None)
