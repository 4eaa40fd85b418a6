"""``parnet-export build``: TensorRT engines for the segments of a bundle.

Nothing but typer is loaded until the command runs.
"""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Group
    from rich.table import Table

    from parnet_engines.tensorrt.bundle_engines import EngineReport
    from parnet_engines.tensorrt.engine_sidecar import Sidecar
    from parnet_export.bundle import Bundle


def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    backend: Annotated[
        Literal["auto", "tensorrt", "tensorrt-rtx"],
        typer.Option(help="auto: TensorRT where it is installed, else TensorRT-RTX."),
    ] = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="GPUs of this machine to build for. Default: 0 for TensorRT; none for "
            "TensorRT-RTX, whose engines then suit compute capability 8.0 and later.",
            metavar="N[,N]",
        ),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="Architectures to build for with TensorRT-RTX, without such a GPU.",
            metavar="X.Y[,X.Y]",
        ),
    ] = None,
    tf32: Annotated[
        bool,
        typer.Option("--tf32/--no-tf32", help="Let float32 convolutions round inputs to TF32."),
    ] = True,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Range of the dimensions that the bundle leaves open, such as 1/4/8 or "
            "batch=1/4/8.",
            metavar="MIN/OPT/MAX",
        ),
    ] = None,
    max_aux_streams: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Further CUDA streams that one engine may use. Default: 0 for segments, "
            "TensorRT's choice for the whole graph.",
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="From 0, the quickest to build, to 5. Default: 3."),
    ] = None,
    workspace_mib: Annotated[
        int | None,
        typer.Option(min=1, help="Scratch memory of kernels in MiB. Default: TensorRT's."),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="Timings of kernels, to read and to replace.", metavar="F"),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="Let later versions of TensorRT run them."),
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole/--no-whole", help="Also build the whole graph as one engine.")
    ] = True,
    boundary: Annotated[
        Literal["linear", "vector"],
        typer.Option(
            help="Memory layout of tensors between segments. vector: channels last, in vectors "
            "of 8, for fp16."
        ),
    ] = "linear",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Build TensorRT engines of a bundle's segments and whole graph, where they have changed."""
    from parnet_engines.tensorrt import build_progress
    from parnet_engines.tensorrt.build_place import choose_places
    from parnet_engines.tensorrt.bundle_engines import build_engines, names_of, require_options
    from parnet_engines.tensorrt.options import EngineOptions, parse_sizes
    from parnet_export import console, files
    from parnet_export.bundle import open_bundle

    for path in (output, timing_cache):
        if path is not None:
            files.require_writable(path)
    opened = open_bundle(bundle)
    places = choose_places(backend, devices, compute_capability)
    graph = opened.stream_graph
    options = EngineOptions(
        tf32=tf32,
        sizes=parse_sizes(shapes, [t for s in graph.segments for t in s.inputs]),
        max_aux_streams=max_aux_streams,
        optimization_level=optimization_level,
        workspace_mib=workspace_mib,
        version_compatible=version_compatible,
        boundary=boundary,
    )
    for place in places:
        require_options(opened, place.target.backend, options, timing_cache)
    count = len(places) * len(names_of(opened, whole=whole))
    with build_progress.on_terminal(count) as progress:
        reports = tuple(
            build_engines(
                opened,
                places,
                options,
                whole=whole,
                timing_cache=timing_cache,
                progress=progress,
                command=("parnet-export", *sys.argv[1:]),
            )
        )
    console.show(
        _as_dict(opened, reports), _tables(opened, reports), as_json=as_json, output=output
    )
    _say_why(reports)


def register(app: typer.Typer) -> None:
    """Add the command of this module to a command line."""
    app.command()(build)


def _as_dict(bundle: Bundle, reports: Sequence[EngineReport]) -> dict[str, object]:
    origin = bundle.manifest.provenance
    return {
        "bundle": str(bundle.path),
        "network": origin.network,
        "weights": origin.weights,
        "seed": origin.seed,
        "precision": bundle.manifest.precision,
        "engines": [
            {
                "segment": report.segment,
                "status": report.status,
                "causes": report.causes,
                "verified": report.sidecar.is_verified,
                "sidecar_file": str(report.path),
                "sidecar": report.sidecar,
            }
            for report in reports
        ],
    }


def _tables(bundle: Bundle, reports: Sequence[EngineReport]) -> Group:
    """Show a table for each target, below one another."""
    from rich.console import Group

    targets = dict.fromkeys(report.sidecar.recipe.target for report in reports)
    return Group(
        *(
            _table(bundle, [r for r in reports if r.sidecar.recipe.target == target])
            for target in targets
        )
    )


def _table(bundle: Bundle, reports: Sequence[EngineReport]) -> Table:
    from rich.table import Table

    from parnet_engines.tensorrt.module import LABELS
    from parnet_export.console import format_bytes, printable

    recipe = reports[0].sidecar.recipe
    title = (
        f"{bundle.label}, {bundle.manifest.precision}, for {recipe.target} "
        f"by {LABELS[recipe.target.backend]} {recipe.version}"
    )
    table = Table(title=printable(title))
    table.caption = (
        "Layers: by the type of what they produce, as the engine tells on a GPU. "
        "Verified: `parnet-export verify --devices` has compared it, on a GPU, with float32; "
        "the figure is the largest relative error."
    )
    table.add_column("engine")
    table.add_column("status")
    for heading in ("build", "size"):
        table.add_column(heading, justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("verified")
    for report in reports:
        sidecar = report.sidecar
        table.add_row(
            printable(report.segment),
            report.status,
            f"{sidecar.build_s:.2f} s",
            format_bytes(sidecar.plan_bytes),
            _layers(sidecar),
            _verified(sidecar),
        )
    return table


def _say_why(reports: Sequence[EngineReport]) -> None:
    """Say why engines were built, and what is wrong with them, on standard error."""
    from parnet_export import console
    from parnet_export.errors import name_some

    reasons: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        if report.status == "built":
            reasons.setdefault(report.causes, []).append(report.segment)
    for causes, segments in reasons.items():
        console.note(f"built {name_some(segments)}: {'; '.join(causes)}")
    for report in reports:
        audit = report.sidecar.audit
        if audit is not None and audit.unexpected_fp32:
            layers = audit.unexpected_fp32
            problem = f"{len(layers)} layers compute in fp32, though the bundle is fp16"
            console.warn(f"{report.segment}: {problem}: {name_some(layers)}")


def _verified(sidecar: Sidecar) -> str:
    found = sidecar.checked
    if found is None:
        return "no"
    error = "not finite" if found.error is None else f"{found.error:.1e}"
    return f"{'yes' if found.passed else 'FAILED'}, {error}"


def _layers(sidecar: Sidecar) -> str:
    if sidecar.audit is None:
        return "not audited"
    return ", ".join(f"{count} {name}" for name, count in sidecar.audit.layers.items())
