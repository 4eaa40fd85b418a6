"""What a worker process runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_engines.cuda.boundary import Boundary  # noqa: TC001 - msgspec reads it

if TYPE_CHECKING:
    from parnet_bench.targets.rows import PlannedRow


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
    """

    bundle: str
    plan: str
    devices: str
    cores: tuple[int, ...]
    sizes: dict[str, int]
    lanes: int | None = None
    data_transfers: bool = True
    boundary: Boundary | None = None


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
    )
