"""The calls of `cuda-bindings` as far as they go without a driver: to where it is looked for."""

from __future__ import annotations

import inspect
import sys
import threading

import pytest

from parnet_engines.cuda import bindings as cuda_bindings
from parnet_engines.cuda.bindings import BindingsDriver
from parnet_engines.cuda.driver import CudaDriver, CudaError

cuda = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

STREAM, EVENT, ADDRESS, GRAPH, BYTES = 4096, 4104, 1 << 40, 8192, 64

CALLS = {
    "gpus": (),
    "retain_context": (0,),
    "release_context": (0,),
    "push_context": (0,),
    "set_context": (0,),
    "pop_context": (),
    "can_access_peer": (0, 1),
    "enable_peer_access": (0, 1),
    "priority_range": (0,),
    "create_stream": (0, -1),
    "destroy_stream": (0, STREAM),
    "is_primary_stream": (STREAM, 0),
    "create_event": (0,),
    "destroy_event": (0, EVENT),
    "record_event": (EVENT, STREAM),
    "wait_event": (STREAM, EVENT),
    "elapsed_ms": (0, EVENT, EVENT),
    "free_bytes": (0,),
    "allocate": (0, BYTES),
    "free": (0, ADDRESS),
    "allocate_pinned": (0, BYTES),
    "free_pinned": (0, ADDRESS),
    "copy_to_device": (ADDRESS, ADDRESS, BYTES, STREAM),
    "copy_to_host": (ADDRESS, ADDRESS, BYTES, STREAM),
    "copy_on_device": (ADDRESS, ADDRESS, BYTES, STREAM),
    "copy_peer": (ADDRESS, ADDRESS, BYTES, STREAM),
    "clear": (ADDRESS, BYTES, STREAM),
    "begin_capture": (STREAM,),
    "end_capture": (STREAM,),
    "abort_capture": (STREAM,),
    "instantiate": (0, GRAPH),
    "destroy_graph": (0, GRAPH),
    "destroy_executable": (0, GRAPH),
    "launch": (GRAPH, STREAM),
    "synchronize": (STREAM,),
    "is_idle": (STREAM,),
    "locate": (ADDRESS,),
}
OPTIONS = {
    "copy_peer": ({"target_device": 0, "source_device": 1},),
    "create_event": ({}, {"timing": True}),
    "record_event": ({}, {"external": True}),
}


def has_driver() -> bool:
    try:
        return bool(BindingsDriver().gpus())
    except CudaError:
        return False


@pytest.fixture
def driver(monkeypatch):
    """A driver past its constructor, which fails without one, with a context of two devices."""
    real, started = cuda_bindings._import_driver(), []

    class Started:
        def __getattr__(self, name):
            if name == "cuInit" and not started:
                started.append(name)
                return lambda _: (cuda.CUresult.CUDA_SUCCESS,)
            if name == "cuDeviceGet":
                return lambda ordinal: (cuda.CUresult.CUDA_SUCCESS, cuda.CUdevice(ordinal))
            if name in {"cuCtxPushCurrent", "cuCtxPopCurrent"} and self.has_contexts:
                return lambda *_: (cuda.CUresult.CUDA_SUCCESS,)
            return getattr(real, name)

    module = Started()
    module.has_contexts = False
    monkeypatch.setattr(cuda_bindings, "_import_driver", lambda: module)
    found = BindingsDriver()
    found._contexts = {device: cuda.CUcontext(16 + device) for device in range(2)}
    return found, module


def test_every_method_has_a_call_here():
    names = {name for name, _ in inspect.getmembers(CudaDriver, inspect.isfunction)}
    assert set(CALLS) == {name for name in names if not name.startswith("_")}


@pytest.mark.skipif("has_driver()", reason="handles that are made up may not reach a driver")
@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_of_types_that_the_bindings_take(driver, name):
    found, module = driver
    module.has_contexts = name not in {"push_context", "pop_context"}
    for options in OPTIONS.get(name, ({},)):
        # A name or type that the bindings do not have is an AttributeError or TypeError.
        with pytest.raises(RuntimeError, match=r"driver library|libcuda\.so"):
            getattr(found, name)(*CALLS[name], **options)


def test_threads_that_come_and_go_leave_each_other_their_contexts(monkeypatch):
    """Each thread counts on a context from when it retains it until it releases it."""

    class Primary:
        CUstreamCaptureMode = cuda.CUstreamCaptureMode
        CUgraphInstantiate_flags = cuda.CUgraphInstantiate_flags

        def __getattr__(self, name):
            context = () if name in {"cuInit", "cuDevicePrimaryCtxRelease"} else (16,)
            return lambda *_: (cuda.CUresult.CUDA_SUCCESS, *context)

    monkeypatch.setattr(cuda_bindings, "_import_driver", Primary)
    found, wrong = BindingsDriver(), []

    def come_and_go() -> None:
        try:
            for _ in range(3000):
                found.retain_context(0)
                found.push_context(0)
                found.pop_context()
                found.release_context(0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
            wrong.append(repr(error))

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=come_and_go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert wrong == []
