"""``--plan auto``: what is quickest on this machine, found by measuring.

The candidates are the whole graph with one to all threads, and the planner's best
placement of the segments for each number of lanes. Rounds of all of them pick the best of
either kind. If the segments come near the whole graph, fresh rounds of these two decide:
the whole graph is left only if the lower end of the ratio's interval says that it pays.
The decision is kept in the bundle's folder, for this machine and these devices.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from parnet_engines.bundle_costs import add_bundle_costs, load_bundle_costs, network_of
from parnet_engines.clock import Clock, MonotonicClock
from parnet_engines.cost_measure import measure_costs
from parnet_engines.cost_table import WHOLE, CostTable, SegmentCost, lane_threads

# msgspec resolves the annotations of the dataclasses below while the program runs.
from parnet_engines.devices import Device, divide
from parnet_engines.machine import describe_machine
from parnet_engines.placement import Placement  # noqa: TC001
from parnet_engines.plan_option import default_lanes, place_streams, place_whole, program_of
from parnet_engines.rounds import Ratio, ratio_of, run_rounds
from parnet_engines.session import Session
from parnet_export import files
from parnet_export.errors import InputError
from parnet_export.samples import make_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from parnet_engines.cost_measure import OpenProgram
    from parnet_engines.placement import Lane
    from parnet_export.bundle import Bundle

DECISIONS_NAME = "auto_plans.json"
"""File name of the decisions in a bundle's folder."""

SCHEMA_VERSION = 1

