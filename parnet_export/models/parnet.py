"""ParNet: a 12-layer network of parallel streams (arXiv 2110.07641).

`ParNet` is the network as it is trained, or with the branches of every block
fused as the authors do it; its parameter names are theirs. Stream ``i`` works
at half the resolution of stream ``i - 1``; each stream's output is fused with
the downsampled path of the streams before it. A network of a single stream has
nothing to fuse: its last block, ``combine.0``, follows the stream.

The CIFAR networks (paper section 3.3) were never released. Their form here is
a reconstruction: what the text leaves open is listed at `CIFAR_CHOICES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from parnet_export.models.parnet_blocks import (
    Activation,
    BatchNormPair,
    Boxed,
    DownsamplingBlock,
    Interleave,
    PointwiseBlock,
    RepVGGBlock,
    RepVGGSSEBlock,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Variant = Literal["imagenet", "cifar"]

CIFAR_CHOICES = (
    "stream widths grow as w, 2w, 4w with w = 32, 112, 168; the published sizes are fused counts; "
    "the last 1x1 convolution has 5w channels, BatchNorm and an activation, and no stride; "
    "the first block has the gate of a downsampling block, since three channels cannot skip"
)
"""What the paper does not say about the CIFAR networks and this reconstruction assumes."""


@dataclass(frozen=True, slots=True)
class ParNetConfig:
    """Everything that fixes a ParNet's structure.

    Parameters
    ----------
    widths
        Channels of each stream, from the highest resolution to the lowest; one or more.
    blocks
        RepVGG-SSE blocks in each stream.
    last_width
        Channels before the classifier.
    num_classes
        Outputs of the classifier.
    activation
        SiLU in the paper; the released configuration files build a ReLU network.
    variant
        ``"imagenet"`` starts with downsampling blocks and ends with one;
        ``"cifar"`` keeps full resolution in the stem and ends with a 1x1 convolution.
    stem
        Channels after each downsampling block before the first stream; the last ones are
        the stream's. By default two blocks, the first of at most 64 channels, as the
        authors have it. The stem of ``"cifar"`` has one width, the first stream's.
    dropout
        Dropout before the classifier, active in training only.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    last_width: int
    num_classes: int = 1000
    activation: Activation = "silu"
    variant: Variant = "imagenet"
    stem: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.blocks):
            raise ValueError("a ParNet has one or more streams, each with a width and its blocks")
        if not self.stem:
            width = self.widths[0]
            default = (min(64, width), width) if self.variant == "imagenet" else (width,)
            object.__setattr__(self, "stem", default)
        if min(*self.widths, *self.blocks, *self.stem, self.last_width, self.num_classes) < 1:
            raise ValueError("widths, blocks and classes are positive")
        if any(width % 2 for width in self.widths[1:]):
            raise ValueError("streams after the first are fused in two groups: widths must be even")
        if self.stem[-1] != self.widths[0] or (self.variant == "cifar" and len(self.stem) > 1):
            raise ValueError("the stem ends in as many channels as the first stream has")

    @property
    def streams(self) -> int:
        """Number of parallel streams."""
        return len(self.widths)

    @property
    def input_multiple(self) -> int:
        """Height and width of the input must be multiples of this many pixels.

        Every 2x2 average of a 1x1 branch needs an even input.
        """
        between_streams = self.streams - 1
        others = 0 if self.variant == "cifar" else len(self.stem) + 1
        return 1 << (between_streams + others)


def _stem(config: ParNetConfig, index: int, *, fused: bool) -> nn.Module:
    act = config.activation
    if index > 0:
        width_in, width = config.widths[index - 1 : index + 1]
        return Boxed(DownsamplingBlock(width_in, width, act, fused=fused))
    if config.variant == "imagenet":
        return nn.Sequential(
            *(
                Boxed(DownsamplingBlock(before, after, act, fused=fused))
                for before, after in pairwise((3, *config.stem))
            )
        )
    width = config.widths[0]
    return nn.Sequential(
        Boxed(DownsamplingBlock(3, width, act, stride=1, fused=fused)),
        Boxed(RepVGGSSEBlock(width, act, fused=fused)),
        Boxed(RepVGGSSEBlock(width, act, fused=fused)),
    )


def _fusion(
    width_in: int, width: int, stride: int, act: Activation, *, fused: bool
) -> list[nn.Module]:
    block = DownsamplingBlock(2 * width_in, width, act, stride=stride, groups=2, fused=fused)
    return [BatchNormPair(width_in), Interleave(), Boxed(block)]


