"""How exactly torch computes on a GPU: in float32 as it is, or rounded to TF32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_CUDNN_FLAGS = {"enabled": True, "benchmark": False, "deterministic": False}


@contextlib.contextmanager
def float32_precision(*, tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 meanwhile, for convolutions and for products, in all threads.

    Whatever the process has set is there again afterwards. It may have set it by torch's
    settings of a precision or by the older ones of TF32. torch refuses to tell the older ones
    once the others were used, and setting them does not overrule a precision that is set for
    everything, so that only the precisions are used here.

    Parameters
    ----------
    tf32
        Whether to allow it.
    """
    cudnn = cast("Any", torch.backends.cudnn)
    with contextlib.ExitStack() as undo:
        for name, value in _CUDNN_FLAGS.items():
            undo.callback(setattr, cudnn, name, getattr(cudnn, name))
            setattr(cudnn, name, value)
        for kind in (cudnn.conv, torch.backends.cuda.matmul):
            precision = kind.fp32_precision
            if (precision == "tf32") != tf32:
                undo.callback(_restore, kind, precision)
                kind.fp32_precision = "tf32" if tf32 else "ieee"
        yield


def _restore(kind: Any, precision: str) -> None:
    """Set a precision again, as one that follows the setting for everything if that does it."""
    kind.fp32_precision = "none"
    if kind.fp32_precision != precision:
        kind.fp32_precision = precision
