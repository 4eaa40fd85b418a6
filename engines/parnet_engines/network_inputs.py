"""What a caller gives a network: an array for each input, checked once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_export.stream_graph import TensorSpec


def checked_inputs(
    specs: tuple[TensorSpec, ...], inputs: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Return the inputs in order.

    Raises
    ------
    InputError
        When one is missing, unknown, or not of the type and shape that the network takes.
    """
    names = {spec.name for spec in specs}
    if inputs.keys() != names:
        unknown, missing = sorted(set(inputs) - names), sorted(names - set(inputs))
        problem = "is not an input of the network" if unknown else "is missing"
        raise InputError(f"input {(unknown or missing)[0]!r}", problem, _takes(specs))
    sizes: dict[str, int] = {}
    arrays = []
    for spec in specs:
        array = np.asarray(inputs[spec.name])
        # Runtimes read the bytes as they are, so the byte order matters as well.
        fits = array.dtype.name == spec.dtype and array.dtype.isnative
        fits = fits and array.ndim == len(spec.shape)
        for expected, size in zip(spec.shape, array.shape, strict=False):
            known = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            fits = fits and size == known and size > 0
        if not fits:
            given = _describe("", array.dtype.newbyteorder("=").name, array.shape)
            given += "" if array.dtype.isnative else " in the other byte order"
            raise InputError(f"input {spec.name!r}", f"was given as{given}", _takes(specs))
        arrays.append(array)
    return arrays


def _takes(specs: Sequence[TensorSpec]) -> str:
    tensors = (_describe(spec.name, spec.dtype, spec.shape) for spec in specs)
    return f"The network takes {', '.join(tensors)}"


def _describe(name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"{name} {dtype} [{', '.join(map(str, shape))}]"
