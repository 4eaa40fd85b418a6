"""The schema version that every JSON document of ours begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class _Header:
    schema_version: object = None


def require_readable(
    content: bytes, newest: int, subject: str | Path, remedy: str = "Upgrade parnet-export"
) -> None:
    """Require that a document is not of a schema that is still to come.

    Documents of one that is known, or that name none, pass: decoding them tells what is wrong.

    Parameters
    ----------
    content
        The JSON document.
    newest
        The latest schema version that can be read here.
    subject
        Where the document comes from, for the message.
    remedy
        What to do about a newer one.

    Raises
    ------
    InputError
        When the document's schema is newer.
    msgspec.DecodeError
        When the content is no JSON object.
    """
    version = msgspec.json.decode(content, type=_Header).schema_version
    if isinstance(version, int) and version > newest:
        problem = f"has schema version {version}; this version reads up to {newest}"
        raise InputError(subject, problem, remedy)
