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
import re
import secrets
from typing import IO, TYPE_CHECKING

from parnet_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPORARY_SUFFIX = ".partial"
"""Ends the name of every unfinished file, so that leftovers can be recognised."""

_DIGEST_DIGITS = 16
_CONTENT_NAME = re.compile(r".+-([0-9a-f]{16})\.\w+", re.DOTALL)
_TEMPORARY_NAME = re.compile(r"\..+-[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))

_WRITE_ERRORS = frozenset(
    {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOSPC}
    | {errno.ENOTDIR, errno.EISDIR, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
)


def unwritable(path: Path, error: OSError) -> InputError:
    """Return the message for a place that cannot be written to."""
    reason = error.strerror or str(error)
    return InputError(path, f"cannot be written ({reason})", "Free space or choose another place")


def is_temporary(name: str) -> bool:
    """Tell whether a file name is one that `temporary_sibling` gives."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


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
        # The body may also read other files, whose errors are not about this place.
        # Errors of writing to an open file carry no name.
        about_this_place = error.filename in {None, str(temporary), str(path)}
        if error.errno not in _WRITE_ERRORS or not about_this_place:
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

    A symbolic link stays one: its target is replaced. A device or a pipe, such as
    ``/dev/stdout``, has no content to protect and is written to as it is.

    Raises
    ------
    InputError
        When the place cannot be written to or the disk is full. The temporary
        file is removed and `path` is as it was.
    """
    try:
        is_stream = path.exists() and not path.is_file() and not path.is_dir()
        target = path.resolve() if path.is_symlink() and not is_stream else path
    except OSError as error:
        raise unwritable(path, error) from error
    if is_stream:
        try:
            yield path
        except OSError as error:
            raise unwritable(path, error) from error
        return
    with temporary_sibling(target) as temporary:
        yield temporary
        move_into_place(temporary, target)


def require_writable(path: Path) -> None:
    """Refuse a place that `replacing` could not write to, before any work is done for it.

    Raises
    ------
    InputError
        When `path` is a folder or cannot be written to.
    """
    try:
        if path.is_dir():
            raise InputError(path, "is a folder", "Give the name of a file")
        if path.exists() and not path.is_file():
            return
    except OSError as error:
        raise unwritable(path, error) from error
    with temporary_sibling(path.resolve() if path.is_symlink() else path):
        pass


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
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_directory(path: Path) -> None:
    """Create `path` and its parents if they are missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def content_name(stem: str, digest: str, suffix: str) -> str:
    """Return ``<stem>-<digest><suffix>``, the name of a file that never changes.

    Parameters
    ----------
    stem, suffix
        Start and end of the name, such as ``"weights"`` and ``".bin"``.
    digest
        SHA-256 of the content, of which the name takes the first 16 digits.
    """
    return f"{stem}-{digest[:_DIGEST_DIGITS]}{suffix}"


def is_named_by_content(path: Path) -> bool:
    """Tell whether a readable file has a name that `content_name` gives for its content."""
    named = _CONTENT_NAME.fullmatch(path.name)
    if named is None or path.is_symlink() or not path.is_file():
        return False
    try:
        return sha256_of(path).startswith(named[1])
    except OSError:
        return False
