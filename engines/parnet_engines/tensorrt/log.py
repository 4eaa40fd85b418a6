"""What TensorRT says: every line to a file, its errors to our messages."""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class LogRecording:
    """What was logged while a recording was under way.

    Parameters
    ----------
    lines
        One ``SEVERITY text`` line for each message, verbose ones excluded.
    errors
        The texts of the errors, oldest first.
    """

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The lines, as a file holds them."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def reason(self) -> str:
        """The first error, on one line; TensorRT's later ones mostly follow from it."""
        return " ".join(self.errors[0].split()).rstrip(".") if self.errors else "no reason given"


class _Recorders:
    """The recordings under way, by thread: several GPUs' engines may be loaded at once."""

    def __init__(self) -> None:
        # Python's collector may release an engine's context wherever it interrupts this, and what
        # TensorRT says then is recorded, too.
        self._lock = threading.RLock()
        self._active: list[tuple[int, LogRecording]] = []
        self._stray: dict[int, str] = {}

    def add(self, recording: LogRecording) -> None:
        with self._lock:
            self._active.append((threading.get_ident(), recording))

    def remove(self, recording: LogRecording) -> None:
        with self._lock:
            self._active = [entry for entry in self._active if entry[1] is not recording]

    def write(self, severity: str, text: str, *, is_error: bool) -> None:
        """Give a message to the recordings of its thread, or to all if it has none.

        TensorRT also logs from threads of its own.
        """
        with self._lock:
            own = [r for thread, r in self._active if thread == threading.get_ident()]
            for recording in own or [r for _, r in self._active]:
                recording.lines.append(f"{severity} {text}")
                if is_error:
                    recording.errors.append(text)
            if is_error and not own:
                self._stray[threading.get_ident()] = text

    def take_stray_error(self) -> str:
        with self._lock:
            return self._stray.pop(threading.get_ident(), "")


_recorders = _Recorders()


@functools.cache
def logger_of(module: Any) -> Any:
    """Return the one logger of a TensorRT module; TensorRT keeps a single one per process."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity != module.ILogger.VERBOSE:
                is_error = severity in {module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR}
                _recorders.write(severity.name, message, is_error=is_error)

    return Logger()


def take_error() -> str:
    """Return the last error that this thread has caused outside all recordings, and forget it.

    For what runs too often to be recorded: enqueuing engines.
    """
    return " ".join(_recorders.take_stray_error().split()).rstrip(".")


@contextmanager
def recording() -> Iterator[LogRecording]:
    """Record what TensorRT logs while the block runs."""
    record = LogRecording()
    _recorders.add(record)
    try:
        yield record
    finally:
        _recorders.remove(record)
