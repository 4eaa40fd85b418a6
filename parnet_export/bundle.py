"""The bundle: a folder with one manifest and files that never change.

``bundle.json`` names the whole graph, one graph per segment, and the weights
file they share. Data files are named by their content, so a new version never
touches an old one, and replacing ``bundle.json`` is the commit: a reader sees
either the bundle before or the bundle after.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from parnet_export import files
from parnet_export.errors import InputError, name_some
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"
_DIGEST_DIGITS = 16

Precision = Literal["fp32", "fp16"]
WeightsOrigin = Literal["trained", "random", "unknown"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the numbers in a bundle come from.

    Parameters
    ----------
    network
        Name for people, such as ``"parnet-l"`` or an ONNX file's stem.
    source
        Path or catalogue name the bundle was made from.
    source_sha256
        Digest of the source file; empty for a catalogue name.
    weights
        ``"trained"`` from a checkpoint, ``"random"`` from a seed, ``"unknown"`` for ONNX files.
    seed
        The seed of random weights.
    activation
        The activation and how it was chosen; empty where the source does not tell.
    level
        How far the network was fused: ``"none"``, ``"repvgg"``, ``"full"``; empty for ONNX files.
    tools
        Versions of the toolkit and of the libraries that wrote the bundle.
    command
        The command line, if a command line made it.
    created
        UTC time, ISO 8601.
    """

    network: str
    source: str
    source_sha256: str = ""
    weights: WeightsOrigin = "unknown"
    seed: int | None = None
    activation: str = ""
    level: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    created: str = ""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An immutable file of a bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``bundle.json``.

    Parameters
    ----------
    schema_version
        Raised whenever older readers would misread the file.
    precision
        Element type of the weights and of the tensors between segments.
    inputs, outputs, segments
        The stream graph.
    whole
        File name of the graph of the whole network.
    whole_cost
        Cost of the whole network; its depth is that of the longest chain across segments.
    segment_files
        File name of each segment's graph.
    weights
        File name of the external data that all graphs share; empty if they have none.
    files
        Digest and size of every file named above.
    provenance
        Where the numbers come from.
    """

    schema_version: int
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    segments: tuple[Segment, ...]
    whole: str
    whole_cost: Cost
    segment_files: dict[str, str]
    weights: str
    files: dict[str, StoredFile]
    provenance: Provenance


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose schema and digests have been checked.

    Use `open_bundle` to make one.
    """

    path: Path
    manifest: Manifest
    stream_graph: StreamGraph

    @property
    def whole_path(self) -> Path:
        """Path of the ONNX graph of the whole network."""
        return self.path / self.manifest.whole

    def segment_path(self, name: str) -> Path:
        """Path of the ONNX graph of one segment."""
        return self.path / self.manifest.segment_files[name]

    @property
    def label(self) -> str:
        """The network's name for tables, marked when its weights are random."""
        origin = self.manifest.provenance
        return (
            f"{origin.network} (random weights)" if origin.weights == "random" else origin.network
        )


def open_bundle(path: Path) -> Bundle:
    """Read a bundle and check that every file is the one that was written.

    Raises
    ------
    InputError
        When `path` is no bundle, its schema is newer than this version reads,
        or a file is missing or changed.
    """
    remake = "Make it again with `parnet-export split-streams`"
    manifest_path = path / MANIFEST_NAME
    try:
        content = manifest_path.read_bytes()
    except FileNotFoundError as error:
        if not path.exists():
            problem = "does not exist"
        elif path.is_dir():
            problem = f"is a folder without {MANIFEST_NAME}, so it is not a bundle"
        else:
            problem = "is not a bundle"
        raise InputError(path, problem, remake) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"is not a readable bundle ({reason})", remake) from error
    manifest = _decode(manifest_path, content, remake)
    _check_files(path, manifest.files, remake)
    try:
        graph = StreamGraph(manifest.inputs, manifest.outputs, manifest.segments)
    except ValueError as error:
        raise InputError(manifest_path, f"is inconsistent: {error}", remake) from error
    return Bundle(path, manifest, graph)


