"""How far a measurement is, on standard error."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from parnet_export import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from parnet_bench.measuring.measurement import NextTurn

_NS_PER_MS = 1_000_000


@contextlib.contextmanager
def showing_progress() -> Iterator[Callable[[NextTurn], None]]:
    """Show how far a measurement is, where standard error is a terminal.

    It is drawn between turns only: a display that redraws itself takes time from the
    row that is being measured.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=console.stderr(),
        transient=True,
        auto_refresh=False,
        disable=not (sys.stderr.isatty() and console.stderr().is_interactive),
    )
    with display:
        task = display.add_task("starting", total=1)

        def observe(turn: NextTurn) -> None:
            display.update(task, description=describe(turn), completed=turn.fraction, refresh=True)

        yield observe


def describe(turn: NextTurn) -> str:
    """Return a line about the turn that begins, and what is known of its row so far."""
    parts = [f"process {turn.process}", turn.phase]
    if turn.round_number:
        parts.append(f"round {turn.round_number}")
    parts.append(console.printable(turn.row))
    if turn.median_ns is not None:
        known = console.format_ms(turn.median_ns / _NS_PER_MS)
        if turn.half_width is not None:
            known += f" +- {turn.half_width:.1%}"
        parts.append(known)
    if turn.left_s is not None:
        parts.append(f"{turn.left_s:.0f} s left")
    return ", ".join(parts)
