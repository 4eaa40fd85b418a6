"""What a session needs of an interpreter: one slot of a program, on whatever devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from parnet_engines.schedule.recording import Span


class Interpreter(Protocol):
    """Memory and lanes of one slot; one thread at a time may use it."""

    @property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """The network's inputs: write them before `run`, which leaves them as they are."""

    @property
    def outputs(self) -> tuple[NDArray[Any], ...]:
        """The network's outputs: valid from the end of `run` to its next start."""

    @property
    def running(self) -> tuple[str, ...]:
        """The segments whose engines are running now."""

    def run(self, inference: int = 0) -> tuple[Span, ...]:
        """Execute the program once, and return what was recorded."""

    def give_up(self) -> None:
        """Let go of everything when nobody has the session any more."""

    def close(self) -> None:
        """Release everything but what hangs. Closing twice does no harm."""
