"""Plans on disk: a placement as JSON, with what was predicted when it was made.

Where a plan's file is expected, that of a program does as well: it says besides which
copies and waits there are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.planning.evaluate import check_placement
from parnet_engines.planning.layouts import whole_graph
from parnet_engines.schedule.check import CheckedProgram, checked
from parnet_engines.schedule.lowering import lower

# msgspec resolves the annotation of `_Placed` while the program runs.
from parnet_engines.schedule.placement import Placement  # noqa: TC001
from parnet_engines.schedule.program import Run
from parnet_engines.schedule.program_file import decode
from parnet_export import files
from parnet_export.errors import CheckFailedError, InputError
from parnet_export.schema_version import require_readable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from parnet_engines.planning.plan import Plan
    from parnet_export.stream_graph import Cost, StreamGraph

SCHEMA_VERSION = 1

_REPLAN = "Make the plan again for this network and machine"


@dataclass(frozen=True, slots=True)
class _Placed:
    """What is read from a file: a placement, which somebody may have written by hand."""

    placement: Placement
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class _Header:
    """What tells the file of a plan from that of a program."""

    placement: object = None


def save_plan(path: Path, plan: Plan) -> None:
    """Write a plan as JSON, whole or not at all.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": plan.kind,
        "objective": plan.objective,
        "latency_ms": plan.latency_ms,
        "interval_ms": plan.interval_ms,
        "lower_bound_ms": plan.lower_bound_ms,
        "is_optimal": plan.is_optimal,
        "placement": plan.placement,
        "timeline": plan.prediction.spans,
        "critical_path": [span.name for span in plan.prediction.critical_path],
    }
    files.write_bytes(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def read_plan(
    path: Path,
    graph: StreamGraph,
    *,
    whole: Cost | None = None,
    inferences_in_flight: int | None = None,
) -> CheckedProgram:
    """Read a plan or a program from a JSON file, and prove it.

    Of a plan only the placement counts: times in the file are those of when it was written.

    Parameters
    ----------
    path
        A file such as `save_plan` or `parnet_engines.schedule.program_file.encode` writes.
        Of a plan an object with ``placement`` is enough, which has ``lanes`` (``name``,
        ``device``, ``cores``) and ``assignments`` (``segment``, ``lane``) in issue order.
    graph
        The network's stream graph. The file may also run the whole network as one.
    whole
        Cost of the whole network; by default the sum over the segments.
    inferences_in_flight
        How many inferences overlap; by default what a program says, and 1 for a plan.

    Raises
    ------
    InputError
        When the file cannot be read or holds no plan, or its placement is not one of this
        network.
    CheckFailedError
        When a program has faults, or is not one of this network.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "Give the path of a plan, or one of auto, whole, streams and authors"
        raise InputError(path, f"cannot be read ({reason})", remedy) from error
    placement = _decode_placement(content, path)
    if placement is None:
        program = decode(content, path)
        ran = (step.segment for step in program.steps if isinstance(step, Run))
        of_graph = _graph_of(ran, graph, whole)
        if inferences_in_flight is not None:
            program = replace(program, inferences_in_flight=inferences_in_flight)
    else:
        of_graph = _graph_of((a.segment for a in placement.assignments), graph, whole)
        try:
            check_placement(of_graph, placement)
        except ValueError as error:
            raise InputError(path, f"does not fit the network: {error}", _REPLAN) from error
        program = lower(of_graph, placement, inferences_in_flight or 1)
    try:
        return checked(program, of_graph)
    except CheckFailedError as error:
        raise CheckFailedError(f"{path}: {error} {_REPLAN}.") from error


def _decode_placement(content: bytes, path: Path) -> Placement | None:
    """Return the placement in the file of a plan, and None if it is no such file."""
    try:
        header = msgspec.json.decode(content, type=_Header)
    except msgspec.DecodeError:
        return None
    if header.placement is None:
        return None
    require_readable(content, SCHEMA_VERSION, path)
    try:
        return msgspec.json.decode(content, type=_Placed).placement
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(path, f"is no plan ({error})", _REPLAN) from error


def _graph_of(segments: Iterable[str], graph: StreamGraph, whole: Cost | None) -> StreamGraph:
    """Return the stream graph that segments belong to."""
    return whole_graph(graph, whole) if set(segments) == {WHOLE} else graph
