"""The commands of ``parnet-export`` that run engines.

`register` adds them to a command line. Nothing but typer is loaded until one runs.
"""

# Typer reads the annotations at run time.
# ruff: noqa: TC003

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from parnet_engines import build_command, classify_command, detect_command

if TYPE_CHECKING:
    from rich.table import Table

    from parnet_export.bundle import Bundle
    from parnet_export.network import Network
    from parnet_export.verify import Check, Proof


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    ckpt: Annotated[
        str | None,
        typer.Option(
            help="Also compare with the checkpoint or catalogue name that it was made from.",
            metavar="SOURCE",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Random inputs besides the others.")] = 8,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Seed of the inputs, and of a catalogue name's random weights; "
            "by default 0, and the seed that the bundle was made with.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Catalogue name that the checkpoint must turn out to be.", metavar="NAME"
        ),
    ] = None,
    activation: Annotated[
        Literal["auto", "silu", "relu", "mish"],
        typer.Option(help="The network's activation; auto tells it from the checkpoint."),
    ] = "auto",
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="Take the checkpoint's averaged weights.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Also compare engines on these devices with a float32 reference, segment by "
            "segment: 0, 0,1,2, cpu.",
            metavar="DEVICES",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Runtime on --devices: tensorrt, torch, onnxruntime, openvino.")
    ] = "auto",
    boundary: Annotated[
        Literal["linear", "vector"] | None,
        typer.Option(
            help="Memory layout of tensors between engines on GPUs. Default: the runtime's own.",
            show_default=False,
        ),
    ] = None,
    max_aux_streams: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Take the engines that `build` has made with this --max-aux-streams. "
            "Default: those that it makes without.",
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="With --devices: write inputs and outputs here, for polygraphy run.",
            metavar="DIR",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result as JSON.", metavar="F")
    ] = None,
) -> None:
    """Prove that a bundle is intact, and that its segments compute what they were made from."""
    from rich.console import Group

    from parnet_engines.proof.bundle_proof import prove_bundle
    from parnet_export import console, files
    from parnet_export.bundle import open_bundle
    from parnet_export.errors import InputError

    if output is not None:
        files.require_writable(output)
    if save is not None and devices is None:
        problem = "keeps what engines on devices compute, and none are named"
        raise InputError("--save", problem, "Add --devices, such as --devices 0")
    if boundary is not None and devices is None:
        problem = "is between engines on devices, and none are named"
        raise InputError("--boundary", problem, "Add --devices, such as --devices 0")
    if max_aux_streams is not None and devices is None:
        problem = "is for engines on devices, and none are named"
        raise InputError("--max-aux-streams", problem, "Add --devices, such as --devices 0")
    opened = open_bundle(bundle)
    source = None
    if ckpt is not None:
        from parnet_export.source import load_network

        made_with = opened.manifest.provenance.seed or 0
        weights_seed = made_with if seed is None else seed
        with console.working(f"loading {ckpt}"):
            source = load_network(
                ckpt, arch=arch, activation=activation, use_ema=use_ema, seed=weights_seed
            )
    with console.working("running whole and split" + (" and source" if source else "")):
        proof = prove_bundle(opened, source=source, random_samples=samples, seed=seed or 0)
    result, shown = _as_dict(opened, source, proof), [_table(opened, source, proof)]
    on_devices = None
    if devices is not None:
        from parnet_engines.proof import device_verification

        with console.working(f"running engines on {devices}"):
            on_devices = device_verification.verify_on(
                opened,
                devices,
                engine,
                samples=samples,
                seed=seed or 0,
                save=save,
                boundary=boundary,
                max_aux_streams=max_aux_streams,
            )
        result["devices"] = on_devices
        result["passed"] = proof.passed and on_devices.passed
        shown.append(device_verification.table(on_devices))
    console.show(result, Group(*shown), as_json=as_json, output=output)
    proof.require(_consequence(opened, source))
    if on_devices is not None:
        on_devices.require()


def register(app: typer.Typer) -> None:
    """Add the commands of this module to a command line."""
    app.command()(verify)
    build_command.register(app)
    detect_command.register(app)
    classify_command.register(app)


def _as_dict(bundle: Bundle, source: Network | None, proof: Proof) -> dict[str, object]:
    origin = bundle.manifest.provenance
    return {
        "bundle": str(bundle.path),
        "network": origin.network,
        "weights": origin.weights,
        "seed": origin.seed,
        "precision": bundle.manifest.precision,
        "source": source.provenance if source else None,
        "passed": proof.passed,
        "checks": proof.checks,
    }


def _table(bundle: Bundle, source: Network | None, proof: Proof) -> Table:
    """Show one row for each kind of input and one column for each comparison."""
    from rich.table import Table

    from parnet_export.console import printable

    title = f"{bundle.label}, {bundle.manifest.precision}"
    table = Table(
        title=printable(f"{title}, against {source.label}" if source else title),
        caption=printable(_caption(bundle)),
    )
    limits = {check.name: check.limit for check in proof.checks}
    table.add_column("inputs")
    for name, limit in limits.items():
        table.add_column(f"{name}\nlimit {limit:.0e}", justify="right")
    cells = {(check.inputs, check.name): check for check in proof.checks}
    for inputs in dict.fromkeys(check.inputs for check in proof.checks):
        row = (cells.get((inputs, name)) for name in limits)
        table.add_row(inputs, *(_error(check) if check else "" for check in row))
    return table


def _caption(bundle: Bundle) -> str:
    activation = bundle.manifest.provenance.activation
    return f"Relative errors. Schema and digests of {len(bundle.manifest.files)} files agree." + (
        f" Activation: {activation}." if activation else ""
    )


def _error(check: Check) -> str:
    return f"{check.error:.1e}" if check.passed else f"FAILED {check.error:.1e}"


def _consequence(bundle: Bundle, source: Network | None) -> str:
    """Say what a failed check means, and where two random networks differ."""
    if source is None:
        return "Make the bundle again with `parnet-export split-streams`."
    ours, theirs = bundle.manifest.provenance, source.provenance
    if ours.weights == theirs.weights == "random" and ours.seed != theirs.seed:
        return (
            f"The bundle's random weights are of seed {ours.seed}, "
            f"those of {theirs.source} of seed {theirs.seed}."
        )
    return f"The bundle does not compute what {theirs.source} computes."
