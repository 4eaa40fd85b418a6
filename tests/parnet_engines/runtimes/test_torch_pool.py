"""Pools of memory are released when torch can do so, from whatever thread they are given up."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from parnet_engines.runtimes import torch_pool
from parnet_engines.runtimes.torch_pool import TorchPool, release_unused


class Allocator:
    """What torch's allocator insists on, and what it has been asked for."""

    def __init__(self) -> None:
        self.in_use = False
        self.is_capturing = False
        self.released: list[str] = []

    @contextlib.contextmanager
    def use(self, _pool, _device):
        assert not self.in_use
        self.in_use = True
        try:
            yield
        finally:
            self.in_use = False

    def release(self) -> None:
        """Release a pool, as torch does it, which would end the process where this says so."""
        well = not self.in_use and not self.is_capturing
        self.released.append("well" if well else "the process has ended")


@pytest.fixture
def allocator(monkeypatch):
    found = Allocator()

    class MemPool:
        def __del__(self):
            found.release()

    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch.cuda, "MemPool", MemPool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", found.use)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nothing())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nothing())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.is_capturing)
    yield found
    assert not torch_pool._retired


def test_a_pool_that_is_given_up_is_released(allocator):
    pool = TorchPool(0)
    with pool.in_use(None):
        assert allocator.in_use
    assert allocator.released == []
    del pool
    assert allocator.released == ["well"]


def test_a_pool_that_another_thread_gives_up_waits_for_the_one_that_enqueues(allocator):
    kept, given_up = TorchPool(0), [TorchPool(0)]
    with kept.in_use(None):
        thread = threading.Thread(target=given_up.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert allocator.released == []
    assert allocator.released == ["well"]


def test_a_pool_that_the_collector_finds_while_this_thread_enqueues_waits(allocator):
    kept, given_up = TorchPool(0), [TorchPool(0)]
    with kept.in_use(None):
        given_up.clear()
        assert allocator.released == []
    assert allocator.released == ["well"]


def test_nothing_is_released_by_a_thread_that_captures(allocator):
    kept, given_up = TorchPool(0), [TorchPool(0), TorchPool(0)]
    allocator.is_capturing = True
    given_up.pop()
    with kept.in_use(None):
        given_up.clear()
    assert allocator.released == []
    allocator.is_capturing = False
    release_unused()
    assert allocator.released == ["well", "well"]


def test_workspaces_are_forgotten_before_the_memory_they_lie_in_is_released(allocator, monkeypatch):
    def forget() -> None:
        allocator.released.append("workspaces")

    pool = TorchPool(0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", forget, raising=False)
    del pool
    assert allocator.released == ["workspaces", "well"]
