"""What a worker process runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_engines.cuda.boundary import Boundary  # noqa: TC001 - msgspec reads it
from parnet_engines.cuda.devices import names_gpus

if TYPE_CHECKING:
    from parnet_bench.targets.planned_row import PlannedRow
    from parnet_engines.base_session import AnySession
    from parnet_export.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker runs.

    Parameters
    ----------
    bundle
        Path of a bundle; empty for an engine that does nothing, which measures the rest.
    plan
        How to run it: a name of a plan, or the path of a program.
    devices
        Where to run, as `parnet_engines.session.Session.open` takes it.
    cores
        Logical CPU cores that the process may use.
    sizes
        Sizes of the symbolic dimensions of the inputs.
    lanes
        How many segments may run at the same time; None leaves it to the plan.
    data_transfers
        Whether inferences on GPUs copy their inputs there and their outputs back.
    boundary
        How tensors between engines on GPUs lie in memory; None leaves it to the runtime.
    engine
        The runtime of the engines, as `parnet_engines.session.Session.open` takes it.
    """

    bundle: str
    plan: str
    devices: str
    cores: tuple[int, ...]
    sizes: dict[str, int]
    lanes: int | None = None
    data_transfers: bool = True
    boundary: Boundary | None = None
    engine: str = "auto"


def job_of(row: PlannedRow, *, data_transfers: bool = True) -> Job:
    """Return the job of a planned row.

    Parameters
    ----------
    row
        The row.
    data_transfers
        As of `Job`.
    """
    description = row.description
    return Job(
        bundle=str(row.bundle.path),
        plan=row.plan,
        devices=description.devices,
        cores=description.cores,
        sizes=row.sizes,
        lanes=description.lanes,
        data_transfers=data_transfers,
        boundary=description.boundary,
        engine=description.wanted_engine,
    )


def open_session(
    job: Job, bundle: Bundle | Path, *, in_flight: int | None = None, record: bool = False
) -> AnySession:
    """Open what a job runs.

    Parameters
    ----------
    job
        The job.
    bundle
        Its bundle.
    in_flight, record
        As for `parnet_engines.session.Session.open`.

    Raises
    ------
    ParnetError
        As `Session.open`.
    """
    from parnet_engines.session import PLANS, Session

    return Session.open(
        bundle,
        job.devices,
        plan=job.plan if job.plan in PLANS else Path(job.plan),
        engine=job.engine,
        lanes=job.lanes,
        threads=None if names_gpus(job.devices) else len(job.cores),
        in_flight=in_flight,
        record=record,
        boundary=job.boundary,
    )
