"""What can go wrong with a segment while it runs."""

from __future__ import annotations

from parnet_export.errors import ParnetError


class SegmentFailedError(ParnetError):
    """A segment's engine raised an error, which is this error's cause.

    Parameters
    ----------
    segment
        Name of the segment.
    cause
        What its engine raised.
    """

    def __init__(self, segment: str, cause: BaseException) -> None:
        self.segment = segment
        super().__init__(f"segment {segment!r} failed: {type(cause).__name__}: {cause}")


class SegmentHungError(ParnetError):
    """An inference took longer than its time limit; the session is of no use any more.

    Parameters
    ----------
    segments
        Names of the segments that were running then.
    timeout_s
        The time limit in seconds.
    """

    def __init__(self, segments: tuple[str, ...], timeout_s: float) -> None:
        self.segments = segments
        self.timeout_s = timeout_s
        noun = "segment" if len(segments) == 1 else "segments"
        what = f"{noun} {' and '.join(map(repr, segments))}" if segments else "the inference"
        super().__init__(
            f"{what} had not ended when the time limit of {timeout_s:g} s was over. Open a new "
            "session, with a longer limit if the machine is only slow."
        )
