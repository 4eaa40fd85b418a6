"""What ``parnet-export verify --devices`` does: prove, compare by Polygraphy, show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from parnet_engines.proof.accuracy import LIMITS, Accuracy, require
from parnet_engines.proof.device_proof import prove_on_devices
from parnet_engines.proof.engine_verification import record_proof
from parnet_engines.session import Session
from parnet_export.console import printable
from parnet_export.errors import CheckFailedError
from parnet_export.samples import make_samples

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_engines.cuda.boundary import Boundary
    from parnet_engines.proof.polygraphy_results import Repeatable
    from parnet_export.bundle import Bundle


@dataclass(frozen=True, slots=True)
class DeviceVerification:
    """How well engines on devices agree with a float32 reference.

    Parameters
    ----------
    devices
        As they were asked for.
    engine
        The runtime that ran.
    rows
        As in `parnet_engines.proof.device_proof.DeviceProof`.
    polygraphy
        The comparison by Polygraphy and its files, if they were asked for.
    passed
        Whether all is within the limits.
    recorded
        Sidecars of engines in which the result is noted.
    problems
        Why it is not noted in others.
    """

    devices: str
    engine: str
    rows: tuple[Accuracy, ...]
    polygraphy: Repeatable | None
    passed: bool
    recorded: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def require(self) -> None:
        """Raise unless all is within the limits.

        Raises
        ------
        CheckFailedError
            Names what is not.
        """
        consequence = f"Engines on {self.devices} do not compute what the bundle says."
        require(self.rows, consequence)
        if not self.passed:
            raise CheckFailedError(f"Polygraphy finds outputs that disagree. {consequence}")


def verify_on(
    bundle: Bundle,
    devices: str,
    engine: str,
    *,
    samples: int,
    seed: int,
    save: Path | None,
    boundary: Boundary | None = None,
    max_aux_streams: int | None = None,
) -> DeviceVerification:
    """Compare engines on devices with a float32 reference, and note the result beside them.

    Parameters
    ----------
    bundle, devices, engine
        As for `Session.open`.
    samples, seed
        Random inputs besides the others, and their seed.
    save
        Where Polygraphy's files go; without it Polygraphy is not used.
    boundary, max_aux_streams
        As for `Session.open`.

    Raises
    ------
    InputError
        When devices or engine cannot be used.
    MissingBackendError
        When the engine's runtime, or Polygraphy, is not installed.
    """
    proof = prove_on_devices(
        bundle,
        devices,
        engine=engine,
        random_samples=samples,
        seed=seed,
        boundary=boundary,
        max_aux_streams=max_aux_streams,
    )
    recorded, problems = record_proof(bundle, proof)
    kept = None
    if save is not None:
        from parnet_engines.proof.polygraphy_results import compare_and_save

        batch = {size: 1 for spec in bundle.stream_graph.inputs for size in spec.shape}
        sizes = {name: one for name, one in batch.items() if isinstance(name, str)}
        made = make_samples(bundle.stream_graph.inputs, seed=seed, sizes=sizes)
        feeds = [sample.inputs for sample in made]
        with Session.open(
            bundle, devices, engine=engine, boundary=boundary, max_aux_streams=max_aux_streams
        ) as session:
            results = [session.run(feed) for feed in feeds]
        name = f"{proof.engine} on {devices}"
        limit = LIMITS[bundle.manifest.precision].relative_error
        kept = compare_and_save(bundle, feeds, results, save, name=name, limit=limit)
    passed = all(row.passed for row in proof.rows) and (kept is None or kept.passed)
    return DeviceVerification(devices, proof.engine, proof.rows, kept, passed, recorded, problems)


def table(found: DeviceVerification) -> Table:
    """Show one row for each segment, the split program and the whole engine."""
    notes = list(found.problems)
    if found.recorded:
        notes.insert(0, f"Noted in the sidecars of {len(found.recorded)} engines.")
    if found.polygraphy is not None:
        outcome = "agrees" if found.polygraphy.passed else "DISAGREES"
        notes.append(f"Polygraphy {outcome}. Repeat: {found.polygraphy.command}")
    shown = Table(
        title=printable(f"{found.engine} on {found.devices}, against float32"),
        caption=printable("\n".join(notes)),
    )
    shown.add_column("engine")
    for title in ("cosine", "relative error", "limit", "top-1"):
        shown.add_column(title, justify="right")
    shown.add_column("")
    for row in found.rows:
        shown.add_row(
            printable(row.subject),
            f"{row.cosine:.7f}",
            f"{row.relative_error:.1e}",
            f"{row.limits.relative_error:.0e}",
            "" if row.top1 is None else f"{row.top1:.0%}",
            "" if row.passed else printable(f"FAILED: {row.detail}"),
        )
    return shown
