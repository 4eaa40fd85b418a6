"""Lower bounds: what no completion of a partial placement can be below."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from parnet_engines.planning.evaluate import Play
    from parnet_engines.planning.scenario import Instance

Mapping = tuple[tuple[int, ...], ...]
"""For each segment the lanes that run it, each on a device of its own; none if unsettled.

The run on the first of them is the one that other devices copy from.
"""


def run_bit(instance: Instance, segment: int, lane: int) -> int:
    """Return the bit that stands for a segment on a lane in a set of assignments."""
    return 1 << (segment * len(instance.lanes) + lane)


class _Errand(NamedTuple):
    """What a device has to do, besides its segments, to hold what they read.

    A copy of one tensor, or the less of copying and recomputing while that is open.
    """

    at: int
    lane: int | None
    work_ps: int
    tail_ps: int


class Relaxation:
    """The timing model without the rule that a lane does one thing at a time.

    A segment then starts as soon as what it reads can be on a device that may run it.
    What the relaxation leaves out is added back as a whole: no lane is done before all
    of its work, and all lanes together are not done before all work.

    At first any lane may run any segment. `settle` says which do, from the last
    segment to the first.

    Attributes
    ----------
    mapping
        The lanes of the segments for which they are settled.
    """

    __slots__ = (
        "_copies",
        "_errand_list",
        "_first_tail_ps",
        "_follows_ps",
        "_instance",
        "_rest_ps",
        "_tail_ps",
        "_wanted",
        "mapping",
    )

    def __init__(self, instance: Instance) -> None:
        count = len(instance.segment_names)
        self._instance = instance
        self.mapping: Mapping = ((),) * count
        # What follows the first end of each segment, and what follows that of all that
        # feed it: the segment itself, and what comes then.
        self._first_tail_ps = [0] * count
        self._follows_ps = [0] * count
        self._tail_ps: dict[tuple[int, int], int] = {}
        self._copies: list[_Errand] = []
        # What settled segments read of unsettled ones: tensor and device, with what follows.
        self._wanted: dict[tuple[int, int], int] = {}
        self._look_ahead(count)

    def settle(self, segment: int, lanes: tuple[int, ...]) -> Relaxation:
        """Return the relaxation in which these lanes run a segment, and no others.

        Parameters
        ----------
        segment
            The last one that is not settled.
        lanes
            The first one is the one that other devices copy from.
        """
        twin = object.__new__(Relaxation)
        twin._instance = self._instance
        twin.mapping = (*self.mapping[:segment], lanes, *self.mapping[segment + 1 :])
        twin._first_tail_ps = self._first_tail_ps.copy()
        twin._follows_ps = self._follows_ps.copy()
        twin._tail_ps = self._tail_ps.copy()
        twin._copies = self._copies.copy()
        twin._wanted = self._wanted.copy()
        twin._settle_tails(segment, lanes)
        twin._settle_copies(segment, lanes)
        twin._look_ahead(segment)
        return twin

    def _settle_tails(self, segment: int, lanes: tuple[int, ...]) -> None:
        instance = self._instance
        device_of, latency_ps = instance.lane_device, instance.latency_ps
        here = {device_of[lane]: lane for lane in lanes}
        run_ps = dict.fromkeys(lanes, 0)
        for after, copy_ps in instance.followers[segment]:
            for lane in self.mapping[after]:
                follows_ps = latency_ps[after][lane] + self._tail_ps[after, lane]
                source = here.get(device_of[lane])
                if source is None:
                    source = lanes[0]
                    follows_ps += copy_ps
                run_ps[source] = max(run_ps[source], follows_ps)
        for lane, tail_ps in run_ps.items():
            self._tail_ps[segment, lane] = tail_ps
        self._first_tail_ps[segment] = max(run_ps.values())
        self._follows_ps[segment] = max(
            latency_ps[segment][lane] + tail_ps for lane, tail_ps in run_ps.items()
        )

    def _settle_copies(self, segment: int, lanes: tuple[int, ...]) -> None:
        instance, wanted = self._instance, self._wanted
        count = len(instance.device_names)
        devices = [instance.lane_device[lane] for lane in lanes]
        for tensor in instance.writes[segment]:
            for device in range(count):
                tail_ps = wanted.pop((tensor, device), None)
                if device in devices:
                    continue
                if tail_ps is not None:
                    self._add_copy(tensor, device, tail_ps)
                elif device == 0 and tensor in instance.network_outputs:
                    copy_ps = instance.copy_ps[tensor]
                    self._copies.append(_Errand(tensor * count, 0, copy_ps, 0))
        for lane, device in zip(lanes, devices, strict=True):
            follows_ps = instance.latency_ps[segment][lane] + self._tail_ps[segment, lane]
            for tensor in instance.reads[segment]:
                before_ps = wanted.get((tensor, device), 0)
                wanted[tensor, device] = max(before_ps, follows_ps)

    def _add_copy(self, tensor: int, device: int, tail_ps: int) -> None:
        instance = self._instance
        lanes = instance.lanes_on[device]
        at = tensor * len(instance.device_names) + device
        lane = lanes[0] if len(lanes) == 1 else None
        self._copies.append(_Errand(at, lane, instance.copy_ps[tensor], tail_ps))

    def _look_ahead(self, settled: int) -> None:
        """Find out what has to follow the segments before `settled`, and what they leave open."""
        instance = self._instance
        for segment in reversed(range(settled)):
            tail_ps = 0
            for after, _ in instance.followers[segment]:
                tail_ps = max(tail_ps, self._follows_ps[after])
            self._first_tail_ps[segment] = tail_ps
            self._follows_ps[segment] = tail_ps + instance.fastest_ps[segment]
        self._rest_ps = sum(instance.fastest_ps[:settled])
        self._errand_list = self._copies.copy()
        tensors: dict[tuple[int, int], list[int]] = {}
        for tensor, device in self._wanted:
            if instance.producer[tensor] >= 0:
                tensors.setdefault((instance.producer[tensor], device), []).append(tensor)
            elif device:
                lanes = instance.lanes_on[device]
                at = tensor * len(instance.device_names) + device
                lane = lanes[0] if len(lanes) == 1 else None
                tail_ps = self._wanted[tensor, device]
                self._errand_list.append(_Errand(at, lane, instance.copy_ps[tensor], tail_ps))
        saved_ps: dict[int, int] = {}
        for (producer, device), read in tensors.items():
            lanes = instance.lanes_on[device]
            copy_ps = sum(instance.copy_ps[tensor] for tensor in read)
            work_ps = min(copy_ps, *(instance.latency_ps[producer][lane] for lane in lanes))
            tail_ps = min(self._wanted[tensor, device] for tensor in read)
            lane = lanes[0] if len(lanes) == 1 else None
            self._errand_list.append(_Errand(-1, lane, work_ps, tail_ps))
            saved_ps[producer] = max(saved_ps.get(producer, 0), work_ps)
        # One of these errands may be the producer's own run.
        for producer, work_ps in saved_ps.items():
            self._rest_ps -= min(work_ps, instance.fastest_ps[producer])

    def interval_ps(self, play: Play, issued: int = 0) -> int:
        """Return a load that some lane reaches at least, going on from `play`."""
        work_ps, rest_ps = self._work(play, issued)
        loads_ps = [a + b for a, b in zip(play.lane_load_ps, work_ps, strict=True)]
        return max(*loads_ps, -(-(sum(loads_ps) + rest_ps) // len(loads_ps)))

    def latency_ps(self, play: Play, issued: int, limit_ps: int) -> int:
        """Return a latency that cannot be undercut, going on from `play`.

        Parameters
        ----------
        play
            What was issued so far, of settled segments only.
        issued
            The assignments issued so far, as `run_bit`.
        limit_ps
            A bound that is this high need not be any better.
        """
        free_ps = play.lane_free_ps
        ready_ps = play.ready_ps.copy()
        jobs: list[list[tuple[int, int, int]]] = [[] for _ in free_ps]
        work_ps, rest_ps = self._work(play, issued)
        total_ps = sum(free_ps) + sum(work_ps) + rest_ps
        bound_ps = max(*free_ps, -(-total_ps // len(free_ps)))
        for segment in range(len(self.mapping)):
            end_ps = self._try_lanes(segment, issued, play, ready_ps, jobs)
            bound_ps = max(bound_ps, end_ps + self._first_tail_ps[segment])
            if bound_ps >= limit_ps:
                return bound_ps
        for errand in self._errands(play):
            if errand.lane is not None:
                start_ps = free_ps[errand.lane]
                if errand.at >= 0:
                    start_ps = max(start_ps, ready_ps[errand.at] - errand.work_ps)
                jobs[errand.lane].append((start_ps, errand.work_ps, errand.tail_ps))
        return max(bound_ps, *map(_one_machine, jobs))

    def _try_lanes(
        self,
        segment: int,
        issued: int,
        play: Play,
        ready_ps: list[int],
        jobs: list[list[tuple[int, int, int]]],
    ) -> int:
        """Note when a segment can end on each device, and return its first end if it is to come."""
        instance = self._instance
        count = len(instance.device_names)
        latency_ps = instance.latency_ps[segment]
        settled = self.mapping[segment]
        ends_ps: dict[int, int] = {}
        to_come = True
        for lane in settled or range(len(instance.lanes)):
            if issued and issued & run_bit(instance, segment, lane):
                to_come = False
                continue
            device = instance.lane_device[lane]
            start_ps = max(play.lane_free_ps[lane], self._arrive(segment, device, play, ready_ps))
            end_ps = start_ps + latency_ps[lane]
            if device not in ends_ps or end_ps < ends_ps[device]:
                ends_ps[device] = end_ps
            if settled:
                jobs[lane].append((start_ps, latency_ps[lane], self._tail_ps[segment, lane]))
        if not ends_ps:
            return 0
        first_ps = min(ends_ps.values())
        for tensor in instance.writes[segment]:
            elsewhere_ps = first_ps + instance.copy_ps[tensor]
            for device, end_ps in ends_ps.items():
                on_time_ps = end_ps if settled else min(end_ps, elsewhere_ps)
                ready_ps[tensor * count + device] = on_time_ps
        return first_ps if to_come else 0

    def _arrive(self, segment: int, device: int, play: Play, ready_ps: list[int]) -> int:
        """Return when all that a segment reads can be on a device."""
        instance = self._instance
        count = len(instance.device_names)
        start_ps = 0
        for tensor in instance.reads[segment]:
            at = tensor * count + device
            there_ps = ready_ps[at]
            if there_ps < 0:
                producer = instance.producer[tensor]
                home = 0 if producer < 0 else instance.lane_device[self.mapping[producer][0]]
                free_ps = min([play.lane_free_ps[lane] for lane in instance.lanes_on[device]])
                there_ps = max(ready_ps[tensor * count + home], free_ps) + instance.copy_ps[tensor]
                ready_ps[at] = there_ps
            start_ps = max(start_ps, there_ps)
        return start_ps

    def _work(self, play: Play, issued: int) -> tuple[list[int], int]:
        """Return what each lane still has to do, and what is left for any lane."""
        instance = self._instance
        work_ps = [0] * len(instance.lanes)
        rest_ps = self._rest_ps
        for segment, settled in enumerate(self.mapping):
            for lane in settled:
                if not issued or not issued & run_bit(instance, segment, lane):
                    work_ps[lane] += instance.latency_ps[segment][lane]
        for errand in self._errands(play):
            if errand.lane is None:
                rest_ps += errand.work_ps
            else:
                work_ps[errand.lane] += errand.work_ps
        return work_ps, rest_ps

    def _errands(self, play: Play) -> list[_Errand]:
        """Return the errands that are still to be done."""
        return [e for e in self._errand_list if e.at < 0 or play.ready_ps[e.at] < 0]


def _one_machine(jobs: list[tuple[int, int, int]]) -> int:
    """Return when a lane and all that follows its jobs can be over.

    Each job has the time from which it can run, how long it takes, and what follows
    it elsewhere. Preemption is allowed, so that always running the job with the most
    to follow is best (Jackson's preemptive schedule, the bound of Carlier 1982).
    """
    jobs.sort()
    waiting: list[tuple[int, int]] = []
    now_ps = bound_ps = upcoming = 0
    while waiting or upcoming < len(jobs):
        if not waiting:
            now_ps = max(now_ps, jobs[upcoming][0])
        while upcoming < len(jobs) and jobs[upcoming][0] <= now_ps:
            heapq.heappush(waiting, (-jobs[upcoming][2], jobs[upcoming][1]))
            upcoming += 1
        minus_tail_ps, left_ps = heapq.heappop(waiting)
        run_ps = left_ps
        if upcoming < len(jobs):
            run_ps = min(left_ps, jobs[upcoming][0] - now_ps)
        now_ps += run_ps
        if run_ps < left_ps:
            heapq.heappush(waiting, (minus_tail_ps, left_ps - run_ps))
        else:
            bound_ps = max(bound_ps, now_ps - minus_tail_ps)
    return bound_ps
