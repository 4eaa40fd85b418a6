"""From what a user names, a checkpoint or a catalogue entry, to a network."""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from parnet_export.bundle import Provenance
from parnet_export.checkpoints.checkpoint import Checkpoint, load_strictly, read_checkpoint
from parnet_export.errors import InputError, name_some
from parnet_export.images.timm_arguments import stated_form
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.catalog import CATALOG, FAMILIES, find_name
from parnet_export.network import Header, Network

if TYPE_CHECKING:
    from typing import Any

    from torch import nn

    from parnet_export.images.input_form import InputForm
    from parnet_export.models.family import Family
    from parnet_export.network import Level

IMAGENET_CLASSES = 1000

_SUFFIXES = (".tar", ".pth", ".pt", ".safetensors", ".fused", ".bin", ".ckpt", ".weights")
_TOOLS = ("parnet-export", "torch", "onnx", "onnx-ir", "onnxruntime")


def load_network(
    source: str | Path,
    *,
    arch: str | None = None,
    activation: str = "auto",
    use_ema: bool = False,
    seed: int = 0,
) -> Network:
    """Load a checkpoint, a fused file, or a catalogue name with random weights.

    Parameters
    ----------
    source
        A path, or a name of `CATALOG`.
    arch
        A catalogue name that the checkpoint must turn out to be (its number of classes is
        free); the network is then made for that name's resolution.
    activation
        ``"silu"``, ``"relu"``, or ``"auto"`` to detect it.
    use_ema
        Take the exponential moving average of the weights that a checkpoint also holds.
    seed
        Of the random weights and BatchNorm statistics that a catalogue name gets.

    Returns
    -------
    Network
        On the CPU, float32, in evaluation mode.

    Raises
    ------
    InputError
        When the source cannot be read, or is not a complete network of a known family.
    """
    name, path = str(source), Path(source)
    if arch is not None:
        known_arch = find_name(arch)
        if known_arch is None:
            raise _unknown_name("--arch", arch)
        arch = known_arch
    known = find_name(name)
    if known is not None and not path.is_file():
        if use_ema:
            problem = f"{known} stands for random weights, of which there is no average"
            raise InputError("--use-ema", problem, "Leave it out")
        return _random_network(known, arch, activation, seed)
    if not path.exists() and not _looks_like_path(name):
        raise _unknown_name(name, name)
    return _from_file(read_checkpoint(path, use_ema=use_ema), arch, activation)


def tool_versions() -> dict[str, str]:
    """Return the versions of the toolkit and of the libraries that make its files."""
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """Return the current time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def name_of_file(path: Path) -> str:
    """Return a file's name without the suffixes of checkpoints and graphs."""
    name = path.name
    while (stem := name.removesuffix(Path(name).suffix)) != name and stem:
        if Path(name).suffix not in (*_SUFFIXES, ".onnx"):
            break
        name = stem
    return name


def _looks_like_path(name: str) -> bool:
    return os.sep in name or name.endswith(_SUFFIXES)


