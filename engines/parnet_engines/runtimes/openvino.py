"""Engines that run on the CPU by OpenVINO."""

from __future__ import annotations

import importlib
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_engines.engine import SegmentEngine
from parnet_engines.runtimes.kept_after_fork import keep_after_fork
from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_export.stream_graph import Segment

_MODULE = "openvino"
_INSTALL = "pip install 'parnet-export[openvino]'"


class OpenVinoEngine(SegmentEngine):
    """An ONNX file, run by OpenVINO on the CPU.

    An engine of one thread computes in the thread that runs it, and so on the core that
    thread is pinned to. Further threads come from one pool for the whole process, which
    OpenVINO neither lets anyone pin to given cores nor ever ends.

    Parameters
    ----------
    segment
        Name and tensors of what the file computes.
    path
        The ONNX file.
    threads
        Threads that share one operator, the calling thread included; by default one for
        each physical core.

    Raises
    ------
    MissingBackendError
        When OpenVINO is not installed.
    InputError
        When OpenVINO cannot load the file.
    """

    def __init__(self, segment: Segment, path: Path, *, threads: int | None = None) -> None:
        super().__init__(segment)
        self._openvino = _import_openvino()
        self._model: Any = _compile(self._openvino, path, threads)
        keep_after_fork(self._model)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs; see `Engine.run`.

        Raises
        ------
        ValueError
            When the engine is closed.
        """
        request = self._open_model().create_infer_request()
        feeds = {s.name: np.ascontiguousarray(inputs[s.name]) for s in self._segment.inputs}
        request.infer(feeds, share_inputs=True, share_outputs=True)
        return {
            spec.name: np.array(request.get_tensor(spec.name).data)
            for spec in self._segment.outputs
        }

    def bind(
        self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
    ) -> Callable[[], None]:
        """Fix the memory to work on; see `Engine.bind`.

        Raises
        ------
        ValueError
            When the engine is closed.
        """
        request = self._open_model().create_infer_request()
        specs = (*self.inputs, *self.outputs)
        arrays = (*inputs, *outputs)
        for spec, array in zip(specs, arrays, strict=True):
            request.set_tensor(spec.name, self._openvino.Tensor(array, shared_memory=True))
        keep_after_fork(request)
        return partial(_run_bound, request, arrays)

    def close(self) -> None:
        """Release the weights, as soon as no binding is left."""
        self._model = None

    def _open_model(self) -> Any:
        if self._model is None:
            raise ValueError(f"engine {self.name!r} is closed")
        return self._model


def _run_bound(request: Any, _kept_alive: tuple[NDArray[Any], ...]) -> None:
    # Otherwise the results would be copied into arrays for the caller.
    request.infer(share_outputs=True)


def _import_openvino() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        raise MissingBackendError(_MODULE, "Running on OpenVINO", _INSTALL) from error


@cache
def _core(openvino: Any) -> Any:
    """Return the one OpenVINO of this process, which is kept to its end.

    On processors with AMX, OpenVINO gives the thread that loads it a stack for signals, and
    unmaps that memory when its last object goes. Where that happens in another thread, the
    first one keeps the address, and its next signal, such as that of Ctrl-C, ends the process.
    """
    core = openvino.Core()
    keep_after_fork(core)
    return core


def _compile(openvino: Any, path: Path, threads: int | None) -> Any:
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # lanes pin themselves
        # Processors with bfloat16 arithmetic would otherwise use it for float32 graphs.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = _core(openvino)
        return core.compile_model(core.read_model(path), "CPU", options)
    except RuntimeError as error:  # all that OpenVINO raises
        reason = " ".join(str(error).split())
        raise InputError(
            path,
            f"cannot be loaded by OpenVINO ({reason})",
            "Upgrade openvino, or run the network with the engine onnxruntime",
        ) from error
