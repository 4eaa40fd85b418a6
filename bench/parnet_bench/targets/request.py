"""What a user asks to have measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from parnet_bench.targets import graphs
from parnet_bench.targets.graphs import AS_IT_IS, Reading

if TYPE_CHECKING:
    from parnet_engines.cuda.boundary import Boundary
    from parnet_export.bundle import Precision

Task = Literal["classification", "detection"]
"""What networks are measured where no target is named."""

STREAMS = "streams"
"""The plan of a row of segments, unless another one is asked for."""

_BESIDE_CLASSIFIERS = ("resnet34", "resnet50")
_BESIDE_DETECTORS = ("yolov4-csp",)


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    Parameters
    ----------
    targets
        Bundles, ONNX files and catalogue names; where there are none, those of the task.
    ckpt
        Checkpoint or catalogue name of the first target's network, in training form.
    reading
        How the checkpoint is read.
    baselines
        Catalogue names to measure beside the targets.
    batches, resolution, precision
        What targets leave open; by default 1, the network's own resolution, and float32.
        Where a target fixes them, nothing else can be asked for. Every batch size has rows
        of its own.
    devices
        Where to run. With several, segments run on the first one alone and on all of them.
    threads
        CPU threads of every row, in all; by default one for each core of the devices.
    lanes
        How many segments may run at the same time; by default as many as can.
    plan
        How segments are placed: a name of a plan, or the path of a program.
    engine
        The runtime of every row, as for `Session.open`.
    boundary
        How tensors between engines on GPUs lie in memory; None leaves it to the runtime.
    seed
        Seed of random weights.
    task
        What is measured where no target is named.
    """

    targets: tuple[str, ...] = ()
    ckpt: str | None = None
    reading: Reading = AS_IT_IS
    baselines: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    resolution: int | None = None
    precision: Precision | None = None
    devices: str = "cpu"
    threads: int | None = None
    lanes: int | None = None
    plan: str = STREAMS
    engine: str = "auto"
    boundary: Boundary | None = None
    seed: int = 0
    task: Task = "classification"


def with_default_targets(request: Request) -> Request:
    """Return a request with the networks of its task: the paper's and what it compares with.

    ParNet-L beside ResNet-34 and ResNet-50 (Goyal et al., arXiv 2110.07641, table 1), and
    the detectors with a ParNet backbone beside YOLOv4-CSP (table 6).
    """
    if request.task == "classification":
        return replace(
            request, targets=("parnet-l",), baselines=(*request.baselines, *_BESIDE_CLASSIFIERS)
        )
    ours = tuple(name for name in graphs.detectors() if name.startswith("parnet"))
    if not ours:
        return replace(request, targets=_BESIDE_DETECTORS)
    return replace(request, targets=ours, baselines=(*request.baselines, *_BESIDE_DETECTORS))
