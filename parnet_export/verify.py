"""Proofs that two forms of a network compute the same.

The metric is the largest absolute difference divided by the largest absolute
reference value. A proof is a value, one row for each check with its error and
its limit: for tables, for JSON, and for refusing to write what did not pass.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from parnet_export.detections.compare_detections import compared_detections
from parnet_export.errors import CheckFailedError, name_some
from parnet_export.graphs.onnx_runtime import open_session, runtime_failures
from parnet_export.samples import make_samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_export.bundle import Precision
    from parnet_export.detections.detection_form import DetectionOutput
    from parnet_export.samples import Sample
    from parnet_export.stream_graph import StreamGraph, TensorSpec

    Tensors = dict[str, NDArray[Any]]

SPLIT_LIMIT: dict[Precision, float] = {"fp32": 1e-6, "fp16": 1e-3}
"""Largest relative error of the segments against the whole graph.

In float32 both run the same operators in the same order; fused by the runtime, they
differ by up to 3e-7 (ParNet-S, 224 px). In half precision, ONNX Runtime's CPU kernels
compute in float32 and round where a graph ends, so a split rounds in more places (6e-5).
"""

SOURCE_LIMIT: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest relative error against the source network in torch, in float32.

ParNet-S at 224 px is off by 8e-7, and by 4e-4 in half precision.
"""

BOX_FACTOR = 10.0
"""How much larger the limits are for boxes than for the heads that they are decoded from.

A box's size is an anchor's times ``(2 sigmoid(x))**2``: an error of x counts twice, and x is
larger than what the error is compared with.
"""

_SPLIT_PURPOSE = "Proving the split (--no-verify skips it)"


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a proof.

    Parameters
    ----------
    name
        What was compared.
    inputs
        Kind of the inputs; empty where the check needs none.
    error
        Relative error, or how many things differ; infinite where nothing can be compared.
    limit
        Largest error that passes.
    detail
        What differs, for people.
    passed
        Whether the error is within the limit.
    """

    name: str
    inputs: str
    error: float
    limit: float
    detail: str = ""
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", self.error <= self.limit)


@dataclass(frozen=True, slots=True)
class Proof:
    """The checks that were made on one subject, such as a bundle."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether there is a check and every one passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def worst_error(self) -> float:
        """The largest error of all checks."""
        return max((check.error for check in self.checks), default=math.inf)

    def require(self, consequence: str) -> None:
        """Raise unless every check passed.

        Parameters
        ----------
        consequence
            What follows from a failure, as a sentence such as ``"Nothing was written."``.

        Raises
        ------
        CheckFailedError
            Names what failed, each with its worst inputs.
        """
        if self.passed:
            return
        failed = [check for check in self.checks if not check.passed]
        worst: dict[str, Check] = {}
        for check in failed:
            known = worst.setdefault(check.name, check)
            if check.error > known.error:
                worst[check.name] = check
        reasons = "; ".join(
            f"{name} ({', '.join(filter(None, (check.inputs, check.detail)))})"
            for name, check in worst.items()
        )
        raise CheckFailedError(
            f"{self.subject}: {len(failed)} of {len(self.checks)} checks failed: "
            f"{reasons}. {consequence}"
        )


