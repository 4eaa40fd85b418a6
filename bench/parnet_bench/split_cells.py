"""The parts of an inference as cells for tables and pages, and what to know about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_bench.cost_columns import NONE
from parnet_export.console import format_ms

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_bench.result import Result
    from parnet_bench.summary import RowSummary, SplitSummary

SPLIT_HEADINGS = ("to device", "compute", "to host", "enqueue")


def split_cells(split: SplitSummary | None) -> tuple[str, ...]:
    """Return the figures of `SPLIT_HEADINGS` in milliseconds, without the unit."""
    if split is None:
        return (NONE,) * len(SPLIT_HEADINGS)
    parts_ms = (
        split.host_to_device_ms,
        split.compute_ms,
        split.device_to_host_ms,
        split.enqueue_ms,
    )
    return tuple(format_ms(part_ms).removesuffix(" ms") for part_ms in parts_ms)


def remarks_on_parts(result: Result, summaries: Sequence[RowSummary]) -> Iterator[str]:
    """Yield what latencies have in them, where that is not what they usually have."""
    if not result.procedure.data_transfers:
        yield "Latencies leave out copies between the host and GPUs: inputs and outputs stay there."
    if result.procedure.l2_flush:
        yield "Caches were emptied before each inference, outside of its latency."
    if any(summary.split for summary in summaries):
        yield (
            "Copies to the device, computing and copies to the host are medians by CUDA events, "
            "enqueueing by the host's clock, of inferences that were run for them after the rounds."
        )
