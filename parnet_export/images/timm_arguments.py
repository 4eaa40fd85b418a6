"""What a training script of timm notes about pictures in its checkpoints.

Such a script, ParNet's among them, stores its arguments as ``args``. Those of timm's
``--mean``, ``--std``, ``--crop-pct`` and ``--interpolation`` that were given say how
validation prepares pictures; those that were not leave it to the network's defaults.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from parnet_export.images.input_form import Interpolation

if TYPE_CHECKING:
    from parnet_export.images.input_form import InputForm

_PREFIX = "args."
_FIELDS = {
    "mean": "mean",
    "std": "std",
    "crop_pct": "crop",
    "interpolation": "interpolation",
}


def picture_arguments(content: Mapping[Any, object]) -> dict[str, str]:
    """Return the arguments about pictures in a checkpoint, as JSON by ``args.<name>``."""
    stored = content.get("args")
    arguments = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(arguments, Mapping):
        return {}
    found: dict[str, str] = {}
    for name in _FIELDS:
        value = arguments.get(name)
        if isinstance(value, str | int | float) or (
            isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
        ):
            found[_PREFIX + name] = json.dumps(value)
    return found


def stated_form(metadata: Mapping[str, str], default: InputForm) -> InputForm | None:
    """Return how a checkpoint says that pictures are prepared.

    Parameters
    ----------
    metadata
        Of the checkpoint, with what `picture_arguments` gives.
    default
        For what its arguments leave open.

    Returns
    -------
    InputForm or None
        None where no argument says anything, or none that makes sense.
    """
    stated = {
        field: value
        for name, field in _FIELDS.items()
        if (value := _understood(field, metadata.get(_PREFIX + name))) is not None
    }
    try:
        return replace(default, **stated) if stated else None
    except ValueError:
        return None


def _understood(field: str, text: str | None) -> Any:
    """Return an argument as the field of a form; None where it is absent or something else."""
    if text is None:
        return None
    kinds = {"crop": float, "interpolation": Interpolation}
    try:
        value = msgspec.json.decode(text, type=kinds.get(field, tuple[float, ...]))
    except msgspec.DecodeError:
        return None
    if isinstance(value, tuple):
        value = value * 3 if len(value) == 1 else value
        return value if len(value) == 3 else None
    return value
