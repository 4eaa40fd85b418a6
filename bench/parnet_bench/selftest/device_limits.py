"""What no engine of a network can be below on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench.selftest.failure import reason_of
from parnet_bench.selftest.path_figures import PathFigures, path_figures

if TYPE_CHECKING:
    from parnet_bench.machine.peaks import Peaks
    from parnet_export.bundle import Bundle

_MS_PER_S = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What no engine of a network can be below on this device.

    Parameters
    ----------
    network
        The network.
    weights_ms
        Reading every weight once at the measured bandwidth; None where it was not measured.
    compute_ms
        Its floating-point operations at the measured rate of a large matrix product; None
        where it was not measured.
    path
        What recordings say of its segments.
    """

    network: str
    weights_ms: float | None
    compute_ms: float | None
    path: PathFigures


def limits_of(name: str, bundle: Bundle, devices: str, engine: str, peaks: Peaks | None) -> Limits:
    """Return a network's limits, as far as they can be measured.

    Parameters
    ----------
    name
        The network.
    bundle
        Its bundle.
    devices, engine
        As for `path_figures`.
    peaks
        What the device can do at most; None where that is not known.
    """
    cost = bundle.manifest.whole_cost
    try:
        path = path_figures(bundle, devices, engine)
    except Exception as error:  # noqa: BLE001 - what was measured before must not be lost
        path = PathFigures(reason=reason_of(error))
    flops_per_s = peaks.flops_per_s if peaks else None
    return Limits(
        name,
        cost.weight_bytes / peaks.copy_bytes_per_s * _MS_PER_S if peaks else None,
        cost.flops / flops_per_s * _MS_PER_S if flops_per_s else None,
        path,
    )
