"""Inputs that are likely to tell two forms of a network apart.

Random inputs find wrong weights; the others find what random inputs hide: a
padding that is not zero shows on constants, a missing bias on zeros, a wrong
offset on a single pixel, swapped rows on a checkerboard, and a lost order of
operations on large and small magnitudes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from parnet_export.stream_graph import TensorSpec

    _Fill = Callable[[tuple[int, ...], np.random.Generator], NDArray[np.float64]]

LARGE_MAGNITUDE = 16.0
"""Scale of the large inputs: far beyond any normalised image, and still within what the
arithmetic can hold. Beyond about 200, ParNet-S in float32 is itself off by more than 1e-5
from float64, and in half precision activations must stay below 65504."""

SMALL_MAGNITUDE = 1e-3
"""Scale of the small inputs."""

FREE_SIZE = 64
"""What a symbolic dimension other than the batch becomes, where its size is not given."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One set of network inputs.

    Parameters
    ----------
    name
        Kind of the values, such as ``"normal"``.
    inputs
        An array for each network input.
    """

    name: str
    inputs: dict[str, NDArray[Any]]


def batch_symbol(specs: Sequence[TensorSpec]) -> str | None:
    """Return the name of the dynamic batch dimension: the first symbolic leading dimension."""
    leading = (spec.shape[0] for spec in specs if spec.shape)
    return next((size for size in leading if isinstance(size, str)), None)


def make_samples(
    specs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    random_samples: int = 1,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[Sample]:
    """Yield random and adversarial inputs, the same ones for the same arguments.

    Integer inputs take only the values 0 and 1, which every table of embeddings has.

    Parameters
    ----------
    specs
        The network's inputs.
    seed
        Seed of all random values.
    random_samples
        How many samples of the kind ``"normal"``.
    sizes
        Sizes of symbolic dimensions. Otherwise the batch is 1, with one more sample
        of batch 2, and any other dimension `FREE_SIZE`.
    """
    batch = batch_symbol(specs)
    known = dict(sizes or {})
    for spec in specs:
        for size in spec.shape:
            if isinstance(size, str):
                known.setdefault(size, 1 if size == batch else FREE_SIZE)
    rng = np.random.default_rng(seed)
    for _ in range(random_samples):
        yield _sample("normal", _normal, specs, known, rng)
    if batch is not None and batch not in (sizes or {}):
        yield _sample("normal, batch 2", _normal, specs, {**known, batch: 2}, rng)
    fills: dict[str, _Fill] = {
        "uniform": lambda shape, rng: rng.random(shape),
        "zeros": lambda shape, _: np.zeros(shape),
        "ones": lambda shape, _: np.ones(shape),
        f"normal x {LARGE_MAGNITUDE:g}": lambda shape, rng: (
            LARGE_MAGNITUDE * rng.standard_normal(shape)
        ),
        f"normal x {SMALL_MAGNITUDE:g}": lambda shape, rng: (
            SMALL_MAGNITUDE * rng.standard_normal(shape)
        ),
        "one pixel": _one_pixel,
        "checkerboard": _checkerboard,
    }
    for name, fill in fills.items():
        yield _sample(name, fill, specs, known, rng)


def _sample(
    name: str,
    fill: _Fill,
    specs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    rng: np.random.Generator,
) -> Sample:
    inputs = {}
    for spec in specs:
        values = fill(spec.resolve(sizes), rng)
        if "float" not in spec.dtype:
            values = np.asarray(np.asarray(values) > 0, dtype=np.float64)
        inputs[spec.name] = np.asarray(values, dtype=spec.dtype)
    return Sample(name, inputs)


def _normal(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.standard_normal(shape)


def _one_pixel(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """One in a single place of the last two dimensions, for every item and channel."""
    values = np.zeros(shape)
    images = values.reshape(-1, math.prod(shape[-2:]))  # a view
    images[:, rng.integers(images.shape[1])] = 1.0
    return values


def _checkerboard(shape: tuple[int, ...], _: np.random.Generator) -> NDArray[np.float64]:
    """Plus and minus one, changing along every dimension."""
    steps = np.asarray(sum(np.indices(shape, sparse=True)))
    return 1.0 - 2.0 * (steps % 2)
