"""What ``--plan`` stands for on given devices: a placement, or a program from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parnet_engines.bundle_costs import costs_for
from parnet_engines.check import CheckedProgram, checked
from parnet_engines.cost_table import WHOLE
from parnet_engines.devices import divide, parse_devices, usable_cores
from parnet_engines.links import Link
from parnet_engines.lowering import lower
from parnet_engines.placement import Assignment, Lane, Placement
from parnet_engines.plan_exact import search_exactly
from parnet_engines.plan_search import list_schedule
from parnet_engines.program import Run, decode
from parnet_engines.scenario import Instance, Scenario
from parnet_export.antichain import heaviest_antichain
from parnet_export.errors import CheckFailedError, InputError
from parnet_export.stream_graph import Segment, StreamGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parnet_engines.cost_table import CostTable
    from parnet_engines.devices import Device
    from parnet_export.bundle import Bundle

MEMORY = Link("memory", 2.0, 10.0)
"""A copy from one CPU device to another: one core reads and writes main memory."""

_REPLAN = "Make the plan again for this bundle and machine"


def whole_graph(bundle: Bundle) -> StreamGraph:
    """Return the stream graph in which the whole network is one segment, named `WHOLE`."""
    graph = bundle.stream_graph
    whole = Segment(WHOLE, graph.inputs, graph.outputs, bundle.manifest.whole_cost)
    return StreamGraph(graph.inputs, graph.outputs, (whole,))


def graph_of(bundle: Bundle, segments: Iterable[str]) -> StreamGraph:
    """Return the stream graph that segments belong to: the bundle's, or `whole_graph`."""
    return whole_graph(bundle) if set(segments) == {WHOLE} else bundle.stream_graph


def program_of(bundle: Bundle, placement: Placement) -> CheckedProgram:
    """Lower a placement of the bundle's segments, or of its whole graph, and prove it."""
    graph = graph_of(bundle, (assignment.segment for assignment in placement.assignments))
    return checked(lower(graph, placement), graph)


def place_whole(device: Device) -> Placement:
    """Place the whole graph on one lane with all cores of a device."""
    return Placement((Lane("lane0", device.name, device.cores),), (Assignment(WHOLE, "lane0"),))


def default_lanes(graph: StreamGraph, devices: Sequence[Device]) -> int:
    """Return how many lanes can be busy at once: no more than segments or cores allow."""
    width = len(heaviest_antichain(graph, {segment.name: 1 for segment in graph.segments}))
    cores = sum(len(device.cores) for device in devices)
    return max(len(devices), min(width, cores))


def place_streams(
    bundle: Bundle, lanes: Sequence[Lane], costs: CostTable | None = None
) -> Placement:
    """Place the bundle's segments on lanes for the least latency, as far as costs tell.

    Parameters
    ----------
    bundle
        The bundle.
    lanes
        The lanes, the origin first.
    costs
        What the segments take there; by default `parnet_engines.bundle_costs.costs_for`.

    Raises
    ------
    InputError
        When the file with the bundle's costs is damaged.
    """
    scenario = Scenario(bundle.stream_graph, costs or costs_for(bundle, lanes), MEMORY)
    instance = Instance.of(scenario, lanes)
    steps = list_schedule(instance)
    if len(instance.segment_names) <= 8:
        steps = list(search_exactly(instance, "latency", steps, 100000).steps)
    return Placement(
        tuple(lanes),
        tuple(
            Assignment(instance.segment_names[segment], lanes[lane].name) for segment, lane in steps
        ),
    )


