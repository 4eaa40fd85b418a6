"""The peaks that rows are compared with: each set of cores or GPUs is probed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_bench.machine.peaks import DEFAULT_PRECISION, measure_peaks
from parnet_bench.measuring.gpu_peaks import measure_gpu_peaks
from parnet_engines.cuda.devices import names_gpus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_bench.machine.peaks import Peaks
    from parnet_bench.results.result import RowDescription


def measure_row_peaks(rows: Iterable[RowDescription]) -> tuple[Peaks, ...]:
    """Measure what the cores and the GPUs of some rows reach.

    Raises
    ------
    ParnetError
        When a probe fails.
    """
    rows = tuple(rows)
    cores = dict.fromkeys(row.cores for row in rows if not names_gpus(row.devices))
    gpus = dict.fromkeys(
        (row.devices, row.precision or DEFAULT_PRECISION) for row in rows if names_gpus(row.devices)
    )
    return (*map(measure_peaks, cores), *(measure_gpu_peaks(*one) for one in gpus))
