"""Measuring costs: what each segment of a bundle takes on this machine.

Segments are timed as they run in practice: in a session, one after another, so that the
weights of all others pass through the caches between two runs of one; alone, and while
the other lanes do the same.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.cost_table import CostTable, SegmentCost, device_kind, lane_threads
from parnet_engines.planning.engine_cores import shared_segments
from parnet_engines.planning.layouts import place_whole
from parnet_engines.planning.machine import describe_machine
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_export.samples import make_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.open_program import OpenProgram, Runner
    from parnet_engines.schedule.recording import Recording
    from parnet_export.bundle import Bundle

    Tensors = dict[str, NDArray[Any]]


MIN_ROUNDS = 7
"""How often each segment is timed at least, in each situation."""

MAX_ROUNDS = 100
"""How often each segment is timed at most, in each situation."""

BUDGET_S = 1.0
"""How long a situation is measured unless `MIN_ROUNDS` take longer, in seconds."""

_WARM_UPS = 2


def measure_costs(
    bundle: Bundle,
    lanes: Sequence[Lane],
    open_program: OpenProgram,
    environment: str | None = None,
) -> tuple[SegmentCost, ...]:
    """Time every segment on lanes of CPU cores, or of a GPU.

    Parameters
    ----------
    bundle
        The bundle. Where it leaves sizes open, they are those of the first sample.
    lanes
        The lanes that a plan is to use at the same time.
    open_program
        Opens a session for one lane.
    environment
        What the measurements belong to; by default this machine with ONNX Runtime on its CPU.

    Returns
    -------
    tuple
        For each segment and width of a lane the median latency alone, and beside busy
        lanes if the device has several. The latter is, for segments that then have the
        cores of all of them (see `parnet_engines.planning.engine_cores`), the latency with those.

    Raises
    ------
    MissingBackendError, InputError
        When `open_program` cannot load a segment.
    SegmentFailedError
        When a segment fails.
    """
    inputs = next(make_samples(bundle.stream_graph.inputs)).inputs

    def open_lane(lane: Lane) -> Runner:
        program = _all_segments_on(bundle, lane)
        session = open_program(program, record=True, beside_others=True)
        for _ in range(_WARM_UPS):
            session.run(inputs)
        return session

    where = environment or describe_machine()
    costs: list[SegmentCost] = []
    for device in dict.fromkeys(lane.device for lane in lanes):
        there = [lane for lane in lanes if lane.device == device]
        # Only cores can be shared; a GPU sees to it by itself.
        on_cores = any(lane.cores for lane in there)
        shared = shared_segments(bundle.stream_graph) if on_cores else frozenset()
        costs += _time_device(there, shared, open_lane, inputs, where)
    return CostTable().updated(costs).entries


def measure_whole(
    bundle: Bundle, lane: Lane, open_program: OpenProgram, environment: str | None = None
) -> tuple[SegmentCost, ...]:
    """Time the whole graph as one engine, alone on a lane.

    The parameters and errors are those of `measure_costs`.
    """
    inputs = next(make_samples(bundle.stream_graph.inputs)).inputs
    program = program_of(bundle, place_whole(lane))
    with open_program(program, record=True, beside_others=True) as session:
        for _ in range(_WARM_UPS):
            session.run(inputs)
        return tuple(_time([session], inputs, environment or describe_machine()))


def _time_device(
    lanes: Sequence[Lane],
    shared: frozenset[str],
    open_lane: Callable[[Lane], Runner],
    inputs: Tensors,
    environment: str,
) -> Iterator[SegmentCost]:
    """Yield what segments take on lanes of one device, alone and together."""
    with ExitStack() as stack:
        sessions = {lane: stack.enter_context(open_lane(lane)) for lane in lanes}
        by_width = {lane_threads(lane): session for lane, session in sessions.items()}
        for session in by_width.values():
            yield from _time([session], inputs, environment)
        if len(lanes) == 1:
            return
        together = _time(list(sessions.values()), inputs, environment)
        yield from (cost for cost in together if cost.segment not in shared)
    if shared:
        all_cores = tuple(core for lane in lanes for core in lane.cores)
        with open_lane(Lane("all", lanes[0].device, all_cores)) as session:
            alone = _time([session], inputs, environment)
        yield from alone
        for cost in alone:
            if cost.segment in shared:
                for width in by_width:
                    yield replace(cost, threads=width, busy_lanes=len(lanes))


def _all_segments_on(bundle: Bundle, lane: Lane) -> CheckedProgram:
    segments = (segment.name for segment in bundle.stream_graph.segments)
    in_order = tuple(Assignment(segment, lane.name) for segment in segments)
    return program_of(bundle, Placement((lane,), in_order))


def _time(sessions: Sequence[Runner], inputs: Tensors, environment: str) -> list[SegmentCost]:
    """Return what segments take in sessions that run side by side."""
    durations_ns: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for recording in _run_together(sessions, inputs):
        (lane,) = recording.lanes
        for span in recording.busy_by_lane[lane.name]:
            situation = span.label, device_kind(lane.device), lane_threads(lane)
            durations_ns[situation].append(span.duration_ns)
    busy = len(sessions)
    return [
        SegmentCost(*situation, busy, median(samples_ns) / 1e6, "measured", environment)
        for situation, samples_ns in durations_ns.items()
    ]


def _run_together(sessions: Sequence[Runner], inputs: Tensors) -> list[Recording]:
    """Run sessions side by side, each until all have been through their rounds."""
    unfinished = set(range(len(sessions)))

    def serve(number: int) -> None:
        begin_s = time.monotonic()
        try:
            for rounds in itertools.count(1):
                sessions[number].run(inputs)
                in_time = time.monotonic() - begin_s < BUDGET_S
                if rounds >= MIN_ROUNDS and not (in_time and rounds < MAX_ROUNDS):
                    unfinished.discard(number)
                if not unfinished:
                    return
        finally:
            unfinished.discard(number)

    for session in sessions:
        session.take_recording()
    with ThreadPoolExecutor(len(sessions)) as pool:
        for served in [pool.submit(serve, number) for number in range(len(sessions))]:
            served.result()
    return [session.take_recording() for session in sessions]
