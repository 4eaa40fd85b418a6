"""The layers of YOLOv4-CSP as a list, numbered as published weights number them.

Source: Wang et al., "Scaled-YOLOv4", arXiv 2011.08036, section 3.1, as the file
``yolov4-csp.cfg`` fixes it: a CSP-ized Darknet53, spatial pyramid pooling, a path
aggregation neck and three heads. State dicts name their tensors by the numbers of the
layers, and Darknet orders its files by them, so the list is kept as it is.

The file ``yolov4-csp.yaml`` describes another network, which normalises the
concatenations of its neck once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, get_args

from parnet_export.detections.detection_form import BOX_CHANNELS, AnchorLevel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

Activation = Literal["mish", "silu"]

Layout = Literal["scaled-yolov4", "yolor"]
"""Whose layer list numbers the layers.

``"scaled-yolov4"``, which Darknet shares, has each head where its feature map is ready
and 175 layers; ``"yolor"`` has the three heads at its end and 176. Both are one network.
"""

HEAD_INDICES: Mapping[Layout, tuple[int, int, int]] = {
    "scaled-yolov4": (143, 158, 173),
    "yolor": (166, 170, 174),
}
"""Layer numbers of the last convolution of each head; only they have a bias."""

LAYOUT_ACTIVATIONS: Mapping[Layout, Activation] = {"scaled-yolov4": "mish", "yolor": "silu"}
"""What each layer list activates with. Weights do not tell."""

LEVELS = (
    AnchorLevel(8, ((12, 16), (19, 36), (40, 28))),
    AnchorLevel(16, ((36, 75), (76, 55), (72, 146))),
    AnchorLevel(32, ((142, 110), (192, 243), (459, 401))),
)
"""Stride and anchors of the heads, in the order of the network's outputs."""

OUTPUT_NAMES = ("p3", "p4", "p5")
"""The heads by the power of two of their stride."""

BACKBONE_BLOCKS = (1, 2, 8, 8, 4)
"""Residual blocks of each stage; the first stage has no bypass."""

NECK_BLOCKS = 2
"""Pairs of convolutions in each CSP block of the neck."""

ANCHORS_PER_LEVEL = 3

_FUSED_STEM = "backbone.stem.conv.weight"
_FUSED_HEAD = "head.p3.predict.conv.weight"


@dataclass(frozen=True, slots=True)
class YOLOv4CSPConfig:
    """The structure of a YOLOv4-CSP.

    Parameters
    ----------
    width
        Channels of the first convolution; the backbone ends with 32 times as many.
    num_classes
        Classes of objects.
    activation
        After every normalised convolution.

    Raises
    ------
    ValueError
        When a number is not positive or the activation is unknown.
    """

    width: int = 32
    num_classes: int = 80
    activation: Activation = "mish"

    def __post_init__(self) -> None:
        if min(self.width, self.num_classes) < 1:
            raise ValueError(f"needs at least one channel and one class: {self}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"cannot use the activation {self.activation!r}; choose mish or silu")

    @property
    def head_channels(self) -> int:
        """Channels of each output: a box, its objectness and its classes for each anchor."""
        return ANCHORS_PER_LEVEL * (BOX_CHANNELS + self.num_classes)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], activation: Activation = "mish") -> Self:
        """Read the structure off the names and shapes of a state dict, in either form.

        Raises
        ------
        ValueError
            When the names or shapes are not those of a YOLOv4-CSP; the message is a clause.
        """
        if is_fused_yolov4_csp(tensors):
            stem, head = tensors[_FUSED_STEM], tensors[_FUSED_HEAD]
        else:
            index = HEAD_INDICES[layout_of(tensors)][0]
            head = tensors[f"module_list.{index}.Conv2d.weight"]
            stem = tensors["module_list.0.Conv2d.weight"]
        if stem.ndim != 4 or head.ndim != 4:
            raise ValueError("holds no YOLOv4-CSP: its first or last layer is no convolution")
        classes, rest = divmod(head.shape[0], ANCHORS_PER_LEVEL)
        if rest or classes <= BOX_CHANNELS:
            raise ValueError(
                f"holds no YOLOv4-CSP: a head of {head.shape[0]} channels is none of "
                f"{ANCHORS_PER_LEVEL} anchors with a box, an objectness and classes each"
            )
        return cls(stem.shape[0], classes - BOX_CHANNELS, activation)


