"""How tensors between two engines lie in memory: row by row, or in vectors of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from parnet_export.stream_graph import TensorSpec

Boundary = Literal["linear", "vector"]
"""``"linear"``: row by row. ``"vector"``: feature maps channels last, in vectors of 8."""

BOUNDARIES: tuple[Boundary, ...] = get_args(Boundary)
"""All that `Boundary` allows."""


def require_boundary(boundary: str | None, precision: str, subject: str) -> None:
    """Require that there is a boundary by this name, and for this precision.

    Parameters
    ----------
    boundary
        What was asked for; None if nothing was.
    precision
        Of the bundle.
    subject
        What messages call the option.

    Raises
    ------
    InputError
        When there is none.
    """
    if boundary is not None and boundary not in BOUNDARIES:
        raise InputError(f"{subject} {boundary!r}", "is unknown", f"Use {' or '.join(BOUNDARIES)}")
    if boundary == "vector" and precision != "fp16":
        problem = f"there are no channels-last vectors for {precision}"
        remedy = "Use linear, or split with --precision fp16"
        raise InputError(f"{subject} vector", problem, remedy)


def choose_layouts(
    tensors: Iterable[TensorSpec], boundary: Boundary, outside: Iterable[str]
) -> Mapping[str, TensorLayout]:
    """Return how each tensor of an engine lies in memory.

    Vectors are for feature maps of 16-bit types: TensorRT has channels-last vectors for no
    other type, and a tensor of one pixel for each channel gains nothing by them.

    Parameters
    ----------
    tensors
        What the engine reads and writes.
    boundary
        What is asked for between engines.
    outside
        Names of the network's inputs and outputs, which stay linear.
    """
    kept = set(outside)
    return {
        spec.name: TensorLayout.HWC8
        if boundary == "vector" and spec.name not in kept and _is_half_feature_map(spec)
        else TensorLayout.LINEAR
        for spec in tensors
    }


def _is_half_feature_map(spec: TensorSpec) -> bool:
    return spec.dtype == "float16" and len(spec.shape) == 4 and spec.shape[2:] != (1, 1)