def relative_error(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return max |actual - reference| / max |reference|.

    Infinite when the shapes differ, when a value of either is NaN or infinite, or
    when the reference is all zeros and `actual` is not. Zero for two empty arrays.
    """
    if actual.shape != reference.shape:
        return math.inf
    if actual.size == 0:
        return 0.0
    wide_actual = actual.astype(np.float64)
    wide_reference = reference.astype(np.float64)
    if not (np.isfinite(wide_actual).all() and np.isfinite(wide_reference).all()):
        return math.inf
    difference = float(np.abs(wide_actual - wide_reference).max())
    if difference == 0.0:
        return 0.0
    scale = float(np.abs(wide_reference).max())
    return difference / scale if scale else math.inf


def compare_outputs(
    name: str,
    samples: Sequence[Sample],
    actual: Sequence[Tensors],
    reference: Sequence[Tensors],
    limit: float,
    *,
    detections: DetectionOutput | None = None,
) -> tuple[Check, ...]:
    """Compare the outputs of two forms of a network, one check for each kind of sample.

    A sample on which the reference itself is not finite, as the logarithm of a
    negative input is not, passes when `actual` is not finite in the same places and
    agrees in the others. Each output must have a finite reference on some sample.

    Parameters
    ----------
    name
        What is compared with what, such as ``"split against whole"``.
    samples
        The inputs. Samples of the same name share a check, which reports the worst.
    actual, reference
        The outputs for each sample. Every output of the reference is compared.
    limit
        Largest relative error that passes.
    detections
        How a detector's outputs are to be read. Boxes have the limit times `BOX_FACTOR`;
        after suppression they are compared by `detections_error`.
    """
    if detections is not None and detections.form != "raw":
        limit *= BOX_FACTOR
    if detections is not None and detections.suppression is not None:
        compared = compared_detections(samples, actual, reference, detections.suppression, limit)
        return tuple(
            Check(name, kind, error, limit, "" if error <= limit else "other objects are found")
            for kind, error in compared.items()
        )
    errors: dict[str, float] = {}
    details: dict[str, str] = {}
    never_finite: set[str] = set().union(*reference)
    for sample, found, expected in zip(samples, actual, reference, strict=True):
        errors.setdefault(sample.name, 0.0)
        for output, value in expected.items():
            finite = np.isfinite(value.astype(np.float64))
            if finite.all():
                never_finite.discard(output)
            error = _masked_error(found[output], value, finite)
            if error > errors[sample.name]:
                errors[sample.name] = error
                details[sample.name] = _explain(output, found[output], value, error, limit)
    checks = [
        Check(name, kind, error, limit, details.get(kind, "")) for kind, error in errors.items()
    ]
    for output in sorted(never_finite):
        detail = f"{output!r} of the reference has NaN or infinite values"
        checks.append(Check(name, "all inputs", math.inf, limit, detail))
    return tuple(checks)


def _masked_error(
    actual: NDArray[Any], reference: NDArray[Any], finite: NDArray[np.bool_]
) -> float:
    if finite.all() or actual.shape != reference.shape:
        return relative_error(actual, reference)
    if not np.array_equal(actual[~finite], reference[~finite], equal_nan=True):
        return math.inf
    return relative_error(actual[finite], reference[finite])


def _explain(
    output: str, actual: NDArray[Any], reference: NDArray[Any], error: float, limit: float
) -> str:
    if error <= limit:
        return ""
    if actual.shape != reference.shape:
        return f"{output!r} has shape {actual.shape}, the reference {reference.shape}"
    if not np.isfinite(actual.astype(np.float64)).all():
        return f"{output!r} has NaN or infinite values"
    return f"{output!r} is off by {error:.2g}, the limit is {limit:.2g}"


def prove_split(
    graph: StreamGraph,
    whole: Path,
    segments: Mapping[str, Path],
    *,
    precision: Precision,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    detections: DetectionOutput | None = None,
) -> Proof:
    """Compare a whole graph with its segments, run one after another by ONNX Runtime.

    Both run without graph optimisations, so that they run the very same kernels; only
    one of them is loaded at a time.

    Parameters
    ----------
    graph
        How the segments connect, in the order in which they run.
    whole, segments
        The ONNX files.
    precision
        Chooses the limit.
    seed
        Seed of the random inputs.
    sizes
        Sizes of symbolic dimensions, as `make_samples` takes them.
    detections
        How a detector's outputs are to be read.

    Returns
    -------
    Proof
        That no operator was lost, added or changed, that the segments' tensors are
        those of the stream graph, and that the outputs agree on each kind of sample.

    Raises
    ------
    MissingBackendError
        When ONNX Runtime is not installed.
    CheckFailedError
        When ONNX Runtime cannot run one of the graphs.
    """
    protos = {name: onnx.load(path, load_external_data=False) for name, path in segments.items()}
    checks = [
        _check_operators(onnx.load(whole, load_external_data=False), list(protos.values())),
        _check_interfaces(graph, protos),
    ]
    if all(check.passed for check in checks):
        samples = list(make_samples(graph.inputs, seed=seed, sizes=sizes))
        names = [spec.name for spec in graph.outputs]
        expected = _run(whole, names, [sample.inputs for sample in samples])
        tensors: list[Tensors] = [dict(sample.inputs) for sample in samples]
        for segment in graph.segments:
            produced = [spec.name for spec in segment.outputs]
            for known, new in zip(
                tensors, _run(segments[segment.name], produced, tensors), strict=True
            ):
                known.update(new)
        checks.append(_check_shapes(graph, tensors))
        limit = SPLIT_LIMIT[precision]
        checks += compare_outputs(
            "split against whole", samples, tensors, expected, limit, detections=detections
        )
    return Proof("the split", tuple(checks))


def _run(path: Path, outputs: list[str], samples: Sequence[Tensors]) -> list[Tensors]:
    """Run one graph on all samples, of which it takes the tensors it has inputs for."""
    session = open_session(path, purpose=_SPLIT_PURPOSE, optimize=False)
    inputs = [argument.name for argument in session.get_inputs()]
    results = []
    for sample in samples:
        try:
            values = session.run(outputs, {name: sample[name] for name in inputs})
        except runtime_failures() as error:
            shapes = ", ".join(f"{name} {list(sample[name].shape)}" for name in inputs)
            raise CheckFailedError(
                f"{path.name}: ONNX Runtime cannot run this graph on {shapes} ({error}). If the "
                "graph has free dimensions that do not take every size, fix height and width with "
                "--resolution and others in the source, or skip the proof with --no-verify."
            ) from error
        results.append(dict(zip(outputs, values, strict=True)))
    return results


def _check_operators(whole: onnx.ModelProto, segments: Sequence[onnx.ModelProto]) -> Check:
    """Compare the multisets of operators with their attributes and tensor names."""
    expected = Counter(_operators(whole))
    found = Counter(operator for segment in segments for operator in _operators(segment))
    lost, added = expected - found, found - expected
    detail = ""
    if lost or added:
        detail = f"{lost.total()} operators of the whole graph are in no segment"
        detail += f", {added.total()} are in a segment only"
    return Check("operators kept", "", float(lost.total() + added.total()), 0.0, detail)


def _operators(model: onnx.ModelProto) -> Iterator[bytes]:
    for node in model.graph.node:
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        bare.ClearField("name")
        bare.ClearField("doc_string")
        bare.ClearField("metadata_props")
        yield bare.SerializeToString(deterministic=True)


def _check_interfaces(graph: StreamGraph, protos: Mapping[str, onnx.ModelProto]) -> Check:
    """Compare names, types and shapes of the segments' inputs and outputs with the graph's."""
    wrong = []
    for segment in graph.segments:
        proto = protos[segment.name].graph
        constant = {tensor.name for tensor in proto.initializer}
        inputs = [value for value in proto.input if value.name not in constant]
        for specs, values in ((segment.inputs, inputs), (segment.outputs, proto.output)):
            expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
            found = {value.name: _declared(value) for value in values}
            wrong += [
                f"{segment.name}/{name}"
                for name in sorted(expected.keys() | found.keys())
                if expected.get(name) != found.get(name)
            ]
    detail = f"differ from the stream graph: {name_some(wrong)}" if wrong else ""
    return Check("segment inputs and outputs", "", float(len(wrong)), 0.0, detail)


def _declared(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return dtype, tuple(
        size.dim_param if size.HasField("dim_param") else size.dim_value
        for size in tensor.shape.dim
    )


def _check_shapes(graph: StreamGraph, samples: Sequence[Tensors]) -> Check:
    """Compare the tensors that were computed with the types and shapes that are declared."""
    specs = {spec.name: spec for segment in graph.segments for spec in segment.outputs}
    wrong = {
        name: None
        for tensors in samples
        for name, spec in specs.items()
        if not _fits(tensors[name], spec)
    }
    detail = f"are not as declared: {name_some(list(wrong))}" if wrong else ""
    return Check("shapes of computed tensors", "", float(len(wrong)), 0.0, detail)


def _fits(tensor: NDArray[Any], spec: TensorSpec) -> bool:
    return (
        tensor.dtype.name == spec.dtype
        and tensor.ndim == len(spec.shape)
        and all(
            isinstance(expected, str) or found == expected
            for found, expected in zip(tensor.shape, spec.shape, strict=True)
        )
    )
