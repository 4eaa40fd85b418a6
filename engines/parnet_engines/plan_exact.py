"""Branch and bound: the best placement of a small stream graph, with proof.

The search settles which lanes run each segment, from the network's outputs back to
its inputs, so that it is known where a segment's outputs are read when its turn
comes. It leaves a partial choice when its lower bound is no better than the best
placement known. What is left when every segment has its lanes is the issue order,
which `parnet_engines.plan_order` searches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_engines.evaluate import Objective, Play
from parnet_engines.plan_order import best_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_engines.scenario import Instance, Step


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
    search.settle(len(instance.segment_names) - 1, 0)
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
        self.for_latency = objective == "latency"
        self.max_nodes = max_nodes
        self.nodes = 0
        self.best = list(incumbent)
        play = Play(instance)
        for segment, lane in incumbent:
            play.run(segment, lane)
        latency_ps = play.finish()
        self.best_ps = latency_ps if self.for_latency else play.interval_ps
        self.never_ps = latency_ps + play.interval_ps + 1
        self.lanes = range(len(instance.lanes))
        self.devices = range(len(instance.device_names))
        self.mapping: list[tuple[int, ...]] = [()] * len(instance.segment_names)
        self.lanes_on = [
            [lane for lane in self.lanes if instance.lane_device[lane] == device]
            for device in self.devices
        ]
        self.fastest_ps = [min(latencies) for latencies in instance.latency_ps]
        self.tail_ps = [0] * len(self.mapping)
        for segment in reversed(range(len(self.mapping))):
            for after in instance.successors[segment]:
                tail_ps = self.fastest_ps[after] + self.tail_ps[after]
                self.tail_ps[segment] = max(self.tail_ps[segment], tail_ps)
        self.copy_ps = dict(instance.exits) | dict(itertools.chain(*instance.reads))
        self.producer = {t: s for s, tensors in enumerate(instance.writes) for t in tensors}
        self._find_twins()

    def _find_twins(self) -> None:
        """Find the earlier lanes and devices that nothing but their name tells apart."""
        instance = self.instance
        column = [tuple(row[lane] for row in instance.latency_ps) for lane in self.lanes]
        alone = len(self.devices) == 1
        self.twin_lanes = [
            [
                twin
                for twin in self.lanes_on[instance.lane_device[lane]]
                if twin < lane and column[twin] == column[lane] and (alone or twin > 0)
            ]
            for lane in self.lanes
        ]
        kind = [sorted(column[lane] for lane in lanes) for lanes in self.lanes_on]
        self.twin_devices = [
            [twin for twin in range(1, device) if kind[twin] == kind[device]]
            for device in self.devices
        ]

    def settle(self, segment: int, used: int) -> None:
        """Try every choice of lanes for a segment and those before it."""
        if segment < 0:
            self._complete()
            return
        children = []
        for lanes in self._choices(segment, used):
            if self.max_nodes is not None and self.nodes >= self.max_nodes:
                return
            self.nodes += 1
            self.mapping[segment] = lanes
            bound_ps = self._bound()
            if bound_ps < self.best_ps:
                children.append((bound_ps, len(lanes), lanes))
        self.mapping[segment] = ()
        for bound_ps, _, lanes in sorted(children):
            if bound_ps < self.best_ps:
                self.mapping[segment] = lanes
                self.settle(segment - 1, used | sum(1 << lane for lane in lanes))
        self.mapping[segment] = ()

    def _complete(self) -> None:
        """Look for the best issue order of a complete mapping."""
        if self.for_latency:
            found = best_order(self.instance, tuple(self.mapping), self.best_ps)
            if found:
                self.best_ps, self.best = found
            return
        steps = [(segment, lane) for segment, lanes in enumerate(self.mapping) for lane in lanes]
        play = Play(self.instance)
        for segment, lane in steps:
            play.run(segment, lane)
        play.finish()
        if play.interval_ps < self.best_ps:
            self.best_ps, self.best = play.interval_ps, steps

    def _choices(self, segment: int, used: int) -> Iterator[tuple[int, ...]]:
        """Yield the sets of lanes that are worth running a segment on."""
        instance = self.instance
        read_on = {
            instance.lane_device[lane]
            for after in instance.successors[segment]
            for lane in self.mapping[after]
        }
        if any(tensor in instance.writes[segment] for tensor, _ in instance.exits):
            read_on.add(0)
        lanes = [lane for lane in self.lanes if not self._has_unused_twin(lane, used)]
        on_device = [[x for x in lanes if instance.lane_device[x] == d] for d in self.devices]
        for count in range(1, len(self.devices) + 1):
            for devices in itertools.combinations(self.devices, count):
                # A run is of use where its outputs are read. One run more can be of use
                # as what the others copy from.
                elsewhere = set(devices) - read_on
                copied = read_on - set(devices)
                if count == 1 or not elsewhere or (len(elsewhere) == 1 and copied):
                    yield from itertools.product(*(on_device[device] for device in devices))

    def _has_unused_twin(self, lane: int, used: int) -> bool:
        if used >> lane & 1:
            return False
        if any(not used >> twin & 1 for twin in self.twin_lanes[lane]):
            return True
        device = self.instance.lane_device[lane]
        return not self._is_used(device, used) and any(
            not self._is_used(twin, used) for twin in self.twin_devices[device]
        )

    def _is_used(self, device: int, used: int) -> bool:
        return any(used >> lane & 1 for lane in self.lanes_on[device])

    def _bound(self) -> int:
        """Return a value that no completion of a partial choice can be below.

        Segments start as early as the tensors they read allow, whatever else their
        lanes do; then no lane can be done before its work, and all lanes together not
        before all work.
        """
        instance, count = self.instance, len(self.devices)
        work_ps = [0] * len(self.lanes)
        head_ps = [self.never_ps] * len(self.lanes)
        tail_ps = [self.never_ps] * len(self.lanes)
        rest_ps = 0
        bound_ps = 0
        copied: set[int] = set()
        ready_ps = [0] * (len(instance.tensor_names) * count)
        for tensor in instance.network_inputs:
            for device in self.devices[1:]:
                ready_ps[tensor * count + device] = self.copy_ps.get(tensor, 0)
        for segment, chosen in enumerate(self.mapping):
            ends_ps = [self.never_ps] * count
            for lane in chosen or self.lanes:
                device = instance.lane_device[lane]
                start_ps = pulling_ps = 0
                for tensor, copy_ps in instance.reads[segment]:
                    at = tensor * count + device
                    start_ps = max(start_ps, ready_ps[at])
                    if chosen and self._is_copied(tensor, device) and at not in copied:
                        copied.add(at)
                        pulling_ps += copy_ps
                latency_ps = instance.latency_ps[segment][lane]
                ends_ps[device] = min(ends_ps[device], start_ps + latency_ps)
                if chosen:
                    work_ps[lane] += latency_ps + pulling_ps
                    head_ps[lane] = min(head_ps[lane], max(0, start_ps - pulling_ps))
                    tail_ps[lane] = min(tail_ps[lane], self.tail_ps[segment])
            if not chosen:
                rest_ps += self.fastest_ps[segment]
            end_ps = min(ends_ps)
            bound_ps = max(bound_ps, end_ps + self.tail_ps[segment])
            for tensor in instance.writes[segment]:
                there_ps = end_ps + self.copy_ps.get(tensor, 0)
                for device in self.devices:
                    ready_ps[tensor * count + device] = min(ends_ps[device], there_ps)
        mean_ps = -(-(sum(work_ps) + rest_ps) // len(self.lanes))
        if not self.for_latency:
            return max(mean_ps, *work_ps)
        for tensor, _ in instance.exits:
            bound_ps = max(bound_ps, ready_ps[tensor * count])
        return max(
            bound_ps,
            mean_ps,
            *(h + w + t for h, w, t in zip(head_ps, work_ps, tail_ps, strict=True) if w),
        )

    def _is_copied(self, tensor: int, device: int) -> bool:
        """Tell whether it is settled that a device has to copy a tensor."""
        producer = self.producer.get(tensor)
        if producer is None:
            return device > 0
        lanes = self.mapping[producer]
        return bool(lanes) and all(self.instance.lane_device[x] != device for x in lanes)
