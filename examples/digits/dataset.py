"""The handwritten digits that scikit-learn carries, as images a CIFAR network takes.

Each of the 1797 digits is an 8x8 picture with 17 grey levels. It is enlarged to
32x32 pixels, its grey is repeated for the three colours, and the values are
normalised by the statistics of the training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = 10
PIXELS = 32
MEAN, STD = 0.305, 0.324
"""Of all pixels of the enlarged training images, where 0 is paper and 1 is ink."""

_LEVELS = 16
_TEST_SHARE = 0.25
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Digits:
    """Images and what they show.

    Parameters
    ----------
    images
        Normalised, float32, ``(N, 3, 32, 32)``.
    labels
        The digits, int64, ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_split() -> tuple[Digits, Digits]:
    """Return the training and the test images, always the same ones.

    A quarter of each digit's images, 450 in all, are the test images.
    """
    digits = load_digits()
    train, test = split_indices(digits.target)
    images = torch.from_numpy(digits.images.astype(np.float32)) / _LEVELS
    labels = torch.from_numpy(digits.target)
    training, testing = (Digits(enlarge(images[part]), labels[part]) for part in (train, test))
    return training, testing


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the training and of the test images, stratified by label."""
    places = np.arange(len(labels))
    train, test = train_test_split(
        places, test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=labels
    )
    return np.sort(train), np.sort(test)


def enlarge(images: Tensor) -> Tensor:
    """Map grey images ``(N, 8, 8)`` in [0, 1] to normalised ones, ``(N, 3, 32, 32)``."""
    enlarged = functional.interpolate(
        images[:, None], size=(PIXELS, PIXELS), mode="bilinear", align_corners=False
    )
    return ((enlarged - MEAN) / STD).repeat(1, 3, 1, 1)
