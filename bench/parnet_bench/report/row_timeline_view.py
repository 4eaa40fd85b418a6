"""The picture of a row's lanes for a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from parnet_engines.schedule import program_file, recording
from parnet_engines.timeline.analysis import analyse
from parnet_engines.timeline.picture import render_timeline_svg
from parnet_export.console import format_ms, format_percent, format_ratio

if TYPE_CHECKING:
    from parnet_bench.results.result import Row
    from parnet_engines.timeline.analysis import TimelineAnalysis

_NS_PER_MS = 1e6
_BETWEEN_TAGS = re.compile(r"\n\s*(?=<)")


@dataclass(frozen=True, slots=True)
class RowTimelineView:
    """One inference of a row on its lanes.

    Parameters
    ----------
    svg
        The picture.
    facts
        Overlap and critical path, in a line.
    is_open
        Whether the page shows it at once: it is dull with a single lane.
    """

    svg: str
    facts: str
    is_open: bool


def timeline_view(row: Row) -> RowTimelineView | None:
    """Return the picture of a row's recorded inference; None where there is none.

    Raises
    ------
    InputError
        When what the result holds of it is damaged.
    """
    if row.timeline is None:
        return None
    name = row.description.name
    ran = program_file.decode(msgspec.json.encode(row.timeline.program), name)
    happened = recording.decode(msgspec.json.encode(row.timeline.recording), name)
    analysis = analyse(ran, happened)
    facts = _facts(analysis) if len(ran.lanes) > 1 else _took(analysis) + " on one lane"
    svg = render_timeline_svg(ran, happened, analysis, name)
    return RowTimelineView(_BETWEEN_TAGS.sub("", svg), facts, is_open=len(ran.lanes) > 1)


def _facts(analysis: TimelineAnalysis) -> str:
    path = " > ".join(
        dict.fromkeys(p.span.label for p in analysis.critical_path if p.span.kind == "run")
    )
    return (
        f"{_took(analysis)}, lanes overlap {format_percent(analysis.overlap)} of the time, "
        f"{format_ratio(analysis.parallel_gain)} against one after another; critical path {path}"
    )


def _took(analysis: TimelineAnalysis) -> str:
    return format_ms(analysis.wall.total_ns / _NS_PER_MS)
