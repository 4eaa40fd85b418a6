"""One network of the catalogue in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """What a network of the catalogue costs, in training form and fused.

    FLOPs are two per multiply-accumulate, of level ``repvgg``, for one image.
    """

    name: str
    title: str
    family: str
    origin: str
    source: str
    choices: str
    resolution: int
    parameters: int
    parameters_repvgg: int
    parameters_full: int
    flops_unfused: int
    flops: int
    depth: int
