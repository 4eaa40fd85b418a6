"""When runs and copies on GPUs began and ended, on the clock of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.cuda.driver import on_device
from parnet_engines.schedule.recording import span_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_engines.clock import Clock
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.lanes import CudaLanes
    from parnet_engines.cuda.resources import CudaResources
    from parnet_engines.schedule.program import Program
    from parnet_engines.schedule.recording import Span


class CudaClocks:
    """An event on each device whose time the host knows, to measure all others against.

    Parameters
    ----------
    program
        The program.
    lanes
        Its streams, with timers.
    driver, resources
        CUDA, and who releases the events.
    clock
        The host's.
    """

    def __init__(
        self,
        program: Program,
        lanes: CudaLanes,
        driver: CudaDriver,
        resources: CudaResources,
        clock: Clock,
    ) -> None:
        self._program = program
        self._lanes = lanes
        self._driver = driver
        self._clock = clock
        self._zeros = {
            device: resources.create_event(device, timing=True) for device in lanes.devices
        }

    def synchronise(self) -> dict[int, int]:
        """Let each device's time scale begin anew, and return when that was, on the clock."""
        began_ns: dict[int, int] = {}
        leads: dict[int, int] = {}
        for lane, device in self._lanes.ordinals.items():
            leads.setdefault(device, self._lanes.streams[lane])
        for device, zero in self._zeros.items():
            with on_device(self._driver, device):
                self._driver.record_event(zero, leads[device])
                self._driver.synchronize(leads[device])
                began_ns[device] = self._clock.now_ns()
        return began_ns

    def spans(self, inference: int, began_ns: Mapping[int, int]) -> tuple[Span, ...]:
        """Return the runs and copies of an inference that has ended.

        Parameters
        ----------
        inference
            Its number.
        began_ns
            What `synchronise` returned before it.
        """
        found = []
        for index, timers in self._lanes.timers.items():
            device = self._lanes.ordinals[self._program.steps[index].lane]
            moments = [
                began_ns[device]
                + round(self._driver.elapsed_ms(device, self._zeros[device], event) * 1e6)
                for event in timers
            ]
            found.append(span_of(self._program, index, moments[0], moments[1], inference))
        return tuple(found)
