"""What ``--plan`` stands for on given devices: a program, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_engines.planning.auto_plan import decide
from parnet_engines.planning.bundle_costs import costs_for
from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.cost_table import device_kind
from parnet_engines.planning.devices import divide, parse_devices, usable_cores
from parnet_engines.planning.lane_sets import default_lanes, lane_sets
from parnet_engines.planning.links import MEMORY
from parnet_engines.planning.plan import default_in_flight, plan_authors, plan_whole, rank_streams
from parnet_engines.planning.plan_file import read_plan
from parnet_engines.planning.scenario import Scenario
from parnet_engines.schedule.placement import Lane
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.planning.decision import Decision
    from parnet_engines.planning.devices import Device
    from parnet_engines.planning.evaluate import Objective
    from parnet_engines.planning.plan import Plan
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.open_program import OpenProgram
    from parnet_engines.schedule.program import Program
    from parnet_export.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Choice:
    """A program, and why it is that one. `str` shows it.

    Parameters
    ----------
    program
        What a session is to run.
    plan
        What is predicted of it, with its lower bound; None for a program from a file, and
        for what measuring has decided.
    decision
        What was measured, if that is what decided.
    """

    program: CheckedProgram
    plan: Plan | None = None
    decision: Decision | None = None

    def __str__(self) -> str:
        if self.decision is not None:
            return str(self.decision)
        return str(self.plan) if self.plan is not None else "a plan from a file"


def choose(
    bundle: Bundle,
    devices: str,
    plan: str | Path,
    *,
    open_program: OpenProgram,
    lanes: int | None = None,
    threads: int | None = None,
    objective: Objective = "latency",
    in_flight: int | None = None,
) -> Choice:
    """Return what the options of `parnet_engines.session.Session.open` stand for.

    Parameters
    ----------
    bundle, devices, plan, lanes, threads, objective, in_flight
        As for `Session.open`.
    open_program
        Opens the candidates of plan ``"auto"``, which are measured.

    Raises
    ------
    InputError
        When an option cannot be used, or not with the others.
    CheckFailedError
        When the program in a file has faults, or is not one of this bundle.
    """
    if in_flight is not None and in_flight < 1:
        raise InputError(f"in flight {in_flight}", "is less than one", "Use at least 1")
    if isinstance(plan, Path):
        return Choice(_read(plan, bundle, in_flight))
    available = parse_devices(devices, threads=threads)
    match plan:
        case "whole":
            if lanes not in {None, 1}:
                problem = "the whole graph runs on one lane"
                raise InputError(f"lanes {lanes}", problem, "Use plan 'streams', or no lanes")
            first = Lane("lane0", available[0].name, available[0].cores)
            found = plan_whole(_scenario(bundle, [[first]]), first, objective)
        case "streams":
            found = _plan_streams(bundle, available, lanes, objective)
        case "authors":
            if lanes not in {None, len(available)}:
                problem = "every device has one lane in the authors' layout"
                raise InputError(f"lanes {lanes}", problem, "Leave the number of lanes out")
            places = divide(available, len(available))
            found = plan_authors(_scenario(bundle, [places]), places, objective)
        case "auto":
            decision = decide(
                bundle,
                available,
                lanes,
                objective=objective,
                in_flight=in_flight,
                open_program=open_program,
            )
            placement = decision.chosen.placement
            program = program_of(bundle, placement, decision.chosen.inferences_in_flight)
            return Choice(program, decision=decision)
        case _:
            known = "auto, whole, streams, authors, or the path of a file"
            raise InputError(f"plan {plan!r}", "is unknown", f"Use {known}")
    overlapping = in_flight or default_in_flight(objective, found.placement.lanes)
    return Choice(program_of(bundle, found.placement, overlapping), found)


def _plan_streams(
    bundle: Bundle, devices: Sequence[Device], lanes: int | None, objective: Objective
) -> Plan:
    """Plan for every division of the devices' cores, or those for which all is measured."""
    count = default_lanes(bundle.stream_graph, devices) if lanes is None else lanes
    offered = list(lane_sets(devices, count))
    measured = [s for s in offered if costs_for(bundle, [s]).is_measured]
    scenario = _scenario(bundle, measured or offered)
    return rank_streams(scenario, measured or offered, objective)[0]


def _scenario(bundle: Bundle, offered: Sequence[Sequence[Lane]]) -> Scenario:
    return Scenario(bundle.stream_graph, costs_for(bundle, offered), MEMORY)


def _read(path: Path, bundle: Bundle, in_flight: int | None) -> CheckedProgram:
    """Read a plan that this machine can run."""
    program = read_plan(
        path,
        bundle.stream_graph,
        whole=bundle.manifest.whole_cost,
        inferences_in_flight=in_flight,
    )
    _require_here(program.program, path)
    return program


def _require_here(program: Program, path: Path) -> None:
    """Refuse lanes that this machine does not have."""
    remedy = "Make the plan again for this network and machine"
    usable = usable_cores()
    for lane in program.lanes:
        if device_kind(lane.device) != "cpu":
            problem = f"uses {lane.device}, and the devices are CPU cores"
            raise InputError(path, problem, remedy)
        for core in lane.cores:
            if core not in usable:
                raise InputError(path, f"uses core {core}, which this process cannot", remedy)
