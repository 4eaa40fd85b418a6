"""How what measures programs opens sessions, without depending on what runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from parnet_engines.schedule.check import CheckedProgram
    from parnet_engines.schedule.recording import Recording


class Runner(Protocol):
    """A loaded program, such as a `parnet_engines.session.Session`."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the network once."""

    def take_recording(self) -> Recording:
        """Return what was recorded since the last call."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class OpenProgram(Protocol):
    """Loads a program of a bundle: `functools.partial` of `Session.load` and the bundle."""

    def __call__(
        self, program: CheckedProgram, *, record: bool = ..., beside_others: bool = ...
    ) -> Runner:
        """Load a program.

        Parameters
        ----------
        program
            What to run.
        record
            Whether to note when each step begins and ends.
        beside_others
            Whether other programs run at the same time on other cores, so that even one
            of a single lane has to keep to its own.
        """
