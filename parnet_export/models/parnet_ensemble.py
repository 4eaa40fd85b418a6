"""Ensembles of ParNets as one network, which averages its members' probabilities.

Every member sees the image and shares nothing with the others, so they run side by side.

Source: arXiv 2110.07641, table 9, which compares multi-stream networks with two and three
single-stream ones. How their predictions were combined is not said; see `ENSEMBLE_CHOICES`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from parnet_export.models.family import Entry, Family, Restored
from parnet_export.models.parnet import (
    ParNetConfig,
    config_from_tensors,
    is_fused_state,
    is_parnet,
)
from parnet_export.models.parnet_family import FAMILY as PARNET
from parnet_export.models.parnet_family import (
    ONE_STREAM,
    ONE_STREAM_CHOICES,
    choose_activation,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from parnet_export.network import Level

ENSEMBLE_CHOICES = (
    f"the mean of the members' probabilities; each member as parnet-m-one-stream: "
    f"{ONE_STREAM_CHOICES}"
)
"""What the paper does not say about its ensembles and this reconstruction assumes."""


@dataclass(frozen=True, slots=True)
class EnsembleConfig(ParNetConfig):
    """The structure of an ensemble: that of each member, and how many there are.

    Parameters
    ----------
    members
        Networks of the same structure, each with weights of its own; two or more.
    """

    members: int = 2

    def __post_init__(self) -> None:
        ParNetConfig.__post_init__(self)
        if self.members < 2:
            raise ValueError("an ensemble has two or more members")

    @property
    def member(self) -> ParNetConfig:
        """The structure of each member."""
        return ParNetConfig(**{f.name: getattr(self, f.name) for f in fields(ParNetConfig)})


class ParNetEnsemble(nn.Module):
    """Several ParNets whose probabilities are averaged.

    Parameters
    ----------
    config
        The structure.
    members
        The networks, all in the same form.
    """

    def __init__(self, config: EnsembleConfig, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to probabilities ``(N, num_classes)``."""
        first, *others = (torch.softmax(member(image), 1) for member in self.members)
        total: Tensor = first
        for probabilities in others:
            total = total + probabilities
        return total / len(self.members)


def _of_member(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"members.{index}."
    return {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}


def _recognises(keys: Iterable[str]) -> bool:
    prefix = "members.0."
    return is_parnet(key[len(prefix) :] for key in keys if key.startswith(prefix))


def _restore(tensors: Mapping[str, Tensor], activation: str) -> Restored:
    chosen, reason = choose_activation(tensors, activation)
    numbers = {key.split(".")[1] for key in tensors if key.startswith("members.")}
    count = len(numbers)
    if numbers != {str(index) for index in range(count)}:
        raise ValueError(f"has members numbered {', '.join(sorted(numbers))}")
    members = [_of_member(tensors, index) for index in range(count)]
    first, *others = (config_from_tensors(member, chosen) for member in members)
    if any(other != first for other in others):
        raise ValueError("holds an ensemble whose members differ in structure")
    level: Level = "repvgg" if is_fused_state(members[0]) else "none"
    config = EnsembleConfig(
        **{f.name: getattr(first, f.name) for f in fields(first)}, members=count
    )
    return Restored(config, level, f"{chosen} ({reason})")


def _build(config: EnsembleConfig, level: Level, keys: Iterable[str]) -> nn.Module:
    known = tuple(keys)

    def member(index: int) -> nn.Module:
        prefix = f"members.{index}."
        own = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
        return PARNET.build(config.member, level, own)

    return ParNetEnsemble(config, map(member, range(config.members)))


def _fuse(module: nn.Module, level: Level) -> nn.Module:
    ensemble = cast("ParNetEnsemble", module)
    fused = ParNetEnsemble(
        ensemble.config, (PARNET.fuse(member, level) for member in ensemble.members)
    )
    return fused.train(ensemble.training)


def _describe(config: EnsembleConfig) -> str:
    return f"ensemble of {config.members}, each a {PARNET.describe(config.member)}"


def _entry(members: int) -> Entry:
    member = {f.name: getattr(ONE_STREAM, f.name) for f in fields(ONE_STREAM)}
    return Entry(
        f"parnet-m-one-stream-x{members}",
        f"{members} x ParNet-M-OneStream",
        EnsembleConfig(**member, members=members),
        224,
        "reconstruction",
        "arXiv 2110.07641, table 9",
        ENSEMBLE_CHOICES,
    )


FAMILY = Family(
    key="parnet-ensemble",
    title="ParNet ensemble",
    config_type=EnsembleConfig,
    module_types=(ParNetEnsemble,),
    recognises=_recognises,
    restore=_restore,
    build=_build,
    fuse=_fuse,
    input_multiple=PARNET.input_multiple,
    resolution=PARNET.resolution,
    describe=_describe,
    entries=(_entry(2), _entry(3)),
    output_names=("probabilities",),
)
