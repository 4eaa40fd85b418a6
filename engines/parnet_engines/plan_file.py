"""Plans on disk: a placement as JSON, with what was predicted when it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from parnet_engines.cost_table import WHOLE
from parnet_engines.layouts import whole_scenario

# msgspec resolves the annotation of `_Placed` while the program runs.
from parnet_engines.placement import Placement  # noqa: TC001
from parnet_engines.plan import Plan, evaluate_placement
from parnet_export import files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_engines.evaluate import Objective, Prediction
    from parnet_engines.scenario import Scenario

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Placed:
    """What is read from a file: a placement, which somebody may have written by hand."""

    placement: Placement
    schema_version: int = SCHEMA_VERSION


def save_plan(path: Path, plan: Plan) -> None:
    """Write a plan as JSON, whole or not at all.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    prediction: Prediction = plan.prediction
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": plan.kind,
        "objective": plan.objective,
        "latency_ms": plan.latency_ms,
        "interval_ms": plan.interval_ms,
        "lower_bound_ms": plan.lower_bound_ms,
        "is_optimal": plan.is_optimal,
        "placement": plan.placement,
        "timeline": prediction.spans,
        "critical_path": [span.name for span in prediction.critical_path],
    }
    files.write_bytes(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def load_plan(path: Path, scenario: Scenario, objective: Objective = "latency") -> Plan:
    """Read a placement and predict what it takes.

    Only the placement counts: times in the file are those of when it was written.

    Parameters
    ----------
    path
        A JSON file, such as `save_plan` writes. An object with ``placement`` is enough,
        which has ``lanes`` (``name``, ``device``, ``cores``) and ``assignments``
        (``segment``, ``lane``) in issue order.
    scenario
        The stream graph that is placed, its costs and link.
    objective
        What the plan is compared by.

    Raises
    ------
    InputError
        When the file cannot be read, is no plan, or is not one of this stream graph, or
        when the cost table lacks a segment on one of its lanes.
    """
    again = "Make the plan again for this network, or choose auto, whole, streams or authors"
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", again) from error
    try:
        placed = msgspec.json.decode(content, type=_Placed)
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(path, f"is no plan ({error})", again) from error
    if placed.schema_version > SCHEMA_VERSION:
        raise InputError(
            path,
            f"has schema version {placed.schema_version}; this version reads up to "
            f"{SCHEMA_VERSION}",
            "Upgrade parnet-export",
        )
    names = {segment.name for segment in scenario.graph.segments}
    if WHOLE not in names and {a.segment for a in placed.placement.assignments} == {WHOLE}:
        scenario = whole_scenario(scenario)
    try:
        return evaluate_placement("file", scenario, placed.placement, objective)
    except ValueError as error:
        raise InputError(path, f"does not fit the network: {error}", again) from error
