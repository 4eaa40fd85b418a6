"""Lower bounds: what no completion of a partial placement can be below."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_engines.evaluate import Play
    from parnet_engines.scenario import Instance

Mapping = tuple[tuple[int, ...], ...]
"""For each segment the lanes that run it, each on a device of its own; none if unsettled."""


class Relaxation:
    """The timing model without the rule that a lane does one thing at a time.

    A segment then starts as soon as what it reads can be on a device that may run it.
    What the relaxation leaves out is added back as a whole: no lane is done before all
    of its work, and all lanes together are not done before all work.

    Parameters
    ----------
    instance
        The stream graph on its lanes.
    mapping
        The lanes of the segments for which they are settled. Where those of a segment
        are, those of all segments that depend on it are too.
    """

    def __init__(self, instance: Instance, mapping: Mapping) -> None:
        self._instance = instance
        self._mapping = mapping
        self._lanes = range(len(instance.lanes))
        self._count = len(instance.device_names)
        self._lane_of = [x[0] if len(x) == 1 else -1 for x in instance.lanes_on]
        self._copies = self._settled_copies()
        self._tail_ps = self._tails()

    def interval_ps(self, play: Play, issued: int = 0) -> int:
        """Return a load that some lane reaches at least, going on from `play`."""
        work_ps, rest_ps = self._work(play, issued)
        loads_ps = [a + b for a, b in zip(play.lane_load_ps, work_ps, strict=True)]
        return max(*loads_ps, -(-(sum(loads_ps) + rest_ps) // len(loads_ps)))

    def latency_ps(self, play: Play, issued: int = 0) -> int:
        """Return a latency that cannot be undercut, going on from `play`.

        Parameters
        ----------
        play
            What was issued so far, of settled segments only.
        issued
            One bit for each assignment issued, at ``segment * lanes + lane``.
        """
        instance, count, lanes = self._instance, self._count, self._lanes
        free_ps = play.lane_free_ps
        soonest_ps = [min(free_ps[lane] for lane in on) for on in instance.lanes_on]
        ready_ps = play.ready_ps.copy()
        head_ps: list[int | None] = [None] * len(lanes)
        tail_ps: list[int | None] = [None] * len(lanes)
        bound_ps = max(free_ps)
        for segment, settled in enumerate(self._mapping):
            ends_ps: dict[int, int] = {}
            for lane in settled or lanes:
                if issued >> (segment * len(lanes) + lane) & 1:
                    continue
                device = instance.lane_device[lane]
                first_ps, start_ps = self._arrive(segment, device, ready_ps, soonest_ps)
                start_ps = max(start_ps, free_ps[lane])
                end_ps = start_ps + instance.latency_ps[segment][lane]
                ends_ps[device] = min(ends_ps.get(device, end_ps), end_ps)
                if settled:
                    first_ps = min(first_ps, start_ps)
                    head = head_ps[lane]
                    head_ps[lane] = first_ps if head is None else min(head, first_ps)
                    tail = tail_ps[lane]
                    this = self._tail_ps[segment]
                    tail_ps[lane] = this if tail is None else min(tail, this)
            if not ends_ps:
                continue
            end_ps = min(ends_ps.values())
            bound_ps = max(bound_ps, *ends_ps.values()) if settled else bound_ps
            if len(ends_ps) == len(settled) or not settled:
                bound_ps = max(bound_ps, end_ps + self._tail_ps[segment])
            for tensor in instance.writes[segment]:
                for device, here_ps in ends_ps.items():
                    elsewhere_ps = end_ps + instance.copy_ps[tensor]
                    ready_ps[tensor * count + device] = here_ps if settled else min(here_ps, elsewhere_ps)
        work_ps, rest_ps = self._work(play, issued)
        total_ps = sum(free_ps) + sum(work_ps) + rest_ps
        bound_ps = max(bound_ps, -(-total_ps // len(lanes)))
        for lane in lanes:
            head = head_ps[lane]
            tail = tail_ps[lane]
            bound_ps = max(bound_ps, max(free_ps[lane], head or 0) + work_ps[lane] + (tail or 0))
        bound_ps = max(bound_ps, *(self._arrive_exit(t, c, ready_ps, soonest_ps) for t, c in instance.exits))
        return bound_ps

    def _arrive_exit(self, tensor, copy_ps, ready_ps, soonest_ps):
        at = tensor * self._count
        if ready_ps[at] >= 0:
            return ready_ps[at]
        return max(min(x for x in ready_ps[at : at + self._count] if x >= 0), soonest_ps[0]) + copy_ps

    def _arrive(
        self, segment: int, device: int, ready_ps: list[int], soonest_ps: list[int]
    ) -> tuple[int, int]:
        """Return when the first copy for a segment can start, and when all it reads is there."""
        count = self._count
        first_ps = self._instance.horizon_ps
        start_ps = 0
        for tensor, copy_ps in self._instance.reads[segment]:
            at = tensor * count + device
            if ready_ps[at] < 0:
                held_ps = min(x for x in ready_ps[tensor * count : (tensor + 1) * count] if x >= 0)
                ready_ps[at] = max(held_ps, soonest_ps[device]) + copy_ps
            start_ps = max(start_ps, ready_ps[at])
            if at in self._copies:
                first_ps = min(first_ps, ready_ps[at] - copy_ps)
        return first_ps, start_ps

    def _work(self, play: Play, issued: int) -> tuple[list[int], int]:
        """Return what each lane still has to do, and what some lane has to do."""
        lanes = self._lanes
        work_ps = [0] * len(lanes)
        rest_ps = 0
        for segment, settled in enumerate(self._mapping):
            for lane in settled:
                if not issued >> (segment * len(lanes) + lane) & 1:
                    work_ps[lane] += self._instance.latency_ps[segment][lane]
            if not settled:
                rest_ps += min(self._instance.latency_ps[segment])
        for at, (lane, copy_ps) in self._copies.items():
            if play.ready_ps[at] < 0:
                if lane >= 0:
                    work_ps[lane] += copy_ps
                else:
                    rest_ps += copy_ps
        return work_ps, rest_ps

    def _settled_copies(self) -> dict[int, tuple[int, int]]:
        """Find the copies that the settled lanes make necessary, and the lanes that make them."""
        instance = self._instance
        copies: dict[int, tuple[int, int]] = {}

        def copy(tensor: int, device: int, lane: int) -> None:
            at = tensor * self._count + device
            if at not in copies:
                copies[at] = lane, instance.copy_ps[tensor]

        for segment, settled in enumerate(self._mapping):
            for lane in settled:
                device = instance.lane_device[lane]
                for tensor, _ in instance.reads[segment]:
                    if self._is_foreign(tensor, device):
                        copy(tensor, device, self._lane_of[device])
        for tensor, _ in instance.exits:
            if self._is_foreign(tensor, 0):
                copy(tensor, 0, 0)
        return copies

    def _is_foreign(self, tensor: int, device: int) -> bool:
        """Tell whether it is settled that a tensor is not produced on a device."""
        producer = self._instance.producer[tensor]
        if producer < 0:
            return device != 0
        lanes = self._mapping[producer]
        return bool(lanes) and all(self._instance.lane_device[x] != device for x in lanes)

    def _tails(self) -> list[int]:
        """Return what must follow after the first run of each segment."""
        instance, mapping = self._instance, self._mapping
        tail_ps = [0] * len(mapping)
        for segment in reversed(range(len(mapping))):
            here = {instance.lane_device[x] for x in mapping[segment]}
            longest_ps = 0
            for after in instance.successors[segment]:
                copy_ps = max(
                    c for t, c in instance.reads[after] if instance.producer[t] == segment
                )
                shortest_ps = min(
                    instance.latency_ps[after][lane]
                    + (copy_ps if here and instance.lane_device[lane] not in here else 0)
                    for lane in mapping[after] or self._lanes
                )
                longest_ps = max(longest_ps, shortest_ps + tail_ps[after])
            if here and 0 not in here:
                for tensor, copy_ps in instance.exits:
                    if instance.producer[tensor] == segment:
                        longest_ps = max(longest_ps, copy_ps)
            tail_ps[segment] = longest_ps
        return tail_ps
