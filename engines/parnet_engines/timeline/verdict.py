"""Whether the lanes of a recording overlap, and if they hardly do, why: in one sentence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import device_kind
from parnet_export.console import format_ms, format_percent, format_ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parnet_engines.schedule.placement import Lane

LEAST_OVERLAP = 0.25
"""Lanes that are at work together for a smaller part of the time hardly overlap."""

LEAST_GAIN = 1.1
"""Overlap that makes the segments less than this much faster is hardly worth lanes."""

_NS_PER_MS = 1e6


class VerdictKind(StrEnum):
    """What the lanes of a recording do, or what keeps them from it."""

    OVERLAP = "lanes overlap"
    ONE_LANE = "there is one lane"
    CHAIN = "there is no parallel work"
    DOMINANT = "one stream dominates"
    COPIES = "copies dominate"
    SHARED_CORES = "lanes share cores"
    FULL_DEVICE = "the device is already full"
    HAND_OVER = "handing over dominates"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether lanes overlap, or what mostly keeps them from it.

    Parameters
    ----------
    kind
        The verdict.
    sentence
        What was found, with figures, as one sentence for people.
    """

    kind: VerdictKind
    sentence: str

    @property
    def remedy(self) -> str:
        """What to do about it, as one sentence; empty where lanes overlap."""
        return _REMEDIES[self.kind]


_REMEDIES = {
    VerdictKind.OVERLAP: "",
    VerdictKind.ONE_LANE: "Use several lanes, or let plan auto measure whether they pay.",
    VerdictKind.CHAIN: "Run the whole graph as one engine, with all cores or the whole device.",
    VerdictKind.DOMINANT: "Give its lane more cores, or divide the network's work more evenly.",
    VerdictKind.COPIES: "Use a faster link or fewer devices, or recompute what is cheap.",
    VerdictKind.SHARED_CORES: "Give every lane cores of its own.",
    VerdictKind.FULL_DEVICE: "Use more devices or fewer lanes, or run the whole graph as one.",
    VerdictKind.HAND_OVER: (
        "Use fewer lanes, or the whole graph as one engine; and leave the lanes' cores to them."
    ),
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict rests on. Times are nanoseconds of the recording's time.

    Parameters
    ----------
    lanes
        The lanes that worked.
    has_parallel_work
        Whether any two segments could run at the same time, as far as tensors go.
    total_ns
        From the first begin to the last end.
    overlap
        Time with two or more lanes at work / time with any.
    parallel_gain
        Time that the same work takes one after another / `total_ns`.
    slowdown
        Time that the runs took / time that they take alone; None if that is not known.
    slowed_ns
        What the runs on the critical path took longer than they do alone.
    alone_ns
        For each segment how long it ran by itself while another one could have run.
    serial_ns
        Time in which only segments ran that no other one can run beside.
    copying_ns
        Copies on the critical path.
    idle_ns
        Time in which no lane worked.
    """

    lanes: Sequence[Lane]
    has_parallel_work: bool
    total_ns: int
    overlap: float
    parallel_gain: float
    slowdown: float | None
    slowed_ns: int
    alone_ns: Mapping[str, int]
    serial_ns: int
    copying_ns: int
    idle_ns: int


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict; of several reasons, the one that costs the most time."""
    if len(evidence.lanes) == 1:
        sentence = f"All steps are on {evidence.lanes[0].name}, so nothing can overlap."
        return Verdict(VerdictKind.ONE_LANE, sentence)
    if not evidence.has_parallel_work:
        sentence = "Every segment waits for the one before, so lanes can only take turns."
        return Verdict(VerdictKind.CHAIN, sentence)
    shared = _shared_cores(evidence.lanes)
    if shared and evidence.slowdown is None:
        sentence = (
            f"{' and '.join(shared)} are pinned to the same cores and only take turns on them."
        )
        return Verdict(VerdictKind.SHARED_CORES, sentence)
    if evidence.overlap >= LEAST_OVERLAP and evidence.parallel_gain >= LEAST_GAIN:
        sentence = (
            f"Two or more lanes are at work for {format_percent(evidence.overlap)} of the "
            f"time, and do {format_ratio(evidence.parallel_gain)} the work of one."
        )
        return Verdict(VerdictKind.OVERLAP, sentence)
    losses = {
        VerdictKind.FULL_DEVICE: evidence.slowed_ns,
        VerdictKind.COPIES: evidence.copying_ns,
        VerdictKind.DOMINANT: sum(evidence.alone_ns.values()),
        VerdictKind.CHAIN: evidence.serial_ns,
        VerdictKind.HAND_OVER: evidence.idle_ns,
    }
    kind = max(losses, key=lambda reason: losses[reason])
    if kind is VerdictKind.FULL_DEVICE:
        return _slowed(evidence, shared)
    part = f"{_ms(losses[kind])} of {_ms(evidence.total_ns)}"
    return Verdict(kind, f"{_overlap(evidence)}: {_reason(kind, part, evidence)}.")


def _overlap(evidence: Evidence) -> str:
    if evidence.overlap >= LEAST_OVERLAP:
        return f"Lanes do only {format_ratio(evidence.parallel_gain)} the work of one"
    return f"Two or more lanes are at work for only {format_percent(evidence.overlap)} of the time"


def _reason(kind: VerdictKind, part: str, evidence: Evidence) -> str:
    match kind:
        case VerdictKind.COPIES:
            return f"copies are {part} on the critical path"
        case VerdictKind.DOMINANT:
            name, alone_ns = Counter(evidence.alone_ns).most_common(1)[0]
            return f"{name} runs for {_ms(alone_ns)} of {_ms(evidence.total_ns)} by itself"
        case VerdictKind.CHAIN:
            return f"for {part} only segments run that nothing can run beside"
        case _:
            return f"for {part} no lane works, since steps are handed from one to the next"


def _slowed(evidence: Evidence, shared: Sequence[str]) -> Verdict:
    slowdown = format_ratio(evidence.slowdown or 1.0)
    slower = f"Segments take {slowdown} as long in company as alone"
    if shared:
        sentence = f"{slower}: {' and '.join(shared)} share cores."
        return Verdict(VerdictKind.SHARED_CORES, sentence)
    devices = sorted({lane.device for lane in evidence.lanes})
    full = " and ".join(devices) + (" is" if len(devices) == 1 else " are")
    sentence = f"{slower}: {full} full already, so that lanes only share what there is."
    return Verdict(VerdictKind.FULL_DEVICE, sentence)


def _shared_cores(lanes: Sequence[Lane]) -> tuple[str, ...]:
    """Return the first two CPU lanes that are pinned to a common core."""
    cpu_lanes = [lane for lane in lanes if device_kind(lane.device) == "cpu"]
    for number, lane in enumerate(cpu_lanes):
        for other in cpu_lanes[:number]:
            if set(lane.cores) & set(other.cores):
                return other.name, lane.name
    return ()


def _ms(duration_ns: int) -> str:
    return format_ms(duration_ns / _NS_PER_MS)
