"""What ``--plan`` stands for on GPUs: a program for lanes that are CUDA streams."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from parnet_engines.clock import MonotonicClock
from parnet_engines.cuda.devices import is_gpu, lanes_on, ordinal_of, parse_gpus
from parnet_engines.planning.bundle_costs import gpu_costs_for
from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.layouts import place_authors, place_whole
from parnet_engines.planning.links import LINKS
from parnet_engines.planning.plan import plan_streams
from parnet_engines.planning.plan_file import read_plan
from parnet_engines.planning.rounds import run_rounds
from parnet_engines.planning.scenario import Scenario
from parnet_export.errors import InputError
from parnet_export.samples import make_samples
from parnet_export.splitting.antichain import parallel_width

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parnet_engines.planning.evaluate import Objective
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.open_program import OpenProgram
    from parnet_engines.schedule.placement import Placement
    from parnet_export.bundle import Bundle

_LINK = LINKS["pcie4"]
"""Between GPUs as long as nothing is measured."""

_BUDGET_S = 3.0


def choose_on_gpus(
    bundle: Bundle,
    devices: str,
    plan: str | Path,
    *,
    gpus: Sequence[str],
    open_program: OpenProgram,
    lanes: int | None = None,
    objective: Objective = "latency",
    in_flight: int | None = None,
) -> CheckedProgram:
    """Return the program that the options of `Session.open` stand for on GPUs.

    Parameters
    ----------
    bundle, devices, plan, lanes, objective, in_flight
        As for `Session.open`.
    gpus
        The names of this machine's GPUs, by ordinal: plans go by what was measured on such ones.
    open_program
        Opens the candidates of plan ``"auto"``, which are measured.

    Raises
    ------
    InputError
        When an option cannot be used, or not with the others.
    CheckFailedError
        When the program in a file has faults, or is not one of this bundle.
    """
    names = parse_gpus(devices)
    if in_flight is not None and in_flight < 1:
        raise InputError(f"in flight {in_flight}", "is less than one", "Use at least 1")
    if isinstance(plan, Path):
        return _read(plan, bundle, in_flight)
    overlapping = in_flight or (2 if objective == "throughput" else 1)
    used = {name: gpus[ordinal_of(name)] for name in names}
    if plan == "auto":
        offered = [_place(bundle, used, name, lanes, objective) for name in ("whole", "streams")]
        programs = [program_of(bundle, placement, overlapping) for placement in offered]
        return _quickest(bundle, programs, open_program)
    return program_of(bundle, _place(bundle, used, plan, lanes, objective), overlapping)


def _place(
    bundle: Bundle,
    gpus: Mapping[str, str],
    plan: str,
    lanes: int | None,
    objective: Objective,
) -> Placement:
    """Return the placement of a plan on devices, each with the name of its GPU."""
    graph, devices = bundle.stream_graph, tuple(gpus)
    width = parallel_width(graph)
    match plan:
        case "whole":
            return place_whole(lanes_on(devices[:1], 1)[0])
        case "authors":
            return place_authors(graph, lanes_on(devices, max(len(devices), lanes or width)))
        case "streams":
            offered = lanes_on(devices, max(len(devices), width) if lanes is None else lanes)
            scenario = Scenario(graph, gpu_costs_for(bundle, gpus.values(), len(offered)), _LINK)
            return plan_streams(scenario, offered, objective).placement
    known = "auto, whole, streams, authors, or the path of a file"
    raise InputError(f"plan {plan!r}", "is unknown", f"Use {known}")


def _read(path: Path, bundle: Bundle, in_flight: int | None) -> CheckedProgram:
    program = read_plan(
        path,
        bundle.stream_graph,
        whole=bundle.manifest.whole_cost,
        inferences_in_flight=in_flight,
    )
    for lane in program.program.lanes:
        if not is_gpu(lane.device):
            problem = f"has lane {lane.name!r} on {lane.device}, which is no GPU"
            raise InputError(path, problem, "Give a plan for GPUs, or use --devices cpu")
    return program


def _quickest(
    bundle: Bundle, programs: Sequence[CheckedProgram], open_program: OpenProgram
) -> CheckedProgram:
    """Measure programs in turns, and return the one of least median latency."""
    sample = next(iter(make_samples(bundle.stream_graph.inputs, random_samples=1)))
    latencies_ms = {}
    runners = [open_program(program) for program in programs]
    try:
        candidates = {
            str(number): lambda runner=runner: runner.run(sample.inputs)
            for number, runner in enumerate(runners)
        }
        latencies_ms = run_rounds(
            candidates,
            budget_s=_BUDGET_S,
            min_rounds=5,
            max_rounds=200,
            clock=MonotonicClock(),
            order=random.Random(0),  # noqa: S311 - an order of measurements, no secret
        )
    finally:
        for runner in runners:
            runner.__exit__(None, None, None)
    best = min(latencies_ms, key=lambda name: median(latencies_ms[name]))
    return programs[int(best)]
