"""What an engine is: one segment, or a whole network, made executable on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
        """The tensors that the engine reads."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine produces."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs into new memory, and return when they are complete.

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

    def bind(
        self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
    ) -> Callable[[], None]:
        """Fix the memory that the engine works on, and return what then runs it.

        Parameters
        ----------
        inputs, outputs
            C-contiguous arrays in the order of the properties `inputs` and `outputs`,
            of their types and with all dimensions known. They stay where they are; the
            engine keeps them alive, and writes nothing but `outputs`.

        Returns
        -------
        Callable
            Computes the outputs from what the inputs hold when it is called, and returns
            when they are complete. It allocates no arrays, and other Python threads run
            meanwhile. Several bindings may run at the same time, each one in one thread.
        """

    def close(self) -> None:
        """Release threads and memory. Closing twice does no harm; running afterwards does."""


class SegmentEngine:
    """Name and tensors of an engine, which are those of the segment that it computes.

    Parameters
    ----------
    segment
        Name and tensors.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    @property
    def name(self) -> str:
        """The segment's name."""
        return self._segment.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine reads."""
        return self._segment.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the engine produces."""
        return self._segment.outputs


class NullEngine(SegmentEngine):
    """An engine that computes nothing and takes no time, to measure what surrounds engines.

    Parameters
    ----------
    segment
        The segment whose interface it has.
    sizes
        Sizes of symbolic dimensions in what `run` returns, 1 where not given.
    """

    def __init__(self, segment: Segment, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(segment)
        self._zeros = {
            spec.name: np.zeros(spec.resolve(sizes), dtype=spec.dtype) for spec in segment.outputs
        }

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:  # noqa: ARG002 - the protocol's signature
        """Return zeros, the same arrays every time."""
        return self._zeros

    def bind(
        self,
        inputs: Sequence[NDArray[Any]],  # noqa: ARG002 - the protocol's signature
        outputs: Sequence[NDArray[Any]],  # noqa: ARG002
    ) -> Callable[[], None]:
        """Return what does nothing; the outputs stay as they are."""
        return _do_nothing

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _do_nothing() -> None:
    pass
