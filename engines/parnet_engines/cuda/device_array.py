"""Arrays that lie in a GPU, and CUDA streams, as other libraries hand them out.

Torch tensors, CuPy arrays and PyCUDA's GPUArrays describe themselves by the CUDA array
interface, others by DLPack; a PyCUDA allocation is an address. None is copied.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.cuda.driver import CudaDriver
    from parnet_export.stream_graph import TensorSpec

LEGACY_DEFAULT_STREAM = 1
"""CUDA's handle of the stream that libraries use unless told otherwise."""

_VIEW_MODULES = ("cuda.core.utils", "cuda.core.experimental.utils")
"""Where cuda-core has its views of arrays, since version 0.5 and before."""

_DLPACK_CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An array in a GPU that somebody else owns.

    Parameters
    ----------
    pointer
        Its address.
    shape, dtype
        What it holds; row-major.
    stream
        The CUDA stream on which its owner has written it, as far as it says so.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    stream: int | None = None


def as_device_array(value: object, spec: TensorSpec, subject: str) -> DeviceArray | None:
    """Return what is known of an array in a GPU; None for anything else, such as NumPy's.

    Parameters
    ----------
    value
        The array: by ``__cuda_array_interface__``, DLPack, or an address (an `int`, or an
        object that converts to one, as PyCUDA's ``DeviceAllocation`` does), which is
        trusted to hold what the network takes.
    spec
        The tensor that the array is for.
    subject
        What messages call it.

    Raises
    ------
    InputError
        When it is not row-major, or an address is given for a tensor with free dimensions.
    MissingBackendError
        When it speaks DLPack only, and ``cuda-core`` is not installed.
    """
    interface = _interface_of(value, subject)
    if interface is not None:
        return _from_interface(interface, subject)
    kind = getattr(value, "__dlpack_device__", None)
    if kind is not None:
        if int(kind()[0]) not in _DLPACK_CUDA:
            return None
        return _from_dlpack(value, subject)
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return None
    if isinstance(value, bool | float) or not hasattr(value, "__int__"):
        return None
    if spec.is_dynamic:
        problem = "was given as an address, which does not say its free dimensions"
        raise InputError(subject, problem, "Give an array with __cuda_array_interface__")
    return DeviceArray(int(cast("Any", value)), spec.resolve(), spec.dtype)


def require_usable(
    array: DeviceArray, driver: CudaDriver, device: int, subject: str, *, copy: str
) -> None:
    """Require that an array lies in the primary context of a GPU.

    Parameters
    ----------
    array
        The array.
    driver
        CUDA.
    device
        Ordinal of the GPU.
    subject
        What messages call the array.
    copy
        What to do about an array that lies elsewhere, as a sentence without a full stop.

    Raises
    ------
    InputError
        When it lies in another GPU, another context, or in host memory.
    """
    place = driver.locate(array.pointer)
    if place.device is None:
        raise InputError(subject, "does not lie in a GPU's memory", copy)
    if place.device != device:
        problem = f"lies in GPU {place.device}, and the network runs on GPU {device}"
        raise InputError(subject, problem, copy)
    if not place.is_primary:
        raise InputError(
            subject,
            f"belongs to another CUDA context than the primary one of GPU {device}",
            "Make it in the primary context (in PyCUDA, pycuda.autoprimaryctx in place of "
            "pycuda.autoinit)",
        )


def stream_handle(stream: object, driver: CudaDriver, device: int) -> int:
    """Return the handle of a CUDA stream of any library.

    Parameters
    ----------
    stream
        An object with ``__cuda_stream__`` (cuda.core, CuPy), a torch or PyCUDA stream, or a
        handle.
    driver
        CUDA.
    device
        Ordinal of the GPU that it has to belong to.

    Raises
    ------
    InputError
        When it is no stream, or one of another GPU or context.
    """
    handle = _handle_of(stream)
    if handle is None:
        raise InputError(
            f"stream {stream!r}",
            "is no CUDA stream",
            "Give an object with __cuda_stream__, a torch or PyCUDA stream, or its handle",
        )
    handle = handle or LEGACY_DEFAULT_STREAM
    if handle > 2 and not driver.is_primary_stream(handle, device):
        raise InputError(
            f"stream {stream!r}",
            f"belongs to another GPU or context than the primary one of GPU {device}",
            "Give a stream that was made in the primary context of the same GPU",
        )
    return handle


def _handle_of(stream: object) -> int | None:
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _, handle = protocol() if callable(protocol) else protocol
        return int(handle)
    for name in ("cuda_stream", "handle", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    return int(stream) if isinstance(stream, int) and not isinstance(stream, bool) else None


def _interface_of(value: object, subject: str) -> dict[str, Any] | None:
    try:
        return getattr(value, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError) as error:  # torch, of a tensor with gradients
        raise InputError(subject, f"cannot be read ({error})", "Detach it first") from error


def _from_interface(interface: dict[str, Any], subject: str) -> DeviceArray:
    shape = tuple(int(size) for size in interface["shape"])
    name, item_bytes = _type_of(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        _require_row_major(shape, [n // item_bytes for n in strides], subject)
    stream = interface.get("stream")
    return DeviceArray(
        int(interface["data"][0]), shape, name, None if stream is None else int(stream)
    )


@functools.cache
def _type_of(code: str) -> tuple[str, int]:
    """Return NumPy's name of an element type, which takes NumPy long to tell, and its size."""
    dtype = np.dtype(code)
    return dtype.name, dtype.itemsize


def _from_dlpack(value: object, subject: str) -> DeviceArray:
    view = _strided_view()(value, stream_ptr=LEGACY_DEFAULT_STREAM)
    shape = tuple(int(size) for size in view.shape)
    if view.strides is not None:
        _require_row_major(shape, list(view.strides), subject)
    return DeviceArray(int(view.ptr), shape, np.dtype(view.dtype).name, LEGACY_DEFAULT_STREAM)


def _strided_view() -> Any:
    """Return what makes a `StridedMemoryView` of ``cuda.core`` of an array."""
    for name in _VIEW_MODULES:
        try:
            view = importlib.import_module(name).StridedMemoryView
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
        else:
            return getattr(view, "from_dlpack", view)
    purpose = "Taking arrays by DLPack"
    raise MissingBackendError("cuda.core", purpose, "pip install 'parnet-export[gpu]'")


def _require_row_major(shape: Sequence[int], strides: Sequence[int], subject: str) -> None:
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if any(
        size > 1 and found != wanted
        for size, found, wanted in zip(shape, strides, expected, strict=True)
    ):
        raise InputError(subject, "is not row-major", "Give a contiguous array")
