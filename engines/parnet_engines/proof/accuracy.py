"""How well results agree with a float32 reference: cosine, relative error, top-1."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from parnet_export.errors import CheckFailedError
from parnet_export.verify import relative_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from parnet_export.bundle import Precision


@dataclass(frozen=True, slots=True)
class Limits:
    """What counts as agreement.

    Parameters
    ----------
    cosine
        Least cosine of the angle between result and reference.
    relative_error
        Greatest ``max |result - reference| / max |reference|``.
    top1
        Least share of rows with the same greatest entry.
    """

    cosine: float
    relative_error: float
    top1: float = 1.0


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(0.99999, 1e-3),
    "fp16": Limits(0.999, 2e-2),
}
"""By the precision that engines compute in.

In float32 another order of summation makes 1e-6 to 1e-4, and TF32, which rounds what
convolutions read to 10 bits, up to 5e-4 in the catalogue's networks. Half precision rounds every
tensor to 11 bits, layer after layer.
"""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well the results of one thing agree with the reference, over all samples.

    Parameters
    ----------
    subject
        What was compared, such as a segment.
    cosine, relative_error
        The worst of all samples and tensors. Without a finite result they are NaN and
        infinite.
    top1
        Share of rows whose greatest entry is the reference's, or one that ties with it within
        the greatest relative error allowed; None where there are no classes.
    limits
        What passes.
    detail
        What is wrong; empty if nothing is.
    passed
        Whether all is within the limits.
    """

    subject: str
    cosine: float
    relative_error: float
    top1: float | None
    limits: Limits
    detail: str = ""
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        within = self.cosine >= self.limits.cosine
        within = within and self.relative_error <= self.limits.relative_error
        within = within and (self.top1 is None or self.top1 >= self.limits.top1)
        object.__setattr__(self, "passed", within)


def assess(
    subject: str,
    pairs: Iterable[tuple[str, NDArray[Any], NDArray[Any]]],
    limits: Limits,
    *,
    classes: bool = False,
) -> Accuracy:
    """Compare results with a reference.

    Parameters
    ----------
    subject
        What is compared.
    pairs
        Name, result and reference of each tensor of each sample.
    limits
        What passes.
    classes
        Whether the tensors of two dimensions hold a score for each class.
    """
    cosines, errors, agreements, details = [], [], [], []
    for name, actual, reference in pairs:
        error = relative_error(actual, reference)
        errors.append(error)
        cosines.append(cosine(actual, reference))
        if math.isinf(error):
            details.append(_why_incomparable(name, actual, reference))
        elif classes and actual.ndim == 2:
            agreements.append(top1_agreement(actual, reference, limits.relative_error))
    top1 = float(np.mean(agreements)) if agreements else None
    found = Accuracy(
        subject, float(np.min(cosines, initial=1.0)), max(errors, default=math.inf), top1, limits
    )
    if not errors:
        details.append("there is nothing to compare")
    if not found.passed and not details:
        details.append("is outside the limits")
    return Accuracy(
        subject, found.cosine, found.relative_error, top1, limits, "; ".join(details[:1])
    )


def cosine(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the cosine of the angle between two tensors taken as vectors.

    One for two vectors of zeros, zero for one of them; NaN where it is not defined.
    """
    if actual.shape != reference.shape:
        return math.nan
    a, b = (array.astype(np.float64).ravel() for array in (actual, reference))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if 0.0 in lengths:
        return float(lengths[0] == lengths[1])
    return float((a / lengths[0]) @ (b / lengths[1]))


def top1_agreement(actual: NDArray[Any], reference: NDArray[Any], tie: float) -> float:
    """Return the share of rows whose greatest entry is the reference's, or ties with it.

    Parameters
    ----------
    actual, reference
        Scores, a row for each item and a column for each class.
    tie
        Two scores tie when they differ by no more than this share of the greatest absolute
        score of the reference.
    """
    wide = reference.astype(np.float64)
    chosen = np.take_along_axis(wide, actual.argmax(axis=1)[:, None], axis=1)[:, 0]
    slack = tie * np.abs(wide).max(initial=0.0)
    return float(np.mean(wide.max(axis=1) - chosen <= slack))


def require(found: Sequence[Accuracy], consequence: str) -> None:
    """Raise unless everything agrees.

    Raises
    ------
    CheckFailedError
        Names what does not.
    """
    failed = [accuracy for accuracy in found if not accuracy.passed]
    if not failed:
        return
    reasons = "; ".join(
        f"{a.subject} ({a.detail}, relative error {a.relative_error:.1e}, cosine {a.cosine:.6f})"
        for a in failed
    )
    raise CheckFailedError(f"{len(failed)} of {len(found)} disagree: {reasons}. {consequence}")


def _why_incomparable(name: str, actual: NDArray[Any], reference: NDArray[Any]) -> str:
    if actual.shape != reference.shape:
        return f"{name!r} has shape {actual.shape}, the reference {reference.shape}"
    if not np.isfinite(actual.astype(np.float64)).all():
        return f"{name!r} has NaN or infinite values"
    if not np.isfinite(reference.astype(np.float64)).all():
        return f"the reference of {name!r} has NaN or infinite values"
    return f"{name!r} is not zero as the reference is"
