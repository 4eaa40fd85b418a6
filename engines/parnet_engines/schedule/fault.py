"""What can be wrong with a program, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """What can be wrong with a program."""

    NEVER_RECORDED = "a wait for an event that is never recorded"
    RECORDED_LATER = "a wait before its record in issue order"
    RECORDED_TWICE = "an event recorded twice in one inference"
    OWN_EVENT = "a wait for an event of the same lane"
    DEADLOCK = "lanes that wait for each other"
    NOT_FORKED = "a lane that does not start from the origin"
    NOT_JOINED = "a lane that does not come back to the origin"
    WRONG_DEVICE = "a buffer on another device than its use"
    WRONG_COPY = "a copy between buffers that do not match"
    WRONG_SEGMENT = "a step or interface that is not the stream graph's"
    INPUT_OVERWRITTEN = "a network input that a step overwrites"
    MISSING_OUTPUT = "a network output that is not there at the end"
    WRONG_CONTENT = "a read that finds no or another tensor"
    ONE_STEP = "a step that uses the same memory twice"
    UNORDERED = "two uses of the same memory without order"
    UNORDERED_NEXT = "two uses by consecutive inferences without order"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a program.

    Parameters
    ----------
    kind
        What sort of fault it is.
    steps
        Indices of the steps involved, in issue order.
    message
        One sentence without a full stop that names the steps and what is missing.
    """

    kind: FaultKind
    steps: tuple[int, ...]
    message: str
