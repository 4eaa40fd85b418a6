"""The command ``parnet-export classify``.

`register` adds it to a command line. Nothing but typer is loaded until it runs.
"""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parnet_export.images.input_options import (
    ColourOrderOption,
    CropOption,
    InputOptions,
    InterpolationOption,
    LabelsOption,
    MeanOption,
    StdOption,
)

if TYPE_CHECKING:
    from rich.table import Table

    from parnet_engines.classify import Classified
    from parnet_export.bundle import Bundle
    from parnet_export.images.input_form import InputForm


def classify(
    images: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    bundle: Annotated[
        Path, typer.Option(help="Bundle of a classifier.", metavar="BUNDLE", show_default=False)
    ],
    devices: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    labels: LabelsOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each picture.")] = 5,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width, where the network leaves them open.", metavar="PX"
        ),
    ] = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    colour_order: ColourOrderOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Name what pictures show, with the preprocessing that the network was trained with.

    Size, preprocessing and the names of the classes come from the bundle. One that states no
    preprocessing gets that of ParNet's ImageNet networks; one that has no names, ImageNet's if
    it knows 1000 classes. Options replace what the bundle says.
    """
    from parnet_engines import classify as classifier
    from parnet_engines.session import Session
    from parnet_export import console, files
    from parnet_export.bundle import open_bundle
    from parnet_export.images.class_names import read_names, usual_names

    if output is not None:
        files.require_writable(output)
    opened = open_bundle(bundle)
    own, classes = classifier.classifier_shape(opened)
    size = _resolution(bundle, own, resolution)
    options = InputOptions(crop, mean, std, interpolation, colour_order)
    form, source = _choose_form(opened, options)
    if labels is not None:
        names = read_names(labels, classes)
    else:
        names = opened.class_names or usual_names(classes, detector=False)
    with (
        console.working(f"classifying {len(images)} pictures"),
        Session.open(opened, devices) as session,
    ):
        found = classifier.classify(session, images, form, resolution=size, labels=names, top=top)
    origin = opened.manifest.provenance
    result = {
        "bundle": str(bundle),
        "network": origin.network,
        "weights": origin.weights,
        "preprocessing": {"resolution": size, **asdict(form), "source": source},
        "images": found,
    }
    table = _table(opened, f"{_describe(form, size)}; {source}.", found)
    console.show(result, table, as_json=as_json, output=output)
    if origin.input_form is None and not options.is_complete:
        console.warn(
            f"{bundle} states no preprocessing, so ParNet's for ImageNet is assumed; "
            "say it here or to split-streams, with --crop, --mean, --std and --interpolation"
        )


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(classify)


def _resolution(bundle: Path, own: int | None, asked: int | None) -> int:
    from parnet_export.errors import InputError

    if own is None and asked is None:
        raise InputError(bundle, "leaves the size of its images open", "Give --resolution")
    if own is not None and asked not in {None, own}:
        problem = f"{bundle} takes images of {own} pixels, not {asked}"
        raise InputError("--resolution", problem, "Leave it out")
    return own or asked or 0


def _choose_form(bundle: Bundle, options: InputOptions) -> tuple[InputForm, str]:
    """Return how pictures are prepared, and a clause that says who says so."""
    from parnet_export.errors import InputError
    from parnet_export.images.input_form import IMAGENET

    stated = bundle.manifest.provenance.input_form
    form, source = options.choose(stated, IMAGENET, "ImageNet's")
    if form.fit != "crop":
        problem = f"prepares pictures as a {form.fit}, as detectors do"
        raise InputError(bundle.path, problem, "Give the bundle of a classifier")
    return form, source


def _describe(form: InputForm, size: int) -> str:
    from parnet_export.images.preprocessing import resized_side

    middle = f"The middle {size} x {size} pixels of pictures resized to {resized_side(form, size)}"
    return f"{middle}: {form.description}"


def _table(bundle: Bundle, caption: str, found: tuple[Classified, ...]) -> Table:
    from rich.table import Table

    from parnet_export.console import format_percent, printable

    table = Table(title=printable(bundle.label), title_justify="left", box=None)
    table.caption = caption
    table.caption_justify = "left"
    table.add_column("image", overflow="fold")
    table.add_column("class", justify="right")
    named = any(prediction.label for row in found for prediction in row.predictions)
    if named:
        table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for row in found:
        for rank, prediction in enumerate(row.predictions):
            name = (printable(prediction.label),) if named else ()
            table.add_row(
                "" if rank else printable(row.image),
                str(prediction.number),
                *name,
                format_percent(prediction.probability),
            )
    return table
