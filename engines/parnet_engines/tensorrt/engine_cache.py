"""The engines of a bundle: where they lie, and whether building again would change them.

They lie in ``engines/<target>/`` in the bundle's folder, each as a plan file that is named by
its content and never changes, and a sidecar, which is replaced to commit a new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.tensorrt.engine_sidecar import Recipe, Sidecar, read_sidecar, write_sidecar
from parnet_engines.tensorrt.module import LABELS
from parnet_engines.tensorrt.options import EngineOptions
from parnet_export import files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from parnet_engines.tensorrt.module import Backend
    from parnet_engines.tensorrt.options import Target
    from parnet_export.bundle import Bundle

ENGINES_FOLDER = "engines"

_PLAN_SUFFIX = ".plan"
_OPTION_NAMES = {
    "tf32": "--tf32",
    "sizes": "--shapes",
    "max_aux_streams": "--max-aux-streams",
    "optimization_level": "--optimization-level",
    "workspace_mib": "--workspace-mib",
    "version_compatible": "--version-compatible",
    "boundary": "--boundary",
}


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the cache knows about an engine.

    Parameters
    ----------
    sidecar
        The sidecar of an engine that is there, whole, and what was asked for; None on a miss.
    causes
        Why the engine has to be built, each as a clause; none on a hit.
    """

    sidecar: Sidecar | None
    causes: tuple[str, ...] = ()


def this_platform() -> str:
    """Return this machine's operating system and processor architecture."""
    return f"{platform.system()}-{platform.machine()}".lower()


def onnx_path(bundle: Bundle, name: str) -> Path:
    """Return the ONNX graph of a segment, or of the whole network by the name `WHOLE`."""
    return bundle.whole_path if name == WHOLE else bundle.segment_path(name)


def resolve_options(options: EngineOptions, name: str) -> EngineOptions:
    """Return the options with what they leave to the kind of graph filled in.

    A segment gets no auxiliary streams unless they are asked for. The whole graph has no
    boundary to another engine.
    """
    if name == WHOLE:
        return dataclasses.replace(options, boundary="linear")
    return dataclasses.replace(options, max_aux_streams=options.max_aux_streams or 0)


def recipe_of(
    bundle: Bundle, name: str, target: Target, options: EngineOptions, version: str
) -> Recipe:
    """Return what an engine of a bundle is made of, here and now."""
    manifest = bundle.manifest
    return Recipe(
        segment=name,
        onnx_sha256=manifest.files[onnx_path(bundle, name).name].sha256,
        precision=manifest.precision,
        version=version,
        platform=this_platform(),
        target=target,
        options=resolve_options(options, name),
    )


def sidecar_path(bundle: Bundle, target: Target, name: str, options: EngineOptions) -> Path:
    """Return where the sidecar of an engine lies.

    Engines that are there to be compared, with another boundary or number of auxiliary
    streams, lie side by side.
    """
    return bundle.path / ENGINES_FOLDER / target.folder / sidecar_name(name, options)


def sidecar_name(name: str, options: EngineOptions) -> str:
    """Return the file name that the sidecar of an engine has in every target's folder."""
    resolved = resolve_options(options, name)
    streams = "auto" if resolved.max_aux_streams is None else resolved.max_aux_streams
    return f"{_file_stem(name)}-{resolved.boundary}-aux{streams}.json"


def build_command(
    bundle: Path, name: str, backend: Backend, device: int, options: EngineOptions
) -> str:
    """Return the command line that builds an engine, among others, for a GPU of this machine."""
    words = [f"parnet-export build {bundle} --backend {backend} --devices {device}"]
    defaults, resolved = (resolve_options(o, name) for o in (EngineOptions(), options))
    for option, flag in _OPTION_NAMES.items():
        value = getattr(resolved, option)
        if value == getattr(defaults, option):
            continue
        match value:
            case bool():
                words.append(flag if value else flag.replace("--", "--no-", 1))
            case dict():
                words.append(f"{flag} {_shown(value)}")
            case _:
                words.append(f"{flag} {value}")
    return " ".join(words)


