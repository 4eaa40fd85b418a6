"""``parnet-export detect``: objects in image files, as JSON, as a table, and drawn."""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_export.images.input_form import LETTERBOX
from parnet_export.images.input_options import (
    ColourOrderOption,
    InputOptions,
    InterpolationOption,
    MeanOption,
    StdOption,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from parnet_engines.detect import Detector
    from parnet_export.bundle import Bundle
    from parnet_export.detections.suppression import Detections


def detect(
    images: Annotated[
        list[Path], typer.Argument(help="Image files: JPEG, PNG, ...", metavar="IMAGE...")
    ],
    bundle: Annotated[
        Path, typer.Option("--bundle", help="A bundle of a detector.", metavar="BUNDLE")
    ],
    devices: Annotated[
        str, typer.Option(help="Where to run: cpu, or cores such as cpu:0,cpu:1.")
    ] = "cpu",
    score_threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Show objects of a greater score. Default: the bundle's, or 0.4."
        ),
    ] = None,
    iou_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The overlap with a more certain box of its class above which a box goes. "
            "Default: the bundle's, or 0.5.",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classes",
            "--labels",
            help="A text file with the name of a class on each line. Default: the bundle's names, "
            "or COCO's where there are 80 classes.",
            metavar="F",
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            help="Draw the boxes: the name of a PNG file, or of a folder for several images.",
            metavar="F",
        ),
    ] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    colour_order: ColourOrderOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Find objects in image files with a bundle of a detector; boxes are in the image's pixels.

    Images are prepared as the bundle states, but for what options replace.
    """
    from parnet_engines.detect import Detector, Thresholds
    from parnet_export import console
    from parnet_export.bundle import open_bundle
    from parnet_export.images.files import load_image
    from parnet_export.pictures.boxes_picture import draw_boxes

    drawings = _places(images, draw, output)
    opened = open_bundle(bundle)
    described = opened.manifest.provenance.detections
    names = _names(opened, described.num_classes, classes) if described else ()
    thresholds = Thresholds(score_threshold, iou_threshold)
    options = InputOptions(None, mean, std, interpolation, colour_order)
    stated = opened.manifest.provenance.input_form
    form, source = options.choose(stated, LETTERBOX, "YOLOv4-CSP's")
    found: list[ImageResult] = []
    pictures: list[NDArray[np.uint8]] = []
    with (
        console.working(f"looking at {len(images)} images"),
        Detector.open(opened, devices, thresholds=thresholds, input_form=form) as detector,
    ):
        for path in images:
            pixels = load_image(path)
            objects = detector.detect(pixels)
            found.append(_describe(path, pixels, objects, names))
            if drawings:
                titles = [f"{thing.label} {thing.score:.2f}" for thing in found[-1].objects]
                pictures.append(draw_boxes(pixels, objects.corners, titles, objects.classes))
    # Nothing is written before every image has been read.
    for place, picture in zip(drawings, pictures, strict=True):
        _write_png(place, picture)
    console.show(
        _as_dict(opened, detector, found) | {"preprocessing": {**asdict(form), "source": source}},
        _table(opened, f"{form.description}; {source}", found),
        as_json=as_json,
        output=output,
    )
    for place in drawings:
        console.note(f"wrote {place}")


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(detect)


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object in an image file.

    Parameters
    ----------
    label, class_number
        Name and number of its class.
    score
        Objectness times class probability.
    box
        Left, top, right and bottom in pixels of the image.
    """

    label: str
    class_number: int
    score: float
    box: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The objects in an image file, the most certain first; its size is in pixels."""

    image: str
    width: int
    height: int
    objects: tuple[FoundObject, ...]


def _names(bundle: Bundle, num_classes: int, file: Path | None) -> tuple[str, ...]:
    from parnet_export.images.class_names import read_names, usual_names

    if file is not None:
        return read_names(file, num_classes)
    known = bundle.class_names or usual_names(num_classes, detector=True)
    return known or tuple(f"class {number}" for number in range(num_classes))


def _places(images: Sequence[Path], draw: Path | None, output: Path | None) -> tuple[Path, ...]:
    """Return where each image is drawn; refuse places that cannot be written to, or are taken."""
    from parnet_export import files
    from parnet_export.errors import InputError

    drawings: tuple[Path, ...] = ()
    if draw is not None and len(images) == 1 and not draw.is_dir():
        if draw.suffix.lower() != ".png":
            raise InputError("--draw", f"{draw} does not end in .png", "Give a name that does")
        drawings = (draw,)
    elif draw is not None:
        files.make_directory(draw)
        drawings = tuple(draw / f"{image.stem}.png" for image in images)
    taken = {image.resolve(): str(image) for image in images}
    for option, place in (*(("--draw", drawing) for drawing in drawings), ("--output", output)):
        if place is None:
            continue
        if place.resolve() in taken:
            problem = f"{place} is also {taken[place.resolve()]}, which would be lost"
            raise InputError(option, problem, "Give another name")
        taken[place.resolve()] = option
        files.require_writable(place)
    return drawings


def _describe(
    path: Path, pixels: NDArray[np.uint8], objects: Detections, names: Sequence[str]
) -> ImageResult:
    height, width = pixels.shape[:2]
    rows = zip(
        objects.classes.tolist(), objects.scores.tolist(), objects.corners.tolist(), strict=True
    )
    things = (FoundObject(names[number], number, score, tuple(box)) for number, score, box in rows)
    return ImageResult(str(path), width, height, tuple(things))


def _write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    from PIL import Image

    from parnet_export import files

    with files.open_replacing(path) as stream:
        Image.fromarray(picture).save(stream, format="PNG")


def _as_dict(bundle: Bundle, detector: Detector, found: Sequence[ImageResult]) -> dict[str, object]:
    origin = bundle.manifest.provenance
    return {
        "bundle": str(bundle.path),
        "network": origin.network,
        "weights": origin.weights,
        "seed": origin.seed,
        "score_threshold": detector.suppression.min_score,
        "iou_threshold": detector.suppression.max_iou,
        "images": found,
    }


def _table(bundle: Bundle, preprocessing: str, found: Sequence[ImageResult]) -> Table:
    from rich.table import Table

    from parnet_export.console import printable

    table = Table(title=printable(bundle.label), title_justify="left", box=None)
    table.padding = (0, 2, 0, 0)
    table.caption_justify = "left"
    table.caption = f"Boxes in pixels of the image. Preprocessing: {preprocessing}."
    table.add_column("image", overflow="fold")
    table.add_column("object", overflow="fold")
    for heading in ("score", "left", "top", "right", "bottom"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in found:
        name = printable(result.image)
        if not result.objects:
            table.add_row(name, "nothing found")
        for thing in result.objects:
            numbers = (f"{edge:.1f}" for edge in thing.box)
            table.add_row(name, printable(thing.label), f"{thing.score:.3f}", *numbers)
            name = ""
    return table
