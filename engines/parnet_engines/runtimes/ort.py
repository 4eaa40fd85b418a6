"""Engines that run on the CPU by ONNX Runtime."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from parnet_engines.engine import SegmentEngine
from parnet_engines.runtimes.kept_after_fork import keep_after_fork
from parnet_export.errors import InputError
from parnet_export.graphs.onnx_runtime import import_onnxruntime, runtime_failures

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_export.stream_graph import Segment

Spin = Literal["never", "in_runs", "always"]

_ERRORS_ONLY = 3  # ONNX Runtime's severity, from 0 (verbose) to 4 (fatal)


class OrtEngine(SegmentEngine):
    """An ONNX file, run by ONNX Runtime on the CPU.

    Parameters
    ----------
    segment
        Name and tensors of what the file computes.
    path
        The ONNX file.
    threads
        Threads that share one operator, the calling thread included; by default one
        for each physical core.
    cores
        CPU cores to pin the threads to, one for each thread, which sets `threads`. The
        first belongs to the thread that runs the engine, which pins itself.
    spin
        When threads that wait for work look for it for a while instead of sleeping, which
        is quicker but keeps their cores from others. ``"in_runs"``: between two operators,
        not between two runs. Engines that run side by side on the same cores slow each
        other twofold unless they never do.

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
        spin: Spin = "never",
    ) -> None:
        super().__init__(segment)
        self._output_names = [spec.name for spec in segment.outputs]
        self._session: Any = _open(path, threads=threads, cores=cores, spin=spin)
        keep_after_fork(self._session)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs; see `Engine.run`.

        Raises
        ------
        ValueError
            When the engine is closed.
        """
        session = self._open_session()
        feeds = {spec.name: inputs[spec.name] for spec in self._segment.inputs}
        values = session.run(self._output_names, feeds)
        return dict(zip(self._output_names, values, strict=True))

    def bind(
        self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
    ) -> Callable[[], None]:
        """Fix the memory to work on; see `Engine.bind`.

        Raises
        ------
        ValueError
            When the engine is closed.
        """
        session = self._open_session()
        binding = session.io_binding()
        for spec, array in zip(self.inputs, inputs, strict=True):
            binding.bind_input(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for spec, array in zip(self.outputs, outputs, strict=True):
            binding.bind_output(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return partial(_run_bound, session, binding, (*inputs, *outputs))

    def close(self) -> None:
        """Release the weights and ONNX Runtime's threads, as soon as no binding is left."""
        self._session = None

    def _open_session(self) -> Any:
        if self._session is None:
            raise ValueError(f"engine {self.name!r} is closed")
        return self._session


def _run_bound(session: Any, binding: Any, _kept_alive: tuple[NDArray[Any], ...]) -> None:
    session.run_with_iobinding(binding)


def _open(path: Path, *, threads: int | None, cores: Sequence[int], spin: Spin) -> Any:
    onnxruntime = import_onnxruntime("Running on the CPU")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = len(cores) or threads or 0
    if spin == "never":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif spin == "in_runs":
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if len(cores) > 1:
        # ONNX Runtime counts processors from 1 and starts one thread less than it uses.
        affinities = ";".join(str(core + 1) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except runtime_failures() as error:
        raise InputError(
            path,
            f"cannot be loaded by ONNX Runtime ({error})",
            "Upgrade onnxruntime, or export the network with an older ONNX opset",
        ) from error
