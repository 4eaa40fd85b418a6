"""The simulator against sessions that really run: with delays, and with real engines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from parnet_bench.lanes.overhead import measure_overhead, sample_inputs, spread
from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.cost_measure import measure_costs
from parnet_engines.planning.cost_table import CostTable, SegmentCost, lane_threads
from parnet_engines.planning.devices import divide, parse_devices
from parnet_engines.planning.links import MEMORY
from parnet_engines.planning.plan import rank_streams
from parnet_engines.planning.scenario import Scenario
from parnet_engines.planning.simulate import simulate
from parnet_engines.runtimes.delay_engine import DelayEngine
from parnet_engines.schedule.program import Run
from parnet_engines.session import Session

if TYPE_CHECKING:
    from parnet_engines.clock import Clock
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_export.bundle import Bundle

DELAY_LIMIT = 0.03
"""How far a prediction may be off where engines only take their time."""

ENGINE_LIMIT = 0.15
"""How far it may be off with real engines, and costs measured beside busy lanes."""

_LEAST_DELAY_MS = 3.0
_OVERHEAD_INFERENCES = 2000


@dataclass(frozen=True, slots=True)
class SimulatorCheck:
    """A predicted latency beside measured ones.

    Parameters
    ----------
    network
        The network.
    engines
        ``"delays"`` or ``"onnxruntime"``.
    lanes
        How many lanes there are.
    measured_ms
        Median latency of the session in each repetition.
    predicted_ms
        What the simulator predicts in each, with the session's overhead added.
    alone_ms
        The same with what segments take alone, as if lanes did not disturb each other.
    overhead_ms
        What an inference takes whose engines take no time.
    limit
        How far the median error may be from 0.
    """

    network: str
    engines: str
    lanes: int
    measured_ms: tuple[float, ...]
    predicted_ms: tuple[float, ...]
    alone_ms: tuple[float, ...]
    overhead_ms: float
    limit: float

    @property
    def error(self) -> float:
        """The median over the repetitions of predicted / measured - 1."""
        return _error(self.predicted_ms, self.measured_ms)

    @property
    def error_alone(self) -> float:
        """The same with what segments take alone."""
        return _error(self.alone_ms, self.measured_ms)

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit."""
        return abs(self.error) <= self.limit


def _error(predicted_ms: tuple[float, ...], measured_ms: tuple[float, ...]) -> float:
    return median(p / m - 1 for p, m in zip(predicted_ms, measured_ms, strict=True))


def check_delays(
    bundle: Bundle, lanes: int, *, inferences: int, clock: Clock, total_ms: float = 120.0
) -> SimulatorCheck:
    """Run a bundle's segments as delays in proportion to their FLOPs.

    Parameters
    ----------
    bundle
        The bundle.
    lanes
        How many lanes to use.
    inferences
        How many are timed.
    clock
        By which engines wait and inferences are timed.
    total_ms
        What all delays add up to, about.
    """
    program, graph = spread(bundle, lanes), bundle.stream_graph
    flops = sum(segment.cost.flops for segment in graph.segments)
    delays_ms = {
        segment.name: max(_LEAST_DELAY_MS, total_ms * segment.cost.flops / flops)
        for segment in graph.segments
    }
    costs = CostTable(
        tuple(
            SegmentCost(name, "cpu", width, 1, delay_ms, "measured", "delays")
            for name, delay_ms in delays_ms.items()
            for width in {lane_threads(lane) for lane in program.program.lanes}
        )
    )
    engines = {
        (step.segment, step.lane): DelayEngine(
            graph[step.segment], delays_ms[step.segment], clock=clock
        )
        for step in program.program.steps
        if isinstance(step, Run)
    }
    predicted_ms = simulate(program.program, costs, MEMORY).latency_ms
    with Session(program, engines) as session:
        measured_ms = _latency_ms(session, bundle, inferences, clock)
    return SimulatorCheck(
        bundle.label,
        "delays",
        lanes,
        (measured_ms,),
        (predicted_ms,),
        (predicted_ms,),
        0.0,
        DELAY_LIMIT,
    )


def check_engines(
    bundle: Bundle,
    lanes: int,
    *,
    repetitions: int,
    inferences: int,
    clock: Clock,
) -> SimulatorCheck:
    """Measure costs and the session they predict in turns, with ONNX Runtime.

    Parameters
    ----------
    bundle
        The bundle.
    lanes
        How many lanes to use, on all cores.
    repetitions
        How often both are measured, so that whatever else the machine does meets both.
    inferences
        How many are timed in each repetition.
    clock
        By which they are timed.

    Raises
    ------
    InputError
        When there are more lanes than cores.
    MissingBackendError
        When ONNX Runtime is not installed.
    """
    offered = divide(parse_devices("cpu"), lanes)
    load = partial(Session.load, bundle)
    program: CheckedProgram | None = None
    overhead_ms = 0.0
    measured_ms: list[float] = []
    predicted_ms: list[float] = []
    alone_ms: list[float] = []
    for _ in range(repetitions):
        costs = CostTable(measure_costs(bundle, offered, load))
        if program is None:
            scenario = Scenario(bundle.stream_graph, costs, MEMORY)
            program = program_of(bundle, rank_streams(scenario, [offered])[0].placement)
            overhead = measure_overhead(bundle, program, _OVERHEAD_INFERENCES, clock)
            overhead_ms = overhead.median_us / 1000
        with load(program) as session:
            measured_ms.append(_latency_ms(session, bundle, inferences, clock))
        for found, alone in ((predicted_ms, False), (alone_ms, True)):
            simulation = simulate(program.program, costs, MEMORY, alone=alone)
            found.append(simulation.latency_ms + overhead_ms)
    return SimulatorCheck(
        bundle.label,
        "onnxruntime",
        lanes,
        tuple(measured_ms),
        tuple(predicted_ms),
        tuple(alone_ms),
        overhead_ms,
        ENGINE_LIMIT,
    )


def _latency_ms(session: Session, bundle: Bundle, inferences: int, clock: Clock) -> float:
    """Return the median latency of a session that is warm."""
    inputs = sample_inputs(bundle)
    latencies_ms = []
    for number in range(-2, inferences):
        begin_ns = clock.now_ns()
        session.run(inputs)
        if number >= 0:
            latencies_ms.append((clock.now_ns() - begin_ns) / 1e6)
    return median(latencies_ms)
