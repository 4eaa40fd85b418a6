"""The words around the charts: what was measured where, how, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.machine.activity import extremes
from parnet_bench.machine.state import heat_of
from parnet_bench.results.used_runtimes import used_runtimes, ways_of
from parnet_export.console import format_bytes, format_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_bench.machine.state import GpuState
    from parnet_bench.results.result import Result

_NS_PER_US = 1000
_STOPPED = {
    "target": "every interval was as narrow as asked for",
    "time": "the time was up before every interval was as narrow as asked for",
    "processes": "each process is precise, but processes differ by more than asked for",
    "rounds": "the rounds that were asked for are complete",
    "min-time": "every row had been measured for as long as asked for",
    "interrupted": "it was interrupted; what is shown is partial",
}


def lead_of(result: Result) -> str:
    """Return where and when it was measured, in one sentence."""
    environment = result.environment
    cores = sorted({len(row.description.cores) for row in result.rows})
    runtimes = (f"{name} {version}" for name, version in used_runtimes(result).items())
    shown = " or ".join(map(str, cores))
    return (
        f"{environment.cpu_model}, {shown} of {environment.logical_cores} cores, "
        f"{', '.join(runtimes) or 'an unknown runtime'}, {environment.created[:10]}."
    )


def facts_of(result: Result) -> Iterator[tuple[str, str]]:
    """Yield the method and the environment as pairs of name and value."""
    environment, rounds = result.environment, sum(map(len, result.orders))
    processes = len(result.orders)
    of = "1 process" if processes == 1 else f"{processes} processes"
    yield "measured", f"{environment.created}, {rounds} rounds in {of} of each row"
    order = "in random order, one after the other" if result.procedure.interleave else "row by row"
    yield "order", f"rows took turns {order}; seed {result.procedure.seed}"
    yield "stopped because", _STOPPED[result.stopped]
    if result.procedure.remarks:
        yield "latencies", " ".join(result.procedure.remarks)
    shapes = dict.fromkeys(
        f"{tensor.name} {format_shape(tensor.shape)} {tensor.dtype}"
        for row in result.rows
        for tensor in row.description.inputs
    )
    yield "inputs", ", ".join(shapes)
    yield "devices", ", ".join(dict.fromkeys(row.description.devices for row in result.rows))
    for index, way in enumerate(ways_of(result)):
        yield "run by" if index == 0 else "", way
    if result.overhead_ns:
        overhead_us = float(np.median(result.overhead_ns)) / _NS_PER_US
        yield "harness overhead", f"{overhead_us:.1f} us a sample, by an engine that does nothing"
    yield "processor", environment.cpu_model
    yield from _gpus(result)
    physical = environment.physical_cores
    counts = f"{environment.logical_cores} logical, {physical or 'unknown'} physical"
    yield "cores", f"{counts}; usable {', '.join(map(str, environment.affinity))}"
    yield "governor", ", ".join(environment.governors) or "not told"
    yield "load at start", ", ".join(f"{load:.2f}" for load in environment.load_average)
    available = format_bytes(environment.available_memory_bytes)
    yield "memory", f"{available} of {format_bytes(environment.memory_bytes)} free"
    yield "system", environment.system
    yield "Python", environment.python
    yield "libraries", ", ".join(f"{name} {v}" for name, v in environment.libraries.items())
    for index, note in enumerate(result.notes):
        yield "note" if index == 0 else "", note


def _gpus(result: Result) -> Iterator[tuple[str, str]]:
    """Yield each GPU with the lowest clock and the highest temperature that were noted."""
    seen: dict[int, GpuState] = {}
    for state in (gpu for activity in result.activities for gpu in activity.gpus):
        seen[state.index] = extremes(seen.get(state.index, state), state)
    for index, gpu in seen.items():
        clocks = f"{gpu.clock_mhz} of {gpu.max_clock_mhz} MHz at least" if gpu.clock_mhz else ""
        facts = (gpu.name, gpu.bus_id, f"driver {gpu.driver}", clocks, *heat_of(gpu))
        yield f"GPU {index}", ", ".join(filter(None, facts))
