"""What a result says: percentiles, ratios and the network's costs, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.stats.statistics import (
    CONFIDENCE,
    Estimate,
    Interval,
    median_absolute_deviation,
    percentile,
    ratio_of_medians,
    samples_needed,
    typical_median,
)
from parnet_bench.stats.tail import tail_estimate, tail_samples_needed

if TYPE_CHECKING:
    import numpy.typing as npt

    from parnet_bench.results.result import ProcessRecording, Result, Row
    from parnet_bench.stats.statistics import Block

_NS_PER_MS = 1_000_000
_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class PercentileSummary:
    """One percentile of a row's latencies, one inference at a time.

    Parameters
    ----------
    percent
        Which one.
    value_ms, interval_ms
        The sample percentile over all processes, and its interval from order statistics,
        which takes samples for independent. None below `samples_needed` samples.
    samples_needed
        How many samples the interval takes.
    tail_ms
        MLPerf's early-stopping estimate: no less than the percentile, with 99 % confidence.
        None below `tail_samples_needed` samples.
    tail_samples_needed
        How many samples that takes.
    """

    percent: float
    value_ms: float | None
    interval_ms: Interval | None
    samples_needed: int
    tail_ms: float | None
    tail_samples_needed: int


@dataclass(frozen=True, slots=True)
class PipelinedSummary:
    """The figures of a row with several inferences in flight.

    Parameters
    ----------
    in_flight
        Inferences under way at the same time.
    samples
        How many inferences were recorded.
    median_ms
        From handing an inference over to having its outputs.
    samples_per_s
        Samples of the network per second, and the interval over processes.
    samples_per_s_interval
        None where there are too few processes.
    """

    in_flight: int
    samples: int
    median_ms: float
    samples_per_s: float
    samples_per_s_interval: Interval | None


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Medians of the parts of an inference; see `parnet_bench.results.result.SplitTimes`."""

    host_to_device_ms: float
    compute_ms: float
    device_to_host_ms: float
    enqueue_ms: float


@dataclass(frozen=True, slots=True)
class RowSummary:
    """The figures of one row.

    Parameters
    ----------
    name, network, form, batch
        As in the row's description.
    samples, rounds, processes
        How many runs were recorded one at a time, in how many rounds of how many processes.
    min_ms, mad_ms, max_ms
        Extremes, and median absolute deviation from the median, over all samples.
    median_ms, median_interval_ms
        Geometric mean of the processes' medians; see `parnet_bench.stats.statistics`.
    percentiles
        Those that the measurement asked for.
    samples_per_s
        Samples of the network per second at the median latency, one inference at a time.
    pipelined
        The same with several in flight; None where that was not measured.
    split
        Parts of an inference; None where the backend cannot tell.
    load_ms
        From starting a process to its first result, the median of the processes; None in
        old files.
    parameters, flops, depth
        As in the row's description.
    reference
        Name of the row that this one is compared with: the first one of its batch size.
    speedup, speedup_interval
        Median latency of the reference divided by this row's; no interval for the reference
        itself, and where there are too few processes and rounds.
    confidence
        Of all intervals.
    """

    name: str
    network: str
    form: str
    batch: int
    samples: int
    rounds: int
    processes: int
    min_ms: float
    median_ms: float
    median_interval_ms: Interval | None
    mad_ms: float
    max_ms: float
    percentiles: tuple[PercentileSummary, ...]
    samples_per_s: float
    pipelined: PipelinedSummary | None
    split: SplitSummary | None
    load_ms: float | None
    parameters: int
    flops: int
    depth: int
    reference: str
    speedup: float
    speedup_interval: Interval | None
    confidence: float


def summarise(result: Result) -> tuple[RowSummary, ...]:
    """Compute the figures of every row from the raw samples."""
    references = references_of(result)
    return tuple(
        _summarise(result, row, reference)
        for row, reference in zip(result.rows, references, strict=True)
    )


def references_of(result: Result) -> tuple[Row, ...]:
    """Return for each row the one it is compared with: the first one of its batch size."""
    first: dict[int, Row] = {}
    return tuple(first.setdefault(row.description.batch, row) for row in result.rows)


