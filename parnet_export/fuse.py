"""Fusing: the same function with fewer operations, proven on random inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from parnet_export.models.catalog import FAMILIES
from parnet_export.network import Level, Network, at_level
from parnet_export.verify import relative_error

if TYPE_CHECKING:
    from torch import nn

    Outputs = torch.Tensor | tuple[torch.Tensor, ...]

FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 1e-5
_PROOF_BATCH = 2


def fuse(module: nn.Module, level: Level = "full") -> nn.Module:
    """Return a new module that computes the same with fewer operations.

    Parameters
    ----------
    module
        A network of the catalogue's families, in training form or of a lower level.
    level
        ``"repvgg"`` as the authors do it, ``"full"`` for everything that folds.

    Raises
    ------
    ValueError
        When `module` is of no known family, or its form cannot be fused to `level`.
    """
    for family in FAMILIES.values():
        if isinstance(module, family.module_types):
            return family.fuse(module, level)
    raise ValueError(f"cannot fuse a {type(module).__name__}: no family of the catalogue has it")


def fuse_network(network: Network, level: Level = "full") -> Network:
    """Return `network` fused to `level`; itself if it is there already.

    Raises
    ------
    ValueError
        When the network is already fused further than `level`.
    """
    order = ("none", "repvgg", "full")
    if level == network.level:
        return network
    if order.index(level) < order.index(network.level):
        raise ValueError(f"is already fused at level {network.level}; level {level} is below it")
    return at_level(network, fuse(network.module, level), level)


@dataclass(frozen=True, slots=True)
class FusionProof:
    """How far a fused network's outputs are from the original's, on random images.

    Differences are max |difference| / max |reference|.

    Parameters
    ----------
    float64_error
        Of the algebra: both forms in float64.
    float32_error
        Of the weights as they are written: both forms in float32.
    """

    float64_error: float
    float32_error: float

    @property
    def holds(self) -> bool:
        """Whether both differences are within their limits; NaN is not."""
        return self.float64_error <= FLOAT64_LIMIT and self.float32_error <= FLOAT32_LIMIT


@torch.no_grad()
def prove_fusion(before: Network, after: Network, *, seed: int = 0) -> FusionProof:
    """Compare a network with its fused form on random images of a small size.

    The size does not matter to the algebra as long as every kernel meets its
    border and its interior.
    """
    pixels = min(before.resolution, max(64, 2 * before.input_multiple))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(_PROOF_BATCH, 3, pixels, pixels, generator=generator, dtype=torch.float64)
    float32_error = _relative(after.module(image.float()), before.module(image.float()))
    exact = copy.deepcopy(before.module).double()
    reference = exact(image)
    fused = fuse(exact, after.level)
    del exact  # two copies in float64 of a large network are enough
    return FusionProof(_relative(fused(image), reference), float32_error)


def _relative(actual: Outputs, reference: Outputs) -> float:
    """Return the largest relative error of any output; infinite for NaN."""
    if isinstance(actual, torch.Tensor) and isinstance(reference, torch.Tensor):
        return relative_error(actual.numpy(), reference.numpy())
    return max(_relative(a, r) for a, r in zip(actual, reference, strict=True))
