"""What is wrong with a measurement, and what helps.

Findings are computed from what was recorded whenever a result is read, as all statistics
are, so that an old file profits from better tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from parnet_bench.machine.activity import disturbance
from parnet_bench.machine.state import heat_of
from parnet_bench.results.summary import blocks_of, summarise
from parnet_bench.stats.statistics import MIN_PROCESSES, MIN_ROUNDS
from parnet_bench.stats.steadiness import drift, modes, process_spread
from parnet_engines.cuda.devices import names_gpus

if TYPE_CHECKING:
    from parnet_bench.results.result import Result, Row
    from parnet_bench.results.summary import RowSummary
    from parnet_bench.stats.statistics import Interval

Kind = Literal[
    "failed",
    "partial",
    "unsettled",
    "imprecise",
    "few-processes",
    "few-samples",
    "drift",
    "bimodal",
    "processes-differ",
    "throttled",
    "steal",
    "neighbours",
    "load",
    "enqueue-bound",
    "transfer-bound",
    "overhead",
]

STEAL_SHARE = 0.01
"""Part of the processors' time that a host may give to others."""

OTHERS_SHARE = 0.05
"""Part of the processors' time that other processes may take."""

LOAD_PER_CORE = 0.5
"""Runnable processes per core when a measurement begins."""

THROTTLED_SHARE = 0.75
"""Clock of a board below which it counts as throttled, relative to its highest one."""

ENQUEUE_SHARE = 0.8
"""Time to enqueue, relative to the time to compute, from which the host is the limit."""

OVERHEAD_SHARE = 0.01
"""What the harness may add to a latency."""

