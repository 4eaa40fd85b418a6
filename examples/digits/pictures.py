"""Write some of the test images as PNG files of 8x8 pixels, as a user would have them."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003 - typer reads annotations at run time
from typing import Annotated

import numpy as np
import typer
from dataset import split_indices
from PIL import Image
from sklearn.datasets import load_digits

from parnet_export import console, files

_LEVELS = 16

app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where they go; created if missing.")],
    count: Annotated[int, typer.Option(min=1, max=450, help="How many.")] = 4,
) -> None:
    """Write the first test images, named by what they show and their place in the data set."""
    digits = load_digits()
    _, places = split_indices(digits.target)
    files.make_directory(folder)
    for place in places[:count].tolist():
        grey = np.round(digits.images[place] / _LEVELS * 255).astype(np.uint8)
        with files.open_replacing(folder / f"{digits.target[place]}-{place}.png") as stream:
            Image.fromarray(grey).save(stream, format="PNG")


if __name__ == "__main__":
    sys.exit(console.run(app))
