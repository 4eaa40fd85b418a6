"""ONNX Runtime as an optional backend: import it, open a graph, know its failures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MODULE = "onnxruntime"
_INSTALL = "pip install 'parnet-export[cpu]'"
# ONNX Runtime's severity of log lines, 0 (verbose) to 4: its errors reach people as ours.
_FATAL_ONLY = 4

_FAILURES = (
    "EPFail",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)


def import_onnxruntime(purpose: str) -> Any:
    """Return the module ``onnxruntime``.

    Parameters
    ----------
    purpose
        What it is needed for, as a noun phrase that starts a sentence.

    Raises
    ------
    MissingBackendError
        When it is not installed. One that is installed and broken raises what it raises.
    """
    try:
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        raise MissingBackendError(_MODULE, purpose, _INSTALL) from error


def runtime_failures() -> tuple[type[Exception], ...]:
    """Return the exceptions by which ONNX Runtime refuses a graph or an input.

    They have no common base class of their own. ONNX Runtime must be installed.
    """
    state = importlib.import_module(f"{_MODULE}.capi.onnxruntime_pybind11_state")
    return tuple(getattr(state, name) for name in _FAILURES if hasattr(state, name))


def open_session(
    path: Path,
    *,
    purpose: str,
    threads: int | None = None,
    cores: Sequence[int] = (),
    optimize: bool = True,
) -> Any:
    """Open an ONNX graph on the CPU.

    Threads that wait for work sleep instead of spinning: sessions that run side
    by side on the same cores slow each other twofold otherwise.

    Parameters
    ----------
    path
        The ONNX file.
    purpose
        What ONNX Runtime is needed for, as a noun phrase that starts a sentence.
    threads
        Threads that share one operator, the calling thread included; by default one
        for each physical core.
    cores
        CPU cores to pin the threads to, one for each thread, which sets `threads`. The
        first belongs to the thread that calls ``run``, which pins itself.
    optimize
        Whether operators may be fused and laid out anew.

    Returns
    -------
    onnxruntime.InferenceSession

    Raises
    ------
    MissingBackendError
        When ONNX Runtime is not installed.
    InputError
        When ONNX Runtime cannot load the graph.
    """
    onnxruntime = import_onnxruntime(purpose)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = len(cores) or threads or 0
    if len(cores) > 1:
        # ONNX Runtime counts processors from 1 and starts one thread less than it uses.
        affinities = ";".join(str(core + 1) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except runtime_failures() as error:
        raise InputError(
            path,
            f"cannot be loaded by ONNX Runtime ({error})",
            "Upgrade onnxruntime, or export the network with an older ONNX opset",
        ) from error
