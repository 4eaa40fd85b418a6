"""From a source to a bundle: fuse, export, split, write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from parnet_export import files
from parnet_export.bundle import Provenance
from parnet_export.detector import (
    FULL_PRECISION_MODULES,
    detection_output,
    is_detector,
    with_output,
)
from parnet_export.errors import CheckFailedError, InputError
from parnet_export.export import export_network
from parnet_export.fuse import fuse_network, prove_fusion
from parnet_export.graphs.onnx_graph import load_onnx
from parnet_export.graphs.precision import to_fp16
from parnet_export.images.class_names import read_names
from parnet_export.images.input_form import INPUT_FORM_KEY, decode_form
from parnet_export.pack import write_bundle
from parnet_export.source import name_of_file, now, tool_versions
from parnet_export.splitting.split import SplitOptions, split_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parnet_export.bundle import Bundle, Precision
    from parnet_export.detections.detection_form import Form, Suppression
    from parnet_export.fuse import FusionProof
    from parnet_export.images.input_options import InputOptions
    from parnet_export.network import Level, Network

DYNAMIC = "dynamic"
"""The batch of a graph whose first dimension is left open."""


def fuse_and_prove(network: Network, level: Level) -> tuple[Network, FusionProof]:
    """Fuse a network to `level` and compare both forms on random images.

    Raises
    ------
    InputError
        When the network is already fused further.
    CheckFailedError
        When the fused network does not compute the same.
    """
    try:
        fused = fuse_network(network, level)
    except ValueError as error:
        source = network.provenance.source
        raise InputError(source, str(error), "Give the trained checkpoint") from error
    proof = prove_fusion(network, fused)
    if not proof.holds:
        raise CheckFailedError(
            f"{network.provenance.source}: the fused network differs from the original by "
            f"{proof.float64_error:.1e} in float64 and {proof.float32_error:.1e} in float32, "
            "relative to the largest output. Nothing was written."
        )
    return fused, proof


def describe_pictures(network: Network, options: InputOptions, labels: Path | None) -> Network:
    """Note how a network's pictures are prepared and what its classes are called.

    Parameters
    ----------
    network
        Keeps what it says already where nothing is given.
    options
        What is known better.
    labels
        A text file with the name of each class on a line.

    Raises
    ------
    InputError
        When an option does not suit the network, or the file has another number of names.
    """
    form = options.note_on(network.provenance.input_form)
    names = read_names(labels, network.config.num_classes) if labels else network.labels
    return replace(network, provenance=replace(network.provenance, input_form=form), labels=names)


def count_classes(model: ir.Model) -> int:
    """Return how many classes the graph of a classifier knows.

    Raises
    ------
    InputError
        When the graph has other outputs than one of shape ``(N, classes)``.
    """
    shapes = [tuple(value.shape or ()) for value in model.graph.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2 or not isinstance(shapes[0][1], int):
        problem = "the graph is no classifier with a known number of classes"
        raise InputError("--labels", problem, "Leave it out")
    return shapes[0][1]


def export_graph(
    network: Network,
    *,
    level: Level | None = None,
    resolution: int | None,
    batch: int | str,
    form: Form | None = None,
    suppression: Suppression | None = None,
) -> tuple[ir.Model, Provenance]:
    """Export a network, fused to `level` first if it is in training form.

    Parameters
    ----------
    network
        In any form; a fused one stays at its level.
    level
        How far a network in training form is fused, by default ``"full"``; ``"none"`` leaves
        it as it is. A network that is fused already can only be asked for at its own level.
    resolution
        Height and width in pixels; the network's own by default.
    batch
        Images per inference, or `DYNAMIC`.
    form
        What the graph of a detector returns, by default its raw heads.
    suppression
        Which boxes a graph of form ``"nms"`` keeps; by default those of `Suppression`.

    Raises
    ------
    InputError
        When the level, the geometry or the form does not suit the network.
    CheckFailedError
        When the fused network does not compute the same.
    """
    wanted = level or ("full" if network.level == "none" else network.level)
    if network.level == "none" and wanted != "none":
        network, _ = fuse_and_prove(network, wanted)
    elif wanted != network.level:
        problem = f"{network.name} is already fused at level {network.level}, not {wanted}"
        raise InputError("--level", problem, "Leave it out, or give the trained checkpoint")
    if form is not None or is_detector(network):
        network = with_output(network, detection_output(network, form or "raw", suppression))
    images = None if batch == DYNAMIC else int(batch)
    return export_network(network, resolution=resolution, batch=images), network.provenance


def read_graph(path: Path, *, resolution: int | None = None) -> tuple[ir.Model, Provenance]:
    """Read an ONNX file as a source.

    Parameters
    ----------
    path
        The file.
    resolution
        Height and width in pixels that free ones of its images are fixed to.

    Raises
    ------
    InputError
        When the file or its metadata are missing or damaged, or a size is asked for that it
        does not leave free.
    """
    model = load_onnx(path)
    if resolution is not None:
        _fix_image_size(model, resolution, path)
    stated = model.metadata_props.get(INPUT_FORM_KEY)
    try:
        form = decode_form(stated) if stated else None
    except ValueError as error:
        raise InputError(path, str(error), "Export it again") from error
    provenance = Provenance(
        network=name_of_file(path),
        source=str(path),
        source_sha256=files.sha256_of(path),
        tools=tool_versions(),
        created=now(),
        input_form=form,
    )
    return model, provenance


def _fix_image_size(model: ir.Model, pixels: int, path: Path) -> None:
    """Give the free heights and widths of a graph's images a size, in place."""
    is_free = False
    for value in model.graph.inputs:
        shape = tuple(value.shape or ())
        if len(shape) == 4 and not (isinstance(shape[2], int) and isinstance(shape[3], int)):
            is_free = True
            sides = (side if isinstance(side, int) else pixels for side in shape[2:])
            value.shape = ir.Shape([*shape[:2], *sides])
    if not is_free:
        problem = f"{path} is a graph whose height and width are fixed"
        raise InputError("--resolution", problem, "Leave the option out")


def make_bundle(
    model: ir.Model,
    provenance: Provenance,
    path: Path,
    *,
    precision: Precision = "fp32",
    options: SplitOptions | None = None,
    prove: bool = True,
    command: tuple[str, ...] = (),
    labels: Sequence[str] = (),
) -> tuple[Bundle, tuple[str, ...]]:
    """Split a graph into segments and write the bundle.

    Parameters
    ----------
    model
        The whole network.
    provenance
        Where it comes from.
    path
        The bundle's folder; a bundle that lies there is replaced.
    precision
        Element type of weights and of the tensors between segments.
    options
        Of the splitter.
    prove
        Compare whole and split graph before anything is committed.
    command
        The command line to note in the bundle.
    labels
        Names of the classes to store in the bundle.

    Returns
    -------
    bundle, notes
        The notes say what the splitter found, for people.
    """
    graph = to_fp16(model, keep=FULL_PRECISION_MODULES) if precision == "fp16" else model
    split = split_model(graph, options or SplitOptions())
    noted = replace(provenance, command=command)
    bundle = write_bundle(
        split, path, precision=precision, provenance=noted, prove=prove, labels=labels
    )
    return bundle, split.notes


def beside(source: str, suffix: str) -> Path:
    """Return where a result goes by default: beside a source file, else in the current folder.

    ``"weights/parnet_l.pth.tar"`` and ``".bundle"`` give ``weights/parnet_l.bundle``.
    """
    path = Path(source)
    return path.parent / (name_of_file(path) + suffix) if path.exists() else Path(source + suffix)
