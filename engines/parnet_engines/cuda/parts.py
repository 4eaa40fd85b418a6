"""How long the parts of an inference on GPUs take, by CUDA timing events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.resources import CudaResources

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class PartTimes:
    """Parts of one inference, in nanoseconds.

    Parameters
    ----------
    host_to_device_ns, compute_ns, device_to_host_ns
        By the device's own clock, whose events have a resolution of half a microsecond. A
        part in which nothing is copied takes what lies between two events.
    enqueue_ns
        How long the host took to hand the computation out, the transfers left out.
    """

    host_to_device_ns: int
    compute_ns: int
    device_to_host_ns: int
    enqueue_ns: int


class PartTimers:
    """Marks on a CUDA stream where the parts of an inference begin and end.

    Parameters
    ----------
    driver, resources
        Where events come from, and who releases them.
    device
        Ordinal of the stream's device, whose context has to be retained.
    """

    def __init__(self, driver: CudaDriver, resources: CudaResources, device: int) -> None:
        self._driver = driver
        self._device = device
        self._marks = tuple(resources.create_event(device, timing=True) for _ in range(4))
        self._enqueue_ns = 0

    def enqueue(
        self,
        stream: int,
        copy_in: Callable[[], object],
        launch: Callable[[], object],
        copy_out: Callable[[], object],
    ) -> None:
        """Enqueue the parts with marks between them.

        Parameters
        ----------
        stream
            Where all parts begin and end; its context has to be current.
        copy_in, launch, copy_out
            What enqueues each part.
        """
        begin, copied, computed, end = self._marks
        self._driver.record_event(begin, stream)
        copy_in()
        self._driver.record_event(copied, stream)
        begin_ns = time.perf_counter_ns()
        launch()
        self._enqueue_ns = time.perf_counter_ns() - begin_ns
        self._driver.record_event(computed, stream)
        copy_out()
        self._driver.record_event(end, stream)

    def read(self) -> PartTimes:
        """Return how long the parts took, once the stream has done all of them."""
        to_device_ns, compute_ns, to_host_ns = (
            round(self._driver.elapsed_ms(self._device, begin, end) * _NS_PER_MS)
            for begin, end in pairwise(self._marks)
        )
        return PartTimes(to_device_ns, compute_ns, to_host_ns, self._enqueue_ns)
