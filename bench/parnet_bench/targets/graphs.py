"""The graphs that rows run: bundles as they are, or made from other sources."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_bench.targets.graph_cache import GraphKey, NetworkSize, cached_graph
from parnet_export import files
from parnet_export.bundle import MANIFEST_NAME
from parnet_export.cache import cache_directory, toolkit_version
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from parnet_bench.targets.graph_cache import CachedGraph
    from parnet_export.bundle import Bundle, Precision
    from parnet_export.network import Level


@dataclass(frozen=True, slots=True)
class Geometry:
    """The images of one inference, and how numbers are stored.

    Parameters
    ----------
    batch
        Images in one inference.
    resolution
        Height and width in pixels; None for graphs that do not take square images.
    precision
        Element type of the weights.
    """

    batch: int
    resolution: int | None
    precision: Precision


@dataclass(frozen=True, slots=True)
class Reading:
    """How a checkpoint is read; see `parnet_export.source.load_network`."""

    arch: str | None = None
    activation: str = "auto"
    use_ema: bool = False

    def __str__(self) -> str:
        """Tell it from others, as part of a cache's key."""
        parts = [f"as {self.arch}" if self.arch else ""]
        parts += [self.activation if self.activation != "auto" else ""]
        parts += ["averaged" if self.use_ema else ""]
        return " ".join(filter(None, parts))


AS_IT_IS = Reading()
"""No wishes: everything is told from the checkpoint."""


def is_bundle(target: str) -> bool:
    """Whether a target is a folder with a manifest."""
    return (Path(target) / MANIFEST_NAME).exists()


def is_onnx_file(target: str) -> bool:
    """Whether a target is an existing file with the suffix of ONNX."""
    return Path(target).suffix == ".onnx" and Path(target).is_file()


def require_known(target: str) -> None:
    """Raise `InputError` for a target that is no bundle, no ONNX file and no catalogue name."""
    if not (is_bundle(target) or is_onnx_file(target)):
        catalogue_name(target)


def catalogue_name(name: str) -> str:
    """Return the catalogue's spelling of a name; case and separators do not matter.

    Raises
    ------
    InputError
        When there is no such network; names the nearest ones.
    """
    from parnet_export.models.catalog import CATALOG, find_name

    found = find_name(name)
    if found is None:
        spellings = {_squash(known): known for known in CATALOG}
        near = difflib.get_close_matches(_squash(name), spellings, n=3, cutoff=0.5)
        names = " or ".join(spellings[spelling] for spelling in near)
        raise InputError(
            name,
            _why_unknown(Path(name)),
            (f"Did you mean {names}? " if near else "")
            + "`parnet-export models` lists the catalogue",
        )
    return found


_OF_CLASSIFIERS = (("logits",), ("probabilities",))
"""Outputs of a classifier, and of an ensemble of them."""


def detectors(family: str | None = None) -> tuple[str, ...]:
    """Return the catalogue's detectors, of one family or all: what classifies nothing."""
    from parnet_export.models.catalog import CATALOG

    return tuple(
        name
        for name, (owner, _) in CATALOG.items()
        if owner.output_names not in _OF_CLASSIFIERS and family in {None, owner.key}
    )


def native_resolution(name: str) -> int:
    """Return height and width in pixels that a network of the catalogue is made for."""
    from parnet_export.models.catalog import CATALOG

    return CATALOG[name][1].resolution


def network_graph(
    source: str, level: Level, geometry: Geometry, seed: int, reading: Reading = AS_IT_IS
) -> CachedGraph:
    """Return a network's graph, from the cache if it is there, and its size in training form.

    Parameters
    ----------
    source
        A checkpoint, or a name as the catalogue spells it.
    level
        ``"none"`` for the training form; others are split and proven as well.
    geometry
        Size, batch and precision of the graph.
    seed
        Seed of a catalogue name's random weights.
    reading
        How a checkpoint is read.

    Raises
    ------
    InputError
        When the source cannot be read, is fused already, or cannot take the geometry.
    """
    from parnet_export.catalogue.census import take_census
    from parnet_export.pipeline import export_graph, make_bundle
    from parnet_export.source import load_network, name_of_file

    path = Path(source)
    from_file = path.is_file()
    resolution = geometry.resolution
    if resolution is None:
        raise InputError(
            source,
            "cannot be measured beside a graph that does not take square images",
            "Leave out --ckpt and --baseline",
        )
    key = GraphKey(
        network=name_of_file(path) if from_file else source,
        weights=f"{_sha256_of(path) if from_file else f'seed {seed}'} {reading}".rstrip(),
        level=level,
        resolution=resolution,
        batch=geometry.batch,
        precision=geometry.precision,
        toolkit=toolkit_version(),
    )

    def make(bundle: Path) -> NetworkSize:
        network = load_network(
            source,
            arch=reading.arch,
            activation=reading.activation,
            use_ema=reading.use_ema,
            seed=seed,
        )
        if network.level != "none":
            raise InputError(
                source, f"is fused already (level {network.level})", "Give the trained checkpoint"
            )
        model, provenance = export_graph(
            network, level=level, resolution=resolution, batch=geometry.batch
        )
        make_bundle(model, provenance, bundle, precision=geometry.precision, prove=level != "none")
        census = take_census(network.module, resolution)
        return NetworkSize(census.parameters, census.flops, census.depth)

    return cached_graph(cache_directory(), key, make)


def onnx_graph(path: Path, folder: Path) -> Bundle:
    """Split an ONNX file and return the bundle, which lies in `folder`.

    Raises
    ------
    InputError
        When the file is damaged or cannot be split.
    """
    from parnet_export.pipeline import make_bundle, read_graph

    model, provenance = read_graph(path)
    return make_bundle(model, provenance, folder)[0]


def _sha256_of(path: Path) -> str:
    try:
        return files.sha256_of(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", "Give a readable file") from error


def _squash(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _why_unknown(path: Path) -> str:
    if path.is_dir():
        return f"is a folder without {MANIFEST_NAME}, so it is not a bundle"
    if path.exists():
        return "is neither a bundle nor an .onnx file; a checkpoint is given with --ckpt"
    return "is neither a file nor a network of the catalogue"
