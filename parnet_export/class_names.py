"""Names of the classes that detectors find."""

from __future__ import annotations

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


def read_names(path: Path | None, num_classes: int) -> tuple[str, ...]:
    """Return a name for each class.

    Parameters
    ----------
    path
        A text file with a name on each line; without one, COCO's names where there are 80
        classes, and numbers otherwise.
    num_classes
        How many classes the detector has.

    Raises
    ------
    InputError
        When the file cannot be read or has another number of names.
    """
    if path is None:
        known = len(COCO_NAMES) == num_classes
        return COCO_NAMES if known else tuple(f"class {i}" for i in range(num_classes))
    remedy = f"Give a text file of {num_classes} lines, a name on each"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", remedy) from error
    except UnicodeDecodeError as error:
        raise InputError(path, "is no text in UTF-8", remedy) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_classes:
        problem = f"has {len(names)} names, and the detector {num_classes} classes"
        raise InputError(path, problem, remedy)
    return names
