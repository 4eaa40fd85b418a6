"""The best issue order when it is settled which lanes run each segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.evaluate import Play

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.scenario import Instance, Step

Mapping = tuple[tuple[int, ...], ...]
"""For each segment the lanes that run it, each on a device of its own."""


def best_order(
    instance: Instance, mapping: Mapping, limit_ps: int
) -> tuple[int, list[Step]] | None:
    """Return the lowest latency below `limit_ps`, and an issue order that has it.

    Branch and bound over issue orders. A partial order is left when its lower bound
    reaches the limit, or when another that issued the same was nowhere later.
    """
    search = _OrderSearch(instance, mapping, limit_ps)
    search.extend(Play(instance), [], 0)
    return (search.limit_ps, search.best) if search.best else None


class _OrderSearch:
    def __init__(self, instance: Instance, mapping: Mapping, limit_ps: int) -> None:
        self.instance = instance
        self.mapping = mapping
        self.limit_ps = limit_ps
        self.best: list[Step] = []
        self.runs: list[Step] = [(s, lane) for s, lanes in enumerate(mapping) for lane in lanes]
        self.everything = (1 << len(self.runs)) - 1
        number = {run: index for index, run in enumerate(self.runs)}
        device_of = instance.lane_device
        # What must be issued before a run: where its device runs a producer too, that
        # run; otherwise any run of the producer, which the tensor is then copied from.
        self.needs: list[list[int]] = []
        for segment, lane in self.runs:
            needs = []
            for producer in instance.predecessors[segment]:
                local = [x for x in mapping[producer] if device_of[x] == device_of[lane]]
                lanes = local or mapping[producer]
                needs.append(sum(1 << number[producer, x] for x in lanes))
            self.needs.append(needs)
        producer_of = {t: s for s, tensors in enumerate(instance.writes) for t in tensors}
        count = len(instance.device_names)
        self.lanes_on = [
            [lane for lane, where in enumerate(device_of) if where == device]
            for device in range(count)
        ]
        self.links_matter = 1 < count < len(instance.lanes)
        # Ready times are compared while a run that reads the tensor is still to come.
        self.readers: list[tuple[int, int]] = []
        self.homes: list[int] = []
        for tensor in range(len(instance.tensor_names)):
            readers = sum(
                1 << number[run]
                for run in self.runs
                if any(tensor == t for t, _ in instance.reads[run[0]])
            )
            if any(tensor == t for t, _ in instance.exits):
                readers |= self.everything + 1
            self.readers.append((tensor * count, readers))
            if tensor in producer_of and len(mapping[producer_of[tensor]]) > 1:
                self.homes.append(tensor)
        self.tail_ps = [0] * len(mapping)
        for segment in reversed(range(len(mapping))):
            for after in instance.successors[segment]:
                fastest_ps = min(instance.latency_ps[after][lane] for lane in mapping[after])
                self.tail_ps[segment] = max(self.tail_ps[segment], fastest_ps + self.tail_ps[after])
        self.seen: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def extend(self, play: Play, steps: list[Step], issued: int) -> None:
        if issued == self.everything:
            latency_ps = play.finish()
            if latency_ps < self.limit_ps:
                self.limit_ps, self.best = latency_ps, list(steps)
            return
        children = []
        for index, (segment, lane) in enumerate(self.runs):
            if issued >> index & 1 or not all(need & issued for need in self.needs[index]):
                continue
            child = play.copy()
            end_ps = child.run(segment, lane)
            then_issued = issued | 1 << index
            bound_ps = self._bound(child, then_issued)
            if bound_ps < self.limit_ps and self._is_new(child, then_issued):
                children.append((bound_ps, end_ps, index, child))
        children.sort(key=lambda entry: entry[:3])
        for bound_ps, _, index, child in children:
            if bound_ps < self.limit_ps:
                steps.append(self.runs[index])
                self.extend(child, steps, issued | 1 << index)
                steps.pop()

    def _is_new(self, play: Play, issued: int) -> bool:
        """Tell whether no other order of the same runs was nowhere later than this one."""
        count = len(self.instance.device_names)
        ready_ps = play.ready_ps
        when = play.lane_free_ps.copy()
        floor_ps = min(when)
        if self.links_matter:
            when += play.link_free_ps
        unread = ~issued
        for first, readers in self.readers:
            if readers & unread:
                when += [max(at, floor_ps) for at in ready_ps[first : first + count]]
        front = self.seen.setdefault((issued, *(play.home[t] for t in self.homes)), [])
        new = tuple(when)
        for old in front:
            if all(a <= b for a, b in zip(old, new, strict=True)):
                return False
        front.append(new)
        return True

    def _bound(self, play: Play, issued: int) -> int:
        """Return a latency that no completion of a partial order can be below."""
        instance, mapping = self.instance, self.mapping
        count = len(instance.device_names)
        free_ps = play.lane_free_ps
        rest_ps = free_ps.copy()
        tail_ps = [0] * len(free_ps)
        latest_ps = max(free_ps)
        bound_ps = latest_ps
        device_free_ps = [min(free_ps[x] for x in lanes) for lanes in self.lanes_on]
        ready_ps = play.ready_ps.copy()
        left = [False] * len(free_ps)
        for index, (segment, lane) in enumerate(self.runs):
            if issued >> index & 1:
                continue
            device = instance.lane_device[lane]
            start_ps = free_ps[lane]
            for tensor, copy_ps in instance.reads[segment]:
                at = tensor * count + device
                there_ps = ready_ps[at]
                if there_ps < 0:
                    elsewhere = [
                        x for x in ready_ps[tensor * count : (tensor + 1) * count] if x >= 0
                    ]
                    there_ps = max(min(elsewhere), device_free_ps[device]) + copy_ps
                    ready_ps[at] = there_ps
                start_ps = max(start_ps, there_ps)
            latency_ps = instance.latency_ps[segment][lane]
            end_ps = start_ps + latency_ps
            rest_ps[lane] += latency_ps
            tail = self.tail_ps[segment]
            tail_ps[lane] = min(tail_ps[lane], tail) if left[lane] else tail
            left[lane] = True
            bound_ps = max(bound_ps, end_ps + tail)
            for tensor in instance.writes[segment]:
                ready_ps[tensor * count + device] = end_ps
        return max(bound_ps, *(a + b for a, b in zip(rest_ps, tail_ps, strict=True)))
