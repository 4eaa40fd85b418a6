"""Every network that can be named instead of giving a file.

A family is one module that ends in a `Family` value, and one line in `FAMILIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_export.models import (
    parnet_detector_family,
    parnet_ensemble,
    parnet_family,
    resnet_family,
    seqconv_family,
    yolov4_csp_family,
)

if TYPE_CHECKING:
    from parnet_export.models.family import Entry, Family

FAMILIES: dict[str, Family] = {
    family.key: family
    for family in (
        parnet_family.FAMILY,
        parnet_ensemble.FAMILY,
        resnet_family.FAMILY,
        seqconv_family.FAMILY,
        yolov4_csp_family.FAMILY,
        parnet_detector_family.FAMILY,
    )
}

CATALOG: dict[str, tuple[Family, Entry]] = {
    entry.name: (family, entry) for family in FAMILIES.values() for entry in family.entries
}
"""Family and entry of each name."""


def find_name(name: str) -> str | None:
    """Return the catalogue's spelling of a name; case and separators do not matter.

    A name with a slash is a path, and no name.
    """
    if "/" in name:
        return None
    return {_plain(known): known for known in CATALOG}.get(_plain(name))


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))
