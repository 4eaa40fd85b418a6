"""Name what pictures show, with a session that classifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_export.errors import InputError
from parnet_export.images.files import load_image
from parnet_export.images.preprocessing import preprocess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from parnet_engines.base_session import AnySession
    from parnet_export.bundle import Bundle
    from parnet_export.images.input_form import InputForm

_NOT_ONE = 1e-2
"""How far from 1 a sum of probabilities in half precision may be."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A class that a picture may belong to.

    Parameters
    ----------
    number
        The class's place among the network's outputs, from 0.
    label
        Its name; empty where none is known.
    probability
        Between 0 and 1.
    """

    number: int
    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Classified:
    """What a network makes of one picture, the most probable class first."""

    image: str
    predictions: tuple[Prediction, ...]


def classifier_shape(bundle: Bundle) -> tuple[int | None, int]:
    """Return height and width in pixels that a classifier takes, and how many classes it knows.

    Returns
    -------
    resolution, classes
        The resolution is None where the network leaves it open.

    Raises
    ------
    InputError
        When the bundle holds no classifier of square colour images.
    """
    inputs, outputs = bundle.manifest.inputs, bundle.manifest.outputs
    taken = [spec.shape for spec in inputs]
    given = [spec.shape for spec in outputs]
    is_classifier = len(taken) == len(given) == 1 and len(taken[0]) == 4 and len(given[0]) == 2
    if not is_classifier or taken[0][1] != 3 or not isinstance(given[0][1], int):
        names = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in (*inputs, *outputs))
        problem = f"is no classifier of colour images: its tensors are {names}"
        raise InputError(bundle.path, problem, "Give the bundle of a classifier")
    height, width = taken[0][2:]
    if isinstance(height, str) or isinstance(width, str):
        return None, given[0][1]
    if height != width:
        problem = f"takes images of {width} x {height} pixels, which are not square"
        raise InputError(bundle.path, problem, "Give the bundle of a network for square images")
    return height, given[0][1]


def classify(
    session: AnySession,
    paths: Sequence[Path],
    form: InputForm,
    *,
    resolution: int,
    labels: Sequence[str] = (),
    top: int = 5,
) -> tuple[Classified, ...]:
    """Classify pictures, in the batches that the network takes.

    Parameters
    ----------
    session
        Of a classifier (`classifier_shape`). Its outputs may be logits or probabilities:
        rows of non-negative numbers that add up to 1 are taken as they are.
    paths
        The pictures.
    form
        How they become the network's input.
    resolution
        Height and width of that input in pixels.
    labels
        A name for each class, or none.
    top
        How many classes to name for each picture.

    Raises
    ------
    InputError
        When a picture cannot be read or used. All are read before the first is classified.
    """
    images = np.stack([_load(path, form, resolution) for path in paths])
    probabilities = _probabilities(_run(session, images))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return tuple(
        Classified(
            str(path),
            tuple(Prediction(int(i), labels[i] if labels else "", float(row[i])) for i in best),
        )
        for path, row, best in zip(paths, probabilities, order, strict=True)
    )


def _load(path: Path, form: InputForm, resolution: int) -> NDArray[np.float32]:
    try:
        return preprocess(load_image(path), form, resolution)
    except ValueError as error:
        raise InputError(path, str(error), "Cut out the part to classify") from error


def _run(session: AnySession, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the network's outputs; a last batch that is not full is filled up with its first."""
    (image,), (output,) = session.inputs, session.outputs
    batch = image.shape[0] if isinstance(image.shape[0], int) else 1
    found: list[NDArray[Any]] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        full = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
        outputs = session.run({image.name: full.astype(image.dtype)})
        found.append(outputs[output.name][: len(part)])
    return np.concatenate(found).astype(np.float64)


def _probabilities(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    if (outputs >= 0).all() and (abs(outputs.sum(1) - 1) <= _NOT_ONE).all():
        return outputs
    exponents = np.exp(outputs - outputs.max(1, keepdims=True))
    shares: NDArray[np.float64] = exponents / exponents.sum(1, keepdims=True)
    return shares
