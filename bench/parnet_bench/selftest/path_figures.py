"""What recordings say of a network's segments: the critical path, and how lanes overlap."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from parnet_bench.selftest.resident_runs import resident_runs
from parnet_engines.session import Session
from parnet_engines.timeline.analysis import analyse

if TYPE_CHECKING:
    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Recording
    from parnet_export.bundle import Bundle

_WARM_UPS = 5
_RECORDED = 20


@dataclass(frozen=True, slots=True)
class PathFigures:
    """What a recording of one network says.

    Parameters
    ----------
    segments_ms
        The median latency of every segment when nothing runs beside it.
    critical_path_ms
        The longest chain of them: split streams cannot be faster.
    overlap
        Time with two or more lanes at work, by time with any, of the split program.
    verdict
        Whether lanes overlap, and if not, why.
    reason
        Why there is no recording, and nothing of all this; empty where there is one.
    """

    segments_ms: dict[str, float] = field(default_factory=dict)
    critical_path_ms: float = 0.0
    overlap: float = 0.0
    verdict: str = ""
    reason: str = ""


def path_figures(bundle: Bundle, devices: str, engine: str) -> PathFigures:
    """Record the split program on one lane and on several, and return what they say.

    Parameters
    ----------
    bundle
        The bundle.
    devices
        Where; only the first one is used.
    engine
        As for `Session.open`.

    Raises
    ------
    ParnetError
        When the split program cannot be run.
    """
    first = devices.split(",", maxsplit=1)[0]
    alone, _ = _record(bundle, first, engine, lanes=1)
    taken: dict[str, list[float]] = {}
    for span in alone.spans:
        if span.kind == "run":
            taken.setdefault(span.label, []).append(span.duration_ns / 1e6)
    segments_ms = {name: median(values) for name, values in taken.items()}
    together, program = _record(bundle, first, engine)
    found = [analyse(program, together.only(number)) for number in together.inferences]
    path = bundle.stream_graph.critical_path(segments_ms)
    return PathFigures(
        segments_ms,
        sum(segments_ms[name] for name in path),
        median(one.overlap for one in found),
        found[-1].verdict.sentence,
    )


def _record(
    bundle: Bundle, device: str, engine: str, lanes: int | None = None
) -> tuple[Recording, Program]:
    with Session.open(bundle, device, lanes=lanes, engine=engine, record=True) as session:
        run = resident_runs(session)
        for _ in range(_WARM_UPS):
            run()
        session.take_recording()
        for _ in range(_RECORDED):
            run()
        return session.take_recording(), session.program.program
