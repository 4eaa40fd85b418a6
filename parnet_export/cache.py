"""Where results are kept that take long to make, and the version of the code that makes them."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import os
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_export import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

CACHE_VARIABLE = "PARNET_EXPORT_CACHE"
"""Environment variable that names another place for the cache."""


def cache_directory() -> Path:
    """Return the folder of the cache: `CACHE_VARIABLE`, else in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "parnet-export"


@functools.cache
def toolkit_version() -> str:
    """Return the version of the exporting code, told from its text as well as its number."""
    digest = hashlib.sha256()
    for source in _sources(importlib.resources.files("parnet_export")):
        digest.update(source.name.encode() + source.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:16]}"


def _sources(folder: Traversable) -> Iterator[Traversable]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry
