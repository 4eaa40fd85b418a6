"""Branch and bound: the best placement of a small stream graph, with proof.

The search settles which lanes run each segment, from the network's outputs back to
its inputs, so that it is known where a segment's outputs are read when its turn
comes. It leaves a partial choice when its lower bound is no better than the best
placement known. What is left when every segment has its lanes is the issue order,
which `parnet_engines.planning.plan_order` searches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_engines.planning.evaluate import Objective, Play
from parnet_engines.planning.plan_bound import Mapping, Relaxation
from parnet_engines.planning.plan_order import best_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_engines.planning.scenario import Instance, Step


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best placement a search found.

    Parameters
    ----------
    steps
        Its assignments, in issue order.
    is_optimal
        Whether the search proved that no placement is better.
    nodes
        How many partial choices were looked at.
    """

    steps: tuple[Step, ...]
    is_optimal: bool
    nodes: int


def search_exactly(
    instance: Instance,
    objective: Objective,
    incumbent: Sequence[Step],
    max_nodes: int | None = None,
) -> SearchResult:
    """Return a placement that is better than `incumbent`, or it when none is.

    Parameters
    ----------
    instance
        The stream graph on its lanes.
    objective
        What to make small.
    incumbent
        A placement to start from; the better it is, the sooner the search ends.
    max_nodes
        Give up the proof after so many partial choices.
    """
    search = _Search(instance, objective, incumbent, max_nodes)
    search.settle(Relaxation(instance), len(instance.segment_names) - 1, 0)
    within = max_nodes is None or search.nodes < max_nodes
    return SearchResult(tuple(search.best), within, search.nodes)


class _Search:
    def __init__(
        self,
        instance: Instance,
        objective: Objective,
        incumbent: Sequence[Step],
        max_nodes: int | None,
    ) -> None:
        self.instance = instance
        self.objective: Objective = objective
        self.max_nodes = max_nodes
        self.nodes = 0
        self.best = list(incumbent)
        self.best_ps = self._value_ps(incumbent)
        self.lanes = range(len(instance.lanes))
        self.devices = range(len(instance.device_names))
        self.start = Play(instance)
        self._find_twins()

    def _value_ps(self, steps: Sequence[Step]) -> int:
        play = Play(self.instance)
        for segment, lane in steps:
            play.run(segment, lane)
        latency_ps = play.finish()
        return latency_ps if self.objective == "latency" else play.interval_ps

    def _find_twins(self) -> None:
        """Find the earlier lanes and devices that nothing but their name tells apart."""
        instance = self.instance
        column = [tuple(row[lane] for row in instance.latency_ps) for lane in self.lanes]
        alone = len(self.devices) == 1
        self.twin_lanes = [
            [
                twin
                for twin in instance.lanes_on[instance.lane_device[lane]]
                if twin < lane and column[twin] == column[lane] and (alone or twin > 0)
            ]
            for lane in self.lanes
        ]
        kind = [sorted(column[lane] for lane in lanes) for lanes in instance.lanes_on]
        self.twin_devices = [
            [twin for twin in range(1, device) if kind[twin] == kind[device]]
            for device in self.devices
        ]

    def settle(self, relaxation: Relaxation, segment: int, used: int) -> None:
        """Try every choice of lanes for a segment and those before it."""
        if segment < 0:
            self._complete(relaxation)
            return
        children = []
        for lanes in self._choices(relaxation.mapping, segment, used):
            if self.max_nodes is not None and self.nodes >= self.max_nodes:
                break
            self.nodes += 1
            child = relaxation.settle(segment, lanes)
            bound_ps = self._bound(child)
            if bound_ps < self.best_ps:
                children.append((bound_ps, len(lanes), lanes, child))
        children.sort(key=lambda entry: entry[:3])
        for bound_ps, _, lanes, child in children:
            if bound_ps < self.best_ps:
                self.settle(child, segment - 1, used | sum(1 << lane for lane in lanes))

    def _bound(self, relaxation: Relaxation) -> int:
        if self.objective == "latency":
            return relaxation.latency_ps(self.start, 0, self.best_ps)
        return relaxation.interval_ps(self.start)

    def _complete(self, relaxation: Relaxation) -> None:
        """Look for the best issue order of a complete mapping."""
        if self.objective == "latency" or self.instance.links_matter:
            found = best_order(self.instance, relaxation, self.objective, self.best_ps)
            if found:
                self.best_ps, self.best = found
            return
        # Loads do not depend on the order, so any will do.
        steps = [(segment, x) for segment, lanes in enumerate(relaxation.mapping) for x in lanes]
        value_ps = self._value_ps(steps)
        if value_ps < self.best_ps:
            self.best_ps, self.best = value_ps, steps

    def _choices(self, mapping: Mapping, segment: int, used: int) -> Iterator[tuple[int, ...]]:
        """Yield the sets of lanes that are worth running a segment on."""
        instance = self.instance
        read_on = {
            instance.lane_device[lane]
            for after in instance.successors[segment]
            for lane in mapping[after]
        }
        if not set(instance.writes[segment]).isdisjoint(instance.network_outputs):
            read_on.add(0)
        for count in range(1, len(self.devices) + 1):
            for devices in itertools.combinations(self.devices, count):
                for home in self._homes(set(devices), read_on):
                    in_order = sorted(devices, key=lambda device: (device != home, device))
                    for lanes in itertools.product(*(instance.lanes_on[d] for d in in_order)):
                        if not any(self._has_better_twin(x, devices, used) for x in lanes):
                            yield lanes

    def _homes(self, devices: set[int], read_on: set[int]) -> list[int]:
        """Return the devices that a segment which runs on `devices` may be copied from.

        A run is of use only where its outputs are read or copied from.
        """
        unread = devices - read_on
        if len(devices) == 1 or not unread:
            return sorted(devices) if read_on - devices else [min(devices)]
        return sorted(unread) if len(unread) == 1 and read_on - devices else []

    def _has_better_twin(self, lane: int, devices: Sequence[int], used: int) -> bool:
        """Tell whether an earlier lane that is left unused would do just as well."""
        if used >> lane & 1:
            return False
        if any(not used >> twin & 1 for twin in self.twin_lanes[lane]):
            return True
        device = self.instance.lane_device[lane]
        return not self._is_used(device, used) and any(
            twin not in devices and not self._is_used(twin, used)
            for twin in self.twin_devices[device]
        )

    def _is_used(self, device: int, used: int) -> bool:
        return any(used >> lane & 1 for lane in self.instance.lanes_on[device])
