"""ResNet, the baseline that ParNet is compared with, in training form and inference form.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
table 1; with the stride of a bottleneck in its 3x3 convolution, as published
weights of ``torchvision`` have it. The training form has their parameter names.

Networks with gates are ParNet's baselines "ResNet12-Wide-SSE" (arXiv 2110.07641, table 8),
of which nothing but name, depth and size was published: a reconstruction. Every shortcut
passes a `SkipGate`, with a normalisation where it is the identity, as in ParNet's own blocks.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from parnet_export.models.batch_norm import fold_into_conv
from parnet_export.models.parnet_blocks import Activation, make_activation
from parnet_export.models.skip_gate import SkipGate, fold_gate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BlockKind = Literal["basic", "bottleneck"]

_KEYS = ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "fc.weight")
_BLOCK_KEY = re.compile(r"layer(\d{1,4})\.(\d{1,4})\.conv1\.weight")


@dataclass(frozen=True, slots=True)
class ResNetConfig:
    """The structure of a ResNet.

    Parameters
    ----------
    block
        ``"basic"``: two 3x3 convolutions; ``"bottleneck"``: 1x1, 3x3, 1x1, four times as wide
        at its end.
    blocks
        Blocks in each stage. Each stage after the first doubles the width and halves
        height and width of the map.
    width
        Channels of the stem, and of the 3x3 convolutions in the first stage.
    num_classes
        Logits.
    gated
        Whether every shortcut passes a squeeze-and-excite gate.
    activation
        ReLU; networks with gates may have SiLU.

    Raises
    ------
    ValueError
        When a number is not positive, or the block or activation is not one of these.
    """

    block: BlockKind
    blocks: tuple[int, ...]
    width: int = 64
    num_classes: int = 1000
    gated: bool = False
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        activations = get_args(Activation) if self.gated else ("relu",)
        if self.activation not in activations:
            allowed = " or ".join(activations)
            raise ValueError(
                f"holds a ResNet, whose activation is {allowed}, not {self.activation}"
            )
        if self.block not in _BLOCKS:
            raise ValueError(f"has the unknown kind of block {self.block!r}")
        if not self.blocks or min(*self.blocks, self.width, self.num_classes) < 1:
            raise ValueError(f"needs at least one stage, block, channel and class: {self}")

    @property
    def depth(self) -> int:
        """Layers with weights on the longest path, shortcuts aside: the number in the name."""
        return 2 + sum(self.blocks) * _BLOCKS[self.block].convolutions

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], activation: str = "auto") -> Self:
        """Read the structure off the names and shapes of a state dict, in either form.

        Parameters
        ----------
        tensors
            The state dict of a `ResNet` or a `FusedResNet`.
        activation
            The network's, which tensors do not tell; ``"auto"`` for SiLU with gates, else ReLU.

        Raises
        ------
        ValueError
            When the names or shapes are not those of a ResNet; the message is a clause.
        """
        missing = [key for key in _KEYS if key not in tensors]
        if missing:
            raise ValueError(f"holds no ResNet: {missing[0]} is missing")
        stem, classifier = tensors["conv1.weight"], tensors["fc.weight"]
        if stem.ndim != 4 or classifier.ndim != 2:
            raise ValueError("holds no ResNet: conv1 is no convolution or fc no linear layer")
        stages: dict[int, int] = {}
        for key in tensors:
            if found := _BLOCK_KEY.fullmatch(key):
                stages[int(found[1])] = stages.get(int(found[1]), 0) + 1
        if sorted(stages) != list(range(1, len(stages) + 1)):
            raise ValueError(f"holds no ResNet: its stages are numbered {sorted(stages)}")
        gated = "layer1.0.gate.conv.weight" in tensors
        usual: Activation = "silu" if gated else "relu"
        return cls(
            block="bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
            blocks=tuple(stages[number] for number in sorted(stages)),
            width=stem.shape[0],
            num_classes=classifier.shape[0],
            gated=gated,
            activation=usual if activation == "auto" else cast("Activation", activation),
        )


def is_resnet(keys: Iterable[str]) -> bool:
    """Tell from the names in a state dict whether it is a ResNet's, in either form."""
    return set(_KEYS) <= set(keys)


def is_fused_resnet(keys: Iterable[str]) -> bool:
    """Tell from the names in a state dict whether it is a `FusedResNet`'s."""
    names = set(keys)
    return is_resnet(names) and "bn1.weight" not in names


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, *, fused: bool
) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=fused,
    )


def _norm(channels: int, *, fused: bool) -> nn.Module:
    return nn.Identity() if fused else nn.BatchNorm2d(channels)


class _Block(nn.Module):
    """What both kinds of block share: a shortcut, gated or not, and the activation."""

    expansion: ClassVar[int]
    convolutions: ClassVar[int]

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, config: ResNetConfig, *, fused: bool
    ) -> None:
        super().__init__()
        is_identity = stride == 1 and in_channels == out_channels
        self.act = make_activation(config.activation)
        self.downsample = (
            nn.Identity()
            if is_identity
            else nn.Sequential(
                _conv(in_channels, out_channels, 1, stride, fused=fused),
                _norm(out_channels, fused=fused),
            )
        )
        self.gate = (
            SkipGate(out_channels, normalised=is_identity, fused=fused)
            if config.gated
            else nn.Identity()
        )

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the block's input by way of its shortcut to what the convolutions made of it."""
        joined: Tensor = self.act(y + self.gate(self.downsample(x)))
        return joined