NOT_WORTH_A_FINAL = 1.15
"""Segments that take so many times as long as the whole graph get no final rounds."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and what was measured of it.

    Parameters
    ----------
    name
        Name for people, such as ``"whole graph, 2 threads"``.
    placement
        What it runs where.
    latencies_ms
        The median latency of each round; rounds are those of the trials beside it.
    """

    name: str
    placement: Placement
    latencies_ms: tuple[float, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it runs the whole graph as one engine."""
        return self.placement.assignments[0].segment == WHOLE

    @property
    def latency_ms(self) -> float:
        """The median over the rounds."""
        return median(self.latencies_ms)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was measured to choose a plan, and for whom it holds. `str` shows it.

    Parameters
    ----------
    network
        The bundle, see `parnet_engines.bundle_costs.network_of`.
    machine
        The machine, see `parnet_engines.machine.describe_machine`.
    devices
        The devices that could be used.
    lanes
        The number of lanes that was asked for, if any.
    trials
        All candidates in the same rounds; at least one runs the whole graph.
    final
        The best of either kind in later rounds, the whole graph first; empty if the
        whole graph was clearly better, or there was nothing else.
    """

    network: str
    machine: str
    devices: tuple[Device, ...]
    lanes: int | None
    trials: tuple[Trial, ...]
    final: tuple[Trial, ...] = ()

    @property
    def ratio(self) -> Ratio | None:
        """The whole graph's latency divided by that of the segments, in the final rounds."""
        if not self.final:
            return None
        whole, segments = self.final
        return ratio_of(whole.latencies_ms, segments.latencies_ms)

    @property
    def chosen(self) -> Trial:
        """The whole graph, unless it is certain that the segments are quicker."""
        if self.ratio is None:
            return _best(trial for trial in self.trials if trial.is_whole)
        whole, segments = self.final
        return segments if self.ratio.low > 1 else whole

    def __str__(self) -> str:
        width = max(len(trial.name) for trial in self.trials)
        lines = [f"auto: {self.chosen.name}"]
        lines += [f"  {t.name:<{width}}  {t.latency_ms:9.3f} ms" for t in self.trials]
        if self.ratio is not None:
            ratio = self.ratio
            lines.append(
                f"  {self.final[1].name} against {self.final[0].name}: {ratio.value:.3f} times "
                f"as fast (95 % interval {ratio.low:.3f} to {ratio.high:.3f}, "
                f"{ratio.rounds} rounds)"
            )
        return "\n".join(lines)


def decide(
    bundle: Bundle,
    devices: Sequence[Device],
    lanes: int | None = None,
    *,
    again: bool = False,
    open_program: OpenProgram | None = None,
    clock: Clock | None = None,
) -> Decision:
    """Return the plan for a bundle on devices, from an earlier decision where there is one.

    Measuring takes from seconds to a minute. A bundle's folder that cannot be written to
    only means that it is measured again next time.

    Parameters
    ----------
    bundle
        The bundle. Where it leaves sizes open, they are those of the first sample.
    devices
        What may be used.
    lanes
        The number of lanes to place the segments on; by default every number that can be
        of use is tried.
    again
        Measure even if there is an earlier decision.
    open_program
        Opens a session that runs a program; by default with ONNX Runtime.
    clock
        By which candidates are timed.

    Raises
    ------
    InputError
        When there are more lanes than cores, or fewer than devices.
    MissingBackendError
        When ONNX Runtime is not installed.
    """
    question = Decision(network_of(bundle), describe_machine(), tuple(devices), lanes, ())
    earlier = _load(bundle)
    for decision in earlier:
        if not again and replace(decision, trials=(), final=()) == question:
            return decision
    trials, final = _measure(bundle, devices, lanes, open_program, clock or MonotonicClock())
    decision = replace(question, trials=trials, final=final)
    others = [d for d in earlier if replace(d, trials=(), final=()) != question]
    with contextlib.suppress(InputError):  # the folder cannot be written to
        _save(bundle, [*others, decision])
    return decision


def _measure(
    bundle: Bundle,
    devices: Sequence[Device],
    lanes: int | None,
    open_program: OpenProgram | None,
    clock: Clock,
) -> tuple[tuple[Trial, ...], tuple[Trial, ...]]:
    """Return the trials of all candidates, and the final ones."""
    candidates = list(_candidates(bundle, devices, lanes, open_program))
    load = open_program or partial(Session.load, bundle)
    sample = next(make_samples(bundle.stream_graph.inputs))
    with contextlib.ExitStack() as stack:
        runs = {}
        for trial in candidates:
            session = load(program_of(bundle, trial.placement), record=False)
            runs[trial.name] = partial(stack.enter_context(session).run, sample.inputs)
        compare = partial(_compare, runs=runs, clock=clock, order=random.Random(0))  # noqa: S311
        trials = compare(candidates, budget_s=2.0, min_rounds=5, max_rounds=15)
        whole = _best(trial for trial in trials if trial.is_whole)
        others = [trial for trial in trials if not trial.is_whole]
        if not others or _best(others).latency_ms > NOT_WORTH_A_FINAL * whole.latency_ms:
            return trials, ()
        finalists = whole, _best(others)
        return trials, compare(finalists, budget_s=4.0, min_rounds=12, max_rounds=60)


def _best(trials: Iterable[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.latency_ms)


def _candidates(
    bundle: Bundle, devices: Sequence[Device], lanes: int | None, open_program: OpenProgram | None
) -> Iterator[Trial]:
    """Yield what is worth measuring: the whole graph, and the segments on several lanes."""
    first = devices[0]
    for threads in _thread_counts(len(first.cores)):
        placement = place_whole(replace(first, cores=first.cores[:threads]))
        yield Trial(f"whole graph, {_count(threads, 'thread')}", placement)
    most = default_lanes(bundle.stream_graph, devices)
    for count in range(max(2, len(devices)), most + 1) if lanes is None else [lanes]:
        divided = divide(devices, count)
        costs = _measured_costs(bundle, divided, open_program)
        placement = place_streams(bundle, divided, costs)
        if lanes is not None or len({a.lane for a in placement.assignments}) == count:
            widths = "+".join(str(lane_threads(lane)) for lane in divided)
            yield Trial(f"streams, {widths} threads", placement)


def _thread_counts(cores: int) -> list[int]:
    """Return 1, 2, 4 and so on up to the number of cores, and that number."""
    return sorted({1 << power for power in range(cores.bit_length())} | {cores})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _measured_costs(
    bundle: Bundle, lanes: Sequence[Lane], open_program: OpenProgram | None
) -> CostTable:
    """Return measured costs for lanes that work side by side, measuring what is missing."""
    costs = load_bundle_costs(bundle)
    graph = bundle.stream_graph
    for lane in lanes:
        neighbours = sum(other.device == lane.device for other in lanes)
        for segment in graph.segments:
            found = costs.find(segment.name, "cpu", lane_threads(lane), neighbours)
            if found is None or found.busy_lanes != neighbours:
                return _add_costs(bundle, costs, measure_costs(bundle, lanes, open_program))
    return costs


def _add_costs(bundle: Bundle, costs: CostTable, measured: Sequence[SegmentCost]) -> CostTable:
    """Return costs with measurements added, also to the bundle if it can be written to."""
    with contextlib.suppress(InputError):
        add_bundle_costs(bundle, measured)
    return costs.updated(measured)


def _compare(
    trials: Sequence[Trial],
    *,
    runs: Mapping[str, Callable[[], object]],
    clock: Clock,
    order: random.Random,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
) -> tuple[Trial, ...]:
    """Return the trials with what they took in new rounds."""
    latencies_ms = run_rounds(
        {trial.name: runs[trial.name] for trial in trials},
        budget_s=budget_s,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        clock=clock,
        order=order,
    )
    return tuple(replace(trial, latencies_ms=latencies_ms[trial.name]) for trial in trials)


@dataclass(frozen=True, slots=True)
class _Document:
    schema_version: int
    decisions: tuple[Decision, ...]


def _load(bundle: Bundle) -> list[Decision]:
    """Return the decisions in a bundle's folder; none from a file that is not understood."""
    try:
        content = (bundle.path / DECISIONS_NAME).read_bytes()
        document = msgspec.json.decode(content, type=_Document)
    except (OSError, msgspec.DecodeError, ValueError):
        return []  # whatever was measured can be measured again
    return list(document.decisions) if document.schema_version == SCHEMA_VERSION else []


def _save(bundle: Bundle, decisions: Sequence[Decision]) -> None:
    document = _Document(SCHEMA_VERSION, tuple(decisions))
    content = msgspec.json.format(msgspec.json.encode(document), indent=2)
    files.write_bytes(bundle.path / DECISIONS_NAME, content + b"\n")
