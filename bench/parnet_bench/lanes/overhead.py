"""What a session adds to its engines: time for each inference, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import psutil

from parnet_engines.engine import NullEngine
from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.devices import usable_cores
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Run
from parnet_engines.session import Session
from parnet_export.samples import make_samples
from parnet_export.splitting.antichain import heaviest_antichain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from parnet_engines.clock import Clock
    from parnet_engines.engine import Engine
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_export.bundle import Bundle

OVERHEAD_LIMIT_US = 150.0
"""An inference whose engines take no time takes less than this, in microseconds."""

MEMORY_LIMIT_BYTES = 1 << 20
"""Resident memory grows by less than this over any number of inferences."""

_WARM_UPS = 1000


@dataclass(frozen=True, slots=True)
class Overhead:
    """What an inference takes whose engines take no time.

    Parameters
    ----------
    network
        The network.
    segments, lanes
        How many there are.
    pinned
        Whether every lane has a core of its own.
    median_us, p90_us
        Microseconds for an inference, its inputs and outputs copied.
    inferences
        How many were timed.
    """

    network: str
    segments: int
    lanes: int
    pinned: bool
    median_us: float
    p90_us: float
    inferences: int

    @property
    def passed(self) -> bool:
        """Whether the median is within its limit."""
        return self.median_us < OVERHEAD_LIMIT_US


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of the process before and after many inferences, in bytes."""

    network: str
    before_bytes: int
    after_bytes: int
    inferences: int

    @property
    def passed(self) -> bool:
        """Whether it has stayed flat."""
        return self.after_bytes - self.before_bytes < MEMORY_LIMIT_BYTES


def spread(bundle: Bundle, count: int) -> CheckedProgram:
    """Return the program that has a bundle's streams on so many lanes in turn.

    The streams are the independent segments that hold the most work; the origin has all
    other segments. Lanes are pinned to a core each if there are enough.
    """
    graph, cores = bundle.stream_graph, usable_cores()
    pinned = len(cores) >= count
    lanes = tuple(Lane(f"lane{i}", "cpu", cores[i : i + 1] if pinned else ()) for i in range(count))
    streams = heaviest_antichain(graph, {s.name: s.cost.flops for s in graph.segments})
    lane_of = {name: lanes[number % count].name for number, name in enumerate(streams)}
    assignments = (Assignment(s.name, lane_of.get(s.name, "lane0")) for s in graph.segments)
    return program_of(bundle, Placement(lanes, tuple(assignments)))


def null_session(bundle: Bundle, program: CheckedProgram) -> Session:
    """Open a session whose engines do nothing."""
    graph = bundle.stream_graph
    engines: Mapping[tuple[str, str], Engine] = {
        (step.segment, step.lane): NullEngine(graph[step.segment])
        for step in program.program.steps
        if isinstance(step, Run)
    }
    return Session(program, engines)


def sample_inputs(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """Return the same inputs for a bundle every time."""
    return next(make_samples(bundle.stream_graph.inputs)).inputs


def measure_overhead(
    bundle: Bundle, program: CheckedProgram, inferences: int, clock: Clock
) -> Overhead:
    """Time inferences of a program with engines that do nothing.

    Parameters
    ----------
    bundle, program
        The network and what is run of it.
    inferences
        How many are timed, two at least.
    clock
        By which they are timed.
    """
    inputs = sample_inputs(bundle)
    times_us = []
    with null_session(bundle, program) as session:
        for _ in range(min(_WARM_UPS, inferences)):
            session.run(inputs)
        for _ in range(inferences):
            begin_ns = clock.now_ns()
            session.run(inputs)
            times_us.append((clock.now_ns() - begin_ns) / 1000)
    lanes = program.program.lanes
    return Overhead(
        bundle.label,
        len(bundle.stream_graph.segments),
        len(lanes),
        all(lane.cores for lane in lanes),
        median(times_us),
        quantiles(times_us, n=10)[-1],
        inferences,
    )


def measure_memory(bundle: Bundle, program: CheckedProgram, inferences: int) -> Memory:
    """Compare resident memory before and after inferences with engines that do nothing."""
    process, inputs = psutil.Process(), sample_inputs(bundle)
    with null_session(bundle, program) as session:
        for _ in range(_WARM_UPS):
            session.run(inputs)
        before_bytes = process.memory_info().rss
        for _ in range(inferences):
            session.run(inputs)
        return Memory(bundle.label, before_bytes, process.memory_info().rss, inferences)
