"""ParNet detectors: ParNet-XL before the neck and the head of YOLOR-D6.

Source: arXiv 2110.07641, section 4.2 and table 4. The authors say that ParNet-XL takes the
place of CSPDarknet53s, that the head and a reduced neck come from YOLOR-D6, that CSP is
applied to ParNet-XL in a second network, and that the backbone is 12 layers deep. They have
published neither code nor weights nor a configuration, and no size: **this is a
reconstruction**, and `DETECTOR_CHOICES` lists what it assumes. ``docs/detectors.md`` gives
the reasons.

The names of the backbone's tensors are those of ParNet's authors, those of the head's are
YOLOR's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from parnet_export.detections.detection_form import BOX_CHANNELS
from parnet_export.models.detector_neck import NORM_EPS, ConvBlock, Neck, NormalisedJoin
from parnet_export.models.implicit_head import ImplicitHead
from parnet_export.models.parnet import ParNetConfig
from parnet_export.models.parnet_backbone import FullParNetBackbone, ParNetBackbone
from parnet_export.models.parnet_blocks import Activation, RepVGGBlock, shuffle_order
from parnet_export.models.parnet_full import affine_parts, full_state
from parnet_export.models.yolov4_csp_layers import ANCHORS_PER_LEVEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from parnet_export.network import Level

DETECTOR_CHOICES = (
    "maps of strides 8, 16 and 32: stream 2, the last fusion, the last block; a 1x1 convolution "
    "to 960 channels in the classifier's place, the backbone's twelfth layer; YOLOR-D6's neck "
    "without its coarsest level: 160, 320, 480 channels, three pairs of convolutions in each "
    "block, pyramid pooling at stride 32; the anchors of YOLOv4-CSP; BatchNorm with an epsilon "
    "of 1e-3; SiLU; 640 pixels"
)
"""What the paper does not say about its detectors and this reconstruction assumes."""

CSP_CHOICES = (
    "half of each stream's channels goes through its blocks, of half the width, and the other "
    "half around them, which keeps the depth of 12"
)
"""What the reconstruction of ParNet-XL-CSP assumes besides."""

_TRAINED = "backbone.streams.0.0.block.rbr_dense.conv.weight"
_FUSED = "backbone.streams.0.0.block.rbr_dense.weight"


@dataclass(frozen=True, slots=True)
class ParNetDetectorConfig:
    """The structure of a ParNet detector.

    Parameters
    ----------
    widths, blocks, last_width
        Of the backbone's three streams and its last block, as in `ParNetConfig`.
    partial
        Whether half of each stream's channels goes around its blocks (CSP).
    pyramid_width
        Channels of the coarsest map that the neck reads.
    neck_widths
        Channels of the neck at strides 8, 16 and 32.
    neck_blocks
        Pairs of convolutions in each CSP block of the neck.
    num_classes
        Classes of objects.
    activation
        Of backbone and neck.

    Raises
    ------
    ValueError
        When there are not three streams and levels, or a number is not positive or odd where
        it is halved.
    """

    widths: tuple[int, ...] = (200, 400, 800)
    blocks: tuple[int, ...] = (4, 5, 5)
    last_width: int = 3200
    partial: bool = False
    pyramid_width: int = 960
    neck_widths: tuple[int, ...] = (160, 320, 480)
    neck_blocks: int = 3
    num_classes: int = 80
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.blocks) == len(self.neck_widths) == 3:
            raise ValueError("a ParNet detector has three streams and three levels of its neck")
        numbers = (*self.widths, *self.blocks, *self.neck_widths, self.neck_blocks)
        if min(*numbers, self.last_width, self.pyramid_width, self.num_classes) < 1:
            raise ValueError("widths, blocks and classes are positive")
        halved = (*self.neck_widths[1:], *(self.widths if self.partial else ()))
        if any(width % 2 for width in halved):
            raise ValueError("widths that are halved must be even")

    @property
    def backbone(self) -> ParNetConfig:
        """The ParNet that the backbone is taken from, with a classifier that it does not have."""
        return ParNetConfig(
            self.widths, self.blocks, self.last_width, num_classes=1, activation=self.activation
        )

    @property
    def head_channels(self) -> int:
        """Channels of each output: a box, its objectness and its classes for each anchor."""
        return ANCHORS_PER_LEVEL * (BOX_CHANNELS + self.num_classes)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], activation: Activation) -> Self:
        """Read the structure off a state dict, in training form or of level ``repvgg``.

        Raises
        ------
        ValueError
            When a tensor that the structure is read from is missing, or they contradict
            each other; the message is a clause.
        """

        def out_channels(*names: str) -> int:
            for name in names:
                if name in tensors and tensors[name].ndim == 4:
                    return int(tensors[name].shape[0])
            raise ValueError(f"has no tensor {names[0]}")

        def dense(prefix: str) -> int:
            name = f"backbone.{prefix}.block.rbr_dense"
            return out_channels(f"{name}.conv.weight", f"{name}.weight")

        def count(prefix: str) -> int:
            found = {
                key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)
            }
            return 1 + max((int(place) for place in found if place.isdigit()), default=-1)

        widths = tuple(dense(stem) for stem in ("inits.0.1", "inits.1", "inits.2"))
        classes, rest = divmod(out_channels("head.m.0.weight"), ANCHORS_PER_LEVEL)
        if rest or classes <= BOX_CHANNELS:
            raise ValueError(
                f"has a head that is none of {ANCHORS_PER_LEVEL} anchors with a box, an "
                "objectness and classes each"
            )
        return cls(
            widths=widths,
            blocks=tuple(count(f"backbone.streams.{index}.") for index in range(3)),
            last_width=dense("combine.3"),
            partial=2 * dense("streams.0.0") == widths[0],
            pyramid_width=out_channels("backbone.project.conv.weight"),
            neck_widths=(
                out_channels("neck.top_down.0.merge.conv.weight"),
                out_channels("neck.top_down.1.merge.conv.weight"),
                out_channels("neck.pyramid_pool.merge.conv.weight"),
            ),
            neck_blocks=count("neck.top_down.0.blocks."),
            num_classes=classes - BOX_CHANNELS,
            activation=activation,
        )


class ParNetDetector(nn.Module):
    """A ParNet detector in training form, or fused.

    Parameters
    ----------
    config
        The structure.
    level
        How far it is fused.
    affine
        At level ``"full"``, the contributions of the backbone that keep their affine step.
    """

    def __init__(
        self,
        config: ParNetDetectorConfig,
        *,
        level: Level = "none",
        affine: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.config = config
        self.level: Level = level
        act = config.activation
        project = ConvBlock(config.last_width, config.pyramid_width, activation=act, level=level)
        self.backbone: ParNetBackbone | FullParNetBackbone
        if level == "full":
            self.backbone = FullParNetBackbone(
                config.backbone, project, partial=config.partial, affine=affine
            )
        else:
            self.backbone = ParNetBackbone(
                config.backbone, project, partial=config.partial, fused=level == "repvgg"
            )
        maps = (*config.widths[1:], config.pyramid_width)
        self.neck = Neck(maps, config.neck_widths, config.neck_blocks, activation=act, level=level)
        head_widths = [2 * width for width in config.neck_widths]
        self.head = ImplicitHead(head_widths, config.head_channels, level=level)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = NORM_EPS

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images to the raw outputs of the heads.

        Parameters
        ----------
        images
            ``(N, 3, H, W)``, RGB in [0, 1], height and width multiples of 32.

        Returns
        -------
        tuple of Tensor
            For the strides 8, 16 and 32, ``(N, 3 * (5 + classes), H / stride, W / stride)``:
            x, y, width, height, objectness and classes for each anchor, before the sigmoid.
        """
        outputs: tuple[Tensor, ...] = self.head(self.neck(self.backbone(images)))
        return outputs

    @torch.no_grad()
    def fuse(self, level: Level) -> ParNetDetector:
        """Return a new network of a higher level that computes the same.

        Level ``"repvgg"`` folds what the authors of ParNet and YOLOR fold: the branches of
        the blocks, BatchNorms that follow a convolution, and implicit knowledge. Level
        ``"full"`` leaves no BatchNorm, distributes the fusions over their inputs as
        `ParNetFull` does, and chains the pools of the pyramid.
        """
        if level in ("none", self.level):
            return self
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, ConvBlock | NormalisedJoin | ImplicitHead):
                state |= _prefixed(name, module.fused_state(level))
            elif isinstance(module, RepVGGBlock):
                weight, bias = module.fused_weight()
                fused_weight = {"rbr_dense.weight": weight, "rbr_dense.bias": bias}
                state |= _prefixed(name, fused_weight)
        affine: frozenset[str] = frozenset()
        if level == "full" and isinstance(self.backbone, ParNetBackbone):
            body, affine = full_state(self.backbone)
            state |= _prefixed("backbone", body)
            # What reads the last fusion finds its channels as they were before the shuffle.
            unshuffle = torch.argsort(shuffle_order(self.config.widths[-1]))
            lateral = "neck.laterals.1.conv.weight"
            state[lateral] = state[lateral][:, unshuffle]
        # Built on the meta device: every tensor is about to be replaced.
        with torch.device("meta"):
            fused = ParNetDetector(self.config, level=level, affine=affine)
        dtype = next(self.parameters()).dtype
        wanted = {key: state[key].clone() for key in fused.state_dict()}
        fused.load_state_dict(wanted, assign=True)
        return fused.to(dtype).train(self.training).requires_grad_(requires_grad=False)


def build_parnet_detector(
    config: ParNetDetectorConfig, level: Level, keys: Iterable[str]
) -> ParNetDetector:
    """Return a form of a detector, ready for tensors of the names in `keys`."""
    inside = (key.removeprefix("backbone.") for key in keys if key.startswith("backbone."))
    affine = affine_parts(inside) if level == "full" else frozenset()
    return ParNetDetector(config, level=level, affine=affine).eval()


def is_parnet_detector(keys: Iterable[str]) -> bool:
    """Tell whether state-dict keys are a ParNet detector's, in training form or ``repvgg``."""
    known = set(keys)
    return "head.m.0.weight" in known and bool({_TRAINED, _FUSED} & known)


def is_fused_parnet_detector(keys: Iterable[str]) -> bool:
    """Tell whether a detector's keys are those of level ``repvgg``."""
    return _FUSED in set(keys)


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}