def look_up(path: Path, wanted: Recipe) -> Lookup:
    """Find out whether an engine has to be built, and why.

    Parameters
    ----------
    path
        Its sidecar.
    wanted
        What it is to be made of.
    """
    if not path.exists():
        return Lookup(None, ("there is none yet",))
    try:
        sidecar = read_sidecar(path)
    except InputError as error:
        return Lookup(None, (f"its sidecar {error.problem}",))
    causes = (*_differences(sidecar.recipe, wanted), *_damage(path, sidecar))
    return Lookup(None if causes else sidecar, causes)


def require_plan(path: Path, sidecar: Sidecar) -> bytes:
    """Read a plan file and check that it is the one that was written.

    Raises
    ------
    InputError
        When it is missing or changed.
    """
    remedy = "Build the engine again with `parnet-export build`"
    plan = path.with_name(sidecar.plan)
    try:
        content = plan.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise InputError(plan, problem, remedy) from error
    if hashlib.sha256(content).hexdigest() != sidecar.plan_sha256:
        raise InputError(plan, "is not the file that was written (its digest differs)", remedy)
    return content


def store(path: Path, plan: bytes, sidecar: Sidecar) -> Sidecar:
    """Write a plan and its sidecar, in place of what was there before.

    Parameters
    ----------
    path
        Where the sidecar goes.
    plan
        The engine.
    sidecar
        Name, digest and size of the plan file are filled in here.

    Raises
    ------
    InputError
        When the place cannot be written to. What was there before stays.
    """
    files.make_directory(path.parent)
    digest = hashlib.sha256(plan).hexdigest()
    name = files.content_name(path.stem, digest, _PLAN_SUFFIX)
    complete = dataclasses.replace(sidecar, plan=name, plan_sha256=digest, plan_bytes=len(plan))
    earlier = _plans_of(path)
    files.write_bytes(path.with_name(name), plan)
    written = write_sidecar(path, complete)
    for stale in earlier - {path.with_name(name)}:
        stale.unlink(missing_ok=True)
    return written


def _plans_of(path: Path) -> set[Path]:
    """Return the plan files that belong to a sidecar, or did so once."""
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}" + re.escape(_PLAN_SUFFIX))
    return {entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)}


def _damage(path: Path, sidecar: Sidecar) -> tuple[str, ...]:
    plan = path.with_name(sidecar.plan)
    try:
        size_bytes = plan.stat().st_size
        digest = files.sha256_of(plan) if size_bytes == sidecar.plan_bytes else ""
    except OSError as error:
        return (f"its plan file {plan.name} cannot be read ({error.strerror or error})",)
    if digest != sidecar.plan_sha256:
        return (f"its plan file {plan.name} is damaged (its digest differs)",)
    return ()


def _differences(built: Recipe, wanted: Recipe) -> tuple[str, ...]:
    """Name everything in which an engine is not what is wanted."""
    causes = []
    if built.segment != wanted.segment:
        causes.append(f"it is of segment {built.segment!r}")
    if built.onnx_sha256 != wanted.onnx_sha256:
        before, now = built.onnx_sha256[:12], wanted.onnx_sha256[:12]
        causes.append(f"its ONNX graph has changed (sha256 {before} then, {now} now)")
    if built.precision != wanted.precision:
        causes.append(f"it was {built.precision}, and the bundle is {wanted.precision}")
    if built.target != wanted.target:
        causes.append(f"it was built for {built.target}, not for {wanted.target}")
    if built.version != wanted.version:
        label = LABELS[wanted.target.backend]
        causes.append(f"{label} was {built.version} then, and is {wanted.version} now")
    if built.platform != wanted.platform:
        causes.append(f"it was built on {built.platform}, and this is {wanted.platform}")
    for option, flag in _OPTION_NAMES.items():
        before, now = (_shown(getattr(recipe.options, option)) for recipe in (built, wanted))
        if before != now:
            causes.append(f"{flag} was {before} then, and is {now} now")
    return tuple(causes)


def _shown(value: object) -> str:
    match value:
        case None:
            return "TensorRT's default"
        case bool():
            return "on" if value else "off"
        case dict():
            return ",".join(f"{name}={sizes}" for name, sizes in value.items()) or "not given"
        case _:
            return str(value)


def _file_stem(segment: str) -> str:
    """Return a file name for a segment, whose own name may hold any character."""
    stem = re.sub(r"[^\w.-]", "_", segment, flags=re.ASCII).lstrip(".")[:64]
    if stem == segment:
        return stem
    return f"{stem or 'segment'}-{hashlib.sha256(segment.encode()).hexdigest()[:8]}"
