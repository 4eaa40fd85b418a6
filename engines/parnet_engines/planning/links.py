"""Links between devices: how long a tensor takes from one memory to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parnet_export.errors import InputError


@dataclass(frozen=True, slots=True)
class Link:
    """A connection between two devices, the same in both directions.

    Parameters
    ----------
    name
        Name for people, such as ``"nvlink4"``.
    latency_us
        Time from issuing a copy to its first byte, in microseconds.
    gb_per_s
        Bandwidth in one direction, in 10^9 bytes per second; infinite if copies
        take only their latency.
    """

    name: str
    latency_us: float
    gb_per_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_us) and self.latency_us >= 0):
            raise ValueError(f"link {self.name!r} needs a latency of 0 us or more")
        if not self.gb_per_s > 0:
            raise ValueError(f"link {self.name!r} needs a bandwidth above 0 GB/s")

    def copy_ms(self, size_bytes: int) -> float:
        """Return the milliseconds that a copy of `size_bytes` occupies the link."""
        return self.latency_us * 1e-3 + size_bytes / (self.gb_per_s * 1e6)


FREE_LINK = Link("free", 0.0, math.inf)
"""Copies that take no time: the ideal that real links are compared with."""

MEMORY = Link("memory", 2.0, 10.0)
"""A copy from one CPU device to another: one core reads and writes main memory."""

LINKS = {
    link.name: link
    for link in (
        Link("nvlink4", 3.0, 450.0),
        Link("pcie4", 6.0, 31.5),
        Link("pcie5", 6.0, 63.0),
        Link("ethernet100", 30.0, 12.5),
    )
}
"""Links by name, with nominal bandwidths.

Bandwidths are what the standards publish for one direction: NVLink 4, 18 links of
25 GB/s (NVIDIA H100 Tensor Core GPU Architecture, 900 GB/s for both directions);
PCI Express 4.0 and 5.0 with 16 lanes of 16 and 32 GT/s in 128b/130b coding (PCI-SIG
base specifications); 100 Gbit/s Ethernet (IEEE 802.3). Real copies reach 80 to 95 %
of them. No standard publishes latencies: those here are the order of magnitude of a
peer copy that is issued from a stream, and of a message over RDMA. Measure yours
and give it as ``LATENCY_US,GB_S`` when it matters.
"""


def parse_link(text: str) -> Link:
    """Return the link that a command line names, or describes as ``LATENCY_US,GB_S``.

    Raises
    ------
    InputError
        When `text` is neither a known name nor two usable numbers.
    """
    if text in LINKS:
        return LINKS[text]
    latency, comma, bandwidth = text.partition(",")
    known = ", ".join(LINKS)
    remedy = f"Use one of {known}, or LATENCY_US,GB_S such as 5,25"
    if not comma:
        raise InputError(f"link {text!r}", "is not a link that is known by name", remedy)
    try:
        return Link(text, float(latency), float(bandwidth))
    except ValueError as error:
        problem = "needs a latency of 0 us or more and a bandwidth above 0 GB/s"
        raise InputError(f"link {text!r}", problem, remedy) from error
