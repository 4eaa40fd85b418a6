"""Result files: versioned JSON.

A file holds what was recorded. The ``summary`` of each row is in it for other
programs; it is never read back but computed anew from the samples, so that an
old file profits from better statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from parnet_bench.result import Result
from parnet_bench.summary import summarise
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

KIND = "parnet-bench latency"
SCHEMA_VERSION = 1

_MEASURE_AGAIN = "Measure again with `parnet-bench latency --output`"


def as_dict(result: Result) -> dict[str, Any]:
    """Return a result with its summaries as plain values, ready for JSON."""
    plain: dict[str, Any] = msgspec.to_builtins(result)
    rows = [
        {
            "label": row.description.provenance.label,
            **msgspec.to_builtins(row.description),
            "summary": msgspec.to_builtins(summary),
            **msgspec.to_builtins(row.recording),
        }
        for row, summary in zip(result.rows, summarise(result), strict=True)
    ]
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "partial": result.partial,
        **plain,
        "rows": rows,
    }


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises
    ------
    InputError
        When the file is missing, damaged, of a newer schema, or holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", _MEASURE_AGAIN) from error
    return decode(content, path)


def decode(content: bytes, subject: Path | str) -> Result:
    """Decode the content of a result file, which messages call `subject`.

    Raises
    ------
    InputError
        As `read_result`.
    """
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = f"is damaged or no JSON ({error})" if content else "is empty"
        raise InputError(subject, problem, _MEASURE_AGAIN) from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise InputError(subject, f"is no result of {KIND}", _MEASURE_AGAIN)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        problem = f"has schema version {version}; this version reads up to {SCHEMA_VERSION}"
        raise InputError(subject, problem, "Upgrade parnet-export" if newer else _MEASURE_AGAIN)
    rows = document.get("rows")
    if isinstance(rows, list):
        # Each dataclass picks its own keys out of the flat row.
        document["rows"] = [{"description": row, "recording": row} for row in rows]
    try:
        return msgspec.convert(document, Result)
    except msgspec.ValidationError as error:
        raise InputError(subject, f"is damaged ({error})", _MEASURE_AGAIN) from error