def blocks_of(row: Row) -> list[Block]:
    """Return what the bootstrap draws from: the rounds of each process."""
    return [process.rounds_ns for process in row.recording.processes]


def _summarise(result: Result, row: Row, reference: Row) -> RowSummary:
    description, recording, seed = row.description, row.recording, result.procedure.seed
    latencies_ms = np.asarray(recording.samples_ns) / _NS_PER_MS
    center = _in_ms(typical_median(blocks_of(row), seed=seed))
    speedup = Estimate(1.0, None)
    if row is not reference:
        speedup = ratio_of_medians(blocks_of(reference), blocks_of(row), seed=seed)
    loads = [p.load_ms for p in recording.processes if p.load_ms is not None]
    return RowSummary(
        name=description.name,
        network=description.network,
        form=description.form,
        batch=description.batch,
        samples=len(latencies_ms),
        rounds=len(recording.rounds_ns),
        processes=len(recording.processes),
        min_ms=float(latencies_ms.min()),
        median_ms=center.value,
        median_interval_ms=center.interval,
        mad_ms=median_absolute_deviation(latencies_ms),
        max_ms=float(latencies_ms.max()),
        percentiles=tuple(
            _percentile(latencies_ms, percent) for percent in result.procedure.percentiles
        ),
        samples_per_s=description.batch * 1000 / center.value,
        pipelined=_pipelined(row),
        split=_split(recording.processes),
        load_ms=float(np.median(loads)) if loads else None,
        parameters=description.parameters,
        flops=description.flops,
        depth=description.depth,
        reference=reference.description.name,
        speedup=speedup.value,
        speedup_interval=speedup.interval,
        confidence=CONFIDENCE,
    )


def _percentile(latencies_ms: npt.NDArray[np.float64], percent: float) -> PercentileSummary:
    estimate = percentile(latencies_ms, percent)
    return PercentileSummary(
        percent=percent,
        value_ms=estimate.value if estimate else None,
        interval_ms=estimate.interval if estimate else None,
        samples_needed=samples_needed(percent),
        tail_ms=tail_estimate(latencies_ms, percent),
        tail_samples_needed=tail_samples_needed(percent),
    )


def _pipelined(row: Row) -> PipelinedSummary | None:
    recorded = [p.pipelined for p in row.recording.processes if p.pipelined is not None]
    if not recorded:
        return None
    latencies_ms = np.concatenate([turn for p in recorded for turn in p.latencies_ns]) / _NS_PER_MS
    # The time per sample of each round; its typical median has the interval of its inverse.
    batch = row.description.batch
    seconds = [
        [
            [elapsed / (len(turn) * batch * _NS_PER_S)]
            for turn, elapsed in zip(p.latencies_ns, p.elapsed_ns, strict=True)
        ]
        for p in recorded
    ]
    per_sample = typical_median(seconds)
    interval = per_sample.interval
    return PipelinedSummary(
        in_flight=recorded[0].in_flight,
        samples=len(latencies_ms),
        median_ms=float(np.median(latencies_ms)),
        samples_per_s=1 / per_sample.value,
        samples_per_s_interval=Interval(1 / interval.high, 1 / interval.low) if interval else None,
    )


def _split(processes: tuple[ProcessRecording, ...]) -> SplitSummary | None:
    splits = [process.split for process in processes if process.split is not None]
    if not splits:
        return None

    def median_ms(part: str) -> float:
        return float(
            np.median(np.concatenate([turn for split in splits for turn in getattr(split, part)]))
            / _NS_PER_MS
        )

    return SplitSummary(
        host_to_device_ms=median_ms("host_to_device_ns"),
        compute_ms=median_ms("compute_ns"),
        device_to_host_ms=median_ms("device_to_host_ns"),
        enqueue_ms=median_ms("enqueue_ns"),
    )


def _in_ms(estimate: Estimate) -> Estimate:
    interval = estimate.interval
    return Estimate(
        estimate.value / _NS_PER_MS,
        Interval(interval.low / _NS_PER_MS, interval.high / _NS_PER_MS) if interval else None,
    )
