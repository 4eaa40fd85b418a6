"""What measuring decided for ``--plan auto``, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from parnet_engines.planning.cost_table import WHOLE

# msgspec resolves the annotations of the dataclasses below while the program runs.
from parnet_engines.planning.devices import Device  # noqa: TC001
from parnet_engines.planning.evaluate import Objective  # noqa: TC001
from parnet_engines.planning.rounds import Ratio, ratio_of
from parnet_engines.schedule.placement import Placement  # noqa: TC001
from parnet_export import files

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from parnet_export.bundle import Bundle

DECISIONS_NAME = "auto_plans.json"
"""File name of the decisions in a bundle's folder."""

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and what was measured of it.

    Parameters
    ----------
    name
        Name for people, such as ``"whole graph, 2 threads"``.
    placement
        What it runs where.
    inferences_in_flight
        How many inferences overlap.
    rounds_ms
        What it took in each round; rounds are those of the trials beside it. For latency
        that is the median latency, for throughput the time from one inference to the next.
    predicted_ms, lower_bound_ms
        What the plan was predicted to take by the segments' costs, and what no plan on
        its lanes can be below; None for the whole graph.
    """

    name: str
    placement: Placement
    inferences_in_flight: int = 1
    rounds_ms: tuple[float, ...] = ()
    predicted_ms: float | None = None
    lower_bound_ms: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it runs the whole graph as one engine."""
        return self.placement.assignments[0].segment == WHOLE

    @property
    def median_ms(self) -> float:
        """The median over the rounds."""
        return median(self.rounds_ms)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was measured to choose a plan, and for whom it holds. `str` shows it.

    Parameters
    ----------
    network
        The bundle, see `parnet_engines.planning.bundle_costs.network_of`.
    machine
        The machine, see `parnet_engines.planning.machine.describe_machine`.
    devices
        The devices that could be used.
    lanes
        The most lanes, if a number was asked for.
    trials
        All candidates in the same rounds; at least one runs the whole graph.
    final
        The best of either kind in later rounds, the whole graph first; empty if the
        whole graph was clearly better, or there was nothing else.
    objective
        What was measured.
    in_flight
        How many inferences overlap, if a number was asked for.
    """

    network: str
    machine: str
    devices: tuple[Device, ...]
    lanes: int | None
    trials: tuple[Trial, ...]
    final: tuple[Trial, ...] = ()
    objective: Objective = "latency"
    in_flight: int | None = None

    @property
    def ratio(self) -> Ratio | None:
        """The whole graph's time divided by that of the segments, in the final rounds."""
        if not self.final:
            return None
        whole, segments = self.final
        return ratio_of(whole.rounds_ms, segments.rounds_ms)

    @property
    def chosen(self) -> Trial:
        """The whole graph, unless it is certain that the segments are quicker."""
        if self.ratio is None:
            return best(trial for trial in self.trials if trial.is_whole)
        whole, segments = self.final
        return segments if self.ratio.low > 1 else whole

    def __str__(self) -> str:
        width = max(len(trial.name) for trial in self.trials)
        unit = "ms" if self.objective == "latency" else "ms from one inference to the next"
        lines = [f"auto: {self.chosen.name}"]
        for trial in self.trials:
            line = f"  {trial.name:<{width}}  {trial.median_ms:9.3f} {unit}"
            if trial.predicted_ms is not None:
                line += f"  (predicted {trial.predicted_ms:.3f}, "
                line += f"not below {trial.lower_bound_ms:.3f})"
            lines.append(line)
        if self.ratio is not None:
            ratio = self.ratio
            lines.append(
                f"  {self.final[1].name} against {self.final[0].name}: {ratio.value:.3f} times "
                f"as fast (95 % interval {ratio.low:.3f} to {ratio.high:.3f}, "
                f"{ratio.rounds} rounds)"
            )
        return "\n".join(lines)


def best(trials: Iterable[Trial]) -> Trial:
    """Return the trial that took the least time."""
    return min(trials, key=lambda trial: trial.median_ms)


@dataclass(frozen=True, slots=True)
class _Document:
    schema_version: int
    decisions: tuple[Decision, ...]


def load_decisions(bundle: Bundle) -> list[Decision]:
    """Return the decisions in a bundle's folder; none from a file that is not understood."""
    try:
        content = (bundle.path / DECISIONS_NAME).read_bytes()
        document = msgspec.json.decode(content, type=_Document)
    except (OSError, msgspec.DecodeError, ValueError):
        return []  # whatever was measured can be measured again
    return list(document.decisions) if document.schema_version == SCHEMA_VERSION else []


def save_decisions(bundle: Bundle, decisions: Sequence[Decision]) -> None:
    """Write decisions into a bundle's folder.

    Raises
    ------
    InputError
        When the folder cannot be written to.
    """
    document = _Document(SCHEMA_VERSION, tuple(decisions))
    content = msgspec.json.format(msgspec.json.encode(document), indent=2)
    files.write_bytes(bundle.path / DECISIONS_NAME, content + b"\n")
