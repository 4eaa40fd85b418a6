"""The command ``parnet-export classify``.

`register` adds it to a command line. Nothing but typer is loaded until it runs.
"""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from parnet_engines.classify import Classified
    from parnet_export.bundle import Bundle
    from parnet_export.preprocessing import Preprocessing


def classify(
    images: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    bundle: Annotated[
        Path, typer.Option(help="Bundle of a classifier.", metavar="BUNDLE", show_default=False)
    ],
    devices: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    labels: Annotated[
        Path | None,
        typer.Option(help="Names of the classes, one a line, in their order.", metavar="F"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each picture.")] = 5,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width, where the network leaves them open.", metavar="PX"
        ),
    ] = None,
    crop: Annotated[
        float, typer.Option(help="Share of the shorter side that is kept.", metavar="SHARE")
    ] = 0.875,
    mean: Annotated[
        str, typer.Option(help="Of red, green and blue, or one for all.", metavar="R,G,B")
    ] = "0.485,0.456,0.406",
    std: Annotated[
        str, typer.Option(help="Of red, green and blue, or one for all.", metavar="R,G,B")
    ] = "0.229,0.224,0.225",
    interpolation: Annotated[
        Literal["bicubic", "bilinear"], typer.Option(help="How pictures are resized.")
    ] = "bicubic",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Name what pictures show, with the preprocessing that the network was trained with.

    The defaults are ImageNet's. Of the bundle comes the size of the images.
    """
    from parnet_engines import classify as classifier
    from parnet_engines.session import Session
    from parnet_export import console, files
    from parnet_export.bundle import open_bundle

    if output is not None:
        files.require_writable(output)
    opened = open_bundle(bundle)
    own, classes = classifier.classifier_shape(opened)
    settings = _settings(
        _resolution(bundle, own, resolution),
        crop,
        _colours("--mean", mean),
        _colours("--std", std),
        interpolation,
    )
    names = _read_labels(labels, classes) if labels is not None else ()
    with (
        console.working(f"classifying {len(images)} pictures"),
        Session.open(opened, devices) as session,
    ):
        found = classifier.classify(session, images, settings, labels=names, top=top)
    origin = opened.manifest.provenance
    result = {
        "bundle": str(bundle),
        "network": origin.network,
        "weights": origin.weights,
        "preprocessing": settings,
        "images": found,
    }
    console.show(result, _table(opened, settings, found), as_json=as_json, output=output)


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


def _settings(
    resolution: int,
    crop: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    interpolation: Literal["bicubic", "bilinear"],
) -> Preprocessing:
    from parnet_export.errors import InputError
    from parnet_export.preprocessing import Preprocessing

    try:
        return Preprocessing(resolution, crop, mean, std, interpolation)
    except ValueError as error:
        raise InputError("preprocessing", str(error), "Check --crop, --mean and --std") from error


def _colours(option: str, text: str) -> tuple[float, float, float]:
    from parnet_export.errors import InputError

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise InputError(option, f"{text!r} is neither a number nor three", "Write R,G,B")
    return values[0], values[1], values[2]


def _read_labels(path: Path, classes: int) -> tuple[str, ...]:
    from parnet_export.errors import InputError

    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(path, f"cannot be read ({reason})", "Give a text file") from error
    if len(names) != classes:
        problem = f"has {len(names)} lines, but the network knows {classes} classes"
        raise InputError(path, problem, "Give one line for each class")
    return names


def _table(bundle: Bundle, settings: Preprocessing, found: tuple[Classified, ...]) -> Table:
    from rich.table import Table

    from parnet_export.console import format_percent, printable

    table = Table(title=printable(bundle.label), title_justify="left", box=None)
    side, how = settings.resolution, f"{settings.resized} ({settings.interpolation})"
    table.caption = (
        f"The middle {side} x {side} pixels of pictures resized to {how}, "
        f"mean {'/'.join(map(str, settings.mean))}, std {'/'.join(map(str, settings.std))}."
    )
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
