"""What a user can ask of an engine, and the GPUs that it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parnet_engines.cuda.boundary import Boundary  # noqa: TC001 - msgspec reads it
from parnet_engines.tensorrt.module import Backend  # noqa: TC001
from parnet_export.errors import InputError, name_some

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parnet_engines.cuda.driver import Gpu
    from parnet_export.stream_graph import TensorSpec

OPTIMIZATION_LEVELS = (0, 5)
"""TensorRT's lowest and highest builder optimisation level; its own default is 3."""

_SIZES = re.compile(r"(?:(?P<name>[^=,/]+)=)?(?P<sizes>\d+/\d+/\d+)")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")


@dataclass(frozen=True, slots=True)
class SizeRange:
    """The sizes of a symbolic dimension that an engine accepts, and the one it is tuned for."""

    smallest: int
    optimal: int
    largest: int

    def __str__(self) -> str:
        return f"{self.smallest}/{self.optimal}/{self.largest}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How engines are built; the precision is the bundle's.

    Parameters
    ----------
    tf32
        Whether float32 convolutions and products may round their inputs to TF32.
    sizes
        Range of each symbolic dimension.
    max_aux_streams
        How many further CUDA streams one engine may use at once. None: 0 for a segment,
        since lanes run segments side by side, and TensorRT's own choice for a whole graph.
    optimization_level
        From 0, the quickest to build, to 5; TensorRT's default if None.
    workspace_mib
        Scratch memory that kernels may use, in MiB; TensorRT's default if None.
    version_compatible
        Whether later versions of TensorRT may run the engine, too.
    boundary
        Memory layout of tensors between two segments.
    """

    tf32: bool = True
    sizes: dict[str, SizeRange] = field(default_factory=dict)
    max_aux_streams: int | None = None
    optimization_level: int | None = None
    workspace_mib: int | None = None
    version_compatible: bool = False
    boundary: Boundary = "linear"


@dataclass(frozen=True, slots=True)
class Target:
    """The GPUs that an engine is for.

    Parameters
    ----------
    backend
        Which TensorRT runs it.
    compute_capabilities
        Architectures, such as ``("8.9",)``; none stands for all that TensorRT-RTX builds for
        by default, 8.0 and later.
    gpu
        Name of the GPU that TensorRT timed its kernels on; empty for TensorRT-RTX.
    """

    backend: Backend
    compute_capabilities: tuple[str, ...] = ()
    gpu: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder that holds the target's engines."""
        architectures = [f"sm{c.replace('.', '')}" for c in self.compute_capabilities] or ["any"]
        model = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return "-".join([self.backend, *architectures, *([model] if model else [])])

    def __str__(self) -> str:
        if self.gpu:
            return f"{self.gpu} (compute capability {self.compute_capabilities[0]})"
        if self.compute_capabilities:
            return f"compute capability {' and '.join(self.compute_capabilities)}"
        return "compute capability 8.0 and later"


def target_of(backend: Backend, gpu: Gpu) -> Target:
    """Return the target of engines for a GPU of this machine."""
    name = gpu.name if backend == "tensorrt" else ""
    return Target(backend, (capability_of(gpu),), name)


def capability_of(gpu: Gpu) -> str:
    """Return the compute capability of a GPU as text, such as ``"8.9"``."""
    major, minor = gpu.compute_capability
    return f"{major}.{minor}"


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Return compute capabilities such as ``"8.0,8.9"``, ascending, each once.

    Raises
    ------
    InputError
        When the text is something else.
    """
    parts = {part.strip() for part in text.split(",")}
    for part in parts:
        if not _CAPABILITY.fullmatch(part):
            problem = f"{part!r} is no compute capability"
            raise InputError("--compute-capability", problem, "Give one such as 8.9, or 8.0,8.9")
    return tuple(sorted(parts, key=lambda part: tuple(map(int, part.split(".")))))


def parse_sizes(text: str | None, inputs: Iterable[TensorSpec]) -> dict[str, SizeRange]:
    """Return the range of each symbolic dimension of a network.

    Parameters
    ----------
    text
        ``"1/4/8"``: the smallest, the optimal and the largest size, of all symbolic dimensions;
        or one such range for each by name, ``"batch=1/4/8,width=64/224/512"``.
    inputs
        The network's inputs.

    Raises
    ------
    InputError
        When the text is something else, names no dimension of the network, or leaves one out.
    """
    names = tuple(dict.fromkeys(d for spec in inputs for d in spec.shape if isinstance(d, str)))
    if text is None:
        if names:
            problem = f"the bundle leaves {name_some(names)} open, and engines need a range of it"
            raise InputError("--shapes", problem, "Give smallest/optimal/largest, such as 1/1/8")
        return {}
    if not names:
        problem = "all shapes of the bundle are fixed"
        raise InputError("--shapes", problem, "Leave it out, or split with --batch dynamic")
    found: dict[str, SizeRange] = {}
    for part in text.split(","):
        match = _SIZES.fullmatch(part.strip())
        if match is None:
            problem = f"{part!r} is not smallest/optimal/largest"
            raise InputError("--shapes", problem, "Give three numbers, such as 1/4/8")
        sizes = SizeRange(*map(int, match["sizes"].split("/")))
        if not 1 <= sizes.smallest <= sizes.optimal <= sizes.largest:
            problem = f"{sizes} does not ascend from 1 or more"
            raise InputError("--shapes", problem, "Give smallest/optimal/largest, such as 1/4/8")
        name = match["name"]
        if name is not None and name not in names:
            problem = f"the bundle has no dimension {name!r}"
            raise InputError("--shapes", problem, f"Name one of {name_some(names)}")
        found |= dict.fromkeys(names if name is None else (name,), sizes)
    missing = [name for name in names if name not in found]
    if missing:
        problem = f"the range of {name_some(missing)} is missing"
        raise InputError("--shapes", problem, "Add it, or give one range for all")
    return found
