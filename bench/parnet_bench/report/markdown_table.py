"""Tables and texts in GitHub's Markdown, with nothing in them that Markdown would read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from parnet_export.console import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def markdown_text(text: str) -> str:
    """Return one line of text that Markdown shows as it stands."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are figures.

    Parameters
    ----------
    headings
        One for each column.
    rows
        Cells as they are to be shown.
    """
    lines = [
        _line(headings),
        f"|---|{'---:|' * (len(headings) - 1)}",
        *(_line(row) for row in rows),
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"
