"""The lanes of a program as CUDA streams, and how each kind of step is enqueued there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from parnet_engines.cuda.devices import ordinal_of
from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.lane_priorities import lane_priorities, lane_slack
from parnet_engines.planning.bundle_costs import TYPICAL_GPU
from parnet_engines.schedule.program import Copy, Record, Run, Wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.memory import Region
    from parnet_engines.cuda.resources import CudaResources
    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.execution import CopyRoute
    from parnet_engines.schedule.program import Program

    Action = Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Detour:
    """A way by page-locked host memory, where two GPUs cannot access each other's memory.

    The half of the copy that is not on the lane's own device runs on a stream of the other
    one, between two events.
    """

    pinned: int
    stream: int
    leave: int
    back: int


class CudaLanes:
    """One slot's streams, events and copies.

    Parameters
    ----------
    checked_program
        What they are for.
    driver, resources
        Where they come from, and who releases them.
    timed
        Whether to note by events when runs and copies begin and end.
    """

    def __init__(
        self,
        checked_program: CheckedProgram,
        driver: CudaDriver,
        resources: CudaResources,
        *,
        timed: bool,
    ) -> None:
        self._program = program = checked_program.program
        self._driver = driver
        self._resources = resources
        self.ordinals = {lane.name: ordinal_of(lane.device) for lane in program.lanes}
        self.devices = tuple(dict.fromkeys(self.ordinals.values()))
        for device in self.devices:
            resources.retain_context(device)
        self._peers = self._enable_peer_access()
        priorities = self._priorities(checked_program)
        self.streams = {
            lane: resources.create_stream(device, priorities[lane])
            for lane, device in self.ordinals.items()
        }
        self.events = {
            step.event: resources.create_event(self.ordinals[step.lane])
            for step in program.steps
            if isinstance(step, Record)
        }
        self.timers: dict[int, tuple[int, int]] = {}
        if timed:
            for index, step in enumerate(program.steps):
                if isinstance(step, Run | Copy):
                    device = self.ordinals[step.lane]
                    begin, end = (resources.create_event(device, timing=True) for _ in range(2))
                    self.timers[index] = (begin, end)
        self._detours: dict[int, _Detour] = {}
        self._helpers: dict[int, int] = {}

    @property
    def origin(self) -> int:
        """The origin's stream."""
        return self.streams[self._program.origin.name]

    @property
    def home(self) -> int:
        """Ordinal of the origin's device."""
        return self.ordinals[self._program.origin.name]

    @property
    def copy_route(self) -> CopyRoute:
        """The longest way that a copy of the program takes."""
        pairs = _copied_between(self._program)
        if not pairs:
            return "none"
        if all(a == b for a, b in pairs):
            return "memory"
        return "pinned host" if self.has_detours else "peer"

    @property
    def has_detours(self) -> bool:
        """Whether a copy goes by way of the host."""
        return any(a != b and (a, b) not in self._peers for a, b in _copied_between(self._program))

    def prepare_detours(self, regions: Mapping[str, Region]) -> None:
        """Allocate what copies by way of the host need."""
        for index, step in enumerate(self._program.steps):
            if not isinstance(step, Copy):
                continue
            source, target = regions[step.source], regions[step.target]
            if source.device == target.device or (source.device, target.device) in self._peers:
                continue
            own = self.ordinals[step.lane]
            other = source.device if own == target.device else target.device
            if other not in self._helpers:
                self._helpers[other] = self._resources.create_stream(other, 0)
            self._detours[index] = _Detour(
                self._resources.allocate_pinned(own, source.size_bytes),
                self._helpers[other],
                self._resources.create_event(own),
                self._resources.create_event(other),
            )

    def actions(
        self,
        regions: Mapping[str, Region],
        bindings: Mapping[int, Callable[[int], None]],
    ) -> dict[int, Action]:
        """Return what enqueues each step, by its index.

        Parameters
        ----------
        regions
            Where the buffers are.
        bindings
            Bound engines by the indices of their runs.
        """
        found: dict[int, Action] = {}
        for index, step in enumerate(self._program.steps):
            stream = self.streams[step.lane]
            match step:
                case Run():
                    found[index] = partial(bindings[index], stream)
                case Copy():
                    found[index] = self._copy(index, step, regions)
                case Record():
                    found[index] = partial(
                        self._driver.record_event, self.events[step.event], stream
                    )
                case Wait():
                    found[index] = partial(self._driver.wait_event, stream, self.events[step.event])
        return found

    def enqueue(
        self, steps: Iterable[int], actions: Mapping[int, Action], *, captured: bool
    ) -> None:
        """Enqueue steps in the given order, each with its device's context current.

        Parameters
        ----------
        steps
            Indices of steps.
        actions
            As `actions` returns them.
        captured
            Whether the streams are being captured.
        """
        steps = tuple(steps)
        if not steps:
            return
        driver, ordinals = self._driver, self.ordinals
        lanes = {index: self._program.steps[index].lane for index in steps}
        current = ordinals[lanes[steps[0]]]
        with on_device(driver, current):
            for index in steps:
                device = ordinals[lanes[index]]
                if device != current:
                    driver.set_context(device)
                    current = device
                timers = self.timers.get(index)
                if timers is None:
                    actions[index]()
                    continue
                stream = self.streams[lanes[index]]
                driver.record_event(timers[0], stream, external=captured)
                actions[index]()
                driver.record_event(timers[1], stream, external=captured)

    def _copy(self, index: int, step: Copy, regions: Mapping[str, Region]) -> Action:
        source, target = regions[step.source], regions[step.target]
        stream, size_bytes = self.streams[step.lane], source.size_bytes
        if index in self._detours:
            return partial(self._copy_by_host, self._detours[index], step, source, target)
        to, origin = target.address, source.address
        if source.device == target.device:
            return partial(self._driver.copy_on_device, to, origin, size_bytes, stream)
        return partial(
            self._driver.copy_peer,
            to,
            origin,
            size_bytes,
            stream,
            target_device=target.device,
            source_device=source.device,
        )

    def _copy_by_host(self, detour: _Detour, step: Copy, source: Region, target: Region) -> None:
        driver, size_bytes = self._driver, source.size_bytes
        own, stream = self.ordinals[step.lane], self.streams[step.lane]
        other = source.device if own == target.device else target.device
        if own == source.device:
            driver.copy_to_host(detour.pinned, source.address, size_bytes, stream)
        driver.record_event(detour.leave, stream)
        driver.set_context(other)
        driver.wait_event(detour.stream, detour.leave)
        if own == source.device:
            driver.copy_to_device(target.address, detour.pinned, size_bytes, detour.stream)
        else:
            driver.copy_to_host(detour.pinned, source.address, size_bytes, detour.stream)
        driver.record_event(detour.back, detour.stream)
        driver.set_context(own)
        driver.wait_event(stream, detour.back)
        if own == target.device:
            driver.copy_to_device(target.address, detour.pinned, size_bytes, stream)

    def _enable_peer_access(self) -> frozenset[tuple[int, int]]:
        """Return the pairs of devices that a tensor can be copied between directly."""
        found = set()
        for a, b in sorted({tuple(sorted(p)) for p in _copied_between(self._program)}):
            ways = [(a, b), (b, a)]
            if a != b and all(self._driver.can_access_peer(*way) for way in ways):
                for way in ways:
                    self._driver.enable_peer_access(*way)
                found.update(ways)
        return frozenset(found)

    def _priorities(self, checked_program: CheckedProgram) -> dict[str, int]:
        graph = checked_program.graph
        segments = {step.segment for step in self._program.steps if isinstance(step, Run)}
        weights = (
            {s.name: TYPICAL_GPU.latency_ms(s.cost) for s in graph.segments}
            if graph
            else dict.fromkeys(segments, 1.0)
        )
        slack = lane_slack(self._program, weights)
        found: dict[str, int] = {}
        for device in self.devices:
            least, greatest = self._driver.priority_range(device)
            own = {lane: slack[lane] for lane, where in self.ordinals.items() if where == device}
            found |= lane_priorities(own, least, greatest)
        return found


def _copied_between(program: Program) -> set[tuple[int, int]]:
    buffers = program.buffers_by_name
    return {
        (ordinal_of(buffers[step.source].device), ordinal_of(buffers[step.target].device))
        for step in program.steps
        if isinstance(step, Copy)
    }
