"""Exported graphs of networks that are measured again and again.

Exporting a large network takes longer than measuring it. An entry of the cache is
a folder with a bundle and the network's size; its path tells everything that they
depend on. It is made beside its place and then renamed into it, so that it is
whole or absent; one that is damaged is made anew. Entries of other versions of the
exporting code go when nobody has used them for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from parnet_export import files
from parnet_export.bundle import Bundle, Precision, open_bundle
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from parnet_export.network import Level

KEEP_UNUSED_S = 14 * 24 * 3600
"""How long entries of another version of the exporting code are kept unused."""

_BUNDLE_NAME = "bundle"
_SIZE_NAME = "size.json"


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Everything that an exported graph depends on.

    Parameters
    ----------
    network
        Catalogue name, or a checkpoint's name.
    weights
        SHA-256 of the checkpoint, or ``"seed 0"`` for random weights.
    level
        How far the network is fused.
    resolution
        Height and width in pixels.
    batch
        Samples in one inference.
    precision
        Element type of the weights.
    toolkit
        Version of the code that exports.
    """

    network: str
    weights: str
    level: Level
    resolution: int
    batch: int
    precision: Precision
    toolkit: str

    @property
    def folder_name(self) -> str:
        """A readable name that differs for different keys."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        size = f"{self.batch}x{self.resolution}"
        return f"{self.network}-{self.level}-{size}-{self.precision}-{digest}"


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """Size and work of a network, counted before exporters fold anything.

    Parameters
    ----------
    parameters
        Elements of all parameters; BatchNorm statistics are not parameters.
    flops
        Floating-point operations for one sample.
    depth
        Longest chain of convolutions and linear layers.
    """

    parameters: int
    flops: int
    depth: int


@dataclass(frozen=True, slots=True)
class CachedGraph:
    """An exported network."""

    bundle: Bundle
    size: NetworkSize


def cached_graph(
    directory: Path, key: GraphKey, make: Callable[[Path], NetworkSize]
) -> CachedGraph:
    """Return the graph of a key, made first if the cache does not hold it intact.

    Parameters
    ----------
    directory
        The folder of the cache; created if missing.
    key
        What the graph depends on.
    make
        Writes the bundle at the path it is given, and counts the network.

    Raises
    ------
    InputError
        When the cache cannot be written to.
    """
    version = directory / "graphs" / key.toolkit
    files.make_directory(version)
    with contextlib.suppress(OSError):
        os.utime(version)
    place = version / key.folder_name
    found = _open_intact(place)
    if found is not None:
        return found
    _remove_unused(version)
    with _building_folder(place) as building:
        size = make(building / _BUNDLE_NAME)
        files.write_bytes(building / _SIZE_NAME, msgspec.json.encode(size))
        _move_into_place(building, place)
    return CachedGraph(open_bundle(place / _BUNDLE_NAME), size)


def _open_intact(place: Path) -> CachedGraph | None:
    try:
        size = msgspec.json.decode((place / _SIZE_NAME).read_bytes(), type=NetworkSize)
        return CachedGraph(open_bundle(place / _BUNDLE_NAME), size)
    except (OSError, msgspec.DecodeError, InputError):
        return None


@contextlib.contextmanager
def _building_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder on the file system of `place`, and remove it afterwards."""
    try:
        building = tempfile.mkdtemp(suffix=files.TEMPORARY_SUFFIX, dir=place.parent)
    except OSError as error:
        raise files.unwritable(place.parent, error) from error
    try:
        yield Path(building)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _move_into_place(made: Path, place: Path) -> None:
    """Rename a finished entry, after moving a damaged one out of the way."""
    try:
        made.rename(place)
    except OSError:
        if _open_intact(place) is not None:
            return  # another process has made the same one meanwhile
        _remove(place)
        made.rename(place)


def _remove_unused(version: Path) -> None:
    """Remove the entries of other versions that nobody has used for a while."""
    for other in version.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != version and time.time() - other.stat().st_mtime > KEEP_UNUSED_S:
                shutil.rmtree(other)


def _remove(place: Path) -> None:
    try:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise files.unwritable(place, error) from error