_MEDIAN = 50


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a reader of the figures must know.

    Parameters
    ----------
    kind
        What sort of thing it is.
    row
        The row's name; None where it concerns all rows.
    sentence
        What was found, as one sentence.
    remedy
        The command, option or setting that helps, as one sentence.
    """

    kind: Kind
    row: str | None
    sentence: str
    remedy: str


def find(result: Result) -> tuple[Finding, ...]:
    """Return all findings, those about all rows first."""
    summaries = summarise(result)
    of_all = (finding for check in _CHECKS for finding in check(result, summaries))
    of_rows = (
        finding
        for row, summary in zip(result.rows, summaries, strict=True)
        for check in _ROW_CHECKS
        for finding in check(row, summary, result)
    )
    return (*of_all, *of_rows)


# --------------------------------------------------------------------------- of all rows


def _failed(result: Result, _: Sequence[RowSummary]) -> Iterator[Finding]:
    for row in result.failed:
        what = "could not be loaded" if row.stage == "load" else "failed while it ran"
        name = row.description.name
        where = f" in process {row.process + 1}" if row.process else ""
        sentence = f"{name} {what}{where}: {row.reason}"
        devices = row.description.devices
        where_to_run = f" --devices {devices}" if names_gpus(devices) else ""
        if row.description.wanted_engine != "auto":
            where_to_run += f" --engine {row.description.wanted_engine}"
        remedy = f"Try it alone: `parnet-bench latency {row.description.target}{where_to_run}`."
        yield Finding("failed", name, sentence, remedy)


def _partial(result: Result, _: Sequence[RowSummary]) -> Iterator[Finding]:
    if result.partial:
        rounds = sum(map(len, result.orders))
        yield Finding(
            "partial",
            None,
            f"Partial: interrupted after {rounds} rounds in {len(result.orders)} of "
            f"{result.procedure.processes} processes.",
            "Measure again, and let it end.",
        )


def _imprecise(result: Result, summaries: Sequence[RowSummary]) -> Iterator[Finding]:
    target, procedure = result.procedure.target_ci, result.procedure
    if result.stopped not in {"target", "time"}:
        return
    widths = {row.name: _widest(row) for row in summaries}
    wide = {name: width for name, width in widths.items() if width > target}
    if not wide:
        return
    worst = max(wide, key=lambda name: wide[name])
    within = f"only within {wide[worst]:.1%}" if math.isfinite(wide[worst]) else "has no interval"
    sentence = (
        f"Medians or ratios of {len(wide)} of {len(summaries)} rows are not known within "
        f"{target:.1%}: {worst} {within}."
    )
    if result.stopped == "time":
        remedy = f"Give it more time: --max-time {math.ceil(2 * procedure.max_time_s)}."
    else:
        remedy = f"Its processes differ: --processes {2 * procedure.processes}."
    yield Finding("imprecise", None, sentence, remedy)


def _few_processes(result: Result, _: Sequence[RowSummary]) -> Iterator[Finding]:
    count = len(result.orders)
    if count >= MIN_PROCESSES:
        return
    enough = min(map(len, result.orders)) >= MIN_ROUNDS
    said = "intervals say nothing about others" if enough else "there are no intervals"
    yield Finding(
        "few-processes",
        None,
        f"Everything was measured in {count} process{'es' if count > 1 else ''}, so that {said}.",
        "Use --processes 5.",
    )


def _load(result: Result, _: Sequence[RowSummary]) -> Iterator[Finding]:
    cores = result.environment.logical_cores or 1
    load = result.environment.load_average[0]
    if load > LOAD_PER_CORE * cores:
        yield Finding(
            "load",
            None,
            f"The machine was busy when this began (load {load:.1f} on {cores} cores).",
            "Wait for other programs to end, which `top` shows.",
        )


def _disturbed(result: Result, _: Sequence[RowSummary]) -> Iterator[Finding]:
    spans = [disturbance(before, after) for before, after in pairwise(result.activities)]
    steal = max((span.steal for span in spans), default=0.0)
    others = max((span.others for span in spans), default=0.0)
    if steal > STEAL_SHARE:
        yield Finding(
            "steal",
            None,
            f"The host of this virtual machine gave up to {steal:.0%} of its processor time to "
            "others.",
            "Use a machine or instance with dedicated cores.",
        )
    if others > OTHERS_SHARE:
        yield Finding(
            "neighbours",
            None,
            f"Other programs took up to {others:.0%} of the processors' time.",
            "Stop them, which `top` shows, or keep to quiet cores with --devices cpu:A-B.",
        )


def _throttled(result: Result, _: Sequence[RowSummary]) -> Iterator[Finding]:
    events = [activity.throttle_events for activity in result.activities]
    known = [count for count in events if count is not None]
    if known and known[-1] > known[0]:
        yield Finding(
            "throttled",
            None,
            f"The processor was too hot {known[-1] - known[0]} times and lowered its clock.",
            "Improve its cooling, or cap the clock: `cpupower frequency-set --max`.",
        )
    low: dict[tuple[str, str], str] = {}
    for gpu in (gpu for activity in result.activities for gpu in activity.gpus):
        board = f"GPU {gpu.index} ({gpu.name})", gpu.bus_id
        reached = f", at up to {' and '.join(heat_of(gpu))}" if heat_of(gpu) else ""
        if gpu.slowed_by:
            low[board] = f"was held down by {' and '.join(gpu.slowed_by)}{reached}"
        elif (
            gpu.clock_mhz
            and gpu.max_clock_mhz
            and gpu.clock_mhz < THROTTLED_SHARE * gpu.max_clock_mhz
        ):
            problem = f"ran at {gpu.clock_mhz} of {gpu.max_clock_mhz} MHz under load{reached}"
            low.setdefault(board, problem)
    for (name, bus_id), problem in low.items():
        # nvidia-smi counts boards otherwise than CUDA.
        which = f" --id={bus_id}" if bus_id else ""
        command = f"`sudo nvidia-smi{which} --lock-gpu-clocks=MIN,MAX`"
        remedy = f"Improve its cooling, or fix the clock lower: {command}."
        yield Finding("throttled", None, f"{name} {problem}.", remedy)


def _few_samples(result: Result, summaries: Sequence[RowSummary]) -> Iterator[Finding]:
    needed: dict[float, int] = {}
    lacking: list[RowSummary] = []
    for row in summaries:
        missing = [p for p in row.percentiles if p.percent > _MEDIAN and p.tail_ms is None]
        needed |= {p.percent: p.tail_samples_needed for p in missing}
        lacking += [row] if missing else []
    if not lacking:
        return
    takes = " and ".join(f"p{percent:g} takes {count}" for percent, count in needed.items())
    counts = sorted({row.samples for row in lacking})
    have = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    rows = "all rows" if len(lacking) == len(summaries) else ", ".join(r.name for r in lacking)
    most = max(needed.values())
    min_time_s = math.ceil(1.1 * most * max(row.median_ms for row in lacking) / 1000)
    max_time_s = math.ceil(1.2 * most / counts[0] * result.procedure.max_time_s)
    yield Finding(
        "few-samples",
        None,
        f"Tails need samples: {takes}, and {rows} have {have}.",
        f"Use --min-time {min_time_s} --max-time {max_time_s}.",
    )


_Check = Callable[["Result", Sequence["RowSummary"]], Iterator[Finding]]
_CHECKS: tuple[_Check, ...] = (
    _partial,
    _failed,
    _load,
    _disturbed,
    _throttled,
    _few_processes,
    _imprecise,
    _few_samples,
)


# --------------------------------------------------------------------------- of one row


def _fix_clocks(row: Row) -> str:
    """Return the command that fixes the clocks of a row's devices."""
    if names_gpus(row.description.devices):
        return "`sudo nvidia-smi --lock-gpu-clocks=MHZ`"
    return "`sudo cpupower frequency-set --governor performance`"


