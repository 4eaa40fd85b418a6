"""How a tensor lies in the memory of a device: row by row, or in vectors of channels."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


class TensorLayout(Enum):
    """A layout of N x C x H x W tensors; `LINEAR` suits tensors of any rank.

    A vectorised layout pads the channels to whole vectors: 92 channels in vectors of 8
    take the memory of 96.
    """

    LINEAR = ("linear", 1)
    """Row-major, NCHW: what NumPy and PyTorch hold by default."""

    HWC8 = ("hwc8", 8)
    """Channels last, padded to vectors of 8: TensorRT's ``HWC8``, for 16-bit types."""

    CHW32 = ("chw32", 32)
    """Blocks of 32 channels, each channels-last: TensorRT's ``CHW32``."""

    def __init__(self, label: str, vector: int) -> None:
        self.label = label
        self.vector = vector

    def size_bytes(self, shape: Sequence[int], dtype: str) -> int:
        """Return the memory that a tensor takes, padding included.

        Parameters
        ----------
        shape
            All sizes known. The channels are the second dimension.
        dtype
            NumPy's name of the element type.

        Raises
        ------
        ValueError
            When the layout has vectors and the tensor has no channels.
        """
        sizes = list(shape)
        if self.vector > 1:
            if len(sizes) < 2:
                raise ValueError(f"a tensor of rank {len(sizes)} has no channels for {self.label}")
            sizes[1] = -(-sizes[1] // self.vector) * self.vector
        return math.prod(sizes) * np.dtype(dtype).itemsize