def place_authors(graph: StreamGraph, devices: Sequence[Device]) -> Placement:
    """Place segments as ParNet's authors do (section 3.4): one stream on each device.

    A device runs its stream and recomputes all that leads to it, so that only streams'
    results are copied. The first device runs the rest. The streams of any network are the
    independent segments that hold the most work.

    Raises
    ------
    InputError
        When there are not as many devices as streams.
    """
    streams = heaviest_antichain(graph, {s.name: s.cost.flops for s in graph.segments})
    if len(streams) != len(devices):
        there = f"is {len(devices)}" if len(devices) == 1 else f"are {len(devices)}"
        raise InputError(
            "plan 'authors'",
            f"runs each of the network's {len(streams)} streams on a device of its own, "
            f"and there {there}",
            "Name as many devices, such as 'cpu:0,cpu:1,cpu:2', or use plan 'streams'",
        )
    lanes = divide(devices, len(devices))
    wanted_on: dict[str, list[str]] = {segment.name: [] for segment in graph.segments}
    for stream, lane in zip(streams, lanes, strict=True):
        for name in _leading_to(graph, stream):
            wanted_on[name].append(lane.name)
    return Placement(
        lanes,
        tuple(
            Assignment(segment.name, lane)
            for segment in graph.segments
            for lane in wanted_on[segment.name] or [lanes[0].name]
        ),
    )


def _leading_to(graph: StreamGraph, segment: str) -> set[str]:
    """Return a segment and all that it depends on."""
    found = {segment}
    for earlier in reversed(graph.segments):
        if earlier.name in found:
            found.update(graph.predecessors[earlier.name])
    return found


def read_program(path: Path, bundle: Bundle) -> CheckedProgram:
    """Read a program for a bundle from a JSON file, and prove it.

    Raises
    ------
    InputError
        When the file cannot be read, is no program, or needs other devices or cores than
        this machine has.
    CheckFailedError
        When the program has faults, or is not one of this bundle's segments.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "Give the path of a plan, or one of auto, whole, streams and authors"
        raise InputError(path, f"cannot be read ({reason})", remedy) from error
    program = decode(content, path)
    for lane in program.lanes:
        if lane.device.partition(":")[0] != "cpu":
            problem = f"uses {lane.device}, and this version runs on the CPU only"
            raise InputError(path, problem, _REPLAN)
        for core in lane.cores:
            if core not in usable_cores():
                raise InputError(path, f"uses core {core}, which this process cannot", _REPLAN)
    graph = graph_of(bundle, (s.segment for s in program.steps if isinstance(s, Run)))
    try:
        return checked(program, graph)
    except CheckFailedError as error:
        raise CheckFailedError(f"{path}: {error} {_REPLAN}.") from error


def choose_program(
    bundle: Bundle,
    devices: str,
    plan: str | Path,
    *,
    lanes: int | None = None,
    threads: int | None = None,
) -> CheckedProgram:
    """Return the program that the options of `Session.open` stand for.

    Raises
    ------
    InputError
        When an option cannot be used, or not with the others.
    CheckFailedError
        When the program in a file has faults, or is not one of this bundle.
    """
    if isinstance(plan, Path):
        return read_program(plan, bundle)
    available = parse_devices(devices, threads=threads)
    match plan:
        case "whole":
            if lanes not in {None, 1}:
                problem = "the whole graph runs on one lane"
                raise InputError(f"lanes {lanes}", problem, "Use plan 'streams', or no lanes")
            placement = place_whole(available[0])
        case "streams":
            count = default_lanes(bundle.stream_graph, available) if lanes is None else lanes
            placement = place_streams(bundle, divide(available, count))
        case "authors":
            if lanes not in {None, len(available)}:
                problem = "every device has one lane in the authors' layout"
                raise InputError(f"lanes {lanes}", problem, "Leave the number of lanes out")
            placement = place_authors(bundle.stream_graph, available)
        case "auto":
            from parnet_engines.auto_plan import decide  # it opens sessions, which plan

            placement = decide(bundle, available, lanes).chosen.placement
        case _:
            known = "auto, whole, streams, authors, or the path of a file"
            raise InputError(f"plan {plan!r}", "is unknown", f"Use {known}")
    return program_of(bundle, placement)