def _decode(path: Path, content: bytes, remake: str) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=dict[str, object]).get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(
                path,
                f"has schema version {version}; this version reads up to {SCHEMA_VERSION}",
                "Upgrade parnet-export",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(path, f"is damaged ({error})", remake) from error
    named = {manifest.whole, *manifest.segment_files.values(), manifest.weights} - {""}
    unlisted = sorted(named - set(manifest.files))
    if unlisted or {s.name for s in manifest.segments} != set(manifest.segment_files):
        raise InputError(path, f"is damaged (files not listed: {name_some(unlisted)})", remake)
    return manifest


def _check_files(path: Path, expected: Mapping[str, StoredFile], remake: str) -> None:
    for name, stored in expected.items():
        file = path / name
        if Path(name).name != name:
            raise InputError(
                path / MANIFEST_NAME, f"names a file outside the bundle: {name}", remake
            )
        try:
            size_bytes = file.stat().st_size
            digest = files.sha256_of(file) if size_bytes == stored.size_bytes else ""
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(file, f"cannot be read ({reason})", remake) from error
        if digest != stored.sha256:
            raise InputError(file, "is not the file that was written (its digest differs)", remake)


class BundleWriter:
    """Collects the files of a bundle and commits them at once.

    Files that already lie in the folder under their content's name are kept.
    Until `commit`, a reader of the folder sees what was there before; after it,
    files that the new manifest does not name are removed.

    Parameters
    ----------
    path
        The bundle's folder. It is created when the first file is added.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            raise InputError(path, "is a file", "Give the name of a folder with --out")
        if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST_NAME).exists():
            foreign = [p.name for p in path.iterdir() if not _is_ours(p.name)]
            if foreign:
                raise InputError(
                    path, "is a folder with other files in it", "Choose a new or empty folder"
                )
        self._path = path
        self._files: dict[str, StoredFile] = {}

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self._path

    def add_bytes(self, stem: str, suffix: str, content: bytes) -> str:
        """Store `content` as ``<stem>-<digest><suffix>`` and return that name."""
        files.make_directory(self._path)
        with files.temporary_sibling(self._path / stem) as temporary:
            temporary.write_bytes(content)
            return self.add_file(stem, suffix, temporary)

    def add_file(self, stem: str, suffix: str, temporary: Path) -> str:
        """Move a finished file of the same file system in as ``<stem>-<digest><suffix>``."""
        digest = files.sha256_of(temporary)
        name = f"{stem}-{digest[:_DIGEST_DIGITS]}{suffix}"
        self._files[name] = StoredFile(digest, temporary.stat().st_size)
        files.move_into_place(temporary, self._path / name)
        return name

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, which makes the new version the bundle, and clear the rest."""
        complete = replace(manifest, files=dict(self._files))
        content = msgspec.json.format(msgspec.json.encode(complete), indent=2)
        files.write_bytes(self._path / MANIFEST_NAME, content + b"\n")
        self._clear(keep=set(self._files))
        return open_bundle(self._path)

    def discard(self) -> None:
        """Remove what was added and is not part of the bundle that was there before."""
        if not self._path.is_dir():
            return
        manifest = self._path / MANIFEST_NAME
        if manifest.exists():
            self._clear(keep=set(_decode(manifest, manifest.read_bytes(), "").files))
        else:
            self._clear(keep=set())
            with contextlib.suppress(OSError):
                self._path.rmdir()  # only if nothing else lies in it

    def _clear(self, keep: set[str]) -> None:
        for leftover in self._path.iterdir():
            if leftover.name not in keep and _is_ours(leftover.name):
                leftover.unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    digest = stem.rpartition("-")[2]
    written = len(digest) == _DIGEST_DIGITS and set(digest) <= set("0123456789abcdef")
    return name.endswith(files.TEMPORARY_SUFFIX) or (
        bool(dot) and suffix in {"onnx", "bin"} and written
    )
