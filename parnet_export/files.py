"""Files that are either whole or absent.

Everything the toolkit writes goes to a temporary sibling first, is flushed to
disk, and is then renamed over its destination. A process that dies in the
middle, or a disk that fills up, leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from typing import IO, TYPE_CHECKING

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPORARY_SUFFIX = ".partial"
"""Ends the name of every unfinished file, so that leftovers can be recognised."""

_CHUNK_BYTES = 1 << 20


_WRITE_ERRORS = frozenset(
    {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOSPC}
    | {errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.EROFS}
)


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the message for a place that cannot be written to."""
    reason = error.strerror or str(error)
    return InputError(path, f"cannot be written ({reason})", "Free space or choose another place")


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a new empty file beside `path`, and remove it if it is still there afterwards.

    Raises
    ------
    InputError
        When the place cannot be written to or the disk is full.
    """
    temporary = path.parent / f".{path.name}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        temporary.touch(exist_ok=False)
        yield temporary
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Flush a finished file to disk and rename it over `path` of the same file system."""
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`; rename it over `path` on success.

    Raises
    ------
    InputError
        When the place cannot be written to or the disk is full. The temporary
        file is removed and `path` is as it was.
    """
    with temporary_sibling(path) as temporary:
        yield temporary
        move_into_place(temporary, path)


@contextlib.contextmanager
def open_replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary sibling of `path` for writing; rename it over `path` on success."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        yield stream


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, whole or not at all."""
    with open_replacing(path) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by UTF-8 `content`, whole or not at all."""
    write_bytes(path, content.encode())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def make_directory(path: Path) -> None:
    """Create `path` and its parents if they are missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
