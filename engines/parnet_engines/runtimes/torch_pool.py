"""The memory of a GPU that torch takes for what lies between an engine's inputs and outputs."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ENQUEUEING = threading.Lock()
"""Held by the thread that enqueues on a GPU by torch.

Which precisions are allowed, the workspaces of cuBLAS, and whether a pool is in use on a
device, is the same for all threads.
"""

_retired: list[torch.cuda.MemPool] = []
"""Pools that nobody uses any more, until they can be released."""


class TorchPool:
    """A pool of a GPU's memory for one binding.

    A captured graph works in the same memory at every launch, so that nobody else may have it.

    torch ends the process when a pool is released while memory is taken from another one on
    the same device: the pool's destructor empties its cache, and insists that no pool is in
    use by any thread. So a pool is not released when the last reference to it goes, wherever
    that may be, but when no thread enqueues.

    Parameters
    ----------
    device
        CUDA ordinal.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        with torch.cuda.device(device):  # a pool is of the device that is current
            self._kept = [torch.cuda.MemPool()]
        weakref.finalize(self, _retire, self._kept).atexit = False
        release_unused()

    @contextlib.contextmanager
    def in_use(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Enqueue on a CUDA stream meanwhile, with memory of this pool; one thread at a time.

        Parameters
        ----------
        stream
            A stream of the pool's device.
        """
        device = self._device
        with ENQUEUEING, torch.cuda.device(device), torch.cuda.stream(stream):
            with torch.cuda.use_mem_pool(self._kept[0], device):
                yield
            # What retired meanwhile could not be released then.
            if _retired and not torch.cuda.is_current_stream_capturing():
                _release_retired()


def release_unused() -> None:
    """Release pools that nobody uses, and let cuBLAS take new workspaces when it next runs.

    torch keeps a workspace for each CUDA stream by the stream's handle, also when the stream is
    gone and with it the pool that the workspace is of. A new stream may have the same handle,
    and a captured graph would work in memory that is about to be released. Graphs that are there
    keep theirs: it returns to the pool of their binding, which nobody else takes memory from.
    """
    with ENQUEUEING:
        _release_retired()


def _retire(kept: list[torch.cuda.MemPool]) -> None:
    """Release the pool of a binding that is gone, now or when the thread that enqueues is done.

    Waiting for that thread could last forever: it may be this one, interrupted by Python's
    collector. A thread that captures must not free memory of the GPU.
    """
    _retired.append(kept.pop())
    if not torch.cuda.is_current_stream_capturing() and ENQUEUEING.acquire(blocking=False):
        try:
            _release_retired()
        finally:
            ENQUEUEING.release()


def _release_retired() -> None:
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # noqa: SLF001
    if forget is not None:
        forget()
    while _retired:
        _retired.pop()
