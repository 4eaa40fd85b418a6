"""A published table beside what this machine measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from parnet_bench.results.summary import RowSummary, summarise
from parnet_bench.stats.statistics import Estimate, Interval
from parnet_bench.targets.rows import plan_rows
from parnet_export.models.catalog import CATALOG

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_bench.results.published import Figures, Form, PublishedTable
    from parnet_bench.results.result import Result
    from parnet_bench.targets.planned_row import PlannedRow, Working
    from parnet_bench.targets.request import Request

_NOT_IN_CATALOGUE = "not in the catalogue"

_PAPER_DEVICES = 3
"""ParNet's authors run a stream on each of three devices (section 3.4)."""

_Key = tuple[str, "Form"]
"""A network of the catalogue and what is run of it: rows with the same key share a measurement."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a row.

    Parameters
    ----------
    name
        The row of the measurement.
    latency_ms, latency_interval_ms
        Median, one inference at a time, and its interval.
    samples_per_s
        At that latency.
    parameters, flops, depth
        Counted in the graph that ran.
    speedup
        Latency of the table's reference row divided by this row's; None where the reference
        was not measured.
    """

    name: str
    latency_ms: float
    latency_interval_ms: Interval | None
    samples_per_s: float
    parameters: int
    flops: int
    depth: int
    speedup: Estimate | None


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of a published table and what was measured of it.

    Parameters
    ----------
    label
        As printed.
    network
        The catalogue's name; empty where the catalogue has no such network.
    origin
        ``"official"`` or ``"reconstruction"``, as the catalogue says; empty without a network.
    published
        What the paper prints.
    published_speedup
        The published latency of the reference row divided by this row's, where both are.
    measured
        None where the row was not measured.
    missing
        Why not, one clause.
    note
        What a reader has to know about the row, one sentence.
    """

    label: str
    network: str
    origin: str
    published: Figures
    published_speedup: float | None
    measured: Measured | None
    missing: str
    note: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published table beside a measurement.

    Parameters
    ----------
    table, title
        The paper's number, and what the table is about.
    reference
        Label of the row that speed-ups refer to.
    hardware
        What the published latencies were measured on; empty where there are none.
    rows
        In the paper's order.
    caveats
        What is not reproduced, one sentence each without a full stop.
    """

    table: int
    title: str
    reference: str
    hardware: str
    rows: tuple[PaperRow, ...]
    caveats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PaperPlan:
    """The rows that will be measured for a table.

    Parameters
    ----------
    rows
        What to measure, the one of the table's reference row first.
    names
        For each label of the table that will be measured, the name of its row.
    missing
        For each other label, why it will not be measured.
    caveats
        What is run otherwise than in the paper.
    notes
        Of `plan_rows`.
    """

    rows: tuple[PlannedRow, ...]
    names: dict[str, str]
    missing: dict[str, str]
    caveats: tuple[str, ...]
    notes: tuple[str, ...]


def plan_paper(
    table: PublishedTable, request: Request, workspace: Path, working: Working
) -> PaperPlan:
    """Find or make the graphs that a table needs.

    Parameters
    ----------
    table
        The table.
    request
        Where and how to measure. Its targets, baselines and checkpoint do not count.
        Its plan is what runs where the paper ran a stream on each of several devices,
        unless there are as many devices as in the paper.
    workspace, working
        As for `plan_rows`.

    Raises
    ------
    InputError
        When the request cannot be met.
    """
    wanted = {row.label: (row.network, row.form) for row in table.rows if row.network in CATALOG}
    keys = dict.fromkeys(wanted.values())
    single = {network for network, form in keys if form == "whole"}
    several = [network for network, form in keys if form != "whole"]
    targets = tuple(dict.fromkeys(several)) or tuple(single)[:1]
    devices = request.devices.split(",")
    plan = "authors" if len(devices) == _PAPER_DEVICES else request.plan
    if not several:
        plan = "whole"
    planned, notes = plan_rows(
        replace(
            request,
            targets=targets,
            baselines=tuple(n for n, _ in keys if n in single and n not in targets),
            ckpt=None,
            plan=plan,
        ),
        workspace,
        working,
    )
    found: dict[_Key, PlannedRow] = {}
    for row in planned:
        # Of several rows of segments the last one uses all devices.
        found[row.description.target, _published_form(row)] = row
    reference = wanted.get(table.reference)
    rows = [found[key] for key in sorted(found, key=lambda key: key != reference) if key in keys]
    caveats = [_recast(plan, request.devices)] if any(f == "authors" for _, f in keys) else []
    return PaperPlan(
        tuple(rows),
        {label: found[key].description.name for label, key in wanted.items() if key in found},
        {
            row.label: _NOT_IN_CATALOGUE if row.label not in wanted else "has no parallel segments"
            for row in table.rows
            if wanted.get(row.label) not in found
        },
        tuple(caveat for caveat in caveats if caveat),
        notes,
    )


