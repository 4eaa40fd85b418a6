"""The ``parnet-export`` command line.

A thin layer: every command loads what it needs when it runs, so that ``--help``
loads neither torch nor a runtime.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_engines import cli as engines_cli
from parnet_export import console, files, models_command
from parnet_export.errors import InputError
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
    import onnx_ir as ir
    from rich.table import Table

    from parnet_export.bundle import Provenance
    from parnet_export.detections.detection_form import Suppression
    from parnet_export.inspection import Inspection

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Take a multi-stream network from its checkpoint to segments that run in parallel.",
)

Arch = Annotated[
    str | None,
    typer.Option(help="Catalogue name that the checkpoint must turn out to be.", metavar="NAME"),
]
Activation = Annotated[
    Literal["auto", "silu", "relu", "mish"],
    typer.Option(help="The network's activation; auto tells it from the checkpoint."),
]
UseEma = Annotated[bool, typer.Option("--use-ema", help="Take the checkpoint's averaged weights.")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**63 - 1, help="Seed of a catalogue name's random weights."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Output = Annotated[
    Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
]


@app.command()
def fuse(
    ckpt: Annotated[
        str, typer.Option("--ckpt", help="Checkpoint or catalogue name.", metavar="SOURCE")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Default: NAME.fused.safetensors beside the checkpoint.", metavar="F"),
    ] = None,
    level: Annotated[
        Literal["repvgg", "full"],
        typer.Option(help="repvgg: as ParNet's authors do it. full: everything that folds."),
    ] = "full",
    arch: Arch = None,
    activation: Activation = "auto",
    use_ema: UseEma = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    output: Output = None,
    labels: LabelsOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    colour_order: ColourOrderOption = None,
) -> None:
    """Fuse a trained network into its inference form, prove it equal, and write it."""
    from parnet_export.checkpoints.checkpoint import write_safetensors
    from parnet_export.network import Header
    from parnet_export.pipeline import beside, describe_pictures, fuse_and_prove
    from parnet_export.source import load_network

    path = out or beside(ckpt, ".fused.safetensors")
    _check_places(ckpt, {"--out": path, "--output": output})
    options = InputOptions(crop, mean, std, interpolation, colour_order)
    with console.working(f"loading {ckpt}"):
        network = load_network(ckpt, arch=arch, activation=activation, use_ema=use_ema, seed=seed)
    network = describe_pictures(network, options, labels)
    with console.working("fusing, and proving that both forms compute the same"):
        fused, proof = fuse_and_prove(network, level)
    with console.working(f"writing {path}"):
        write_safetensors(path, fused.module.state_dict(), Header.of(fused).encode())

    before, after = (
        sum(parameter.numel() for parameter in form.module.parameters())
        for form in (network, fused)
    )
    result: dict[str, object] = {
        "network": network.name,
        "weights": network.provenance.weights,
        "seed": network.provenance.seed,
        "architecture": network.provenance.architecture,
        "activation": network.provenance.activation,
        "level": fused.level,
        "parameters_before": before,
        "parameters_after": after,
        "float64_error": proof.float64_error,
        "float32_error": proof.float32_error,
        "preprocessing": network.provenance.input_form,
        "labels": len(network.labels),
        "file": str(path),
    }
    table = _facts(network.label)
    table.add_row("architecture", network.provenance.architecture)
    table.add_row("activation", network.provenance.activation)
    table.add_row("fused", f"from level {network.level} to level {fused.level}")
    table.add_row("parameters", f"{before:,} before, {after:,} after")
    table.add_row(
        "difference",
        f"{proof.float64_error:.1e} in float64, {proof.float32_error:.1e} in float32, "
        "relative to the largest output",
    )
    if network.provenance.input_form is not None:
        table.add_row("preprocessing", network.provenance.input_form.description)
    table.add_row("written to", str(path))
    console.show(result, table, as_json=as_json, output=output)


@app.command()
def split_streams(
    source: Annotated[
        str,
        typer.Argument(help="Fused file, checkpoint, ONNX file or catalogue name."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the bundle. Default: NAME.bundle beside the source.", metavar="DIR"
        ),
    ] = None,
    level: Annotated[
        Literal["none", "repvgg", "full"] | None,
        typer.Option(help="How far a network in training form is fused first. Default: full."),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Height and width of the images. Default: the network's. Of an ONNX file, those "
            "that it leaves free.",
            metavar="PX",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Images per inference, or dynamic. Default: 1.", metavar="N|dynamic"),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16"],
        typer.Option(help="Type of the weights and of the tensors between segments."),
    ] = "fp32",
    min_gain: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Keep a parallel region that saves this share of the network's time."
        ),
    ] = 0.03,
    detections: Annotated[
        Literal["raw", "decoded", "nms"] | None,
        typer.Option(
            help="What a detector returns: raw heads, all boxes decoded, or the boxes that "
            "non-maximum suppression in the graph keeps (not for TensorRT-RTX). Default: raw."
        ),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With nms: keep boxes of a greater score. Default: 0.4."),
    ] = None,
    iou_threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With nms: the overlap above which a box goes. Default: 0.5."
        ),
    ] = None,
    max_detections: Annotated[
        int | None,
        typer.Option(min=1, help="With nms: room for so many boxes in an image. Default: 300."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Prove that whole and split graph agree."),
    ] = True,
    arch: Arch = None,
    activation: Activation = "auto",
    use_ema: UseEma = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    output: Output = None,
    labels: LabelsOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    colour_order: ColourOrderOption = None,
) -> None:
    """Export a network to ONNX, split it into segments, and write them as a bundle."""
    from parnet_export import inspection, pipeline
    from parnet_export.images.class_names import read_names
    from parnet_export.source import load_network
    from parnet_export.splitting.split import SplitOptions

    images = _parse_batch(batch)
    path = out or pipeline.beside(source, ".bundle")
    _check_places(source, {"--output": output})
    limits = {
        "--score-threshold": score_threshold,
        "--iou-threshold": iou_threshold,
        "--max-detections": max_detections,
    }
    suppression = _parse_suppression(detections, limits)
    options = InputOptions(crop, mean, std, interpolation, colour_order)
    names: tuple[str, ...]
    model: ir.Model
    provenance: Provenance
    if source.endswith(".onnx"):
        useless = {
            "--level": level,
            "--batch": batch,
            "--arch": arch,
            "--activation": None if activation == "auto" else activation,
            "--use-ema": use_ema or None,
            "--seed": seed or None,
            "--detections": detections,
        }
        for option, value in useless.items():
            if value is not None:
                problem = f"{source} is a graph already, and has its own"
                raise InputError(option, problem, "Leave the option out")
        with console.working(f"reading {source}"):
            model, provenance = pipeline.read_graph(Path(source), resolution=resolution)
        provenance = replace(provenance, input_form=options.note_on(provenance.input_form))
        names = read_names(labels, pipeline.count_classes(model)) if labels else ()
    else:
        with console.working(f"loading {source}"):
            network = load_network(
                source, arch=arch, activation=activation, use_ema=use_ema, seed=seed
            )
        network = pipeline.describe_pictures(network, options, labels)
        names = network.labels
        with console.working("exporting to ONNX"):
            model, provenance = pipeline.export_graph(
                network,
                level=level,
                resolution=resolution,
                batch=images,
                form=detections,
                suppression=suppression,
            )
    with console.working(f"splitting, proving and writing {path}"):
        bundle, notes = pipeline.make_bundle(
            model,
            provenance,
            path,
            precision=precision,
            options=SplitOptions(min_gain=min_gain),
            prove=verify,
            command=("parnet-export", *sys.argv[1:]),
            labels=names,
        )
    _show_inspection(inspection.inspect(bundle), as_json=as_json, output=output)
    for note in notes:
        console.note(note)
    if not verify:
        console.warn("the split is not proven; `parnet-export verify` does it later")
    console.note(f"wrote {path}")


@app.command("inspect")
def inspect_bundle(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")],
    svg: Annotated[
        Path | None, typer.Option(help="Also draw the stream graph, as SVG.", metavar="F")
    ] = None,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Show the segments of a bundle, their cost, and what running them in parallel can gain."""
    from parnet_export import inspection
    from parnet_export.bundle import open_bundle
    from parnet_export.pictures import picture

    _check_places(str(bundle), {"--svg": svg, "--output": output})
    opened = open_bundle(bundle)
    if svg is not None:
        files.write_text(
            svg, picture.render_svg(opened.stream_graph, opened.label, opened.manifest.whole_cost)
        )
    _show_inspection(inspection.inspect(opened), as_json=as_json, output=output)


