"""Comparing with Polygraphy, and files with which ``polygraphy run`` repeats the comparison."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_export.bundle import Bundle

    Tensors = Mapping[str, NDArray[Any]]

_INSTALL = "pip install 'parnet-export[gpu]'"
INPUTS_NAME = "inputs.json"
OUTPUTS_NAME = "outputs.json"


@dataclass(frozen=True, slots=True)
class Repeatable:
    """A comparison by Polygraphy.

    Parameters
    ----------
    passed
        Whether every output of every sample is within the limit.
    inputs, outputs
        The files that were written.
    command
        The command that repeats the comparison.
    """

    passed: bool
    inputs: str
    outputs: str
    command: str


def compare_and_save(
    bundle: Bundle,
    samples: Sequence[Tensors],
    results: Sequence[Tensors],
    folder: Path,
    *,
    name: str,
    limit: float,
) -> Repeatable:
    """Compare outputs with ONNX Runtime's on the whole graph, by Polygraphy, and save both.

    Parameters
    ----------
    bundle
        The bundle, whose whole graph Polygraphy's runner of ONNX Runtime runs on the CPU.
    samples, results
        Inputs, and the outputs that were computed from them elsewhere.
    folder
        Where `INPUTS_NAME` and `OUTPUTS_NAME` are written; it is made if need be.
    name
        Of what computed the results, such as ``"torch on cuda:0"``.
    limit
        Greatest absolute difference, as a share of the greatest value of the output.

    Raises
    ------
    MissingBackendError
        When Polygraphy is not installed.
    InputError
        When the folder cannot be written to.
    """
    comparator = _import("polygraphy.comparator")
    onnxruntime = _import("polygraphy.backend.onnxrt")
    json = _import("polygraphy.json")
    feeds = [dict(sample) for sample in samples]
    runner = onnxruntime.OnnxrtRunner(onnxruntime.SessionFromOnnx(str(bundle.whole_path)))
    quiet = _import("polygraphy.logger").G_LOGGER
    with quiet.verbosity(quiet.CRITICAL):
        run = comparator.Comparator.run([runner], data_loader=feeds)
    iterations = [
        comparator.IterationResult(dict(result), runner_name=name, runtime=0.0)
        for result in results
    ]
    run.append((name, iterations))
    scale = max(float(np.abs(a.astype(np.float64)).max()) for r in results for a in r.values())
    # Since 0.53 it is a class of its own.
    simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple
    with quiet.verbosity(quiet.CRITICAL):
        accuracy = comparator.Comparator.compare_accuracy(
            run, compare_func=simple(rtol=0.0, atol=limit * scale)
        )
    inputs, outputs = folder / INPUTS_NAME, folder / OUTPUTS_NAME
    own = comparator.RunResults()
    own.append((name, iterations))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet.verbosity(quiet.CRITICAL):
            json.save_json(feeds, str(inputs))
            own.save(str(outputs))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(folder, f"cannot be written to ({reason})", "Give a folder") from error
    command = (
        f"polygraphy run {bundle.whole_path} --onnxrt --load-inputs {inputs} "
        f"--load-outputs {outputs} --atol {limit * scale:.3g} --rtol 0"
    )
    return Repeatable(bool(accuracy), str(inputs), str(outputs), command)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "polygraphy":
            raise
        purpose = "Writing a comparison for Polygraphy"
        raise MissingBackendError("polygraphy", purpose, _INSTALL) from error
