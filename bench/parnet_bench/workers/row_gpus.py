"""The GPUs that a row runs on, seen from its process: their memory, and their caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.resources import CudaResources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.cuda.driver import CudaDriver

_MULTIPLE = 2
_DEFAULT_BYTES = 128 << 20
"""Stands for the cache of a GPU that does not tell its size: what the largest ones have."""


class RowGpus:
    """Looks at the memory of some GPUs, and empties their L2 caches.

    A driver tells only how much of a GPU is taken by all processes together. So what the row
    takes is added up over the spans in which it is the only one at work: from when this is
    made, or from `begin`, to `look`. All other rows are suspended meanwhile.

    Parameters
    ----------
    driver
        CUDA.
    ordinals
        The GPUs. What they hold when this is made, their contexts included, is not the row's.
    """

    def __init__(self, driver: CudaDriver, ordinals: Sequence[int]) -> None:
        self._driver = driver
        self._ordinals = tuple(ordinals)
        self._resources = CudaResources(driver)
        self._flushes: list[tuple[int, int, int, int]] = []
        self._taken_bytes = 0
        self._peak_bytes = 0
        try:
            for ordinal in self._ordinals:
                self._resources.retain_context(ordinal)
            self._free_bytes = self._count_free_bytes()
        except BaseException:
            self._resources.close()
            raise

    @property
    def peak_bytes(self) -> int:
        """Most memory that the row had taken whenever somebody looked."""
        return self._peak_bytes

    def begin(self) -> None:
        """Begin a span: what others have taken or given back since `look` is not the row's."""
        self._free_bytes = self._count_free_bytes()

    def look(self) -> None:
        """End a span: what has been taken meanwhile is the row's."""
        free_bytes = self._count_free_bytes()
        self._taken_bytes += self._free_bytes - free_bytes
        self._free_bytes = free_bytes
        self._peak_bytes = max(self._peak_bytes, self._taken_bytes)

    def empty_caches(self) -> None:
        """Write more memory than the L2 caches hold, and wait until it is written."""
        if not self._flushes:
            self._prepare_flushes()
        for ordinal, address, size_bytes, stream in self._flushes:
            with on_device(self._driver, ordinal):
                self._driver.clear(address, size_bytes, stream)
        for ordinal, _, _, stream in self._flushes:
            with on_device(self._driver, ordinal):
                self._driver.synchronize(stream)

    def close(self) -> None:
        """Release what this holds. Closing twice does no harm."""
        self._resources.close()

    def _prepare_flushes(self) -> None:
        before_bytes = self._count_free_bytes()
        sizes = {gpu.ordinal: gpu.l2_cache_bytes for gpu in self._driver.gpus()}
        for ordinal in self._ordinals:
            size_bytes = _MULTIPLE * (sizes[ordinal] or _DEFAULT_BYTES)
            address = self._resources.allocate(ordinal, size_bytes)
            stream = self._resources.create_stream(ordinal, 0)
            self._flushes.append((ordinal, address, size_bytes, stream))
        # What is written over the caches is not the row's.
        self._free_bytes -= before_bytes - self._count_free_bytes()

    def _count_free_bytes(self) -> int:
        return sum(map(self._driver.free_bytes, self._ordinals))
