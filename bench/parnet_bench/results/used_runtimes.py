"""Which of the installed runtimes a result's rows have run on, and how."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_bench.results.result import Result

_ON_CPU = ("onnxruntime",)
_ON_GPU = ("onnxruntime", "tensorrt", "torch")


def used_runtimes(result: Result) -> dict[str, str]:
    """Return distributions and versions of the runtimes that a latency can depend on.

    A result notes what is installed, and rows on GPUs note what was chosen. Where rows do
    not, what no device of them can run on is left out.
    """
    is_on_cpu = all(row.description.devices.startswith("cpu") for row in result.rows)
    names: tuple[str, ...] = _ON_CPU if is_on_cpu else _ON_GPU
    if all(row.engine for row in result.rows):
        names = tuple({row.engine for row in result.rows})
    return {
        name: version
        for name, version in result.environment.libraries.items()
        if name.startswith(names)
    }


def ways_of(result: Result) -> Iterator[str]:
    """Yield which runtime rows have, if they tell, and on GPUs how they were launched."""
    by_way: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for row in result.rows:
        if row.execution or row.engine not in {"", *_ON_CPU}:  # which goes without saying
            by_way[row.engine, row.execution].append(row.description.name)
    for (engine, execution), names in by_way.items():
        rows = "All rows" if len(names) == len(result.rows) else ", ".join(names)
        yield f"{rows}: {engine}{', ' if execution else ''}{execution}."
