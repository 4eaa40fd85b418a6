"""The best issue order when it is settled which lanes run each segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.planning.evaluate import Objective, Play
from parnet_engines.planning.plan_bound import Relaxation, run_bit

if TYPE_CHECKING:
    from parnet_engines.planning.scenario import Instance, Step


def best_order(
    instance: Instance, relaxation: Relaxation, objective: Objective, limit_ps: int
) -> tuple[int, list[Step]] | None:
    """Return the least latency or interval below `limit_ps`, and an issue order that has it.

    Branch and bound over issue orders. A partial order is left when its lower bound
    reaches the limit, or when another that issued the same was nowhere later.
    """
    search = _OrderSearch(instance, relaxation, objective, limit_ps)
    search.extend(Play(instance), [], 0)
    return (search.limit_ps, search.best) if search.best else None


class _OrderSearch:
    """The search of `best_order`. Sets of assignments are integers, as `run_bit`."""

    def __init__(
        self, instance: Instance, relaxation: Relaxation, objective: Objective, limit_ps: int
    ) -> None:
        self.instance = instance
        self.relaxation = relaxation
        self.mapping = relaxation.mapping
        self.for_latency = objective == "latency"
        self.limit_ps = limit_ps
        self.best: list[Step] = []
        self.bits = {
            (segment, lane): run_bit(instance, segment, lane)
            for segment, lanes in enumerate(self.mapping)
            for lane in lanes
        }
        self.everything = sum(self.bits.values())
        self.needs: dict[Step, int] = {}
        self.ancestors: dict[Step, int] = {}
        for run in self.bits:
            self._link_to_producers(run)
        # When a tensor is ready matters as long as something that reads it is to come.
        self.readers = [0] * len(instance.tensor_names)
        for (segment, _), bit in self.bits.items():
            for tensor in instance.reads[segment]:
                self.readers[tensor] |= bit
        for tensor in instance.network_outputs:
            self.readers[tensor] = -1
        self.candidates: dict[int, list[Step]] = {}
        self.seen: dict[int, list[tuple[int, ...]]] = {}

    def _link_to_producers(self, run: Step) -> None:
        """Find what has to be issued before a run, directly and in all.

        Of each producer that is the run on the same device, or else the one that is
        copied from; and that one also comes before the other runs of its segment.
        """
        segment, lane = run
        device = self.instance.lane_device[lane]
        before = []
        for producer in self.instance.predecessors[segment]:
            lanes = self.mapping[producer]
            local = [x for x in lanes if self.instance.lane_device[x] == device]
            before.append((producer, (local or lanes)[0]))
        if lane != self.mapping[segment][0] and self._is_copied(segment):
            before.append((segment, self.mapping[segment][0]))
        self.needs[run] = self.ancestors[run] = 0
        for other in before:
            self.needs[run] |= self.bits[other]
            self.ancestors[run] |= self.bits[other] | self.ancestors[other]

    def _is_copied(self, segment: int) -> bool:
        """Tell whether a device that does not run a segment reads what it produces."""
        instance = self.instance
        here = {instance.lane_device[lane] for lane in self.mapping[segment]}
        read_on = {
            instance.lane_device[lane]
            for after in instance.successors[segment]
            for lane in self.mapping[after]
        }
        if not set(instance.writes[segment]).isdisjoint(instance.network_outputs):
            read_on.add(0)
        return bool(read_on - here)

    def extend(self, play: Play, steps: list[Step], issued: int) -> None:
        """Try every way to go on from a partial order, the most promising first."""
        if issued == self.everything:
            latency_ps = play.finish()
            value_ps = latency_ps if self.for_latency else play.interval_ps
            if value_ps < self.limit_ps:
                self.limit_ps, self.best = value_ps, list(steps)
            return
        children = []
        for run in self._candidates(issued):
            child = play.copy()
            end_ps = child.run(*run)
            then_issued = issued | self.bits[run]
            if self._is_new(child, then_issued):
                bound_ps = self._bound(child, then_issued)
                children.append((bound_ps, end_ps, run, child))
        children.sort(key=lambda entry: entry[:3])
        for bound_ps, _, run, child in children:
            if bound_ps < self.limit_ps:
                steps.append(run)
                self.extend(child, steps, issued | self.bits[run])
                steps.pop()

    def _bound(self, play: Play, issued: int) -> int:
        if self.for_latency:
            return self.relaxation.latency_ps(play, issued, self.limit_ps)
        return self.relaxation.interval_ps(play, issued)

    def _candidates(self, issued: int) -> list[Step]:
        """Return the assignments to try next.

        What each lane does in which order decides the times. So where all that can be
        next on some lane could be issued now, it is enough to try that: whatever comes
        before it in an issue order can come after it as well. Lanes that meet at a link,
        or in producing a tensor first, leave less freedom.
        """
        if issued in self.candidates:
            return self.candidates[issued]
        to_come = [run for run, bit in self.bits.items() if not issued & bit]
        ready = [run for run in to_come if not self.needs[run] & ~issued]
        fewest = ready
        if not self.instance.links_matter:
            for lane in range(len(self.instance.lanes)):
                on_lane = sum(self.bits[run] for run in to_come if run[1] == lane)
                first = [
                    run for run in to_come if run[1] == lane and not self.ancestors[run] & on_lane
                ]
                if 0 < len(first) < len(fewest) and all(run in ready for run in first):
                    fewest = first
        self.candidates[issued] = fewest
        return fewest

    def _is_new(self, play: Play, issued: int) -> bool:
        """Tell whether no other order of the same assignments was nowhere later than this."""
        if self.for_latency:
            count = len(self.instance.device_names)
            when = play.lane_free_ps.copy()
            floor_ps = min(when)
            if self.instance.links_matter:
                when += play.link_free_ps
            for tensor, readers in enumerate(self.readers):
                if readers & ~issued:
                    ready_ps = play.ready_ps[tensor * count : (tensor + 1) * count]
                    when += [max(at, floor_ps) for at in ready_ps]
        else:
            when = play.lane_load_ps + play.link_load_ps
        new = tuple(when)
        front = self.seen.setdefault(issued, [])
        for old in front:
            if all(a <= b for a, b in zip(old, new, strict=True)):
                return False
        front.append(new)
        return True
