"""Train a small CIFAR-style ParNet on handwritten digits, and write a checkpoint.

The checkpoint has the layout of the authors' training script (timm's): weights
under ``state_dict``, settings as a Namespace under ``args``. The same settings,
seed and number of threads give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from dataset import CLASSES, Digits, load_split
from torch.nn import functional

from parnet_export import console, files
from parnet_export.models.parnet import ParNet, ParNetConfig

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT = Path(__file__).with_name("digits.pth.tar")
ARCH = "parnet_cifar"
LAYOUT_VERSION = 2
"""What timm's saver calls the version of this layout."""

CONFIG = ParNetConfig(
    widths=(16, 32, 64),
    blocks=(3, 4, 4),
    last_width=80,
    num_classes=CLASSES,
    variant="cifar",
    dropout=0.1,
)
"""Half as wide as the smallest of the paper's CIFAR networks, because digits are easier."""

_WARM_UP_SHARE = 0.1
_TEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Parameters
    ----------
    epochs
        Passes over the training images.
    batch
        Images per step.
    lr
        Highest learning rate: AdamW, linear warm-up, then a cosine down to nothing.
    weight_decay
        Of AdamW.
    smoothing
        Share of the label that is spread over all classes.
    seed
        Of the weights, the order of the images, their augmentation and dropout.
    threads
        CPU threads.
    """

    epochs: int = 24
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    seed: int = 0
    threads: int = 1


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch and shift each image a little.

    Parameters
    ----------
    images
        ``(N, 3, H, W)``.
    generator
        Draws for each image an angle within 12 degrees, a scale within 10 % for each
        axis, and a shift within 8 % of each side.

    Returns
    -------
    Tensor
        ``(N, 3, H, W)``; the border is repeated where an image no longer reaches.
    """

    def draw(*shape: int, limit: float) -> Tensor:
        return (2 * torch.rand(len(images), *shape, generator=generator) - 1) * limit

    angle = draw(limit=math.radians(12))
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    stretched = rotation.reshape(-1, 2, 2) * (1 + draw(1, 2, limit=0.1))
    # Normalised coordinates run from -1 to 1, so a side measures two.
    shift = draw(2, 1, limit=2 * 0.08)
    grid = functional.affine_grid(
        torch.cat([stretched, shift], 2), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(digits: Digits, settings: Settings, config: ParNetConfig = CONFIG) -> ParNet:
    """Return a new ParNet trained on `digits`, in training form and evaluation mode."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = ParNet(config).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    # A last batch of a few images would spoil the running statistics of BatchNorm.
    steps = len(digits) // settings.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.lr,
        total_steps=settings.epochs * steps,
        pct_start=_WARM_UP_SHARE,
        cycle_momentum=False,
    )
    with console.progress() as display:
        task = display.add_task("training", total=settings.epochs * steps)
        for epoch in range(settings.epochs):
            total_loss = 0.0
            order = torch.randperm(len(digits), generator=generator)
            for places in torch.split(order[: steps * settings.batch], settings.batch):
                images = augment(digits.images[places], generator)
                # Channels last in memory is the quicker order on CPUs.
                logits = network(images.contiguous(memory_format=torch.channels_last))
                loss = functional.cross_entropy(
                    logits, digits.labels[places], label_smoothing=settings.smoothing
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total_loss += loss.item()
                display.advance(task)
            console.note(f"epoch {epoch + 1} of {settings.epochs}: loss {total_loss / steps:.4f}")
    return network.eval()


@torch.no_grad()
def accuracy(network: torch.nn.Module, digits: Digits) -> float:
    """Return the share of `digits` that a network in evaluation mode names rightly."""
    batches = torch.split(digits.images, _TEST_BATCH)
    predictions = torch.cat([network(images).argmax(1) for images in batches])
    return float((predictions == digits.labels).double().mean())


def write_checkpoint(path: Path, network: ParNet, settings: Settings, test_accuracy: float) -> None:
    """Write a training checkpoint, without the optimizer's state.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    checkpoint = {
        "epoch": settings.epochs - 1,
        "arch": ARCH,
        "state_dict": network.state_dict(),
        "version": LAYOUT_VERSION,
        "args": argparse.Namespace(**asdict(settings)),
        "metric": 100 * test_accuracy,
    }
    with files.open_replacing(path) as stream:
        torch.save(checkpoint, stream)


app = typer.Typer(add_completion=False)
_DEFAULTS = Settings()


@app.command()
def main(
    *,
    output: Annotated[Path, typer.Option(help="Checkpoint to write.")] = CHECKPOINT,
    epochs: Annotated[int, typer.Option(min=1)] = _DEFAULTS.epochs,
    batch: Annotated[int, typer.Option(min=2, max=1024)] = _DEFAULTS.batch,
    lr: Annotated[float, typer.Option(min=0)] = _DEFAULTS.lr,
    weight_decay: Annotated[float, typer.Option(min=0)] = _DEFAULTS.weight_decay,
    smoothing: Annotated[float, typer.Option(min=0, max=1)] = _DEFAULTS.smoothing,
    seed: int = _DEFAULTS.seed,
    threads: Annotated[int, typer.Option(min=1)] = _DEFAULTS.threads,
) -> None:
    """Train on the handwritten digits and write a checkpoint."""
    settings = Settings(epochs, batch, lr, weight_decay, smoothing, seed, threads)
    files.make_directory(output.parent)
    torch.set_num_threads(settings.threads)
    training, test = load_split()
    network = train(training, settings)
    test_accuracy = accuracy(network, test)
    write_checkpoint(output, network, settings, test_accuracy)
    right = round(test_accuracy * len(test))
    print(f"{output}: {right} of {len(test)} test images right, {100 * test_accuracy:.2f} %")


if __name__ == "__main__":
    sys.exit(console.run(app))
