"""Why something that was tried did not work, in one line."""

from __future__ import annotations

from parnet_export.errors import ParnetError

_MOST = 300


def reason_of(error: Exception) -> str:
    """Return what an error says, short enough for a table.

    Our own errors are sentences already. Those of others are named, and where the first line
    only announces the next one, as torch.compile's does, that is taken, too.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if not isinstance(error, ParnetError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
