"""A network of the catalogue in all the forms that a comparison of engines runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from parnet_bench.selftest.engine_rows import torch_row
from parnet_export.pipeline import export_graph, fuse_and_prove, make_bundle
from parnet_export.source import load_network

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from parnet_bench.selftest.engine_rows import EngineRow
    from parnet_export.bundle import Bundle, Precision


@dataclass(frozen=True, slots=True)
class PreparedNetwork:
    """One network, of random weights.

    Parameters
    ----------
    name
        Its name in the catalogue.
    unfused, fused
        As torch runs it.
    bundle
        As engines do.
    resolution
        Height and width of its images in pixels.
    """

    name: str
    unfused: torch.nn.Module
    fused: torch.nn.Module
    bundle: Bundle
    resolution: int


def prepare_network(
    name: str, folder: Path, *, precision: Precision, resolution: int, seed: int
) -> PreparedNetwork:
    """Fuse and export a network, and make a bundle of it in an existing folder.

    Raises
    ------
    InputError
        When the network does not take such images.
    """
    network = load_network(name, seed=seed)
    fused, _ = fuse_and_prove(network, "full")
    model, provenance = export_graph(fused, resolution=resolution, batch=1)
    path = folder / f"{name}.bundle"
    bundle, _ = make_bundle(model, provenance, path, precision=precision, prove=False)
    return PreparedNetwork(name, network.module, fused.module, bundle, resolution)


def torch_rows(
    network: PreparedNetwork, device: torch.device, *, unfused: bool = True
) -> Iterator[EngineRow]:
    """Yield a row for each way in which torch runs a network without engines of ours.

    Half precision runs with channels last, which tensor cores want, as in our own engines.

    Parameters
    ----------
    network
        The network.
    device
        Where.
    unfused
        Whether it runs as it was trained, too.
    """
    is_half = network.bundle.manifest.precision == "fp16"
    dtype = torch.float16 if is_half else torch.float32
    layout = torch.channels_last if is_half else torch.contiguous_format
    shape = (1, 3, network.resolution, network.resolution)

    def place(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor]:
        own: Any = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return (
            own.to(device, dtype).to(memory_format=layout),
            image.to(device, dtype, memory_format=layout),
        )

    row = partial(torch_row, network.name)
    if unfused:
        yield row("torch, unfused", partial(place, network.unfused))
    yield row("torch, fused", partial(place, network.fused))
    if device.type == "cuda":
        yield row("torch.compile, fused", partial(place, network.fused), compiled=True)