class BasicBlock(_Block):
    """Two 3x3 convolutions around a shortcut; the first one has the stride."""

    expansion: ClassVar[int] = 1
    convolutions: ClassVar[int] = 2

    def __init__(
        self, in_channels: int, width: int, stride: int, config: ResNetConfig, *, fused: bool
    ) -> None:
        super().__init__(in_channels, width, stride, config, fused=fused)
        self.conv1 = _conv(in_channels, width, 3, stride, fused=fused)
        self.bn1 = _norm(width, fused=fused)
        self.conv2 = _conv(width, width, 3, 1, fused=fused)
        self.bn2 = _norm(width, fused=fused)

    @property
    def last_conv(self) -> nn.Conv2d:
        """The convolution whose output meets the shortcut."""
        return self.conv2

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        y = self.act(self.bn1(self.conv1(x)))
        return self.join(x, self.bn2(self.conv2(y)))


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the 3x3 has the stride."""

    expansion: ClassVar[int] = 4
    convolutions: ClassVar[int] = 3

    def __init__(
        self, in_channels: int, width: int, stride: int, config: ResNetConfig, *, fused: bool
    ) -> None:
        out_channels = width * self.expansion
        super().__init__(in_channels, out_channels, stride, config, fused=fused)
        self.conv1 = _conv(in_channels, width, 1, 1, fused=fused)
        self.bn1 = _norm(width, fused=fused)
        self.conv2 = _conv(width, width, 3, stride, fused=fused)
        self.bn2 = _norm(width, fused=fused)
        self.conv3 = _conv(width, out_channels, 1, 1, fused=fused)
        self.bn3 = _norm(out_channels, fused=fused)

    @property
    def last_conv(self) -> nn.Conv2d:
        """The convolution whose output meets the shortcut."""
        return self.conv3

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, 4 * width, H / stride, W / stride)``."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.join(x, self.bn3(self.conv3(y)))


_BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class _ResNet(nn.Module):
    """What both forms share; `fused` gives convolutions biases in place of normalisations."""

    def __init__(self, config: ResNetConfig, *, fused: bool) -> None:
        super().__init__()
        self.config = config
        self.conv1 = _conv(3, config.width, 7, 2, fused=fused)
        self.bn1 = _norm(config.width, fused=fused)
        self.act = make_activation(config.activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        block = _BLOCKS[config.block]
        channels = config.width
        for index, count in enumerate(config.blocks):
            width = config.width << index
            stage = nn.Sequential()
            for number in range(count):
                stride = 2 if index and not number else 1
                stage.append(block(channels, width, stride, config, fused=fused))
                channels = width * block.expansion
            self.add_module(f"layer{index + 1}", stage)
        self.fc = nn.Linear(channels, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        x = self.maxpool(self.act(self.bn1(self.conv1(images))))
        for number in range(1, len(self.config.blocks) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        # A mean instead of a pooling layer: what follows needs no reshape to (N, channels).
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class ResNet(_ResNet):
    """Training form: every convolution is followed by its own normalisation.

    Fresh weights are normal, with the variance that keeps a signal's size on its way
    forward (He et al., arXiv 1502.01852, section 2.2). The last convolution of each
    block is divided by the root of the number of blocks: without that, the sums over
    the shortcuts of a network with random weights would grow past half precision.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config, fused=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    module.last_conv.weight /= math.sqrt(sum(config.blocks))


class FusedResNet(_ResNet):
    """Inference form: convolutions with biases, and no normalisation left.

    Parameters are named as in the training form, less the normalisations, each
    convolution with a ``bias`` beside its ``weight``.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config, fused=True)


def build_resnet(config: ResNetConfig) -> ResNet:
    """Return the training form with random weights, in evaluation mode."""
    return ResNet(config).eval()


def build_fused_resnet(config: ResNetConfig) -> FusedResNet:
    """Return the inference form with arbitrary weights, ready to be loaded, in evaluation mode."""
    return FusedResNet(config).eval()


def fold_resnet(model: ResNet) -> FusedResNet:
    """Return a new network that computes the same, every normalisation in its convolution.

    Parameters
    ----------
    model
        Evaluated with its running statistics, whatever its mode; it stays as it is.
    """
    # Built on the meta device: every weight is about to be replaced.
    with torch.device("meta"):
        folded = FusedResNet(model.config)
    for name, module in model.named_modules():
        if isinstance(module, SkipGate):
            folded.set_submodule(name, fold_gate(module))
        elif isinstance(module, nn.BatchNorm2d) and not name.endswith(".gate.norm"):
            conv_name = _conv_before(name)
            conv = model.get_submodule(conv_name)
            if not isinstance(conv, nn.Conv2d):
                raise TypeError(f"{conv_name} before {name} is a {type(conv).__name__}")
            folded.set_submodule(conv_name, fold_into_conv(conv, module))
    folded.fc = copy.deepcopy(model.fc)
    return folded.eval()


def _conv_before(name: str) -> str:
    """Return the name of the convolution that the normalisation called `name` follows."""
    if name.endswith("downsample.1"):
        return name.removesuffix("1") + "0"
    return re.sub(r"bn(\d)$", r"conv\1", name)
