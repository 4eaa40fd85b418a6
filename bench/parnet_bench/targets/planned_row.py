"""A row that can be measured, before it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from parnet_bench.results.result import RowDescription
    from parnet_export.bundle import Bundle

    Working = Callable[[str], AbstractContextManager[None]]
    """Told what takes time while rows are planned: a context manager around it."""


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row before it is measured.

    Parameters
    ----------
    description
        What it measures.
    bundle
        The bundle that holds its graph.
    sizes
        Sizes of the symbolic dimensions of its inputs.
    plan
        How it runs: a name of a plan, or the path of a program.
    """

    description: RowDescription
    bundle: Bundle
    sizes: dict[str, int]
    plan: str

    @property
    def form_of_graph(self) -> Literal["whole", "streams"]:
        """Whether it loads the whole graph or the segments."""
        return "streams" if self.description.form == "streams" else "whole"
