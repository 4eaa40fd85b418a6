"""The machine's CUDA driver, by NVIDIA's ``cuda-bindings``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from parnet_engines.cuda.driver import CudaError, Gpu, PointerInfo, on_device
from parnet_export.errors import MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Callable

_MODULE = "cuda.bindings.driver"
_INSTALL = "pip install 'parnet-export[gpu]'"
_NAME_BYTES = 256
_BUS_ID_BYTES = 32


class BindingsDriver:
    """The driver API, version 12 or 13, with primary contexts.

    Raises
    ------
    MissingBackendError
        When ``cuda-bindings`` is not installed.
    CudaError
        When this machine has no NVIDIA driver, or one that is too old, or no GPU.
    """

    def __init__(self) -> None:
        self._cuda = _import_driver()
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:
            # What cuda-bindings raises where it finds no library of the driver. Its classes
            # differ from version to version; that of this module is no RuntimeError.
            raise CudaError("cuInit", "no NVIDIA driver", str(error).splitlines()[0]) from error
        self._contexts: dict[int, Any] = {}
        self._thread_local = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        flags = self._cuda.CUgraphInstantiate_flags
        self._use_node_priority = int(flags.CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY)

    def gpus(self) -> tuple[Gpu, ...]:
        """See `CudaDriver.gpus`."""
        return tuple(self._gpu(ordinal) for ordinal in range(self._call("cuDeviceGetCount")))

    def retain_context(self, device: int) -> None:
        """See `CudaDriver.retain_context`."""
        context = self._call("cuDevicePrimaryCtxRetain", self._device(device))
        self._contexts[device] = context  # and stays known: CUDA itself counts who retains it

    def release_context(self, device: int) -> None:
        """See `CudaDriver.release_context`."""
        self._call("cuDevicePrimaryCtxRelease", self._device(device))

    def push_context(self, device: int) -> None:
        """See `CudaDriver.push_context`."""
        self._call("cuCtxPushCurrent", self._contexts[device])

    def set_context(self, device: int) -> None:
        """See `CudaDriver.set_context`."""
        self._call("cuCtxSetCurrent", self._contexts[device])

    def pop_context(self) -> None:
        """See `CudaDriver.pop_context`."""
        self._call("cuCtxPopCurrent")

    def can_access_peer(self, device: int, peer: int) -> bool:
        """See `CudaDriver.can_access_peer`."""
        answer = self._call("cuDeviceCanAccessPeer", self._device(device), self._device(peer))
        return bool(answer)

    def enable_peer_access(self, device: int, peer: int) -> None:
        """See `CudaDriver.enable_peer_access`."""
        try:
            self._call_on(device, "cuCtxEnablePeerAccess", self._contexts[peer], 0)
        except CudaError as error:
            if error.code != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":
                raise

    def priority_range(self, device: int) -> tuple[int, int]:
        """See `CudaDriver.priority_range`."""
        least, greatest = self._call_on(device, "cuCtxGetStreamPriorityRange")
        return int(least), int(greatest)

    def create_stream(self, device: int, priority: int) -> int:
        """See `CudaDriver.create_stream`."""
        flag = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call_on(device, "cuStreamCreateWithPriority", int(flag), priority))

    def destroy_stream(self, device: int, stream: int) -> None:
        """See `CudaDriver.destroy_stream`."""
        self._call_on(device, "cuStreamDestroy", stream)

    def is_primary_stream(self, stream: int, device: int) -> bool:
        """See `CudaDriver.is_primary_stream`."""
        context = self._call_on(device, "cuStreamGetCtx", stream)
        return int(context) == int(self._contexts[device])

    def create_event(self, device: int, *, timing: bool = False) -> int:
        """See `CudaDriver.create_event`."""
        flags = self._cuda.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        return int(self._call_on(device, "cuEventCreate", int(flag)))

    def destroy_event(self, device: int, event: int) -> None:
        """See `CudaDriver.destroy_event`."""
        self._call_on(device, "cuEventDestroy", event)

    def record_event(self, event: int, stream: int, *, external: bool = False) -> None:
        """See `CudaDriver.record_event`."""
        if external:
            flag = self._cuda.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
            self._call("cuEventRecordWithFlags", event, stream, int(flag))
        else:
            self._call("cuEventRecord", event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        """See `CudaDriver.wait_event`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def elapsed_ms(self, device: int, begin: int, end: int) -> float:
        """See `CudaDriver.elapsed_ms`."""
        return float(self._call_on(device, "cuEventElapsedTime", begin, end))

    def free_bytes(self, device: int) -> int:
        """See `CudaDriver.free_bytes`."""
        free_bytes, _ = self._call_on(device, "cuMemGetInfo")
        return int(free_bytes)

    def allocate(self, device: int, size_bytes: int) -> int:
        """See `CudaDriver.allocate`."""
        return int(self._call_on(device, "cuMemAlloc", size_bytes))

    def free(self, device: int, address: int) -> None:
        """See `CudaDriver.free`."""
        self._call_on(device, "cuMemFree", address)

    def allocate_pinned(self, device: int, size_bytes: int) -> int:
        """See `CudaDriver.allocate_pinned`."""
        flag = self._cuda.CU_MEMHOSTALLOC_PORTABLE
        return int(self._call_on(device, "cuMemHostAlloc", size_bytes, int(flag)))

    def free_pinned(self, device: int, address: int) -> None:
        """See `CudaDriver.free_pinned`."""
        self._call_on(device, "cuMemFreeHost", address)

    def copy_to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.copy_to_device`."""
        self._call("cuMemcpyHtoDAsync", target, source, size_bytes, stream)

    def copy_to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.copy_to_host`."""
        self._call("cuMemcpyDtoHAsync", target, source, size_bytes, stream)

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.copy_on_device`."""
        self._call("cuMemcpyDtoDAsync", target, source, size_bytes, stream)

    def copy_peer(
        self,
        target: int,
        source: int,
        size_bytes: int,
        stream: int,
        *,
        target_device: int,  # noqa: ARG002 - the protocol's signature
        source_device: int,  # noqa: ARG002
    ) -> None:
        """See `CudaDriver.copy_peer`.

        Both contexts can access the other's memory, and addresses are unique over all devices,
        so that an ordinary copy does it, which can be captured like any other.
        """
        self._call("cuMemcpyAsync", target, source, size_bytes, stream)

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """See `CudaDriver.clear`."""
        self._call("cuMemsetD8Async", address, 0, size_bytes, stream)

    def begin_capture(self, stream: int) -> None:
        """See `CudaDriver.begin_capture`."""
        self._call("cuStreamBeginCapture", stream, self._thread_local)

    def end_capture(self, stream: int) -> int:
        """See `CudaDriver.end_capture`."""
        return int(self._call("cuStreamEndCapture", stream))

    def abort_capture(self, stream: int) -> None:
        """See `CudaDriver.abort_capture`."""
        idle = self._cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        failure, status = self._cuda.cuStreamIsCapturing(stream)
        if int(failure) or status != idle:
            _, graph = self._cuda.cuStreamEndCapture(stream)
            if graph is not None and int(graph):
                self._cuda.cuGraphDestroy(graph)
        # The driver keeps no last error; runtimes above it drop theirs as they report it.

    def instantiate(self, device: int, graph: int) -> int:
        """See `CudaDriver.instantiate`."""
        return int(self._call_on(device, "cuGraphInstantiate", graph, self._use_node_priority))

    def destroy_graph(self, device: int, graph: int) -> None:
        """See `CudaDriver.destroy_graph`."""
        self._call_on(device, "cuGraphDestroy", graph)

    def destroy_executable(self, device: int, executable: int) -> None:
        """See `CudaDriver.destroy_executable`."""
        self._call_on(device, "cuGraphExecDestroy", executable)

    def launch(self, executable: int, stream: int) -> None:
        """See `CudaDriver.launch`."""
        self._call("cuGraphLaunch", executable, stream)

    def synchronize(self, stream: int) -> None:
        """See `CudaDriver.synchronize`."""
        self._call("cuStreamSynchronize", stream)

    def is_idle(self, stream: int) -> bool:
        """See `CudaDriver.is_idle`."""
        try:
            self._call("cuStreamQuery", stream)
        except CudaError as error:
            if error.code == "CUDA_ERROR_NOT_READY":
                return False
            raise
        return True

    def locate(self, address: int) -> PointerInfo:
        """See `CudaDriver.locate`."""
        attributes = self._cuda.CUpointer_attribute
        kinds = self._cuda.CUmemorytype
        try:
            kind = self._call(
                "cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address
            )
        except CudaError as error:
            if error.code != "CUDA_ERROR_INVALID_VALUE":
                raise
            return PointerInfo(None, is_primary=False)  # memory that CUDA knows nothing of
        if int(kind) == int(kinds.CU_MEMORYTYPE_HOST):
            return PointerInfo(None, is_primary=False)
        ordinal = int(
            self._call(
                "cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address
            )
        )
        return PointerInfo(ordinal, is_primary=self._is_primary(address, ordinal))

    def _is_primary(self, address: int, device: int) -> bool:
        """Return whether memory belongs to the primary context, or to none, as pools do."""
        attribute = self._cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
        try:
            context = self._call("cuPointerGetAttribute", attribute, address)
        except CudaError as error:
            if error.code != "CUDA_ERROR_INVALID_VALUE":
                raise
            return True
        owner = int(context) if context is not None else 0
        known = self._contexts.get(device)
        return owner == 0 or (known is not None and owner == int(known))

    def _gpu(self, ordinal: int) -> Gpu:
        device = self._device(ordinal)
        kinds = self._cuda.CUdevice_attribute
        name = self._call("cuDeviceGetName", _NAME_BYTES, device)
        major, minor, l2_cache_bytes = (
            int(self._call("cuDeviceGetAttribute", kind, device))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                kinds.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE,
            )
        )
        return Gpu(
            ordinal,
            name.split(b"\0")[0].decode(),
            (major, minor),
            int(self._call("cuDeviceTotalMem", device)),
            l2_cache_bytes,
            self._bus_id(device),
        )

    def _bus_id(self, device: Any) -> str:
        try:
            found: bytes = self._call("cuDeviceGetPCIBusId", _BUS_ID_BYTES, device)
        except CudaError:
            return ""  # nothing computes less well for it
        return found.split(b"\0")[0].decode()

    def _device(self, ordinal: int) -> Any:
        return self._call("cuDeviceGet", ordinal)

    def _call_on(self, device: int, name: str, *arguments: object) -> Any:
        """Call a function of the driver while a device's context is current."""
        with on_device(self, device):
            return self._call(name, *arguments)

    def _call(self, name: str, *arguments: object) -> Any:
        """Call a function of the driver; return what it returns besides the error."""
        function: Callable[..., tuple[Any, ...]] = getattr(self._cuda, name)
        failure, *values = function(*arguments)
        if int(failure):
            _, text = self._cuda.cuGetErrorString(failure)
            raise CudaError(name, failure.name, (text or b"").decode())
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)


def _import_driver() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name not in {"cuda", "cuda.bindings", _MODULE}:
            raise
        raise MissingBackendError("cuda.bindings", "Running on a GPU", _INSTALL) from error
