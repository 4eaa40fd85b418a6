"""Result files: versioned JSON.

A file holds what was recorded. The ``summary`` of each row is in it for other
programs; it is never read back but computed anew from the samples, so that an
old file profits from better statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from parnet_bench.results.findings import find
from parnet_bench.results.result import Result
from parnet_bench.results.summary import summarise
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KIND = "parnet-bench latency"
SCHEMA_VERSION = 2

_FIRST_SCHEMA_PROCEDURE = {"processes": 1, "in_flight": 1, "max_time_s": 120.0}
"""What files of schema 1 do not tell; later defaults must not change what is said of them."""

_MEASURE_AGAIN = "Measure again with `parnet-bench latency --output`"


def as_dict(result: Result) -> dict[str, Any]:
    """Return a result with its summaries and warnings as plain values, ready for JSON."""
    plain: dict[str, Any] = msgspec.to_builtins(result)
    rows = [
        {
            "label": row.description.provenance.label,
            **described.pop("description"),
            "summary": msgspec.to_builtins(summary),
            **described,
        }
        for row, described, summary in zip(
            result.rows, plain["rows"], summarise(result), strict=True
        )
    ]
    failed = [{**described.pop("description"), **described} for described in plain["failed"]]
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "partial": result.partial,
        **plain,
        "rows": rows,
        "failed": failed,
        "warnings": msgspec.to_builtins(find(result)),
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
    reader = _READERS.get(version) if isinstance(version, int) else None
    if reader is None:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        problem = f"has schema version {version}; this version reads up to {SCHEMA_VERSION}"
        raise InputError(subject, problem, "Upgrade parnet-export" if newer else _MEASURE_AGAIN)
    try:
        return msgspec.convert(reader(document), Result)
    except msgspec.ValidationError as error:
        raise InputError(subject, f"is damaged ({error})", _MEASURE_AGAIN) from error


def _nested(document: dict[str, Any]) -> dict[str, Any]:
    """Give each flat row its description back; each dataclass picks its own keys out of it."""
    nested = dict(document)
    for key in ("rows", "failed"):
        rows = document.get(key)
        if isinstance(rows, list):
            nested[key] = [
                {**row, "description": row} if isinstance(row, dict) else row for row in rows
            ]
    return nested


def _from_first_schema(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of schema 1 as one of schema 2: everything came from one process."""
    nested = _nested(document)
    if isinstance(nested.get("rows"), list):
        nested["rows"] = [
            {**row, "recording": {"processes": [row]}} if isinstance(row, dict) else row
            for row in nested["rows"]
        ]
    procedure, orders = document.get("procedure"), document.get("orders")
    if isinstance(procedure, dict):
        nested["procedure"] = {**procedure, **_FIRST_SCHEMA_PROCEDURE}
    if isinstance(orders, list):
        nested["orders"] = [orders]
    return nested


_READERS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_first_schema,
    2: _nested,
}
