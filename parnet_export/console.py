"""What every command line shares: where text goes, how it looks, and the exit code.

Results go to standard output, everything else to standard error. Importing this
module loads neither rich nor typer, so that ``--help`` stays quick; each is loaded
by the function that needs it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parnet_export import files
from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import typer
    from rich.console import Console, RenderableType
    from rich.progress import Progress

INTERRUPTED_EXIT_CODE = 130
"""What shells report for a process that ended on Ctrl-C (128 + SIGINT)."""

CLOSED_PIPE_EXIT_CODE = 141
"""What shells report for a process whose reader went away (128 + SIGPIPE)."""

_PATH_ERRORS = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR})
"""What the operating system says of paths that nobody could use."""

_MULTIPLES = ("", "k", "M", "G", "T", "P")


# ------------------------------------------------------------------------------ consoles


@functools.cache
def stdout() -> Console:
    """Return the console for results. Strings are shown as they are, never as markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


@functools.cache
def stderr() -> Console:
    """Return the console for errors, notes and progress; strings are never markup."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def note(message: str) -> None:
    """Print one line about the work in hand to standard error."""
    stderr().print(printable(message), style="dim", soft_wrap=True)


def warn(message: str) -> None:
    """Print one ``warning: ...`` line to standard error."""
    _say("warning", message, "bold yellow")


def printable(text: str) -> str:
    r"""Return `text` as one line that cannot steer a terminal.

    Line breaks become spaces, other control characters their escapes: names come from
    files of others, and ``"\x1b[2J"`` in one must not clear anyone's screen.
    """
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _say(kind: str, message: str, style: str) -> None:
    from rich.text import Text

    # A wrapped path can neither be copied nor searched for, hence the soft wrap.
    line = Text.assemble((f"{kind}: ", style), printable(message))
    stderr().print(line, soft_wrap=True)


# ------------------------------------------------------------------------------- running


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a command line to its end and return its exit code.

    A `ParnetError` becomes one ``error: ...`` line on standard error and its own exit
    code. A closed pipe ends the command quietly. Any other exception is a bug and keeps
    its traceback.

    Parameters
    ----------
    app
        The commands.
    argv
        The arguments without the program's name; those of this process by default.
    """
    import typer.main

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks must not end a command.
        sys.stdout.reconfigure(errors="replace")
    try:
        exit_code = _exit_code_of(typer.main.get_command(app), argv)
        with _writing_stdout():
            sys.stdout.flush()
    except ParnetError as error:
        _say("error", str(error), "bold red")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        _silence_stdout()
        return CLOSED_PIPE_EXIT_CODE
    except PermissionError as error:
        return _refuse_path(error)
    except OSError as error:
        if error.errno not in _PATH_ERRORS:
            raise
        return _refuse_path(error)
    return exit_code


def _refuse_path(error: OSError) -> int:
    reason = error.strerror or str(error)
    _say("error", f"{error.filename}: cannot be used ({reason}). Check the path.", "bold red")
    return ParnetError.exit_code


def _exit_code_of(command: Callable[..., object], argv: Sequence[str] | None) -> int:
    try:
        command(args=None if argv is None else list(argv))
    except SystemExit as end:
        # typer and rich both turn a closed pipe into exit code 1, which is ours for a
        # check that failed.
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextlib.contextmanager
def _writing_stdout() -> Iterator[None]:
    """Turn a full disk behind a redirected standard output into the usual message."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence_stdout()
        raise files.unwritable(Path("standard output"), error) from error


def _silence_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter complains as it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# ------------------------------------------------------------------------------- results


def encode_json(result: object) -> str:
    """Return `result` as indented JSON that ends in a newline.

    Dataclasses, mappings and sequences keep their order, so that equal results are equal
    texts; NaN and infinities become ``null``.
    """
    import msgspec

    return msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n"


def print_json(result: object) -> None:
    """Print `result` as JSON on standard output, unwrapped and uncoloured."""
    with _writing_stdout():
        sys.stdout.write(encode_json(result))


def write_json(path: Path, result: object) -> None:
    """Replace `path` by `result` as JSON, whole or not at all.

    Raises
    ------
    InputError
        When the place cannot be written to.
    """
    files.write_text(path, encode_json(result))


def show(
    result: object, table: RenderableType, *, as_json: bool = False, output: Path | None = None
) -> None:
    """Show the result of a command the way ``--json`` and ``--output`` ask for.

    Parameters
    ----------
    result
        What JSON readers get.
    table
        What people get on standard output unless `as_json`.
    as_json
        Print JSON instead of the table.
    output
        A file that gets the JSON as well.

    Raises
    ------
    InputError
        When `output` cannot be written.
    """
    if output is not None:
        write_json(output, result)
    if as_json:
        print_json(result)
    else:
        with _writing_stdout():
            stdout().print(table)


# ------------------------------------------------------------------------------ progress


def progress() -> Progress:
    """Return a progress display on standard error, silent when that is no terminal.

    Use it as a context manager; it leaves nothing behind.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = stderr()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # FORCE_COLOR makes rich believe in a terminal; a log file would fill with frames.
        disable=not (sys.stderr.isatty() and console.is_interactive),
    )


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """Show on standard error that `description` is under way, while the block runs."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = stderr()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (sys.stderr.isatty() and console.is_interactive),
    ) as display:
        display.add_task(printable(description), total=None)
        yield


# ------------------------------------------------------------------------------- numbers


def format_count(value: float) -> str:
    """Return a count with a decimal multiple: ``"19.18 M"``, ``"26.65 G"``, ``"640"``."""
    scaled, multiple = _scale(value)
    return f"{scaled} {multiple}".rstrip()


def format_bytes(size_bytes: float) -> str:
    """Return a size with a decimal multiple: ``"1.25 MB"``, ``"512 B"``."""
    scaled, multiple = _scale(size_bytes)
    return f"{scaled} {multiple}B"


def _scale(value: float) -> tuple[str, str]:
    """Return two decimals and the multiple that keeps them below a thousand."""
    index = 0
    # 999.995 would print as 1000.00, so rounding decides where the next multiple begins.
    while abs(round(value, 2 if index else 0)) >= 1000 and index < len(_MULTIPLES) - 1:
        value /= 1000
        index += 1
    if index == 0 and value == int(value):
        return f"{value:.0f}", ""
    return f"{value:.2f}", _MULTIPLES[index]


def format_ms(duration_ms: float) -> str:
    """Return a duration in milliseconds with three digits: ``"139 ms"``, ``"4.20 ms"``.

    The unit never changes, so that a column of durations can be compared at a glance.
    """
    if duration_ms == 0 or not math.isfinite(duration_ms):
        return f"{duration_ms:.0f} ms"
    digits_before_point = math.floor(math.log10(abs(float(f"{duration_ms:.2e}")))) + 1
    return f"{duration_ms:.{max(0, 3 - digits_before_point)}f} ms"


def format_ratio(value: float) -> str:
    """Return a ratio with two decimals: ``"1.84x"``."""
    return f"{value:.2f}x"


def format_percent(share: float) -> str:
    """Return a share between 0 and 1 as a percentage: ``"27.1 %"``."""
    return f"{100 * share:.1f} %"


def format_shape(shape: Sequence[int | str]) -> str:
    """Return a shape: ``"1x160x56x56"``, or ``"[batch, 160, 56, 56]"`` if symbolic."""
    if any(isinstance(dimension, str) for dimension in shape):
        return f"[{', '.join(map(str, shape))}]"
    return "x".join(map(str, shape)) or "scalar"
