"""Write a split network as a bundle, and single graphs as ONNX files.

The weights go first, tensor by tensor, into one file; the whole graph and the
segments' graphs then refer to it. The bundle is proven from the very files that
were written, before the manifest makes them the bundle.
"""

from __future__ import annotations

import contextlib
import glob
import re
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

import parnet_export
from parnet_export import files
from parnet_export.bundle import SCHEMA_VERSION, BundleWriter, Manifest
from parnet_export.errors import CheckFailedError
from parnet_export.graphs.cost import graph_cost
from parnet_export.images.input_form import INPUT_FORM_KEY, encode_form
from parnet_export.verify import prove_split
from parnet_export.weights_file import StoredTensor, large_tensors, refer_to, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from parnet_export.bundle import Bundle, Precision, Provenance
    from parnet_export.splitting.split import Split

INLINE_UP_TO_BYTES = 128 << 20
"""A single ONNX file holds its weights up to this size; larger ones go to a file beside it."""

_DATA_SUFFIX = ".data"
_STEM_LENGTH = 64


def write_bundle(
    split: Split,
    path: Path,
    *,
    precision: Precision,
    provenance: Provenance,
    prove: bool = True,
    labels: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> Bundle:
    """Write a bundle, prove it, and only then put it in the place of the one before.

    The graphs and the weights file depend on nothing but `split`, `precision`, the
    origin of the weights and the preprocessing: the same input gives the same bytes.

    Parameters
    ----------
    split
        The whole graph and its segments. They share tensor objects, so that every
        initializer is stored once.
    path
        The bundle's folder, new, empty or a bundle.
    precision
        Element type of the weights and of the tensors between segments.
    provenance
        Where the numbers come from.
    prove
        Whether to compare the segments with the whole graph by running both. Without
        it, the manifest says that the split was not verified.
    labels
        Names of the classes, if they are to be stored.
    sizes
        Sizes of symbolic dimensions in the proof, as `make_samples` takes them.

    Raises
    ------
    CheckFailedError
        When the segments do not compute what the whole graph computes.
    InputError
        When the place cannot be written to. Either way the folder is as it was before.
    MissingBackendError
        When the proof is asked for and ONNX Runtime is not installed.
    """
    with BundleWriter(path) as writer:
        stored, weights = _add_weights(writer, split)
        metadata = _metadata(precision, provenance)
        whole = writer.add_bytes("whole", ".onnx", _encode(split.whole, metadata, stored, weights))
        segments = {
            name: writer.add_bytes(
                _file_stem(name),
                ".onnx",
                _encode(model, metadata | {"parnet.segment": name}, stored, weights),
            )
            for name, model in split.segments.items()
        }
        for name in (whole, *segments.values()):
            _check_onnx(path / name)
        proof = None
        if prove:
            proof = prove_split(
                split.stream_graph,
                path / whole,
                {name: path / file for name, file in segments.items()},
                precision=precision,
                sizes=sizes,
                detections=provenance.detections,
            )
            proof.require("Nothing was written.")
        text = "".join(f"{name}\n" for name in labels)
        named = writer.add_bytes("labels", ".txt", text.encode()) if labels else ""
        return writer.commit(
            Manifest(
                schema_version=SCHEMA_VERSION,
                precision=precision,
                inputs=split.stream_graph.inputs,
                outputs=split.stream_graph.outputs,
                segments=split.stream_graph.segments,
                whole=whole,
                whole_cost=graph_cost(split.whole.graph),
                segment_files=segments,
                weights=weights,
                files={},
                provenance=provenance,
                labels=named,
                split_error=proof.worst_error if proof else None,
            )
        )


def write_onnx(model: ir.Model, path: Path) -> None:
    """Write one ONNX file, whole or not at all.

    Weights of more than `INLINE_UP_TO_BYTES` go to ``<stem>-<digest>.data`` beside
    it. That name changes with the content, so an earlier ONNX file at `path` stays
    valid until the new one replaces it; what it referred to is removed then.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    tensors = large_tensors([model])
    earlier = [
        file
        for file in path.parent.glob(f"{glob.escape(path.stem)}-*{_DATA_SUFFIX}")
        if files.is_named_by_content(file)
    ]
    data: Path | None = None
    with contextlib.ExitStack() as undo:
        if sum(tensor.nbytes for tensor in tensors) > INLINE_UP_TO_BYTES:
            with files.temporary_sibling(path) as temporary:
                with temporary.open("wb") as stream:
                    stored = write_tensors(tensors, stream)
                digest = files.sha256_of(temporary)
                data = path.with_name(files.content_name(path.stem, digest, _DATA_SUFFIX))
                if data not in earlier:
                    undo.callback(data.unlink, missing_ok=True)
                files.move_into_place(temporary, data)
            model = refer_to(model, stored, data.name)
        files.write_bytes(path, _serialize(model))
        undo.pop_all()
    for file in earlier:
        if file != data:
            file.unlink(missing_ok=True)


def _add_weights(writer: BundleWriter, split: Split) -> tuple[Sequence[StoredTensor], str]:
    """Store the weights and return where, and in which file; the name is empty without any."""
    tensors = large_tensors([split.whole, *split.segments.values()])
    if not tensors:
        return (), ""
    files.make_directory(writer.path)
    with files.temporary_sibling(writer.path / "weights") as temporary:
        with temporary.open("wb") as stream:
            stored = write_tensors(tensors, stream)
        return stored, writer.add_file("weights", ".bin", temporary)


def _metadata(precision: Precision, provenance: Provenance) -> dict[str, str]:
    """Return what an ONNX file says of itself; nothing that changes from run to run."""
    known = {
        "parnet.network": provenance.network,
        "parnet.precision": precision,
        "parnet.weights": provenance.weights,
        "parnet.seed": "" if provenance.seed is None else str(provenance.seed),
        "parnet.source_sha256": provenance.source_sha256,
        "parnet.activation": provenance.activation,
        "parnet.level": provenance.level,
        INPUT_FORM_KEY: encode_form(provenance.input_form) if provenance.input_form else "",
    }
    return {key: value for key, value in known.items() if value}


def _encode(
    model: ir.Model,
    metadata: Mapping[str, str],
    stored: Sequence[StoredTensor],
    weights: str,
) -> bytes:
    described = refer_to(model, stored, weights)
    described.producer_name = "parnet-export"
    described.producer_version = parnet_export.__version__
    described.metadata_props.update(metadata)
    return _serialize(described)


def _serialize(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _file_stem(segment: str) -> str:
    """Return a file name for a segment, whose own name may hold any character."""
    return re.sub(r"[^\w.-]", "_", segment, flags=re.ASCII)[:_STEM_LENGTH].lstrip(".") or "segment"


def _check_onnx(path: Path) -> None:
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise CheckFailedError(f"{path.name} is not valid ONNX: {error}") from error
