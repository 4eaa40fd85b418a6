"""What an engine is: one segment, or a whole network, made executable on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from parnet_export.stream_graph import Segment, TensorSpec


class Engine(Protocol):
    """A segment in executable form.

    Engines know nothing of each other, of lanes, or of threads other than their own.
    """

    @property
    def name(self) -> str:
        """The segment's name."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs, and return when they are complete.

        Parameters
        ----------
        inputs
            An array for each of `inputs`, of its type and shape; others are ignored.
            The caller does not change them meanwhile; the engine never does.

        Returns
        -------
        dict
            An array for each of `outputs`. Callers only read them.

        Notes
        -----
        Several threads may call this at the same time.
        """

    def close(self) -> None:
        """Release threads and memory. Closing twice does no harm; running afterwards does."""


class NullEngine:
    """An engine that computes nothing and takes no time, to measure what surrounds engines.

    Parameters
    ----------
    segment
        The segment whose interface it has.
    sizes
        Sizes of symbolic dimensions in its outputs, 1 where not given.
    """

    def __init__(self, segment: Segment, sizes: Mapping[str, int] | None = None) -> None:
        self._segment = segment
        self._zeros = {
            spec.name: np.zeros(spec.resolve(sizes), dtype=spec.dtype) for spec in segment.outputs
        }

    @property
    def name(self) -> str:
        """The segment's name."""
        return self._segment.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` takes."""
        return self._segment.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that `run` returns."""
        return self._segment.outputs

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:  # noqa: ARG002 - the protocol's signature
        """Return zeros, the same arrays every time."""
        return self._zeros

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
