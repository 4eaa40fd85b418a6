"""Errors that carry one message for the person at the keyboard.

Every error that a user can cause derives from `ParnetError`. Its text names the
thing at fault, says what is wrong and what to do next; the command lines print
it as it stands and leave with `exit_code`. Anything else is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_NAMED = 10
"""How many items (keys, tensors, nodes) a message names before it counts the rest."""


class ParnetError(Exception):
    """Base of all errors a user can cause or must act on."""

    exit_code = 2


class InputError(ParnetError):
    """A file, name or option cannot be used.

    Parameters
    ----------
    subject
        What is at fault: a path, an option or a name.
    problem
        What is wrong with it, as a clause without a full stop.
    remedy
        What to do about it, as a sentence without a full stop.
    """

    def __init__(self, subject: str | Path, problem: str, remedy: str) -> None:
        self.subject = str(subject)
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{subject}: {problem}. {remedy}.")


class CheckFailedError(ParnetError):
    """A proof or comparison did not hold; nothing was written."""

    exit_code = 1


class MissingBackendError(ParnetError, ImportError):
    """An optional runtime is not installed.

    Parameters
    ----------
    module
        The module that could not be imported.
    purpose
        What it is needed for, as a noun phrase.
    install
        The command that installs it.
    """

    def __init__(self, module: str, purpose: str, install: str) -> None:
        super().__init__(f"{purpose} needs the Python module {module!r}. Install it: {install}")


def name_some(names: Sequence[str]) -> str:
    """List at most `MAX_NAMED` names and count the rest."""
    shown = ", ".join(names[:MAX_NAMED])
    rest = len(names) - MAX_NAMED
    return f"{shown} and {rest} more" if rest > 0 else shown