models_command.register(app)
engines_cli.register(app)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(console.run(app))


def _check_places(source: str, places: dict[str, Path | None]) -> None:
    """Refuse places that cannot be written to, or that hold the source, before any work."""
    taken = {Path(source).resolve(): source} if source else {}
    for option, place in places.items():
        if place is None:
            continue
        if place.is_file() or not place.exists():
            if place.resolve() in taken:
                problem = f"{place} is also {taken[place.resolve()]}, which would be lost"
                raise InputError(option, problem, "Give another name")
            taken[place.resolve()] = option
        files.require_writable(place)


def _parse_batch(batch: str | None) -> int | str:
    if batch is None:
        return 1
    if batch != "dynamic" and not batch.isdecimal():
        raise InputError("--batch", f"{batch!r} is not a number of images", "Use N or dynamic")
    return batch if batch == "dynamic" else int(batch)


def _parse_suppression(
    form: str | None, limits: dict[str, float | int | None]
) -> Suppression | None:
    """Return what ``nms`` keeps, or None for other forms, which take no limits."""
    from parnet_export.detections.detection_form import Suppression

    given = [option for option, value in limits.items() if value is not None]
    if form != "nms":
        if given:
            problem = "only non-maximum suppression in the graph takes it"
            raise InputError(given[0], problem, "Add --detections nms, or leave it out")
        return None
    names = ("min_score", "max_iou", "max_detections")
    values = zip(names, limits.values(), strict=True)
    return Suppression(**{name: value for name, value in values if value is not None})  # type: ignore[arg-type]  # typer has checked them


def _show_inspection(found: Inspection, *, as_json: bool, output: Path | None) -> None:
    from parnet_export import inspection

    console.show(
        inspection.as_dict(found), inspection.render(found), as_json=as_json, output=output
    )


def _facts(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
