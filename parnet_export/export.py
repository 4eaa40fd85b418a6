"""From a PyTorch module to an ONNX graph whose names a person can follow."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from typing import TYPE_CHECKING

import torch

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from torch import nn

    from parnet_export.network import Network

INPUT_NAME = "image"
BATCH_NAME = "batch"
OPSET_VERSION = 20

MAX_RESOLUTION = 8192
"""Larger images than this do not fit into memory; refusing them beats a failed allocation."""


def export_network(
    network: Network, *, resolution: int | None = None, batch: int | None = 1
) -> ir.Model:
    """Export a network for square images.

    Parameters
    ----------
    network
        The network, in any form.
    resolution
        Height and width in pixels; the network's own by default.
    batch
        Images per inference; None for a dynamic first dimension called ``batch``.

    Raises
    ------
    InputError
        When the network cannot take the resolution or the batch.
    """
    pixels = network.resolution if resolution is None else resolution
    multiple = network.input_multiple
    if pixels < multiple or pixels % multiple:
        lower = max(multiple, pixels // multiple * multiple)
        near = sorted({lower, lower + multiple}, key=lambda size: abs(size - pixels))
        problem = f"{pixels} is not a multiple of {multiple} pixels, which {network.name} needs"
        raise InputError("--resolution", problem, f"Use {near[0]} or {near[1]}")
    if pixels > MAX_RESOLUTION:
        problem = f"{pixels} is more than {MAX_RESOLUTION} pixels"
        raise InputError("--resolution", problem, "Use the size that the network was trained at")
    if batch is not None and batch < 1:
        raise InputError("--batch", f"{batch} is not a number of images", "Use 1 or more")
    return export_onnx(
        network.module,
        resolution=pixels,
        batch=batch,
        name=network.name,
        output_names=network.output_names,
    )


def export_onnx(
    module: nn.Module,
    *,
    resolution: int,
    batch: int | None,
    name: str,
    output_names: tuple[str, ...] = ("logits",),
) -> ir.Model:
    """Export a module that maps images ``(N, 3, H, W)`` to one or several tensors.

    Nodes and tensors are named after the module that they come from. The weights
    stay in memory, shared with the module.

    Parameters
    ----------
    module
        In evaluation mode.
    resolution
        Height and width in pixels.
    batch
        Images per inference; None for a dynamic first dimension.
    name
        Name of the graph.
    output_names
        Names of the tensors that the module returns.
    """
    from parnet_export.models.suppressed_detector import onnx_translations

    # An exported batch of one would be taken for a constant, so a dynamic one starts at two.
    image = torch.zeros(batch or 2, 3, resolution, resolution)
    dynamic = None if batch is not None else ({0: torch.export.Dim(BATCH_NAME, min=1)},)
    with _quiet():
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=list(output_names),
            dynamic_shapes=dynamic,
            opset_version=OPSET_VERSION,
            custom_translation_table=onnx_translations(),
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returns a program when dynamo is on")
    model = program.model
    model.graph.name = name
    _name_after_modules(model.graph)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks (absent torchvision, its own deprecations) off the screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_after_modules(graph: ir.Graph) -> None:
    """Name nodes and tensors ``<module path>/<operator>``, and drop the exporter's own notes.

    The notes hold stack traces with the paths of the machine that exported.
    """
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    seen: Counter[str] = Counter()
    for node in graph:
        name = f"{_module_path(node)}/{node.op_type}".lstrip("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for index, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
            value.metadata_props.clear()
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _module_path(node: ir.Node) -> str:
    """Return the dotted path of the innermost module that a node was traced in.

    The exporter notes it as ``": Root/a.0: Class/a.0.conv: Class/conv2d: aten.conv2d"``.
    """
    scopes = node.metadata_props.get("namespace", "").split("/")[:-1]
    return scopes[-1].partition(":")[0].strip() if scopes else ""