class Classifier(nn.Module):
    """Global average pooling, dropout, one linear layer."""

    def __init__(self, config: ParNetConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(config.last_width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, last_width, H, W)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.fc(self.dropout(x.mean((2, 3))))
        return logits


class ParNet(nn.Module):
    """ParNet in training form, or with the branches of its blocks fused.

    Parameters
    ----------
    config
        The structure.
    fused
        Build the inference form of level ``repvgg``: one convolution per block.
    """

    def __init__(self, config: ParNetConfig, *, fused: bool = False) -> None:
        super().__init__()
        self.config = config
        act, widths = config.activation, config.widths
        self.inits = nn.ModuleList(
            _stem(config, index, fused=fused) for index in range(config.streams)
        )
        self.streams = nn.ModuleList(
            nn.Sequential(*(Boxed(RepVGGSSEBlock(width, act, fused=fused)) for _ in range(count)))
            for width, count in zip(widths, config.blocks, strict=True)
        )
        # The authors' name; the first entry ends stream 1, the others fuse two paths.
        self.downsamples_2 = nn.ModuleList(
            Boxed(DownsamplingBlock(before, after, act, fused=fused))
            for before, after in pairwise(widths[:2])
        )
        for width, after in pairwise(widths[1:]):
            self.downsamples_2.append(nn.Sequential(*_fusion(width, after, 2, act, fused=fused)))
        last: nn.Module
        if config.variant == "imagenet":
            last = DownsamplingBlock(widths[-1], config.last_width, act, fused=fused)
        else:
            last = PointwiseBlock(widths[-1], config.last_width, act, fused=fused)
        fusion = _fusion(widths[-1], widths[-1], 1, act, fused=fused) if config.streams > 1 else []
        self.combine = nn.Sequential(*fusion, Boxed(last))
        self.head = Classifier(config)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        features = [self.inits[0](image)]
        for stem in list(self.inits)[1:]:
            features.append(stem(features[-1]))
        joined = self.streams[0](features[0])
        for index, downsample in enumerate(self.downsamples_2, 1):
            joined = self.streams[index](features[index]), downsample(joined)
        logits: Tensor = self.head(self.combine(joined))
        return logits

    @property
    def is_fused(self) -> bool:
        """Whether every block holds one convolution only."""
        return all(
            block.rbr_1x1 is None for block in self.modules() if isinstance(block, RepVGGBlock)
        )

    @torch.no_grad()
    def fuse(self) -> ParNet:
        """Return a new network of level ``repvgg``: the authors' fused form, exactly equal.

        BatchNorm and branches of each block become one 3x3 convolution. The
        identity BatchNorms, the pairs before the fusions, gates and shuffles stay.
        """
        fused = ParNet(self.config, fused=True)
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, RepVGGBlock | PointwiseBlock):
                conv = f"{name}.rbr_dense" if isinstance(module, RepVGGBlock) else f"{name}.conv"
                state[f"{conv}.weight"], state[f"{conv}.bias"] = module.fused_weight()
        wanted = {key: state[key] for key in fused.state_dict()}
        fused.to(dtype=self.head.fc.weight.dtype).load_state_dict(wanted)
        return fused.train(self.training).requires_grad_(requires_grad=False)


def is_parnet(keys: Iterable[str]) -> bool:
    """Tell whether state-dict keys are those of a ParNet, trained or fused by the authors' rule."""
    known = set(keys)
    return "head.fc.weight" in known and any(
        key.startswith("streams.0.0.block.rbr_dense.") for key in known
    )


def is_fused_state(keys: Iterable[str]) -> bool:
    """Tell whether a ParNet's keys are those of the fused form of level ``repvgg``."""
    return "streams.0.0.block.rbr_dense.weight" in set(keys)


def config_from_tensors(tensors: Mapping[str, Tensor], activation: Activation) -> ParNetConfig:
    """Read the structure off a state dict of the authors' layout, trained or fused.

    Raises
    ------
    ValueError
        When a tensor that the structure is read from is missing.
    """

    def out_channels(prefix: str) -> int:
        for name in (f"{prefix}.conv.weight", f"{prefix}.weight"):
            if name in tensors:
                return int(tensors[name].shape[0])
        raise ValueError(f"has no tensor {prefix}.conv.weight")

    counts: dict[int, set[int]] = {}
    for key in tensors:
        parts = key.split(".")
        if parts[0] == "streams" and len(parts) > 2 and parts[1].isdigit() and parts[2].isdigit():
            counts.setdefault(int(parts[1]), set()).add(int(parts[2]))
    streams = max(counts, default=-1) + 1
    if sorted(counts) != list(range(streams)):
        raise ValueError("has gaps in the numbers of its streams")
    if "head.fc.weight" not in tensors:
        raise ValueError("has no tensor head.fc.weight")
    last = f"combine.{3 if streams > 1 else 0}.block"
    cifar = f"{last}.conv.weight" in tensors
    widths = tuple(out_channels(f"streams.{i}.0.block.rbr_dense") for i in range(streams))
    stem: tuple[int, ...] = ()
    if not cifar:
        places = (key.split(".")[2] for key in tensors if key.startswith("inits.0."))
        blocks = 1 + max((int(place) for place in places if place.isdigit()), default=0)
        first = (out_channels(f"inits.0.{i}.block.rbr_dense") for i in range(blocks - 1))
        stem = (*first, widths[0])
    return ParNetConfig(
        widths=widths,
        blocks=tuple(max(counts[i]) + 1 for i in range(streams)),
        last_width=out_channels(last if cifar else f"{last}.rbr_dense"),
        num_classes=int(tensors["head.fc.weight"].shape[0]),
        activation=activation,
        variant="cifar" if cifar else "imagenet",
        stem=stem,
    )


def detect_activation(tensors: Mapping[str, Tensor]) -> tuple[Activation, str]:
    """Tell SiLU from ReLU by what the BatchNorms saw in training.

    The BatchNorms of the skip branches and before the fusions read activation
    outputs. Under ReLU all their running means are at least zero; under SiLU,
    whose minimum is -0.278, some channels' means are negative.

    Returns
    -------
    activation, reason
        The reason is a clause for people.
    """
    means = [
        tensor
        for key, tensor in tensors.items()
        if key.endswith((".rbr_identity.running_mean", ".b1.running_mean", ".b2.running_mean"))
    ]
    total = sum(mean.numel() for mean in means)
    negative = sum(int((mean < 0).sum()) for mean in means)
    if negative:
        return "silu", f"detected: {negative} of {total} running means are negative"
    if any(bool(mean.any()) for mean in means):
        return "relu", f"detected: none of {total} running means is negative"
    return "silu", "the paper's; the checkpoint has no statistics to tell"
