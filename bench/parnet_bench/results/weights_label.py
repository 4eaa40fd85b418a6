"""What must stand beside a row's name so that nobody takes it for more than it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parnet_bench.results.result import Result, Row


@dataclass(frozen=True, slots=True)
class Tag:
    """A few words beside a name.

    Parameters
    ----------
    text
        The words.
    css
        Class of their looks; ``"caution"`` where a reader must not overlook them.
    """

    text: str
    css: str = ""


RANDOM_WEIGHTS = Tag("random weights", "caution")
UNKNOWN_WEIGHTS = Tag("weights of unknown origin")
RECONSTRUCTION = Tag("reconstruction", "caution")
NOT_SETTLED = Tag("not settled", "caution")


def tags_of(result: Result) -> tuple[tuple[Tag, ...], ...]:
    """Return the tags of each row."""
    return tuple(tuple(_tags(row)) for row in result.rows)


def _tags(row: Row) -> list[Tag]:
    provenance = row.description.provenance
    tags = []
    if provenance.weights == "random":
        tags.append(RANDOM_WEIGHTS)
    if provenance.weights == "unknown":
        tags.append(UNKNOWN_WEIGHTS)
    elif is_reconstruction(row.description.network):
        tags.append(RECONSTRUCTION)
    if not row.recording.settled:
        tags.append(NOT_SETTLED)
    return tags


def is_reconstruction(network: str) -> bool:
    """Whether the catalogue's network of this name rests on choices of ours."""
    from parnet_export.models.catalog import CATALOG

    known = CATALOG.get(network)
    return known is not None and known[1].origin == "reconstruction"
