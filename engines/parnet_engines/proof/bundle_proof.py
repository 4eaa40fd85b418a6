"""Prove that a bundle, as a session runs it, computes what it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parnet_engines.session import Session
from parnet_export.errors import InputError
from parnet_export.samples import make_samples
from parnet_export.verify import SOURCE_LIMIT, SPLIT_LIMIT, Proof, compare_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.session import Plan
    from parnet_export.bundle import Bundle
    from parnet_export.network import Network
    from parnet_export.samples import Sample

    Tensors = dict[str, NDArray[Any]]


def prove_bundle(
    bundle: Bundle,
    *,
    source: Network | None = None,
    random_samples: int = 8,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> Proof:
    """Run a bundle split and whole, and its source, on random and adversarial inputs.

    Parameters
    ----------
    bundle
        An open bundle: opening it has compared schema and digests.
    source
        The network it was made from, not fused, to be run by torch in float32.
    random_samples, seed, sizes
        As `make_samples` takes them.

    Raises
    ------
    InputError
        When the source cannot run on the bundle's inputs at all.
    MissingBackendError
        When ONNX Runtime is not installed.
    """
    samples = list(
        make_samples(
            bundle.stream_graph.inputs,
            random_samples=random_samples,
            seed=seed,
            sizes=sizes,
        )
    )
    whole = _run_bundle(bundle, "whole", samples)
    split = _run_bundle(bundle, "streams", samples)
    precision = bundle.manifest.precision
    detections = bundle.manifest.provenance.detections
    limit = SPLIT_LIMIT[precision]
    checks = list(
        compare_outputs("split against whole", samples, split, whole, limit, detections=detections)
    )
    if source is not None:
        if detections is not None:
            from parnet_export.detector import is_detector, with_output

            if is_detector(source):
                source = with_output(source, detections)
        reference = _run_source(source, bundle, samples)
        limit = SOURCE_LIMIT[precision]
        for name, found in (("whole", whole), ("split", split)):
            against = f"{name} against source"
            checks += compare_outputs(
                against, samples, found, reference, limit, detections=detections
            )
    return Proof(str(bundle.path), tuple(checks))


def _run_bundle(bundle: Bundle, plan: Plan, samples: Sequence[Sample]) -> list[Tensors]:
    with Session.open(bundle, plan=plan) as session:
        return [session.run(sample.inputs) for sample in samples]


def _run_source(source: Network, bundle: Bundle, samples: Sequence[Sample]) -> list[Tensors]:
    import torch

    inputs = [spec.name for spec in bundle.stream_graph.inputs]
    outputs = [spec.name for spec in bundle.stream_graph.outputs]
    results = []
    for sample in samples:
        tensors = [torch.from_numpy(sample.inputs[name]) for name in inputs]
        try:
            with torch.inference_mode():
                found = source.module(*tensors)
        except (RuntimeError, TypeError) as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise InputError(
                source.provenance.source,
                f"cannot run on the bundle's input {shapes} ({error})",
                "Give the checkpoint that the bundle was made from",
            ) from error
        values = [found] if isinstance(found, torch.Tensor) else list(found)
        if len(values) != len(outputs):
            raise InputError(
                source.provenance.source,
                f"has {len(values)} outputs and the bundle {len(outputs)}",
                "Give the checkpoint that the bundle was made from",
            )
        results.append({name: value.numpy() for name, value in zip(outputs, values, strict=True)})
    return results
