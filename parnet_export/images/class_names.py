"""Names of classes."""

from __future__ import annotations

import functools
from importlib import resources
from typing import TYPE_CHECKING

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee,
skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""

COCO_NAMES = tuple(name.strip() for name in _COCO.split(","))
"""The 80 classes of objects in COCO (arXiv 1405.0312), in the order of their numbers."""


_IMAGENET_FILE = "imagenet_names.txt"


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """Return a short name of each of ImageNet's 1000 classes, in the order of their numbers."""
    text = resources.files("parnet_export").joinpath(_IMAGENET_FILE).read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def usual_names(num_classes: int, *, detector: bool) -> tuple[str, ...]:
    """Return the names of the data set that usually has so many classes; none for others.

    COCO's for a detector of 80 classes, ImageNet's for a classifier of 1000.
    """
    names = COCO_NAMES if detector else imagenet_names()
    return names if len(names) == num_classes else ()


def read_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """Return the name of each class from a text file with a name on each line.

    Parameters
    ----------
    path
        The file; empty lines do not count.
    num_classes
        How many classes the network has.

    Raises
    ------
    InputError
        When the file cannot be read or has another number of names.
    """
    remedy = f"Give a text file of {num_classes} lines, a name on each"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", remedy) from error
    except UnicodeDecodeError as error:
        raise InputError(path, "is no text in UTF-8", remedy) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_classes:
        problem = f"has {len(names)} names, and the network {num_classes} classes"
        raise InputError(path, problem, remedy)
    return names
