"""A network's inputs and outputs on a GPU: arrays of the host, or a caller's tensors there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.memory import Region, array_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_engines.cuda.driver import CudaDriver
    from parnet_engines.cuda.resources import CudaResources
    from parnet_engines.schedule.program import Program

    Addresses = tuple[int, ...]
    Given = Sequence[int | None]

ALIGNMENT_BYTES = 256
"""Engines may want tensors at multiples of this; CUDA's own allocations are."""


class CudaInterface:
    """The memory by which tensors go into a program and come out of it.

    Parameters
    ----------
    program
        The program.
    regions
        Where its buffers lie.
    driver, resources
        CUDA, and who releases what is acquired here.
    """

    def __init__(
        self,
        program: Program,
        regions: Mapping[str, Region],
        driver: CudaDriver,
        resources: CudaResources,
    ) -> None:
        self._names = (*program.inputs, *program.outputs)
        self._regions = regions
        self._driver = driver
        self._resources = resources
        self.inputs = tuple(self._pinned(name) for name in program.inputs)
        self.outputs = tuple(self._pinned(name) for name in program.outputs)
        self.own_place = tuple(regions[name].address for name in self._names)

    def place(self, given: Given) -> Addresses:
        """Return where a program is to work, for addresses of a caller's tensors.

        Parameters
        ----------
        given
            For each input, then for each output, an address, or None for the arrays here.

        Returns
        -------
        tuple
            The same with the program's own addresses for None, and for what is not aligned.
        """
        return tuple(
            own if address is None or address % ALIGNMENT_BYTES else address
            for own, address in zip(self.own_place, given, strict=True)
        )

    def regions_at(self, place: Addresses) -> dict[str, Region]:
        """Return where all buffers lie when inputs and outputs lie elsewhere."""
        regions = dict(self._regions)
        for name, address in zip(self._names, place, strict=True):
            old = regions[name]
            if address != old.address:
                regions[name] = Region(address, old.device, old.shape, old.dtype, old.layout)
        return regions

    def clear_inputs(self, stream: int) -> None:
        """Enqueue filling the inputs with zeros, so that a first run has numbers to work on."""
        own = (self._regions[name] for name in self._names[: len(self.inputs)])
        for region in dict.fromkeys(own):
            with on_device(self._driver, region.device):
                self._driver.clear(region.address, region.size_bytes, stream)

    def copy_in(self, given: Given, place: Addresses, stream: int) -> None:
        """Enqueue the copies of inputs to where the program, launched at a place, reads them."""
        for position, array in enumerate(self.inputs):
            region, address = self._regions[self._names[position]], given[position]
            size_bytes = region.size_bytes
            if address is None:
                source = array.ctypes.data
                self._driver.copy_to_device(region.address, source, size_bytes, stream)
            elif address != place[position]:
                self._driver.copy_on_device(region.address, address, size_bytes, stream)

    def copy_out(self, given: Given, place: Addresses, stream: int) -> None:
        """Enqueue the copies of outputs from where the program has written them."""
        for position, array in enumerate(self.outputs, start=len(self.inputs)):
            region, address = self._regions[self._names[position]], given[position]
            size_bytes = region.size_bytes
            if address is None:
                target = array.ctypes.data
                self._driver.copy_to_host(target, region.address, size_bytes, stream)
            elif address != place[position]:
                self._driver.copy_on_device(address, region.address, size_bytes, stream)

    def _pinned(self, name: str) -> NDArray[Any]:
        """Return page-locked memory for a network input or output."""
        region = self._regions[name]
        address = self._resources.allocate_pinned(region.device, region.size_bytes)
        return array_at(address, region.shape, region.dtype)