def layout_of(keys: Iterable[str]) -> Layout:
    """Tell from the names in a training state dict whose layer list numbers its layers.

    Raises
    ------
    ValueError
        When there is no head where either list has one; the message is a clause.
    """
    names = set(keys)
    for layout, indices in HEAD_INDICES.items():
        if names.issuperset(f"module_list.{index}.Conv2d.bias" for index in indices):
            return layout
    places = " or ".join(str(indices) for indices in HEAD_INDICES.values())
    raise ValueError(f"holds no YOLOv4-CSP: no heads at the layers {places}")


def is_fused_yolov4_csp(keys: Iterable[str]) -> bool:
    """Tell from the names in a state dict whether it is a `FusedYOLOv4CSP`'s."""
    return {_FUSED_STEM, _FUSED_HEAD} <= set(keys)


def is_yolov4_csp(keys: Iterable[str]) -> bool:
    """Tell from the names in a state dict whether it is a YOLOv4-CSP's, in either form."""
    names = set(keys)
    if is_fused_yolov4_csp(names):
        return True
    try:
        layout_of(names)
    except ValueError:
        return False
    return "module_list.0.Conv2d.weight" in names


LayerKind = Literal["convolution", "prediction", "concat", "add", "pool", "upsample", "output"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of the layer list.

    Parameters
    ----------
    kind
        ``"convolution"`` (normalised and activated), ``"prediction"`` (a convolution
        with a bias alone), ``"concat"`` (of one tensor: a reference to it), ``"add"``,
        ``"pool"`` (maximum), ``"upsample"`` (by two, nearest), or ``"output"``.
    sources
        Numbers of the layers it reads; none where it reads the image.
    channels
        Of its output.
    in_channels, kernel, stride
        Of a convolution or a pool.
    name
        What a convolution is for, as a dotted path.
    """

    kind: LayerKind
    sources: tuple[int, ...]
    channels: int
    in_channels: int = 0
    kernel: int = 1
    stride: int = 1
    name: str = ""

    @property
    def has_weights(self) -> bool:
        """Whether it is a convolution."""
        return self.kind in ("convolution", "prediction")

    @property
    def predicts(self) -> bool:
        """Whether it is the last convolution of a head: with a bias, and nothing after it."""
        return self.kind == "prediction"


class _LayerList:
    """Appends layers and returns their numbers."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def _append(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def conv(
        self,
        name: str,
        source: int | None,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        kind: LayerKind = "convolution",
    ) -> int:
        sources = () if source is None else (source,)
        before = 3 if source is None else self.layers[source].channels
        return self._append(Layer(kind, sources, channels, before, kernel, stride, name))

    def concat(self, *sources: int) -> int:
        return self._append(Layer("concat", sources, sum(self.layers[s].channels for s in sources)))

    def add(self, one: int, other: int) -> int:
        return self._append(Layer("add", (one, other), self.layers[one].channels))

    def pool(self, source: int, kernel: int) -> int:
        channels = self.layers[source].channels
        return self._append(Layer("pool", (source,), channels, channels, kernel))

    def upsample(self, source: int) -> int:
        return self._append(Layer("upsample", (source,), self.layers[source].channels))

    def residual(self, name: str, x: int, hidden: int) -> int:
        y = self.conv(f"{name}.reduce", x, hidden)
        return self.add(self.conv(f"{name}.expand", y, self.layers[x].channels, 3), x)

    def csp_stage(self, name: str, x: int, channels: int, blocks: int) -> int:
        """Halve the resolution; send half of the channels through residual blocks."""
        half = channels // 2
        x = self.conv(f"{name}.down", x, channels, 3, 2)
        bypass = self.conv(f"{name}.bypass", x, half)
        y = self.conv(f"{name}.main", self.concat(x), half)
        for block in range(blocks):
            y = self.residual(f"{name}.blocks.{block}", y, half)
        y = self.conv(f"{name}.transition", y, half)
        return self.conv(f"{name}.merge", self.concat(y, bypass), channels)

    def csp_pyramid_pool(self, name: str, x: int, channels: int, *, chain_pools: bool) -> int:
        """Look around at four scales, on half of the channels."""
        bypass = self.conv(f"{name}.bypass", x, channels)
        y = self.conv(f"{name}.main", self.concat(x), channels)
        y = self.conv(f"{name}.spread", y, channels, 3)
        y = self.conv(f"{name}.reduce", y, channels)
        pool5 = self.pool(y, 5)
        # The maximum over 5x5 of maxima over 5x5 is the one over 9x9; again, over 13x13.
        pool9 = self.pool(self.concat(pool5), 5) if chain_pools else self.pool(self.concat(y), 9)
        pool13 = self.pool(self.concat(pool9), 5) if chain_pools else self.pool(self.concat(y), 13)
        y = self.conv(f"{name}.mix", self.concat(pool13, pool9, pool5, y), channels)
        y = self.conv(f"{name}.transition", y, channels, 3)
        return self.conv(f"{name}.merge", self.concat(y, bypass), channels)

    def csp_block(self, name: str, x: int, channels: int) -> int:
        """Mix two concatenated maps, without shortcuts."""
        x = self.conv(f"{name}.reduce", x, channels)
        bypass = self.conv(f"{name}.bypass", x, channels)
        y = self.concat(x)
        for block in range(NECK_BLOCKS):
            y = self.conv(f"{name}.blocks.{block}.reduce", y, channels)
            y = self.conv(f"{name}.blocks.{block}.expand", y, channels, 3)
        return self.conv(f"{name}.merge", self.concat(y, bypass), channels)

    def top_down(self, name: str, x: int, lateral: int, channels: int) -> int:
        """Bring a coarser map to the next finer one of the backbone."""
        up = self.upsample(self.conv(f"{name}.up", x, channels))
        lateral = self.conv(f"{name}.lateral", self.concat(lateral), channels)
        return self.csp_block(name, self.concat(lateral, up), channels)

    def bottom_up(self, name: str, x: int, lateral: int, channels: int) -> int:
        """Bring a finer map to the next coarser one of the neck."""
        down = self.conv(f"{name}.down", x, channels, 3, 2)
        return self.csp_block(name, self.concat(down, lateral), channels)

    def head(self, name: str, x: int, head_channels: int) -> None:
        y = self.conv(f"{name}.widen", x, 2 * self.layers[x].channels, 3)
        y = self.conv(f"{name}.predict", y, head_channels, kind="prediction")
        self._append(Layer("output", (y,), head_channels))


