"""The sidecar: a JSON file beside each engine that says what the engine is.

An engine itself does not tell what it was built from, for which GPU, or by which TensorRT.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import msgspec

from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.tensorrt.module import LABELS, RTX_OLDEST_CAPABILITY
from parnet_export import files
from parnet_export.errors import InputError
from parnet_export.schema_version import require_readable

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_engines.cuda.driver import Gpu

# msgspec reads these annotations at run time.
from parnet_engines.tensorrt.options import EngineOptions, Target, capability_of

SCHEMA_VERSION = 1

_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'(?<="sidecar_sha256": ")[0-9a-f]{64}(?=")')


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor that an engine reads or writes.

    Parameters
    ----------
    name, dtype, shape
        As of a `TensorSpec`.
    direction
        Seen from the engine.
    layout
        Label of its `TensorLayout`.
    size_bytes
        The memory it takes, padding included, at the largest sizes that the engine accepts.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    direction: Literal["input", "output"]
    layout: str
    size_bytes: int

    @property
    def tensor_layout(self) -> TensorLayout:
        """How the elements lie in memory."""
        return next(layout for layout in TensorLayout if layout.label == self.layout)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that an engine is made of: equal recipes mean that building again changes nothing.

    Parameters
    ----------
    segment
        Name of the segment, or ``"whole"``.
    onnx_sha256
        Digest of its ONNX graph, which names its weights by their content.
    precision
        The bundle's.
    version
        Version of the backend that builds the engine.
    platform
        Operating system and processor architecture, such as ``"linux-x86_64"``: engines are
        not portable between them.
    target
        The GPUs that it is for.
    options
        How it is built.
    """

    segment: str
    onnx_sha256: str
    precision: str
    version: str
    platform: str
    target: Target
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class Audit:
    """The precisions in which the layers of an engine compute.

    Parameters
    ----------
    layers
        Number of layers by the type of what they produce, such as ``{"fp16": 20, "fp32": 3}``.
    unexpected_fp32
        Names of float32 layers that the graph wants in fp16.
    """

    layers: dict[str, int]
    unexpected_fp32: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """A comparison of an engine's results, on a device, with a float32 reference.

    Parameters
    ----------
    gpu
        Where it ran.
    plan_sha256
        Digest of the plan file that ran.
    error
        Largest difference relative to the largest value of the reference; None if a result
        was not finite, for which JSON has no number.
    limit
        Largest error that counts as equal.
    cosine
        Least cosine of the angle between result and reference; None as for `error`.
    least_cosine
        Least cosine that counts as equal.
    samples
        How many inputs were compared.
    when
        UTC time, ISO 8601.
    top1
        Share of items whose greatest score is the reference's; None where there are no scores.
    least_top1
        Least share that counts as equal.
    """

    gpu: str
    plan_sha256: str
    error: float | None
    limit: float
    cosine: float | None
    least_cosine: float
    samples: int
    when: str
    top1: float | None = None
    least_top1: float = 1.0

    def __post_init__(self) -> None:
        for name in ("error", "cosine"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    @property
    def passed(self) -> bool:
        """Whether the engine computes what it should."""
        return (
            self.error is not None
            and self.error <= self.limit
            and self.cosine is not None
            and self.cosine >= self.least_cosine
            and (self.top1 is None or self.top1 >= self.least_top1)
        )


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What is known about an engine.

    Parameters
    ----------
    schema_version
        Raised whenever older readers would misread the file.
    recipe
        What it was built from, for and with.
    plan
        Name of the file that holds the engine, in the same folder.
    plan_sha256, plan_bytes
        Digest and size of that file.
    tensors
        What it reads and writes.
    build_s
        Seconds that building took.
    created
        UTC time, ISO 8601.
    command
        The command line, if a command line built it.
    driver
        Versions of the NVIDIA driver it was built with; empty if it was built without a GPU.
    audit
        None if the precisions of its layers were not audited, which needs a GPU.
    verification
        None as long as its numerics were not checked on a device.
    sidecar_sha256
        Digest of the sidecar itself, taken with zeros in place of these digits.
    """

    schema_version: int
    recipe: Recipe
    plan: str
    plan_sha256: str
    plan_bytes: int
    tensors: tuple[EngineTensor, ...]
    build_s: float
    created: str
    command: tuple[str, ...] = field(default_factory=tuple)
    driver: str = ""
    audit: Audit | None = None
    verification: Verification | None = None
    sidecar_sha256: str = _NO_DIGEST

    @property
    def checked(self) -> Verification | None:
        """What a check of this very plan's numerics on a device has found; None without one."""
        found = self.verification
        return found if found is not None and found.plan_sha256 == self.plan_sha256 else None

    @property
    def is_verified(self) -> bool:
        """Whether its numerics were checked on a device, and hold."""
        return self.checked is not None and self.checked.passed

    @property
    def built_for(self) -> str:
        """What it was built for and by, as a phrase."""
        recipe = self.recipe
        return (
            f"built for {recipe.target} by {LABELS[recipe.target.backend]} {recipe.version} "
            f"on {recipe.platform}"
        )


def write_sidecar(path: Path, sidecar: Sidecar) -> Sidecar:
    """Replace `path`, whole or not at all, and return the sidecar with its digest.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    blank = replace(sidecar, sidecar_sha256=_NO_DIGEST)
    content = msgspec.json.format(msgspec.json.encode(blank), indent=2) + b"\n"
    digest = hashlib.sha256(content).hexdigest()
    files.write_bytes(path, _DIGEST.sub(digest.encode(), content))
    return replace(blank, sidecar_sha256=digest)


def read_sidecar(path: Path) -> Sidecar:
    """Read a sidecar and check that it is the file that was written.

    Raises
    ------
    InputError
        When it cannot be read, is damaged, or has a newer schema.
    """
    remedy = "Build the engine again with `parnet-export build`"
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise InputError(path, problem, remedy) from error
    try:
        upgrade = "Upgrade parnet-export, or build the engine again"
        require_readable(content, SCHEMA_VERSION, path, upgrade)
        sidecar = msgspec.json.decode(content, type=Sidecar)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(path, f"is damaged ({error})", remedy) from error
    blank = _DIGEST.sub(_NO_DIGEST.encode(), content)
    if hashlib.sha256(blank).hexdigest() != sidecar.sidecar_sha256:
        raise InputError(path, "is not the file that was written (its digest differs)", remedy)
    return sidecar


def record_verification(path: Path, verification: Verification) -> Sidecar:
    """Note in a sidecar what a check of the engine's numerics on a device has found.

    The sidecar of an engine that was built anew since the check stays as it is.

    Raises
    ------
    InputError
        When the sidecar cannot be read or written.
    """
    sidecar = read_sidecar(path)
    if sidecar.plan_sha256 != verification.plan_sha256:
        return sidecar
    return write_sidecar(path, replace(sidecar, verification=verification))


def misfit(sidecar: Sidecar, *, version: str, platform: str, gpu: Gpu | None) -> str:
    """Return why an engine does not run here, as a clause; empty if it does.

    Parameters
    ----------
    sidecar
        The engine's.
    version
        Of the backend that is installed here.
    platform
        Of this machine, as `Recipe` has it.
    gpu
        Where it is to run; None if only the software is to be compared.
    """
    recipe = sidecar.recipe
    here = f"{LABELS[recipe.target.backend]} {version}"
    if recipe.platform != platform:
        return f"this is {platform}"
    if recipe.version != version and not _runs_later(recipe, version):
        return f"{here} is installed here"
    if gpu is not None and not _suits(recipe.target, gpu):
        return f"device {gpu.ordinal} is {describe_gpu(gpu)}"
    return ""


def describe_gpu(gpu: Gpu) -> str:
    """Return a GPU's name and compute capability, for people."""
    return f"{gpu.name} (compute capability {capability_of(gpu)})"


def _runs_later(recipe: Recipe, version: str) -> bool:
    """Tell whether a version-compatible engine runs on the same or a later version."""
    built, installed = (_release(text) for text in (recipe.version, version))
    return recipe.options.version_compatible and built <= installed


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without its build, which may be that of a preview."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _suits(target: Target, gpu: Gpu) -> bool:
    if target.compute_capabilities:
        return capability_of(gpu) in target.compute_capabilities
    return gpu.compute_capability >= RTX_OLDEST_CAPABILITY
