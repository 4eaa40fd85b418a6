"""The bundle: a folder with one manifest and files that never change.

``bundle.json`` names the whole graph, one graph per segment, and the weights
file they share. Data files are named by their content, so a new version never
touches an old one, and replacing ``bundle.json`` is the commit: a reader sees
either the bundle before or the bundle after.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from parnet_export import files
from parnet_export.detections.detection_form import (
    DetectionOutput,  # noqa: TC001 - msgspec reads annotations at run time
)
from parnet_export.errors import InputError, name_some
from parnet_export.images.input_form import (
    InputForm,  # noqa: TC001 - msgspec reads annotations at run time
)
from parnet_export.schema_version import require_readable
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"

_NO_DIGEST = "0" * 64
_MANIFEST_DIGEST = re.compile(rb'(?<="manifest_sha256": ")[0-9a-f]{64}(?=")')
_REMAKE = "Make it again with `parnet-export split-streams`"

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
    architecture
        One line about the structure; empty for ONNX files.
    level
        How far the network was fused: ``"none"``, ``"repvgg"``, ``"full"``; empty for ONNX files.
    tools
        Versions of the toolkit and of the libraries that wrote the bundle.
    command
        The command line, if a command line made it.
    created
        UTC time, ISO 8601.
    detections
        How a detector's outputs are to be read; None for other networks and ONNX files.
    input_form
        How pictures become the network's input; None where nothing states it.
    """

    network: str
    source: str
    source_sha256: str = ""
    weights: WeightsOrigin = "unknown"
    seed: int | None = None
    activation: str = ""
    architecture: str = ""
    level: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    created: str = ""
    detections: DetectionOutput | None = None
    input_form: InputForm | None = None

    @property
    def label(self) -> str:
        """The network's name for people, marked when its weights are random."""
        return self.network + (" (random weights)" if self.weights == "random" else "")


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
    labels
        File name of the classes' names, one a line; empty if none are known.
    split_error
        Largest relative error of the segments, run one after another, against the
        whole graph when the bundle was written; None if that was not verified.
    manifest_sha256
        Digest of ``bundle.json`` itself, taken with zeros in place of these digits.
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
    labels: str = ""
    split_error: float | None = None
    manifest_sha256: str = _NO_DIGEST


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
        return self.manifest.provenance.label

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the outputs; empty if the bundle has none."""
        if not self.manifest.labels:
            return ()
        text = (self.path / self.manifest.labels).read_text(encoding="utf-8")
        return tuple(text.removesuffix("\n").split("\n"))


def open_bundle(path: Path) -> Bundle:
    """Read a bundle and check that every file is the one that was written.

    Raises
    ------
    InputError
        When `path` is no bundle, its schema is newer than this version reads,
        or a file is missing or changed.
    """
    content = _read_manifest(path)
    while True:
        try:
            return _open(path, content)
        except InputError:
            # A writer may have committed a newer version, and cleared this one, meanwhile.
            latest = _read_manifest(path)
            if latest == content:
                raise
            content = latest


def _read_manifest(path: Path) -> bytes:
    try:
        return (path / MANIFEST_NAME).read_bytes()
    except FileNotFoundError as error:
        if path.is_dir():
            problem = f"is a folder without {MANIFEST_NAME}, so it is not a bundle"
        else:
            problem = "does not exist"
        raise InputError(path, problem, _REMAKE) from error
    except NotADirectoryError as error:
        raise InputError(path, "is not a folder, so it is not a bundle", _REMAKE) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"is not a readable bundle ({reason})", _REMAKE) from error


def _open(path: Path, content: bytes) -> Bundle:
    manifest = _decode(path / MANIFEST_NAME, content)
    _check_files(path, manifest.files)
    try:
        graph = StreamGraph(manifest.inputs, manifest.outputs, manifest.segments)
    except ValueError as error:
        raise InputError(path / MANIFEST_NAME, f"is inconsistent: {error}", _REMAKE) from error
    return Bundle(path, manifest, graph)


def _encode(manifest: Manifest) -> bytes:
    blank = replace(manifest, manifest_sha256=_NO_DIGEST)
    content = msgspec.json.format(msgspec.json.encode(blank), indent=2) + b"\n"
    return _MANIFEST_DIGEST.sub(hashlib.sha256(content).hexdigest().encode(), content)


def _decode(path: Path, content: bytes) -> Manifest:
    try:
        require_readable(content, SCHEMA_VERSION, path)
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(path, f"is damaged ({error})", _REMAKE) from error
    blank = _MANIFEST_DIGEST.sub(_NO_DIGEST.encode(), content)
    if hashlib.sha256(blank).hexdigest() != manifest.manifest_sha256:
        raise InputError(path, "is not the file that was written (its digest differs)", _REMAKE)
    named = {manifest.whole, *manifest.segment_files.values(), manifest.weights, manifest.labels}
    unlisted = sorted(named - set(manifest.files) - {""})
    if unlisted:
        raise InputError(path, f"lists no digest of {name_some(unlisted)}", _REMAKE)
    if {segment.name for segment in manifest.segments} != set(manifest.segment_files):
        raise InputError(path, "does not name one file for each segment", _REMAKE)
    return manifest


def _check_files(path: Path, expected: Mapping[str, StoredFile]) -> None:
    for name, stored in expected.items():
        if name in {"", ".", ".."} or set(name) & set("/\\:\0"):
            raise InputError(
                path / MANIFEST_NAME, f"names a file outside the bundle: {name!r}", _REMAKE
            )
        file = path / name
        try:
            size_bytes = file.stat().st_size
            digest = files.sha256_of(file) if size_bytes == stored.size_bytes else ""
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(file, f"cannot be read ({reason})", _REMAKE) from error
        if digest != stored.sha256:
            raise InputError(file, "is not the file that was written (its digest differs)", _REMAKE)


def _is_foreign(content: bytes) -> bool:
    """Tell whether a manifest is another program's, or of a schema that is still to come."""
    try:
        manifest = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False  # damaged
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    return not isinstance(version, int) or version > SCHEMA_VERSION