def _published_form(row: PlannedRow) -> Form:
    form = row.description.form
    return "authors" if form == "streams" else form


def _recast(plan: str, devices: str) -> str:
    """Say what runs here where the paper ran a stream on each of three devices."""
    if plan == "authors":
        return ""
    return (
        f"Rows that the paper ran on three devices, a stream on each, run here with plan "
        f"{plan!r} on {devices}"
    )


def compare_with_paper(table: PublishedTable, plan: PaperPlan, result: Result) -> Comparison:
    """Put a table and a measurement side by side.

    Parameters
    ----------
    table
        The table.
    plan
        Which rows were to be measured for it.
    result
        The measurement; rows may have failed.
    """
    summaries = {summary.name: summary for summary in summarise(result)}
    failed = {row.description.name: row.reason for row in result.failed}
    reference = plan.names.get(table.reference, "")
    published = {row.label: row.figures.latency_or_inverse_ms for row in table.rows}
    rows = []
    for row in table.rows:
        name = plan.names.get(row.label, "")
        summary = summaries.get(name)
        missing = plan.missing.get(row.label, "")
        if not missing and summary is None:
            missing = f"failed: {failed[name]}" if name in failed else "not reached"
        rows.append(
            PaperRow(
                row.label,
                row.network if row.network in CATALOG else "",
                CATALOG[row.network][1].origin if row.network in CATALOG else "",
                row.figures,
                _ratio(published[table.reference], published[row.label]),
                _measured(summary, reference) if summary else None,
                missing,
                row.note,
            )
        )
    return Comparison(
        table.number,
        table.title,
        table.reference,
        table.hardware,
        tuple(rows),
        (*table.caveats, *plan.caveats, *_resolution_caveats(table, plan)),
    )


def _ratio(reference_ms: float | None, latency_ms: float | None) -> float | None:
    return reference_ms / latency_ms if reference_ms and latency_ms else None


def _measured(summary: RowSummary, reference: str) -> Measured:
    speedup = Estimate(summary.speedup, summary.speedup_interval)
    return Measured(
        summary.name,
        summary.median_ms,
        summary.median_interval_ms,
        summary.samples_per_s,
        summary.parameters,
        summary.flops,
        summary.depth,
        # A reference that failed has left its place to another row.
        speedup if summary.reference == reference else None,
    )


def _resolution_caveats(table: PublishedTable, plan: PaperPlan) -> list[str]:
    """Say where images are not of the size that the catalogue gives the networks."""
    native = {CATALOG[row.network][1].resolution for row in table.rows if row.network in CATALOG}
    used = {
        tensor.resolve()[2]
        for row in plan.rows
        for tensor in row.description.inputs
        if len(tensor.shape) == 4
    }
    if used <= native:
        return []
    sizes = ", ".join(f"{size} x {size}" for size in sorted(used))
    return [f"Measured with images of {sizes}, not of {', '.join(map(str, sorted(native)))} pixels"]
