"""The parts of an inference as cells for tables and pages, and what to know about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_bench.results.cost_columns import NONE
from parnet_export.console import format_ms

if TYPE_CHECKING:
    from parnet_bench.results.summary import SplitSummary

SPLIT_HEADINGS = ("to device ms", "compute ms", "to host ms", "enqueue ms")

REMARK_ON_PARTS = (
    "Copies to the device, computing and copies to the host are medians by CUDA events, enqueueing "
    "by the host's clock, of inferences that were run for them after the rounds."
)


def split_cells(split: SplitSummary | None) -> tuple[str, ...]:
    """Return the figures of `SPLIT_HEADINGS`."""
    if split is None:
        return (NONE,) * len(SPLIT_HEADINGS)
    parts_ms = (
        split.host_to_device_ms,
        split.compute_ms,
        split.device_to_host_ms,
        split.enqueue_ms,
    )
    return tuple(format_ms(part_ms).removesuffix(" ms") for part_ms in parts_ms)
