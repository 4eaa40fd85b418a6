"""Accuracy on the digits' test images before and after fuse, export and split.

Every form of the network sees the same images; none may change a prediction.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from dataset import CLASSES, Digits, load_split
from rich.table import Table

from parnet_engines.session import Session
from parnet_export import console
from parnet_export.bundle import open_bundle
from parnet_export.errors import CheckFailedError, InputError
from parnet_export.source import load_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import nn

    from parnet_engines.session import Plan
    from parnet_export.bundle import Bundle

    Logits = NDArray[np.float64]

CHECKPOINT = Path(__file__).with_name("digits.pth.tar")

BATCH = 50
"""Images per inference where the network leaves it open."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one form of the network does.

    Parameters
    ----------
    form
        The form, for people.
    correct
        Images whose digit it names.
    accuracy
        Their share of all images.
    changed
        Images for which it names another digit than the first form.
    logit_difference
        Largest absolute difference of a logit from the first form's.
    """

    form: str
    correct: int
    accuracy: float
    changed: int
    logit_difference: float


@torch.no_grad()
def torch_logits(module: nn.Module, images: torch.Tensor) -> Logits:
    """Return a module's logits, ``(N, classes)``."""
    return torch.cat([module(batch) for batch in torch.split(images, BATCH)]).double().numpy()


def session_logits(session: Session, images: torch.Tensor) -> Logits:
    """Return a session's logits, ``(N, classes)``, in the batches that its network takes.

    A last batch that is not full is filled up with its first image.
    """
    (image,), (logits,) = session.inputs, session.outputs
    fixed = image.shape[0] if isinstance(image.shape[0], int) else None
    found = []
    for batch in torch.split(images, fixed or BATCH):
        missing = fixed - len(batch) if fixed else 0
        full = torch.cat([batch, batch[:1].repeat(missing, 1, 1, 1)])
        outputs = session.run({image.name: full.numpy().astype(image.dtype)})
        found.append(outputs[logits.name][: len(batch)].astype(np.float64))
    return np.concatenate(found)


def compare(forms: Iterator[tuple[str, Path, Logits]], digits: Digits) -> list[Row]:
    """Return a row for each form of a network: its name, its file and its logits.

    Raises
    ------
    InputError
        When a form does not tell ten classes apart.
    """
    labels = digits.labels.numpy()
    rows: list[Row] = []
    reference: Logits | None = None
    for form, path, logits in forms:
        if logits.shape != (len(digits), CLASSES):
            problem = f"gives {logits.shape[1]} logits for an image, not {CLASSES}"
            raise InputError(path, problem, "Give the digits network")
        if reference is None:
            reference = logits
        predictions = logits.argmax(1)
        correct = int((predictions == labels).sum())
        changed = int((predictions != reference.argmax(1)).sum())
        difference = float(np.abs(logits - reference).max())
        rows.append(Row(form, correct, correct / len(digits), changed, difference))
    return rows


def run_forms(
    ckpt: Path, fused: Path, bundle: Bundle, images: torch.Tensor
) -> Iterator[tuple[str, Path, Logits]]:
    """Run every form of the network on all images.

    Yields
    ------
    form, path, logits
        The form's name, its file, and its logits, ``(N, classes)``.
    """
    for path in (ckpt, fused):
        network = load_network(path)
        form = "as trained" if network.level == "none" else f"fused ({network.level})"
        yield f"torch, {form}", path, torch_logits(network.module, images)
    segments = len(bundle.manifest.segments)
    plans: tuple[tuple[str, Plan], ...] = (
        ("ONNX, whole graph", "whole"),
        (f"ONNX, {segments} segments", "streams"),
    )
    for form, plan in plans:
        with Session.open(bundle, devices="cpu", plan=plan) as session:
            yield form, bundle.path, session_logits(session, images)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    *,
    fused: Annotated[Path, typer.Option(help="Output of `parnet-export fuse`.")],
    bundle: Annotated[Path, typer.Option(help="Output of `parnet-export split-streams`.")],
    ckpt: Annotated[Path, typer.Option(help="Trained checkpoint.")] = CHECKPOINT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show accuracy before and after fuse, export and split.

    The exit code is 1 if a form predicts another digit than the trained network.
    """
    _, digits = load_split()
    with console.working(f"running every form on {len(digits)} images"):
        rows = compare(run_forms(ckpt, fused, open_bundle(bundle), digits.images), digits)
    table = Table(title=f"Handwritten digits, {len(digits)} test images", title_justify="left")
    table.caption = "Changes and largest differences of logits are against the first row."
    table.caption_justify = "left"
    table.add_column("form", no_wrap=True)
    for heading in ("correct", "accuracy", "changed", "logit difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.form,
            str(row.correct),
            f"{100 * row.accuracy:.2f} %",
            str(row.changed),
            f"{row.logit_difference:.1e}",
        )
    console.show({"images": len(digits), "rows": rows}, table, as_json=as_json)
    different = [row.form for row in rows if row.changed]
    if different:
        raise CheckFailedError(
            f"predictions differ from the trained network's in: {'; '.join(different)}. "
            "Fuse and split the checkpoint again."
        )


if __name__ == "__main__":
    sys.exit(console.run(app))
