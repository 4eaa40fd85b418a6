"""Programs as JSON documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

# msgspec resolves the annotations of the dataclass below while the program runs.
from parnet_engines.schedule.placement import Lane  # noqa: TC001
from parnet_engines.schedule.program import Buffer, Copy, Program, Record, Run, Step, Wait
from parnet_export.errors import InputError
from parnet_export.schema_version import require_readable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA_VERSION = 1

_STEP_TYPES: Mapping[str, type[Step]] = {kind.kind: kind for kind in (Run, Copy, Record, Wait)}


def encode(program: Program) -> bytes:
    """Return a program as JSON, ending in a newline.

    The same program always gives the same bytes. `decode` reads them back.
    """
    document = _Document(
        SCHEMA_VERSION,
        program.inferences_in_flight,
        program.lanes,
        program.buffers,
        program.inputs,
        program.outputs,
        tuple({"kind": step.kind, **msgspec.to_builtins(step)} for step in program.steps),
    )
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def decode(content: bytes, subject: str | Path) -> Program:
    """Read a program from the JSON that `encode` wrote.

    Parameters
    ----------
    content
        The JSON document.
    subject
        Where it comes from, for messages.

    Raises
    ------
    InputError
        When the content is no program, or of a newer schema.
    """
    remedy = "Make the program again from its plan"
    try:
        require_readable(content, SCHEMA_VERSION, subject)
        document = msgspec.json.decode(content, type=_Document)
        return Program(
            lanes=document.lanes,
            buffers=document.buffers,
            inputs=document.inputs,
            outputs=document.outputs,
            steps=tuple(_decode_step(entry) for entry in document.steps),
            inferences_in_flight=document.inferences_in_flight,
        )
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(subject, f"is no valid program ({error})", remedy) from error


@dataclass(frozen=True, slots=True)
class _Document:
    schema_version: int
    inferences_in_flight: int
    lanes: tuple[Lane, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[dict[str, object], ...]


def _decode_step(entry: dict[str, object]) -> Step:
    kind = entry.get("kind")
    if kind not in _STEP_TYPES:
        raise ValueError(f"{kind!r} is no kind of step")
    return msgspec.convert(entry, _STEP_TYPES[str(kind)])
