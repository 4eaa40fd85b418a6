"""The figures of a result as comma-separated values: one line for each row."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from parnet_bench.results.cost_columns import costs_of
from parnet_bench.results.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_bench.results.cost_columns import RowCosts
    from parnet_bench.results.result import Result, Row
    from parnet_bench.results.summary import RowSummary
    from parnet_bench.stats.statistics import Interval


def csv_text(result: Result) -> str:
    """Return the figures of a result as CSV, as RFC 4180 has it, with a line of names first.

    Rows that have failed have a line with their reason and without figures. Units are in the
    names; figures that are not known are empty.
    """
    summaries = summarise(result)
    costs = costs_of(result, summaries)
    lines = [_measured(result, *parts) for parts in zip(result.rows, summaries, costs, strict=True)]
    names = list(lines[0])
    for row in result.failed:
        description = row.description
        lines.append(
            {
                "row": description.name,
                "network": description.network,
                "form": description.form,
                "target": description.target,
                "weights": description.provenance.weights,
                "failed": row.reason,
            }
        )
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _measured(result: Result, row: Row, summary: RowSummary, costs: RowCosts) -> Mapping[str, Any]:
    description, pipelined, split = row.description, summary.pipelined, summary.split
    figures: dict[str, Any] = {
        "row": description.name,
        "network": description.network,
        "form": description.form,
        "target": description.target,
        "weights": description.provenance.weights,
        "precision": description.precision,
        "batch": description.batch,
        "devices": description.devices,
        "threads": len(description.cores),
        "partial": result.partial,
        "failed": "",
        "settled": row.recording.settled,
        "processes": summary.processes,
        "rounds": summary.rounds,
        "samples": summary.samples,
        "min_ms": summary.min_ms,
        "median_ms": summary.median_ms,
        **_ends("median", summary.median_interval_ms, "_ms"),
        "mad_ms": summary.mad_ms,
        "max_ms": summary.max_ms,
    }
    for entry in summary.percentiles:
        figures[f"p{entry.percent:g}_ms"] = entry.value_ms
        figures[f"p{entry.percent:g}_tail_ms"] = entry.tail_ms
    figures |= {
        "samples_per_s": summary.samples_per_s,
        "in_flight": pipelined.in_flight if pipelined else None,
        "pipelined_samples_per_s": pipelined.samples_per_s if pipelined else None,
        "host_to_device_ms": split.host_to_device_ms if split else None,
        "compute_ms": split.compute_ms if split else None,
        "device_to_host_ms": split.device_to_host_ms if split else None,
        "enqueue_ms": split.enqueue_ms if split else None,
        "reference": summary.reference,
        "speedup": summary.speedup,
        **_ends("speedup", summary.speedup_interval),
        "parameters": costs.parameters,
        "flops": costs.flops,
        "depth": costs.depth,
        "weights_bytes": costs.weights_bytes,
        "graph_bytes": costs.graph_bytes,
        "engine_bytes": costs.engine_bytes,
        "load_ms": costs.load_ms,
        "peak_host_bytes": costs.peak_host_bytes,
        "peak_device_bytes": costs.peak_device_bytes,
        "j_per_inference": costs.j_per_inference,
        "flops_per_s": costs.achieved.flops_per_s,
        "flops_share": costs.achieved.flops_share,
        "bytes_per_s": costs.achieved.bytes_per_s,
        "bytes_share": costs.achieved.bytes_share,
    }
    return {name: "" if value is None else value for name, value in figures.items()}


def _ends(name: str, interval: Interval | None, unit: str = "") -> dict[str, float | None]:
    return {
        f"{name}_low{unit}": interval.low if interval else None,
        f"{name}_high{unit}": interval.high if interval else None,
    }
