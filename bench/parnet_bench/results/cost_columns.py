"""What rows take besides time, as columns for tables, pages and files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench.machine.peaks import DEFAULT_PRECISION, achieved
from parnet_engines.cuda.devices import names_gpus
from parnet_export.console import format_bytes, format_count, format_ms, format_percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_bench.machine.peaks import Achieved, Peaks
    from parnet_bench.results.result import Result, Row
    from parnet_bench.results.summary import RowSummary

NONE = "-"


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What one row takes besides time; None where nobody has looked or nothing tells.

    Parameters
    ----------
    name
        The row's name.
    parameters, flops, depth
        Of the network; FLOPs of one sample.
    weights_bytes, graph_bytes, engine_bytes
        See `parnet_bench.machine.footprint.Footprint`.
    load_ms
        From a fresh process to the first result.
    peak_host_bytes, peak_device_bytes
        Most memory that the row's process and its GPUs held.
    j_per_inference
        Energy of one inference, of all that the counters count.
    achieved
        Operations and bytes per second, and their shares of the machine's most.
    """

    name: str
    parameters: int
    flops: int
    depth: int
    weights_bytes: int | None
    graph_bytes: int | None
    engine_bytes: int | None
    load_ms: float | None
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    j_per_inference: float | None
    achieved: Achieved


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure for people, with the share of a limit that it is, if it is one."""

    text: str
    share: float | None = None


HEADINGS = (
    "row",
    "parameters",
    "FLOPs",
    "depth",
    "weights",
    "graphs",
    "engines",
    "first result",
    "peak memory",
    "GPU memory",
    "energy",
    "FLOP/s",
    "of peak",
    "bytes/s",
    "of peak",
)


def costs_of(result: Result, summaries: Sequence[RowSummary]) -> tuple[RowCosts, ...]:
    """Return what each row takes besides time."""
    return tuple(
        _costs(row, summary, peaks_for(result, row))
        for row, summary in zip(result.rows, summaries, strict=True)
    )


def cells_of(costs: RowCosts) -> tuple[Cell, ...]:
    """Return the figures of `HEADINGS`, the row's name included."""
    reached = costs.achieved
    return (
        Cell(costs.name),
        Cell(format_count(costs.parameters)),
        Cell(format_count(costs.flops)),
        Cell(str(costs.depth)),
        _bytes(costs.weights_bytes),
        _bytes(costs.graph_bytes),
        _bytes(costs.engine_bytes),
        Cell(NONE if costs.load_ms is None else format_ms(costs.load_ms)),
        _bytes(costs.peak_host_bytes),
        _bytes(costs.peak_device_bytes),
        Cell(NONE if costs.j_per_inference is None else _energy(costs.j_per_inference)),
        Cell(format_count(reached.flops_per_s)),
        _share(reached.flops_share),
        _bytes(reached.bytes_per_s),
        _share(reached.bytes_share),
    )


def used_columns(rows: Sequence[Sequence[Cell]]) -> tuple[int, ...]:
    """Return the indices of the columns in which some row has a figure."""
    columns = range(len(rows[0]) if rows else 0)
    return tuple(index for index in columns if any(row[index].text != NONE for row in rows))


def remarks_on_costs(result: Result, costs: Sequence[RowCosts]) -> Iterator[str]:
    """Yield what a reader of the columns must know, one sentence each."""
    yield (
        "Depth is the longest chain of convolutions and matrix products; FLOPs are two for each "
        "multiply-accumulate of one sample."
    )
    for peaks in result.peaks:
        most = (
            "no peak of FLOP/s"
            if peaks.flops_per_s is None
            else f"{format_count(peaks.flops_per_s)}FLOP/s"
        )
        threads = "1 thread" if peaks.threads == 1 else f"{peaks.threads} threads"
        owner = f"GPU {peaks.devices}" if peaks.devices else threads
        yield (
            f"Peaks of {owner}: {most}, {format_bytes(peaks.copy_bytes_per_s)}/s "
            f"({peaks.how}, {peaks.precision}). Bytes per second count weights and every "
            "operator's tensors; what stays in caches, and algorithms that need fewer "
            "operations, can take a share beyond 100 %."
        )
    missing = dict.fromkeys(
        row.energy.missing for row in result.rows if row.energy and row.energy.missing
    )
    for reason in missing:
        yield f"No energy: {reason}."
    sources = dict.fromkeys(
        row.energy.source for row in result.rows if row.energy and row.energy.source
    )
    for source in sources:
        yield f"Energy is what {source} counted, other programs included."
    if any(cost.peak_device_bytes is not None for cost in costs):
        yield "GPU memory is what the row's process took beyond an empty CUDA context."
    if any(cost.load_ms is not None for cost in costs):
        yield "First result: from a process that has loaded nothing to the row's first output."


def _costs(row: Row, summary: RowSummary, peaks: Peaks | None) -> RowCosts:
    description, footprint = row.description, row.footprint
    traffic = footprint.weights_bytes + footprint.activation_bytes if footprint else None
    return RowCosts(
        name=description.name,
        parameters=description.parameters,
        flops=description.flops,
        depth=description.depth,
        weights_bytes=footprint.weights_bytes if footprint else None,
        graph_bytes=footprint.graph_bytes if footprint else None,
        engine_bytes=footprint.engine_bytes if footprint else None,
        load_ms=summary.load_ms,
        peak_host_bytes=footprint.peak_host_bytes if footprint else None,
        peak_device_bytes=footprint.peak_device_bytes if footprint else None,
        j_per_inference=row.energy.j_per_inference if row.energy else None,
        achieved=achieved(summary.median_ms, description.flops * description.batch, traffic, peaks),
    )


def _energy(joules: float) -> str:
    return f"{joules:.3g} J" if joules >= 1 else f"{1000 * joules:.3g} mJ"


def _bytes(size: float | None) -> Cell:
    return Cell(NONE if size is None else format_bytes(size))


def _share(share: float | None) -> Cell:
    if share is None:
        return Cell(NONE)
    return Cell(format_percent(share), min(100.0, round(100 * share, 1)))


def peaks_for(result: Result, row: Row) -> Peaks | None:
    """Return the peaks of the row's GPUs, or of as many threads as it had."""
    description = row.description
    if not names_gpus(description.devices):
        threads = len(description.cores)
        return next((p for p in result.peaks if not p.devices and p.threads == threads), None)
    wanted = (description.devices, description.precision or DEFAULT_PRECISION)
    return next((p for p in result.peaks if (p.devices, p.precision) == wanted), None)