def _unsettled(row: Row, summary: RowSummary, result: Result) -> Iterator[Finding]:
    if not row.recording.settled:
        yield Finding(
            "unsettled",
            summary.name,
            f"{summary.name} had not become steady when its warm-up ended.",
            f"Give it more time: --max-time {math.ceil(2 * result.procedure.max_time_s)}.",
        )


def _drifting(row: Row, summary: RowSummary, _: Result) -> Iterator[Finding]:
    change = drift(blocks_of(row))
    if change is not None:
        verb = "rose" if change > 0 else "fell"
        yield Finding(
            "drift",
            summary.name,
            f"{summary.name}: the latency {verb} by {abs(change):.1%} while it was measured, so "
            "that its median holds for no moment.",
            f"Let the machine reach a steady temperature, and fix its clocks: {_fix_clocks(row)}.",
        )


def _bimodal(row: Row, summary: RowSummary, _: Result) -> Iterator[Finding]:
    found = modes(blocks_of(row))
    if found is not None:
        fast, slow = found.fast * summary.median_ms, found.slow * summary.median_ms
        yield Finding(
            "bimodal",
            summary.name,
            f"{summary.name} has two modes, {fast:.3g} and {slow:.3g} ms ({found.slow_share:.0%} "
            "of the runs are slow): the median may be typical of neither.",
            f"Fix the clocks: {_fix_clocks(row)}."
            if names_gpus(row.description.devices)
            else "Pin the row to cores of one kind with --devices cpu:A-B, and fix the clocks.",
        )


def _differing(row: Row, summary: RowSummary, result: Result) -> Iterator[Finding]:
    spread = process_spread(blocks_of(row))
    if spread is not None:
        yield Finding(
            "processes-differ",
            summary.name,
            f"{summary.name} differs by {spread:.1%} from one process to the next (standard "
            "deviation).",
            f"More processes narrow its intervals: --processes {2 * result.procedure.processes}.",
        )


def _enqueue_bound(_: Row, summary: RowSummary, __: Result) -> Iterator[Finding]:
    split = summary.split
    if split is None:
        return
    if split.enqueue_ms > ENQUEUE_SHARE * split.compute_ms:
        yield Finding(
            "enqueue-bound",
            summary.name,
            f"{summary.name}: handing the work out takes {split.enqueue_ms:.3g} ms, computing it "
            f"{split.compute_ms:.3g} ms: the host is the limit.",
            "Run it as a CUDA graph, or raise --batch.",
        )
    transfers_ms = split.host_to_device_ms + split.device_to_host_ms
    if transfers_ms >= split.compute_ms:
        yield Finding(
            "transfer-bound",
            summary.name,
            f"{summary.name}: transfers take {transfers_ms:.3g} ms, computing "
            f"{split.compute_ms:.3g} ms.",
            "Use larger batches with --batch, or keep inputs on the device.",
        )


def _overhead(_: Row, summary: RowSummary, result: Result) -> Iterator[Finding]:
    if not result.overhead_ns:
        return
    overhead_ms = float(np.median(result.overhead_ns)) / 1e6
    if overhead_ms > OVERHEAD_SHARE * summary.median_ms:
        yield Finding(
            "overhead",
            summary.name,
            f"{summary.name}: {overhead_ms / summary.median_ms:.1%} of the latency is what the "
            "harness and the session take by themselves.",
            "Raise --batch or --resolution.",
        )


_RowCheck = Callable[["Row", "RowSummary", "Result"], Iterator[Finding]]
_ROW_CHECKS: tuple[_RowCheck, ...] = (
    _unsettled,
    _drifting,
    _bimodal,
    _differing,
    _enqueue_bound,
    _overhead,
)


def _widest(row: RowSummary) -> float:
    """Return how far a row's intervals reach to one side, relative; infinite without one."""
    widths = [_reach(row.median_ms, row.median_interval_ms)]
    if row.reference != row.name:
        widths.append(_reach(row.speedup, row.speedup_interval))
    return max(widths)


def _reach(value: float, interval: Interval | None) -> float:
    if interval is None:
        return math.inf
    return max(interval.high - value, value - interval.low) / value
