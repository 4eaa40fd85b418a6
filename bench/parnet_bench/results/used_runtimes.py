"""Which of the installed runtimes a result's rows have run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parnet_bench.results.result import Result

_ON_CPU = ("onnxruntime",)
_ON_GPU = ("onnxruntime", "tensorrt", "torch")


def used_runtimes(result: Result) -> dict[str, str]:
    """Return distributions and versions of the runtimes that a latency can depend on.

    A result notes what is installed, and rows note their devices: what no device of them
    can run on is left out.
    """
    is_on_cpu = all(row.description.devices.startswith("cpu") for row in result.rows)
    names = _ON_CPU if is_on_cpu else _ON_GPU
    return {
        name: version
        for name, version in result.environment.libraries.items()
        if name.startswith(names)
    }
