"""From a proof on devices to the sidecars of the engines that took part in it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from parnet_engines.tensorrt.engine_sidecar import Verification, record_verification
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_engines.proof.accuracy import Accuracy
    from parnet_engines.proof.device_proof import DeviceProof
    from parnet_export.bundle import Bundle


def record_proof(bundle: Bundle, proof: DeviceProof) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Note in each engine's sidecar what the proof has found about it.

    An engine outside the limits that was given what another one outside them had computed is
    left out: which of the two is wrong is not known.

    Parameters
    ----------
    bundle
        The bundle whose engines took part.
    proof
        What was found.

    Returns
    -------
    recorded, problems
        Paths of the sidecars that were written, and what kept others from being written.
    """
    rows = {row.subject: row for row in proof.rows}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    recorded, problems = [], []
    for engine in proof.engines:
        row = rows[engine.name]
        if not row.passed and not all(r.passed for r in _before(bundle, rows, engine.name)):
            continue
        try:
            record_verification(
                engine.path,
                Verification(
                    gpu=engine.gpu,
                    plan_sha256=engine.plan_sha256,
                    error=row.relative_error,
                    limit=row.limits.relative_error,
                    cosine=row.cosine,
                    least_cosine=row.limits.cosine,
                    samples=proof.samples,
                    when=when,
                    top1=row.top1,
                    least_top1=row.limits.top1,
                ),
            )
        except InputError as error:
            problems.append(str(error))
        else:
            recorded.append(str(engine.path))
    return tuple(recorded), tuple(problems)


def _before(bundle: Bundle, rows: dict[str, Accuracy], name: str) -> list[Accuracy]:
    """Return the rows of the segments that a segment reads from."""
    return [rows[other] for other in bundle.stream_graph.predecessors.get(name, ())]
