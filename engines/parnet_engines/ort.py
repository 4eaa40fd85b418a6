"""Engines that run on the CPU by ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parnet_export.onnx_runtime import open_session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_export.stream_graph import Segment, TensorSpec


class OrtEngine:
    """An ONNX file, run by ONNX Runtime on the CPU.

    Parameters
    ----------
    segment
        Name and tensors of what the file computes.
    path
        The ONNX file.
    threads
        Threads that share one operator, the calling thread included; by default one
        for each physical core. They sleep while they wait.
    cores
        CPU cores to pin the threads to, one for each thread, which sets `threads`. The
        first belongs to the thread that calls `run`, which pins itself.

    Raises
    ------
    MissingBackendError
        When ONNX Runtime is not installed.
    InputError
        When ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        segment: Segment,
        path: Path,
        *,
        threads: int | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        self._segment = segment
        self._output_names = [spec.name for spec in segment.outputs]
        self._session = open_session(
            path, purpose="Running on the CPU", threads=threads, cores=cores
        )

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

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs; see `Engine.run`. The interpreter lock is free meanwhile.

        Raises
        ------
        ValueError
            When the engine is closed.
        """
        if self._session is None:
            raise ValueError(f"engine {self.name!r} is closed")
        feeds = {spec.name: inputs[spec.name] for spec in self._segment.inputs}
        values = self._session.run(self._output_names, feeds)
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        """Release the weights and ONNX Runtime's threads."""
        self._session = None
