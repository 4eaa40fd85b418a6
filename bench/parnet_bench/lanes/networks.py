"""The networks that lanes are held against: ParNet-S and -L, and one a third as wide."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from parnet_bench.targets.graph_cache import GraphKey, NetworkSize, cached_graph
from parnet_export.cache import cache_directory, toolkit_version
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from parnet_export.bundle import Bundle
    from parnet_export.network import Network

SMALL = "parnet-32-64-128"
"""A ParNet of these widths: its operators are too small to share among threads."""

RESOLUTIONS = {"parnet-s": 224, "parnet-l": 224, SMALL: 64}
"""The networks, and height and width of their images in pixels."""


def require_known(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names, or raise `InputError` for one that is not in `RESOLUTIONS`."""
    names = tuple(names)
    for name in names:
        if name not in RESOLUTIONS:
            raise InputError(
                f"network {name!r}", "is none of these", f"Use {', '.join(RESOLUTIONS)}"
            )
    return names


def lane_bundle(name: str) -> Bundle:
    """Return the bundle of a fused network with random weights, from the cache if it is there.

    Parameters
    ----------
    name
        One of `RESOLUTIONS`.
    """
    resolution = RESOLUTIONS[name]
    key = GraphKey(
        network=name,
        weights="seed 0",
        level="full",
        resolution=resolution,
        batch=1,
        precision="fp32",
        toolkit=toolkit_version(),
    )

    def make(folder: Path) -> NetworkSize:
        from parnet_export.catalogue.census import take_census
        from parnet_export.pipeline import export_graph, make_bundle

        network = _network(name)
        model, provenance = export_graph(network, level="full", resolution=resolution, batch=1)
        make_bundle(model, provenance, folder)
        census = take_census(network.module, resolution)
        return NetworkSize(census.parameters, census.flops, census.depth)

    return cached_graph(cache_directory(), key, make).bundle


def _network(name: str) -> Network:
    import torch

    from parnet_export.models.batch_norm import randomise_batch_norm
    from parnet_export.models.parnet import ParNet
    from parnet_export.source import load_network

    if name != SMALL:
        return load_network(name)
    network = load_network("parnet-s")
    config = replace(network.config, widths=(32, 64, 128), last_width=512, stem=())
    torch.manual_seed(0)
    module = ParNet(config)
    randomise_batch_norm(module, torch.Generator().manual_seed(0))
    module.eval().requires_grad_(requires_grad=False)
    provenance = replace(network.provenance, network=name)
    return replace(network, module=module, config=config, provenance=provenance)
