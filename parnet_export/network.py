"""A network with its weights, and what is known about where they come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from parnet_export.bundle import Provenance  # noqa: TC001 - msgspec reads annotations at run time

if TYPE_CHECKING:
    from torch import nn

Level = Literal["none", "repvgg", "full"]
"""How far a network is fused: not at all, as the authors do it, or everything that folds."""

HEADER_KEY = "parnet_export"
"""Key of the description in the metadata of a fused ``.safetensors`` file."""


@dataclass(frozen=True, slots=True)
class Network:
    """A module in evaluation mode with everything a label needs.

    Parameters
    ----------
    module
        Maps images ``(N, 3, H, W)`` to the tensor or tuple of tensors in `output_names`, float32.
    family
        Key of the network's family, such as ``"parnet"``.
    config
        The structure: the family's frozen configuration.
    level
        How far `module` is fused.
    resolution
        Height and width in pixels that the network is made for.
    input_multiple
        Height and width must be multiples of this many pixels.
    provenance
        Where the weights come from.
    output_names
        What the module returns: ``("logits",)`` of shape ``(N, classes)`` for a classifier.
    labels
        Names of the classes in the order of the outputs; none where they are not known.
    """

    module: nn.Module
    family: str
    config: Any
    level: Level
    resolution: int
    input_multiple: int
    provenance: Provenance
    output_names: tuple[str, ...] = ("logits",)
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The network's name, without a mark for random weights."""
        return self.provenance.network

    @property
    def label(self) -> str:
        """The network's name for people, marked when its weights are random."""
        return self.provenance.label


@dataclass(frozen=True, slots=True)
class Header:
    """What a fused file says about itself beside its tensors."""

    family: str
    level: Level
    config: dict[str, Any]
    resolution: int
    provenance: Provenance
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, network: Network) -> Header:
        """Describe a network."""
        return cls(
            network.family,
            network.level,
            asdict(network.config),
            network.resolution,
            network.provenance,
            network.labels,
        )

    def encode(self) -> dict[str, str]:
        """Return the metadata of a ``.safetensors`` file."""
        return {HEADER_KEY: msgspec.json.encode(self).decode()}

    @classmethod
    def decode(cls, metadata: dict[str, str]) -> Header | None:
        """Read the description from a file's metadata; None where there is none.

        Raises
        ------
        ValueError
            When the description is damaged.
        """
        if HEADER_KEY not in metadata:
            return None
        try:
            return msgspec.json.decode(metadata[HEADER_KEY], type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"has a damaged description ({error})") from error


def at_level(network: Network, module: nn.Module, level: Level) -> Network:
    """Return `network` with a fused module in place of its own."""
    provenance = replace(network.provenance, level=level)
    return replace(network, module=module, level=level, provenance=provenance)