def list_layers(
    config: YOLOv4CSPConfig, layout: Layout = "scaled-yolov4", *, chain_pools: bool = False
) -> tuple[Layer, ...]:
    """Write the network down, layer by layer.

    Parameters
    ----------
    config
        The structure.
    layout
        Decides where the heads stand, and with that the numbers of the layers.
    chain_pools
        Compute each pool of the pyramid from the one before instead of from their
        common input. Maxima of maxima are exact, to the bit, also at the borders.
    """
    net, width = _LayerList(), config.width
    x = net.conv("backbone.stem", None, width, 3)
    x = net.conv("backbone.p1.down", x, 2 * width, 3, 2)
    for block in range(BACKBONE_BLOCKS[0]):
        x = net.residual(f"backbone.p1.blocks.{block}", x, width)
    maps = {}
    for level, blocks in enumerate(BACKBONE_BLOCKS[1:], 2):
        maps[level] = x = net.csp_stage(f"backbone.p{level}", x, width << level, blocks)

    pooled = net.csp_pyramid_pool("neck.pyramid_pool", x, 16 * width, chain_pools=chain_pools)
    middle = net.top_down("neck.top_down_p4", pooled, maps[4], 8 * width)
    p3 = net.top_down("neck.top_down_p3", middle, maps[3], 4 * width)

    # One list has each head where its map is ready, and then refers back to the map;
    # the other has the heads at its end, and refers to the map before each.
    inline = layout == "scaled-yolov4"
    if inline:
        net.head("head.p3", p3, config.head_channels)
    x = net.concat(p3) if inline else p3
    p4 = net.bottom_up("neck.bottom_up_p4", x, middle, 8 * width)
    if inline:
        net.head("head.p4", p4, config.head_channels)
    x = net.concat(p4) if inline else p4
    p5 = net.bottom_up("neck.bottom_up_p5", x, pooled, 16 * width)
    if inline:
        net.head("head.p5", p5, config.head_channels)
    else:
        for name, x in zip(OUTPUT_NAMES, (p3, p4, p5), strict=True):
            net.head(f"head.{name}", net.concat(x), config.head_channels)
    return tuple(net.layers)
