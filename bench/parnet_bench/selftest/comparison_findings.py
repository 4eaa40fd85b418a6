"""What a comparison of engines says in sentences: whether aims are met, and where time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_bench.machine.state import heat_of
from parnet_bench.selftest.engine_rows import SPLIT, SPLIT_BY_VECTORS, TORCH, WHOLE_ENGINE
from parnet_bench.selftest.measured_rows import ratio_in_rounds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from parnet_bench.machine.state import GpuState
    from parnet_bench.selftest.device_limits import Limits
    from parnet_bench.selftest.measured_rows import MeasuredRow
    from parnet_bench.selftest.path_figures import PathFigures

AIM = 1.5
"""How many times as fast split streams are to be as the whole engine."""

_AHEAD = {"parnet-l": "resnet50"}
"""Which networks are to be quicker than which."""


def findings(
    rows: Sequence[MeasuredRow], limits: Sequence[Limits], gpus: Sequence[GpuState] = ()
) -> tuple[str, ...]:
    """Say whether the aims are met; where they are not, where the time goes.

    Parameters
    ----------
    rows
        All of them.
    limits
        Of the networks that are run in every way; all others are references.
    gpus
        The GPUs, as they were at their worst meanwhile.
    """
    found: list[str] = []
    for limit in limits:
        own = [row for row in rows if row.network == limit.network]
        found += _of_boundaries(limit.network, own)
        found += _of_streams(own, limit.path)
        found += _of_references(own, rows, {limit.network for limit in limits})
    for gpu in gpus:
        if gpu.slowed_by:
            reached = f", at up to {' and '.join(heat_of(gpu))}" if heat_of(gpu) else ""
            reasons = " and ".join(gpu.slowed_by)
            found.append(f"GPU {gpu.index} ({gpu.name}) was held down by {reasons}{reached}")
    return tuple(found)


def _of_boundaries(network: str, rows: Sequence[MeasuredRow]) -> Iterator[str]:
    by_name = {row.name: row.samples_ms for row in rows}
    gain = ratio_in_rounds(by_name.get(SPLIT, ()), by_name.get(SPLIT_BY_VECTORS, ()))
    if gain is not None:
        yield (
            f"{network}: with vectors between engines split streams are "
            f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f}) as fast as with linear ones"
        )


def _of_streams(rows: Sequence[MeasuredRow], path: PathFigures) -> Iterator[str]:
    split = _quickest([row for row in rows if row.name in {SPLIT, SPLIT_BY_VECTORS}])
    if split is None or split.against_whole is None:
        return
    ratio = split.against_whole
    text = f"{split.network}: {split.name} are {ratio.value:.2f}x as fast as the whole engine"
    if ratio.value < AIM:
        text += f" (aim {AIM}x)"
        if path.segments_ms:
            longest = sorted(path.segments_ms, key=lambda name: -path.segments_ms[name])[:3]
            shares = ", ".join(f"{name} {path.segments_ms[name]:.3f} ms" for name in longest)
            text += (
                f". Of {split.median_ms:.3f} ms the critical path takes "
                f"{path.critical_path_ms:.3f} ms ({shares}), and lanes overlap "
                f"{path.overlap:.0%} of the time: {path.verdict}"
            )
    yield text


def _of_references(
    own: Sequence[MeasuredRow], rows: Sequence[MeasuredRow], compared: set[str]
) -> Iterator[str]:
    """Compare a network's best engine with the whole engines of other networks."""
    best = _quickest([row for row in own if not row.name.startswith(TORCH)])
    if best is None:
        return
    for row in rows:
        if row.network in compared or row.name != WHOLE_ENGINE:
            continue
        ratio = ratio_in_rounds(row.samples_ms, best.samples_ms)
        if ratio is None:
            continue
        text = (
            f"{best.network} ({best.name}) is {ratio.value:.2f}x ({ratio.low:.2f} to "
            f"{ratio.high:.2f}) as fast as {row.network}"
        )
        if _AHEAD.get(best.network) == row.network and ratio.value <= 1:
            text += ", and is to be ahead of it"
        yield text


def _quickest(rows: Sequence[MeasuredRow]) -> MeasuredRow | None:
    measured = [row for row in rows if row.median_ms is not None]
    return min(measured, key=lambda row: row.median_ms or 0.0, default=None)
