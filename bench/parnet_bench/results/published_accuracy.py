"""Accuracies that papers report of a row's network, to stand beside its latency.

They belong to the authors' weights and preprocessing. Nothing here was measured, and
weights of another origin have another accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parnet_bench.results.published import PAPER, TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_bench.results.published import Figures
    from parnet_bench.results.result import RowDescription

IMAGENET = "ImageNet top-1 accuracy"
CIFAR10 = "CIFAR-10 accuracy"
COCO = "COCO AP"

_RESOLUTIONS = {IMAGENET: 224, CIFAR10: 32}
_SEQCONV = "Sequentially Aggregated Convolutional Networks"
_SEQCONV_CIFAR = f"{_SEQCONV}, Table 3"
_SEQCONV_IMAGENET = f"{_SEQCONV}, Table 4, 90 epochs"


@dataclass(frozen=True, slots=True)
class PublishedAccuracy:
    """An accuracy that a paper reports.

    Parameters
    ----------
    metric
        What is measured, on which data.
    percent
        The accuracy, or average precision.
    resolution
        Height and width in pixels of the images that it was reported for.
    source
        Paper and table.
    """

    metric: str
    percent: float
    resolution: int
    source: str


def _seqconv(metric: str, error_percent: float) -> PublishedAccuracy:
    source = _SEQCONV_CIFAR if metric == CIFAR10 else _SEQCONV_IMAGENET
    return PublishedAccuracy(metric, round(100 - error_percent, 2), _RESOLUTIONS[metric], source)


_OF_OTHER_PAPERS: dict[str, PublishedAccuracy] = {
    "seqresnet-k8r4": _seqconv(CIFAR10, 4.78),
    "seqresnet-k16r10": _seqconv(CIFAR10, 3.97),
    "seqresnet-b-k16r7": _seqconv(CIFAR10, 4.3),
    "seqresnet-b-k32r12": _seqconv(CIFAR10, 3.72),
    "seqresnet-b22": _seqconv(IMAGENET, 23.67),
    "seqresnet-b42": _seqconv(IMAGENET, 22.06),
    "seqresnext-24": _seqconv(IMAGENET, 21.92),
    # The ParNet paper prints the figure of 512 x 512 (table 4, official).
    "yolov4-csp": PublishedAccuracy(COCO, 47.5, 640, "Darknet's list of models, 640 x 640"),
}


def published_accuracy(row: RowDescription) -> PublishedAccuracy | None:
    """Return what is published of a row's network at the row's resolution, if anything.

    A graph without known weights, such as an ONNX file, is not taken for a published
    network because of its name. Where ParNet's authors trained a network of others again,
    theirs is the figure, because it is the one that they compare with.
    """
    if row.provenance.weights == "unknown":
        return None
    images = [tensor.shape for tensor in row.inputs if len(tensor.shape) == 4]
    for accuracy in _of(row.network):
        if images and all(shape[2:] == (accuracy.resolution,) * 2 for shape in images):
            return accuracy
    return None


def _of(network: str) -> Iterator[PublishedAccuracy]:
    if network in _OF_OTHER_PAPERS:
        yield _OF_OTHER_PAPERS[network]
    for table in TABLES.values():
        # Networks trained again by the authors come after those they quote.
        for row in reversed(table.rows):
            percent = _percent(row.figures)
            if row.network == network and percent is not None:
                metric, value = percent
                source = f"{PAPER}, table {table.number}"
                if "authors' training" in row.label:
                    source += ", retrained by its authors"
                yield PublishedAccuracy(metric, value, _RESOLUTIONS[metric], source)


def _percent(figures: Figures) -> tuple[str, float] | None:
    if figures.top1 is not None:
        return IMAGENET, figures.top1
    if figures.error_cifar10 is not None:
        return CIFAR10, round(100 - figures.error_cifar10, 2)
    return None