class BundleWriter:
    """Collects the files of a bundle and commits them at once.

    A context manager: what was added and not committed is removed on leaving.
    Until `commit`, a reader of the folder sees what was there before; after it,
    the files of the earlier version are gone. Files that no writer made are
    never touched. One writer at a time may work on a folder.

    Parameters
    ----------
    path
        The bundle's folder. It is created when the first file is added.

    Raises
    ------
    InputError
        When `path` is a file, or a folder with files in it that is not a bundle.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            raise InputError(path, "is a file", "Give the name of a folder with --out")
        self._path = path
        self._existed = path.is_dir()
        self._added: dict[str, StoredFile] = {}
        self._previous: frozenset[str] = frozenset()
        if not self._existed:
            return
        manifest = path / MANIFEST_NAME
        if manifest.exists():
            content = _read_manifest(path)
            if _is_foreign(content):
                problem = f"holds a {MANIFEST_NAME} that is not ours or of a newer version"
                raise InputError(path, problem, "Choose another folder, or remove it first")
            # A damaged manifest does not keep anyone from making the bundle again.
            with contextlib.suppress(InputError):
                self._previous = frozenset(_decode(manifest, content).files)
        elif any(not self._is_ours(entry) for entry in path.iterdir()):
            raise InputError(
                path, "is a folder with other files in it", "Choose a new or empty folder"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

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
        """Move a finished file of the same folder in as ``<stem>-<digest><suffix>``."""
        digest = files.sha256_of(temporary)
        name = files.content_name(stem, digest, suffix)
        self._added[name] = StoredFile(digest, temporary.stat().st_size)
        files.move_into_place(temporary, self._path / name)
        return name

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, which makes the new version the bundle, and clear the rest.

        Parameters
        ----------
        manifest
            What the bundle holds; `Manifest.files` is filled in here.

        Raises
        ------
        InputError
            When an added file has changed or gone since it was added, or the
            manifest cannot be written. The bundle is as it was before.
        """
        complete = replace(manifest, files=dict(self._added))
        content = _encode(complete)
        bundle = _open(self._path, content)
        files.write_bytes(self._path / MANIFEST_NAME, content)
        stale = self._previous - set(self._added)
        self._previous = frozenset(self._added)
        self._clear(stale)
        return bundle

    def discard(self) -> None:
        """Remove what was added and is not part of the bundle; after `commit`, nothing is."""
        self._clear(frozenset(self._added) - self._previous)
        if not self._existed:
            with contextlib.suppress(OSError):
                self._path.rmdir()  # only if nothing else lies in it

    def _clear(self, stale: frozenset[str]) -> None:
        """Remove `stale` files and what writers that died have left behind."""
        if not self._path.is_dir():
            return
        for entry in self._path.iterdir():
            if entry.name not in self._previous and (entry.name in stale or self._is_ours(entry)):
                with contextlib.suppress(OSError):
                    entry.unlink()

    @staticmethod
    def _is_ours(entry: Path) -> bool:
        """Tell whether a writer made a file: it is unfinished, or named by its own content."""
        return (files.is_temporary(entry.name) and entry.is_file()) or files.is_named_by_content(
            entry
        )
