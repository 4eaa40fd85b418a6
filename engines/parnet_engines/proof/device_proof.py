"""Prove that engines compute on a device what the bundle says, each for itself and together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parnet_engines.proof.accuracy import LIMITS, Accuracy, assess
from parnet_engines.runtimes.float32_reference import reference_tensors
from parnet_engines.session import Session
from parnet_engines.tensorrt.run import TensorRtEngine
from parnet_export.samples import make_samples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_engines.base_session import AnySession
    from parnet_engines.cuda.boundary import Boundary
    from parnet_export.bundle import Bundle

    Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ProvenEngine:
    """An engine that a build has stored, and that took part in a proof.

    Parameters
    ----------
    name
        Its segment, or the whole graph.
    path
        Its sidecar.
    plan_sha256
        Digest of the plan file that ran.
    gpu
        Name of the GPU that it ran on.
    """

    name: str
    path: Path
    plan_sha256: str
    gpu: str


@dataclass(frozen=True, slots=True)
class DeviceProof:
    """How well engines on devices agree with a float32 reference.

    Parameters
    ----------
    rows
        One for each segment as the split program runs it (the first that is outside the
        limits is where to look), then ``"split"`` and ``"whole"``.
    samples
        How many inputs were compared.
    engines
        Those that a build has stored; other runtimes make theirs when they load a graph.
    engine
        The runtime that ran; two if the segments and the whole graph had different ones.
    """

    rows: tuple[Accuracy, ...]
    samples: int
    engines: tuple[ProvenEngine, ...] = ()
    engine: str = ""


def prove_on_devices(
    bundle: Bundle,
    devices: str,
    *,
    engine: str = "auto",
    lanes: int | None = None,
    random_samples: int = 8,
    seed: int = 0,
    boundary: Boundary | None = None,
    max_aux_streams: int | None = None,
) -> DeviceProof:
    """Compare each segment, the split program and the whole engine with a float32 reference.

    Parameters
    ----------
    bundle
        The bundle.
    devices, engine, lanes, boundary, max_aux_streams
        As for `Session.open`.
    random_samples, seed
        As for `make_samples`.

    Raises
    ------
    InputError
        When the devices or the engine cannot be used, or there is no float32 reference.
    """
    made = make_samples(bundle.stream_graph.inputs, random_samples=random_samples, seed=seed)
    samples = [sample.inputs for sample in made]
    references = reference_tensors(bundle, samples)
    with Session.open(
        bundle,
        devices,
        plan="streams",
        engine=engine,
        lanes=lanes,
        boundary=boundary,
        max_aux_streams=max_aux_streams,
    ) as session:
        split = [session.inspect(sample) for sample in samples]
        engines, runtimes = _stored(session), [session.engine]
    with Session.open(
        bundle, devices, plan="whole", engine=engine, max_aux_streams=max_aux_streams
    ) as session:
        whole = [session.run(sample) for sample in samples]
        engines += _stored(session)
        runtimes.append(session.engine)
    rows = compare(bundle, references, split, whole)
    return DeviceProof(rows, len(samples), engines, " and ".join(dict.fromkeys(runtimes)))


def compare(
    bundle: Bundle,
    references: Sequence[Tensors],
    split: Sequence[Tensors],
    whole: Sequence[Tensors],
) -> tuple[Accuracy, ...]:
    """Compare tensors, one row for each segment and two for the network's outputs.

    Parameters
    ----------
    bundle
        The bundle.
    references, split, whole
        For each sample the tensors by name: all of them, and of `whole` the outputs.
    """
    limits = LIMITS[bundle.manifest.precision]
    graph = bundle.stream_graph
    outputs = [spec.name for spec in graph.outputs]
    rows: list[tuple[str, Sequence[Tensors], list[str]]] = [
        (segment.name, split, [spec.name for spec in segment.outputs]) for segment in graph.segments
    ]
    rows += [("split", split, outputs), ("whole", whole, outputs)]
    return tuple(
        assess(
            subject,
            [
                (name, found[name], reference[name])
                for found, reference in zip(results, references, strict=True)
                for name in names
            ],
            limits,
            classes=subject in {"split", "whole"},
        )
        for subject, results, names in rows
    )


def _stored(session: AnySession) -> tuple[ProvenEngine, ...]:
    return tuple(
        ProvenEngine(engine.name, engine.path, engine.sidecar.plan_sha256, engine.gpu.name)
        for engine in session.engines
        if isinstance(engine, TensorRtEngine)
    )
