"""What the networks of the catalogue cost, counted once for each version of the toolkit.

Counting builds every network in every form. Its result is kept in the cache's folder
together with the version of the code that it came from, so that a later listing loads
no torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import msgspec

from parnet_export import files
from parnet_export.cache import cache_directory, toolkit_version
from parnet_export.catalogue.row import CatalogueRow  # noqa: TC001 - msgspec reads annotations
from parnet_export.errors import InputError

_FILE_NAME = "catalogue.json"


@dataclass(frozen=True, slots=True)
class _Listing:
    toolkit: str
    rows: tuple[CatalogueRow, ...]


def list_catalogue() -> tuple[CatalogueRow, ...]:
    """Return a row for every network of the catalogue.

    A cache that cannot be read or written only costs time.
    """
    place = cache_directory() / _FILE_NAME
    version = toolkit_version()
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(place.read_bytes(), type=_Listing)
        if known.toolkit == version:
            return known.rows
    from parnet_export.catalogue.census import count_catalogue

    rows = count_catalogue()
    with contextlib.suppress(InputError):
        files.make_directory(place.parent)
        files.write_bytes(place, msgspec.json.encode(_Listing(version, rows)))
    return rows
