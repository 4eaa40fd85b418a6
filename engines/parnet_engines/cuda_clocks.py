"""Times of CUDA events on the time scale of the host's clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_engines.cuda_driver import on_device
from parnet_engines.recording import span_of

if TYPE_CHECKING:
    from parnet_engines.clock import Clock
    from parnet_engines.cuda_driver import CudaDriver
    from parnet_engines.cuda_lanes import CudaLanes
    from parnet_engines.cuda_resources import CudaResources
    from parnet_engines.program import Program
    from parnet_engines.recording import Span

_NS_PER_MS = 1_000_000


class CudaClocks:
    """Says when runs and copies have begun and ended, with an event as zero on each device.

    Parameters
    ----------
    program, lanes
        What is timed; the lanes have timers.
    driver, resources
        Where events come from, and who releases them.
    clock
        Whose time scale spans have.
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
        self._began_ns: dict[int, int] = {}

    def synchronise(self) -> None:
        """Note when each device's time scale begins; waits for its first stream."""
        leads: dict[int, int] = {}
        for lane, device in self._lanes.ordinals.items():
            leads.setdefault(device, self._lanes.streams[lane])
        for device, zero in self._zeros.items():
            with on_device(self._driver, device):
                self._driver.record_event(zero, leads[device])
                self._driver.synchronize(leads[device])
                self._began_ns[device] = self._clock.now_ns()

    def spans(self, inference: int) -> tuple[Span, ...]:
        """Return a span for each run and copy of an inference that is complete."""
        found = []
        for index, timers in self._lanes.timers.items():
            device = self._lanes.ordinals[self._program.steps[index].lane]
            zero, began_ns = self._zeros[device], self._began_ns[device]
            begin_ns, end_ns = (
                began_ns + round(self._driver.elapsed_ms(device, zero, event) * _NS_PER_MS)
                for event in timers
            )
            found.append(span_of(self._program, index, begin_ns, end_ns, inference))
        return tuple(found)