def _unknown_name(subject: str, name: str) -> InputError:
    near = difflib.get_close_matches(name.lower(), CATALOG, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    problem = "is neither a file nor a network of the catalogue"
    if subject != name:
        problem = f"{name!r} is no network of the catalogue"
    return InputError(subject, problem, f"{hint}`parnet-export models` lists the catalogue")


def _random_network(name: str, arch: str | None, activation: str, seed: int) -> Network:
    family, entry = CATALOG[name]
    if arch not in (None, name):
        raise InputError("--arch", f"{arch} contradicts the source {name}", "Leave it out")
    config, chosen = entry.config, ""
    if hasattr(config, "activation"):
        if activation != "auto":
            config = _with_activation(name, config, activation)
        chosen = f"{config.activation} ({'the catalogue' if activation == 'auto' else 'as asked'})"
    elif activation != "auto":
        problem = f"{name} has no choice of activations"
        raise InputError("--activation", problem, "Leave it out")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = family.build(config, "none", ())
    randomise_batch_norm(module, torch.Generator().manual_seed(seed))
    provenance = Provenance(
        network=name,
        source=name,
        weights="random",
        seed=seed,
        activation=chosen,
        architecture=family.describe(config),
        tools=tool_versions(),
        created=now(),
        input_form=_authors_form(family, config),
    )
    return _network(module, family, config, provenance, level="none", resolution=entry.resolution)


def _authors_form(family: Family, config: Any) -> InputForm | None:
    """Return how a family's authors prepare pictures, where they have said so."""
    known = family.anchor_levels or config.num_classes == IMAGENET_CLASSES
    return family.input_form if known else None


def _with_activation(name: str, config: Any, activation: str) -> Any:
    try:
        return msgspec.convert(asdict(config) | {"activation": activation}, type(config))
    except msgspec.ValidationError as error:
        problem = f"{activation!r} is no activation that {name} can have"
        raise InputError("--activation", problem, "Leave it out") from error


def _network(
    module: nn.Module,
    family: Family,
    config: Any,
    provenance: Provenance,
    *,
    level: Level,
    resolution: int,
) -> Network:
    provenance = replace(provenance, level=level)
    module = module.float().eval().requires_grad_(requires_grad=False)
    multiple = family.input_multiple(config)
    return Network(
        module, family.key, config, level, resolution, multiple, provenance, family.output_names
    )


def _from_file(checkpoint: Checkpoint, arch: str | None, activation: str) -> Network:
    path = checkpoint.path
    try:
        header = Header.decode(checkpoint.metadata)
        if header is not None:
            return _from_header(checkpoint, header, arch, activation)
        family = _recognise(checkpoint)
        restored = family.restore(checkpoint.tensors, activation)
    except ValueError as error:
        raise InputError(path, str(error), "Give a complete state dict of the network") from error
    config = restored.config
    if arch is not None:
        wanted_family, entry = CATALOG[arch]
        if wanted_family is family:
            told = {field: getattr(entry.config, field) for field in family.untold}
            config = replace(config, **told)
    _check_arch(path, family, config, arch)
    provenance = Provenance(
        network=name_of_file(path),
        source=str(path),
        source_sha256=checkpoint.sha256,
        weights="trained",
        activation=restored.activation,
        architecture=family.describe(config),
        tools=tool_versions(),
        created=now(),
        input_form=stated_form(checkpoint.metadata, family.input_form)
        or _authors_form(family, config),
    )
    module = family.build(config, restored.level, checkpoint.tensors)
    load_strictly(module, checkpoint.tensors, path)
    resolution = CATALOG[arch][1].resolution if arch else family.resolution(config)
    return _network(module, family, config, provenance, level=restored.level, resolution=resolution)


def _from_header(
    checkpoint: Checkpoint, header: Header, arch: str | None, activation: str
) -> Network:
    family = FAMILIES.get(header.family)
    if family is None:
        raise ValueError(f"is of the unknown family {header.family!r}")
    try:
        config = msgspec.convert(header.config, family.config_type)
    except msgspec.ValidationError as error:
        raise ValueError(f"has a damaged description ({error})") from error
    wanted = getattr(config, "activation", activation)
    if activation not in ("auto", wanted):
        problem = f"was fused with {wanted}, so it cannot be used with {activation}"
        raise InputError(checkpoint.path, problem, "Fuse the checkpoint again with --activation")
    multiple = family.input_multiple(config)
    if header.resolution < multiple or header.resolution % multiple:
        raise ValueError(f"has a damaged description (resolution {header.resolution})")
    _check_arch(checkpoint.path, family, config, arch)
    module = family.build(config, header.level, checkpoint.tensors)
    load_strictly(module, checkpoint.tensors, checkpoint.path)
    network = _network(
        module,
        family,
        config,
        header.provenance,
        level=header.level,
        resolution=header.resolution,
    )
    return replace(network, labels=header.labels)


def _recognise(checkpoint: Checkpoint) -> Family:
    family = next((f for f in FAMILIES.values() if f.recognises(checkpoint.tensors)), None)
    titles = ", ".join(f.title for f in FAMILIES.values())
    if family is None:
        some = name_some(list(checkpoint.tensors))
        problem = (
            f"holds none of the networks this version knows ({titles}); its tensors are {some}"
        )
        raise InputError(checkpoint.path, problem, "Export it to ONNX and give that file")
    return family


def _check_arch(path: Path, family: Family, config: Any, arch: str | None) -> None:
    """Compare a structure with the one asked for; classes and activation are free."""
    if arch is None:
        return
    wanted_family, entry = CATALOG[arch]
    free = ("num_classes", "activation", "dropout")
    given = {name: getattr(config, name) for name in free if hasattr(config, name)}
    if wanted_family is not family or replace(entry.config, **given) != config:
        problem = f"holds a {family.describe(config)}, not the {entry.title} that --arch asks for"
        raise InputError(path, problem, "Leave out --arch, or give the right file")
