"""How far the building of engines is, on a terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from parnet_export import console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress, TaskID

_DEPTH = 3
"""Levels of phases that are shown; TensorRT nests deeper ones, which are over in no time."""


class TerminalProgress:
    """Shows the engines that are built, and the phases of the current one below.

    Use `on_terminal` to make one.
    """

    def __init__(self, display: Progress, engines: int) -> None:
        self._display = display
        self._engines = display.add_task("engines", total=engines)
        self._phases: dict[str, tuple[TaskID | None, int]] = {}

    def engine_start(self, name: str) -> None:
        """Say which engine is looked at or built next."""
        self._display.update(self._engines, description=console.printable(name))

    def engine_finish(self) -> None:
        """Count an engine, and clear what a refused or cancelled build has left."""
        for task, _ in self._phases.values():
            if task is not None:
                self._display.remove_task(task)
        self._phases.clear()
        self._display.advance(self._engines)

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Show a phase below its parent; see `parnet_engines.tensorrt.build.BuildProgress`."""
        depth = 1 + (self._phases[parent][1] if parent in self._phases else 0)
        text = console.printable("  " * depth + phase)
        task = self._display.add_task(text, total=steps) if depth <= _DEPTH else None
        self._phases[phase] = task, depth

    def step_complete(self, phase: str, step: int) -> None:
        """Move a phase on."""
        task, _ = self._phases.get(phase, (None, 0))
        if task is not None:
            self._display.update(task, completed=step + 1)

    def phase_finish(self, phase: str) -> None:
        """Remove a phase."""
        task, _ = self._phases.pop(phase, (None, 0))
        if task is not None:
            self._display.remove_task(task)


@contextmanager
def on_terminal(engines: int) -> Iterator[TerminalProgress]:
    """Show the progress of building so many engines on standard error, if it is a terminal."""
    with console.progress() as display:
        yield TerminalProgress(display, engines)
