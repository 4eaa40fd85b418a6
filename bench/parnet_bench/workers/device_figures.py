"""What a row's process tells of its GPUs besides latencies."""

from __future__ import annotations

from dataclasses import dataclass

# msgspec reads the annotations of the dataclass at run time.
from parnet_bench.results.result import SplitTimes  # noqa: TC001


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """What one process of a row on GPUs has seen.

    Parameters
    ----------
    split
        Parts of inferences that were run for them.
    peak_device_bytes
        See `parnet_bench.machine.footprint.Footprint`.
    engine_bytes
        The files that its engines were loaded from; None where the runtime keeps none.
    engine, execution
        See `parnet_bench.results.result.Row`.
    """

    split: SplitTimes
    peak_device_bytes: int
    engine_bytes: int | None
    engine: str = ""
    execution: str = ""
