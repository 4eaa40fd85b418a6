"""What a row takes besides time: memory, files, and the way to its first result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from parnet_export.bundle import Bundle

_PROC = Path("/proc")
_PEAK_FIELD = "VmHWM"


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one row takes besides time.

    Parameters
    ----------
    weights_bytes
        The network's constant tensors, each once.
    activation_bytes
        All tensors that the operators of one inference read and write, constants excluded.
        Operators that a runtime fuses hand less through memory than this.
    graph_bytes
        The ONNX files that the row loads, without the weights beside them.
    engine_bytes
        The engine files that the row loads; None where the runtime keeps none.
    load_ms
        From a process that has loaded neither runtime nor graph to the first result.
    peak_host_bytes
        Most main memory that the row's process ever held, the interpreter and the runtime
        included; None where the system does not tell.
    peak_device_bytes
        Most memory that the row's process was seen to take of its GPUs, after each turn, as
        the CUDA driver counts it; without the CUDA context itself. None on the CPU.
    """

    weights_bytes: int
    activation_bytes: int
    graph_bytes: int
    engine_bytes: int | None
    load_ms: float
    peak_host_bytes: int | None
    peak_device_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """What a bundle's manifest tells of a row's size; the fields are those of `Footprint`."""

    weights_bytes: int
    activation_bytes: int
    graph_bytes: int


def graph_sizes(bundle: Bundle, plan: Literal["whole", "streams"], batch: int = 1) -> GraphSizes:
    """Return the sizes of what a row loads.

    Parameters
    ----------
    bundle
        The bundle.
    plan
        Whether the row loads the whole graph or one graph per segment.
    batch
        Samples in one inference; counts only where the bundle leaves its batch open.
    """
    manifest = bundle.manifest
    graphs = [manifest.whole] if plan == "whole" else list(manifest.segment_files.values())
    shapes = [tensor.shape for tensor in manifest.inputs if tensor.shape]
    is_open = bool(shapes) and isinstance(shapes[0][0], str)
    return GraphSizes(
        weights_bytes=manifest.whole_cost.weight_bytes,
        activation_bytes=manifest.whole_cost.activation_bytes * (batch if is_open else 1),
        graph_bytes=sum(manifest.files[name].size_bytes for name in graphs),
    )


def peak_host_bytes(process_id: int, proc: Path = _PROC) -> int | None:
    """Return the most main memory that a live process has held; None where nobody tells.

    It is read from Linux's table of processes. ``getrusage`` is no substitute: what it
    tells of a new process starts with the peak of the process that started it.
    """
    try:
        text = (proc / str(process_id) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        field, _, value = line.partition(":")
        words = value.split()
        if field == _PEAK_FIELD and words and words[0].isdecimal():
            return int(words[0]) * 1024
    return None
