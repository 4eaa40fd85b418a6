"""The arrays in a GPU that a caller gives to a session, all inputs or outputs together."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.cuda.device_array import (
    LEGACY_DEFAULT_STREAM,
    as_device_array,
    require_usable,
)
from parnet_engines.cuda.driver import on_device
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.cuda.device_array import DeviceArray
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_export.stream_graph import TensorSpec

_KEPT_ADDRESSES = 64
"""For how many addresses it is kept in mind that they are usable: asking CUDA takes time."""


class UsablePlaces:
    """Which addresses are known to lie where an inference starts and ends.

    Parameters
    ----------
    driver
        CUDA.
    home
        Ordinal of the GPU where they have to lie, whose context is retained.
    """

    def __init__(self, driver: CudaDriver, home: int) -> None:
        self._driver = driver
        self._home = home
        self._known: set[int] = set()

    def require_usable(self, arrays: Mapping[str, DeviceArray], side: str) -> None:
        """Require that arrays lie there; CUDA is asked once for an address.

        Parameters
        ----------
        arrays
            By the names of tensors.
        side
            What the tensors are, for messages: ``"input"`` or ``"output"``.

        Raises
        ------
        InputError
            When one lies in another GPU or context, or in the host's memory.
        """
        for name, array in arrays.items():
            if array.pointer in self._known:
                continue
            with on_device(self._driver, self._home):
                require_usable(
                    array,
                    self._driver,
                    self._home,
                    f"{side} {name!r}",
                    copy="Copy it there, or give a NumPy array",
                )
            if len(self._known) < _KEPT_ADDRESSES:
                self._known.add(array.pointer)


def find_arrays(
    specs: Sequence[TensorSpec], values: Mapping[str, Any], side: str
) -> dict[str, DeviceArray]:
    """Return those values that lie in a GPU, by the names of their tensors.

    Parameters
    ----------
    specs
        The tensors.
    values
        What is given for them: NumPy's arrays, others in a GPU, or nothing.
    side
        What the tensors are, for messages: ``"input"`` or ``"output"``.

    Raises
    ------
    InputError
        When one that lies in a GPU cannot be used where it lies.
    """
    found = {}
    for spec in specs:
        if spec.name in values:
            array = as_device_array(values[spec.name], spec, f"{side} {spec.name!r}")
            if array is not None:
                found[spec.name] = array
    return found


def find_targets(specs: Sequence[TensorSpec], values: Mapping[str, Any]) -> dict[str, DeviceArray]:
    """Return the arrays that outputs are to be written to; all have to lie in a GPU.

    Raises
    ------
    InputError
        When one is for no output, or does not lie in a GPU.
    """
    names = [spec.name for spec in specs]
    for name in values:
        if name not in names:
            problem = "is not an output of the network"
            raise InputError(f"output {name!r}", problem, f"Use {', '.join(names)}")
    targets = find_arrays(specs, values, "output")
    for name in values:
        if name not in targets:
            problem = "does not lie in a GPU"
            raise InputError(f"output {name!r}", problem, "Leave it out to get it as NumPy")
    return targets


def require_fitting(
    specs: Sequence[TensorSpec],
    targets: Mapping[str, DeviceArray],
    buffers: Sequence[NDArray[Any]],
) -> None:
    """Require that arrays have the types and shapes of what is written to them.

    Parameters
    ----------
    specs
        The network's outputs.
    targets
        The arrays, by the names of some of these.
    buffers
        For each output an array like the one that an inference writes.

    Raises
    ------
    InputError
        When one has not.
    """
    for spec, buffer in zip(specs, buffers, strict=True):
        array = targets.get(spec.name)
        if array and (array.shape, np.dtype(array.dtype)) != (buffer.shape, buffer.dtype):
            raise InputError(
                f"output {spec.name!r}",
                f"was given as {array.dtype} {list(array.shape)}",
                f"The network writes {spec.dtype} {list(buffer.shape)}",
            )


def streams_of(arrays: Iterable[DeviceArray], given: int | None) -> set[int]:
    """Return the CUDA streams whose work so far comes before an inference on these arrays.

    Parameters
    ----------
    arrays
        The caller's arrays.
    given
        The stream that the caller orders the inference against, which is left out; if None,
        arrays that name no stream are taken to be in use on the default one.
    """
    streams = {array.stream for array in arrays}
    named = {stream for stream in streams if stream is not None}
    if given is None and None in streams:
        named.add(LEGACY_DEFAULT_STREAM)
    return named - {given}


def stand_in(array: DeviceArray) -> NDArray[Any]:
    """Return a NumPy array of the same type and shape, which takes no memory to speak of."""
    return _zeros(array.dtype, array.shape)


@lru_cache(maxsize=64)
def _zeros(dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.broadcast_to(np.zeros((), dtype), shape)
