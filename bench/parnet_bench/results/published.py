"""What the papers print, to stand beside what is measured.

Figures are those of "Non-deep Networks" (arXiv 2110.07641). Nothing here was measured by
this project. A row names the network of the catalogue that has its structure, where there
is one; which of those are reconstructions the catalogue says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Form = Literal["unfused", "whole", "authors"]
"""The network as trained, the fused network as one graph, or a device for each stream."""

PAPER = "Non-deep Networks (arXiv 2110.07641)"

RTX_3090 = "RTX 3090, PyTorch 1.8.1, CUDA 11.1, batch 1"
"""The hardware and software of the paper's latencies (tables 2 to 4)."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a row of a table prints; None where it prints nothing.

    Parameters
    ----------
    top1, top5
        ImageNet validation accuracies in per cent.
    error_cifar10, error_cifar100
        Test errors in per cent.
    average_precision
        COCO AP in per cent.
    latency_ms
        Milliseconds for one image.
    samples_per_s
        Images per second, one at a time.
    parameters
        Weights.
    flops
        Floating-point operations for one image, two for each multiply-accumulate.
    depth
        Layers on the longest path, as the paper counts them.
    """

    top1: float | None = None
    top5: float | None = None
    error_cifar10: float | None = None
    error_cifar100: float | None = None
    average_precision: float | None = None
    latency_ms: float | None = None
    samples_per_s: float | None = None
    parameters: float | None = None
    flops: float | None = None
    depth: int | None = None

    @property
    def latency_or_inverse_ms(self) -> float | None:
        """The latency, or the one that the speed stands for."""
        if self.latency_ms is None and self.samples_per_s:
            return 1000 / self.samples_per_s
        return self.latency_ms


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of a published table.

    Parameters
    ----------
    label
        The row's name, as printed.
    figures
        What it prints.
    network
        The catalogue's name of the structure; empty where the catalogue has none.
    form
        What was run to get the latency.
    note
        What a reader has to know about the row, one sentence.
    """

    label: str
    figures: Figures
    network: str = ""
    form: Form = "whole"
    note: str = ""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A published table.

    Parameters
    ----------
    number
        Its number in the paper.
    title
        What it is about.
    reference
        Label of the row that ratios refer to.
    rows
        In the paper's order.
    hardware
        What latencies and speeds were measured on; empty where there are none.
    caveats
        What cannot be reproduced, one sentence each.
    """

    number: int
    title: str
    reference: str
    rows: tuple[PublishedRow, ...]
    hardware: str = ""
    caveats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reference not in {row.label for row in self.rows}:
            raise ValueError(f"table {self.number} has no row {self.reference!r}")


RANDOM_WEIGHTS = "Networks are measured with random weights, on which latency does not depend"
ACCURACIES = "Accuracies and errors are the paper's; nothing was trained for this table"

_ENSEMBLES = "How the paper combines the members is not stated; here the mean of probabilities."


def _imagenet(
    label: str, top1: float, top5: float | None = None, network: str = "", note: str = ""
) -> PublishedRow:
    return PublishedRow(label, Figures(top1=top1, top5=top5), network, note=note)


def _speed(
    label: str,
    network: str,
    samples_per_s: float,
    parameters: float,
    flops: float,
    *,
    form: Form = "whole",
) -> PublishedRow:
    figures = Figures(samples_per_s=samples_per_s, parameters=parameters, flops=flops)
    return PublishedRow(label, figures, network, form)


def _cifar(
    label: str, parameters: float, cifar10: float, cifar100: float | None, network: str = ""
) -> PublishedRow:
    figures = Figures(parameters=parameters, error_cifar10=cifar10, error_cifar100=cifar100)
    return PublishedRow(label, figures, network)


def _variant(
    label: str, parameters: float, top1: float, network: str, *, note: str = ""
) -> PublishedRow:
    return PublishedRow(label, Figures(parameters=parameters, top1=top1), network, note=note)


TABLES: Mapping[int, PublishedTable] = {
    table.number: table
    for table in (
        PublishedTable(
            1,
            "Accuracy on ImageNet, 224 x 224",
            "ResNet50",
            (
                _imagenet("ResNet18", 69.57, 89.24, "resnet18"),
                _imagenet("ResNet34", 73.27, 91.26, "resnet34"),
                _imagenet("ResNet50", 75.99, 92.98, "resnet50"),
                _imagenet("ResNet101", 77.56, 93.79, "resnet101"),
                _imagenet("ResNet18 (authors' training)", 70.15, 89.55, "resnet18"),
                _imagenet("ResNet34 (authors' training)", 74.12, 91.89, "resnet34"),
                _imagenet(
                    "ResNet50 (authors' training)",
                    77.53,
                    93.87,
                    "resnet50",
                    "Table 1 prints depth 26 in this row; table 2 gives 77.53 to ResNet50.",
                ),
                _imagenet("ResNet101 (authors' training)", 79.63, 94.68, "resnet101"),
                _imagenet("ParNet-S", 75.19, 92.29, "parnet-s"),
                _imagenet("ParNet-M", 76.60, 93.02, "parnet-m"),
                _imagenet("ParNet-L", 77.66, 93.60, "parnet-l"),
                _imagenet("ParNet-XL", 78.55, 94.13, "parnet-xl"),
            ),
            caveats=("The paper gives no latencies in this table", ACCURACIES, RANDOM_WEIGHTS),
        ),
        PublishedTable(
            2,
            "Speed, parameters and FLOPs against ResNets, batch 1",
            "ResNet50",
            (
                _speed("ParNet-L", "parnet-l", 249, 54.9e6, 26.7e9, form="authors"),
                _speed("ResNet34", "resnet34", 248, 21.8e6, 7.3e9),
                _speed("ParNet-XL", "parnet-xl", 230, 85.0e6, 41.5e9, form="authors"),
                _speed("ResNet50", "resnet50", 207, 25.6e6, 8.2e9),
            ),
            f"ParNets on three, ResNets on one {RTX_3090}",
            (
                "The paper runs ParNets on three GPUs, a stream on each, and ResNets on one",
                "The paper's FLOPs come from thop, which adds 0.2 % for BatchNorm and pooling",
                RANDOM_WEIGHTS,
            ),
        ),
        PublishedTable(
            3,
            "ParNet-L: fusing and several GPUs, batch 1",
            "unfused, 1 GPU",
            (
                PublishedRow(
                    "unfused, 1 GPU",
                    Figures(samples_per_s=112, latency_ms=8.95),
                    "parnet-l",
                    "unfused",
                ),
                PublishedRow(
                    "fused, 1 GPU", Figures(samples_per_s=154, latency_ms=6.50), "parnet-l"
                ),
                PublishedRow(
                    "fused, 3 GPUs (NCCL)",
                    Figures(samples_per_s=249, latency_ms=4.01),
                    "parnet-l",
                    "authors",
                ),
            ),
            RTX_3090,
            (
                (
                    "Read literally, the released three-GPU script leaves two of its three workers "
                    "unfused; which form gave the published figure is not known"
                ),
                RANDOM_WEIGHTS,
            ),
        ),
        PublishedTable(
            4,
            "Detection on COCO, batch 1",
            "YOLOv4-CSP (authors' training)",
            (
                PublishedRow(
                    "YOLOv4-CSP (official)",
                    Figures(average_precision=46.2, latency_ms=21.0, depth=64),
                    "yolov4-csp",
                    note="46.2 is the official figure for 512 x 512.",
                ),
                PublishedRow(
                    "YOLOv4-CSP (authors' training)",
                    Figures(average_precision=47.6, latency_ms=20.0, depth=64),
                    "yolov4-csp",
                ),
                PublishedRow(
                    "ParNet-XL",
                    Figures(average_precision=47.5, latency_ms=18.7, depth=12),
                    "parnet-xl-det",
                ),
                PublishedRow(
                    "ParNet-XL-CSP",
                    Figures(average_precision=48.0, latency_ms=16.4, depth=12),
                    "parnet-xl-csp-det",
                ),
            ),
            f"one {RTX_3090}",
            (
                (
                    "The paper uses another, unstated input size for ParNets than for YOLOv4-CSP; "
                    "here all have the same"
                ),
                (
                    "The ParNet detectors are reconstructions: their neck and head are described, "
                    "but were never published"
                ),
                "The depth is that of the backbone",
                ACCURACIES,
                RANDOM_WEIGHTS,
            ),
        ),
        PublishedTable(
            6,
            "Error on CIFAR-10 and CIFAR-100",
            "ParNet 15.5M",
            (
                _cifar("ResNet110", 1.7e6, 6.41, 27.22),
                _cifar("Stochastic depth 110", 1.7e6, 5.23, 24.58),
                _cifar("Pre-activation ResNet164", 1.7e6, 5.46, 24.33),
                _cifar("DenseNet40", 1.0e6, 5.24, 24.42),
                _cifar("DenseNet-BC100", 0.8e6, 4.51, 22.27),
                _cifar("ParNet 1.3M", 1.3e6, 5.0, 24.62, "parnet-cifar-1.3m"),
                _cifar("Stochastic depth 1202", 10.2e6, 4.91, None),
                _cifar("Pre-activation ResNet1001", 10.2e6, 4.62, 22.71),
                _cifar("WideResNet40", 8.9e6, 4.53, 21.18),
                _cifar("WideResNet16", 11.0e6, 4.27, 20.43),
                _cifar("WideResNet32 with SE", 12.0e6, 3.88, 19.14),
                _cifar("FractalNet41", 22.9e6, 5.21, 21.49),
                _cifar("DenseNet100", 7.0e6, 4.10, 20.20),
                _cifar("DenseNet-BC250", 15.3e6, 3.62, 17.60),
                _cifar("ParNet 15.5M", 15.5e6, 3.90, 20.02, "parnet-cifar-15.5m"),
                _cifar("WideResNet28", 36.5e6, 4.00, 19.25),
                _cifar("FractalNet21", 36.8e6, 5.11, 22.85),
                _cifar("DenseNet100, wider", 27.2e6, 3.74, 19.25),
                _cifar("DenseNet-BC190", 25.6e6, 3.46, 17.18),
                _cifar("ParNet 35M", 35e6, 3.88, 18.65, "parnet-cifar-35m"),
            ),
            caveats=(
                (
                    "The paper gives no latencies in this table, and its CIFAR networks were never "
                    "published: those measured here are reconstructions"
                ),
                ACCURACIES,
                RANDOM_WEIGHTS,
            ),
        ),
        PublishedTable(
            8,
            "Shallow ResNets and one stream against ParNet-M, ImageNet 224 x 224",
            "ParNet-M",
            (
                _variant("ResNet12-Wide", 39.0e6, 73.52, "resnet12-wide"),
                _variant("ResNet14-Wide-BN", 39.0e6, 72.06, "resnet14-wide-bn"),
                _variant("ResNet12-Wide-SSE", 39.0e6, 73.91, "resnet12-wide-sse"),
                _variant("ParNet-M-OneStream", 36.0e6, 75.83, "parnet-m-one-stream"),
                _variant("ParNet-M", 35.9e6, 76.60, "parnet-m"),
            ),
            caveats=(
                (
                    "The paper gives no latencies in this table; the wide ResNets and the "
                    "single-stream network are reconstructions"
                ),
                ACCURACIES,
                RANDOM_WEIGHTS,
            ),
        ),
        PublishedTable(
            9,
            "Streams against ensembles, ImageNet 224 x 224",
            "ParNet-M",
            (
                _variant("ParNet-M", 35.9e6, 76.60, "parnet-m"),
                _variant("ParNet-M-OneStream", 36e6, 75.83, "parnet-m-one-stream"),
                _variant("ParNet-L", 55e6, 77.66, "parnet-l"),
                _variant(
                    "Ensemble of 2 OneStream-M",
                    72e6,
                    77.20,
                    "parnet-m-one-stream-x2",
                    note=_ENSEMBLES,
                ),
                _variant("ParNet-XL", 85.3e6, 78.55, "parnet-xl"),
                _variant(
                    "Ensemble of 3 OneStream-M",
                    108e6,
                    77.68,
                    "parnet-m-one-stream-x3",
                    note=_ENSEMBLES,
                ),
            ),
            caveats=(
                (
                    "The paper gives no latencies in this table; single-stream networks and "
                    "ensembles are reconstructions"
                ),
                ACCURACIES,
                RANDOM_WEIGHTS,
            ),
        ),
    )
}
"""The paper's tables by number."""


TOP1: Mapping[str, float] = {
    "resnet18": 70.15,
    "resnet34": 74.12,
    "resnet50": 77.53,
    "resnet101": 79.63,
    "parnet-s": 75.19,
    "parnet-m": 76.60,
    "parnet-l": 77.66,
    "parnet-xl": 78.55,
}
"""ImageNet top-1 accuracy in per cent by catalogue name: table 1, trained by its authors."""
