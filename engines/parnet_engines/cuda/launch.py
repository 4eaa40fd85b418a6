"""From a program's steps to what is launched for each inference, by the best way there is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.phases import cut_into_phases
from parnet_engines.schedule.execution import Execution

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.lanes import Action, CudaLanes
    from parnet_engines.cuda.phases import Phase
    from parnet_engines.cuda.resources import CudaResources
    from parnet_engines.schedule.program import Program

_MAX_REASON = 200


class Launcher:
    """Decides how a program is launched.

    Parameters
    ----------
    program
        The program.
    lanes
        Its streams and events.
    driver, resources
        Where graphs come from, and who releases them.
    use_graphs
        Whether to try CUDA graphs at all.
    """

    def __init__(
        self,
        program: Program,
        lanes: CudaLanes,
        driver: CudaDriver,
        resources: CudaResources,
        *,
        use_graphs: bool = True,
    ) -> None:
        self._program = program
        self._lanes = lanes
        self._driver = driver
        self._resources = resources
        self._use_graphs = use_graphs

    def prepare(self, actions: Mapping[int, Action]) -> tuple[Execution, Callable[[], None]]:
        """Warm up, and return how an inference is launched and what launches it.

        The steps are enqueued once before anything is captured, and again after each
        capture that was refused, so that whatever is wrong with them shows here.

        Parameters
        ----------
        actions
            What enqueues each step.

        Returns
        -------
        execution, launch
            `launch` enqueues one inference, after which the origin's stream goes on. The
            context of the origin's device has to be current.

        Raises
        ------
        Exception
            What an engine or the driver raises when the steps are enqueued.
        """
        steps = range(len(self._program.steps))
        enqueue = partial(self._lanes.enqueue, steps, actions, captured=False)
        self._warm_up(enqueue)
        copies = self._lanes.copy_route
        if not self._use_graphs:
            return Execution("enqueue", 0, copies, "CUDA graphs are switched off"), enqueue
        try:
            executable = self._capture_whole(actions)
        except Exception as error:  # noqa: BLE001 - whatever refuses it, the steps run without
            reason = f"one CUDA graph was refused: {_first_line(error)}"
        else:
            return Execution("graph", 1, copies), partial(self._launch, executable)
        self._warm_up(enqueue)
        if len(self._lanes.devices) > 1 and not self._lanes.has_detours:
            try:
                launch, launches = self._capture_phases(actions)
            except Exception as error:  # noqa: BLE001
                reason += f"; one for each device: {_first_line(error)}"
                self._warm_up(enqueue)
            else:
                return Execution("device graphs", launches, copies, reason), launch
        return Execution("enqueue", 0, copies, reason), enqueue

    def _warm_up(self, enqueue: Callable[[], None]) -> None:
        enqueue()
        with on_device(self._driver, self._lanes.home):
            self._driver.synchronize(self._lanes.origin)

    def _capture_whole(self, actions: Mapping[int, Action]) -> int:
        steps = range(len(self._program.steps))
        enqueue = partial(self._lanes.enqueue, steps, actions, captured=True)
        with on_device(self._driver, self._lanes.home):
            return self._resources.capture(self._lanes.home, self._lanes.origin, enqueue)

    def _launch(self, executable: int) -> None:
        self._driver.launch(executable, self._lanes.origin)

    def _capture_phases(self, actions: Mapping[int, Action]) -> tuple[Callable[[], None], int]:
        phases = cut_into_phases(self._program, self._lanes.ordinals)
        ends = [self._resources.create_event(phase.device) for phase in phases]
        executables = [self._capture_phase(phase, actions) for phase in phases]
        launches = sum(executable is not None for executable in executables)
        leads: dict[int, int] = {}
        for lane, device in self._lanes.ordinals.items():
            leads.setdefault(device, self._lanes.streams[lane])

        def launch() -> None:
            driver = self._driver
            for phase, executable, end in zip(phases, executables, ends, strict=True):
                stream = leads[phase.device]
                with on_device(driver, phase.device):
                    for before in phase.after:
                        driver.wait_event(stream, ends[before])
                    if executable is not None:
                        driver.launch(executable, stream)
                    driver.record_event(end, stream)

        return launch, launches

    def _capture_phase(self, phase: Phase, actions: Mapping[int, Action]) -> int | None:
        """Return a graph of one phase; None for one that only orders others."""
        if not phase.lanes:
            return None
        lead, *others = (self._lanes.streams[lane] for lane in phase.lanes)
        fork = self._resources.create_event(phase.device)
        joins = [self._resources.create_event(phase.device) for _ in others]
        driver = self._driver

        def enqueue() -> None:
            driver.record_event(fork, lead)
            for stream in others:
                driver.wait_event(stream, fork)
            self._lanes.enqueue(phase.steps, actions, captured=True)
            for stream, join in zip(others, joins, strict=True):
                driver.record_event(join, stream)
                driver.wait_event(lead, join)

        with on_device(driver, phase.device):
            return self._resources.capture(phase.device, lead, enqueue)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text[:_MAX_REASON]
