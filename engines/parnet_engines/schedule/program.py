"""Programs: one inference as steps on lanes, in one total issue order.

A *program* is plain data. Everything that executes or reasons about concurrency
(worker threads, CUDA streams and graphs, the simulator, the checker, the
timeline) interprets the same program and may rely on the following model, and
on nothing more.

**Meaning.** ``Program.steps`` lists the steps of one inference in the order in
which the host hands them out. Executing them one by one in that order is what
the program *means*; `parnet_engines.schedule.check` proves that every execution the lanes
allow reads the same values.

**Lanes.** A lane executes its steps one after another in issue order. Between
lanes nothing is ordered, except by events.

**Events.** ``Record(e)`` marks the point at which its lane has ended all earlier
steps of this inference. ``Wait(e)`` keeps its lane from going on before the lane
of the record has reached that point. An event is recorded once per inference,
and its record precedes its waits in issue order. That makes a wait which blocks
a CPU thread, and a CUDA wait, which does nothing while the event has not been
recorded yet, mean the same; it also rules out deadlock.

**Buffers.** A buffer holds one tensor on one device. Buffers that name the same
``storage`` share memory, so that writing one destroys the others. Besides its
buffers, a ``Run`` has its engine's workspace to itself: one per segment and device.

**Fork and join.** The first lane is the *origin*. The caller has written the input
buffers when the origin starts an inference, and reads the output buffers after the
origin's last step; both lie on the origin's device, and no step overwrites an input,
so that a caller may run the same input again. Every other lane starts with a wait
that goes back to the origin, and everything it does reaches the origin again before
the end. A CUDA graph capture demands exactly this.

**Inferences in flight.** Inference ``i`` uses *slot* ``i mod n`` of the
``inferences_in_flight = n`` slots. Every slot has its own copy of every buffer,
storage, event and engine workspace; slots share nothing but lanes. In a slot, the
origin starts inference ``i + n`` after it has ended inference ``i`` and the caller has
read the outputs. Nothing else orders two inferences: lanes of different slots may
overlap, as CUDA graphs do that are launched side by side (launches of one graph come
one after another, so n in flight are n graphs). An interpreter whose slots share their
lanes, as CPU threads do, hands inferences out whole, one after another; no wait can then
be stuck behind a later inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

# msgspec resolves the annotations of the dataclasses below while the program runs.
from parnet_engines.schedule.placement import Lane  # noqa: TC001
from parnet_export.stream_graph import TensorSpec  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for one tensor on one device, once per slot.

    Parameters
    ----------
    name
        Unique within the program, such as ``"image@cuda:0"``.
    tensor
        What the buffer holds.
    device
        Where it lies, such as ``"cuda:0"``.
    storage
        Buffers of the same storage share memory. By default the buffer's own name:
        a storage of its own.
    """

    name: str
    tensor: TensorSpec
    device: str
    storage: str = ""

    def __post_init__(self) -> None:
        if not self.storage:
            object.__setattr__(self, "storage", self.name)


@dataclass(frozen=True, slots=True)
class Run:
    """Run the engine of one segment.

    Parameters
    ----------
    lane
        The lane, whose device also says which engine runs.
    segment
        The segment's name.
    inputs, outputs
        Names of buffers, in the order of the segment's inputs and outputs.
    """

    kind: ClassVar[str] = "run"

    lane: str
    segment: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        return f"run {self.segment}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the buffers whose content the step uses."""
        return self.inputs

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the buffers that the step fills."""
        return self.outputs


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a tensor to another device, on a lane of either device.

    Parameters
    ----------
    lane
        The lane that carries the copy out and is busy meanwhile.
    source, target
        Names of two buffers for the same tensor.
    """

    kind: ClassVar[str] = "copy"

    lane: str
    source: str
    target: str

    def __str__(self) -> str:
        return f"copy {self.source} -> {self.target}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the buffers whose content the step uses."""
        return (self.source,)

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the buffers that the step fills."""
        return (self.target,)


@dataclass(frozen=True, slots=True)
class Record:
    """Mark the point at which `lane` has ended all its earlier steps."""

    kind: ClassVar[str] = "record"
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()

    lane: str
    event: str

    def __str__(self) -> str:
        return f"record {self.event}"


@dataclass(frozen=True, slots=True)
class Wait:
    """Keep `lane` from going on before `event` is reached."""

    kind: ClassVar[str] = "wait"
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()

    lane: str
    event: str

    def __str__(self) -> str:
        return f"wait {self.event}"


Step = Run | Copy | Record | Wait


@dataclass(frozen=True)
class Program:
    """The steps of one inference, and what they work with.

    `str` gives a deterministic text form to read and to compare.

    Parameters
    ----------
    lanes
        The first lane is the origin: an inference starts there and ends there.
    buffers
        Every buffer exists once per slot.
    inputs, outputs
        Names of the buffers that the caller writes before an inference and reads
        after it, in the order of the network's inputs and outputs.
    steps
        In issue order.
    inferences_in_flight
        Number of slots: how many inferences may be under way at once.

    Raises
    ------
    ValueError
        When names repeat or refer to nothing, or a storage spans two devices.
        Faults of order are left to `parnet_engines.schedule.check`.
    """

    lanes: tuple[Lane, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    inferences_in_flight: int = 1

    def __post_init__(self) -> None:
        if not self.lanes:
            raise ValueError("a program needs at least one lane")
        if self.inferences_in_flight < 1:
            raise ValueError(f"{self.inferences_in_flight} inferences in flight are too few")
        lanes = _unique("lanes", (lane.name for lane in self.lanes))
        buffers = _unique("buffers", (buffer.name for buffer in self.buffers))
        devices: dict[str, str] = {}
        for buffer in self.buffers:
            if devices.setdefault(buffer.storage, buffer.device) != buffer.device:
                raise ValueError(f"storage {buffer.storage!r} is on two devices")
        _require_known("buffer", (*self.inputs, *self.outputs), buffers, "the interface")
        for index, step in enumerate(self.steps):
            user = f"step {index} ({step})"
            _require_known("lane", (step.lane,), lanes, user)
            _require_known("buffer", (*step.reads, *step.writes), buffers, user)

    @property
    def origin(self) -> Lane:
        """The lane where an inference starts and ends."""
        return self.lanes[0]

    @cached_property
    def lanes_by_name(self) -> Mapping[str, Lane]:
        """The lanes, by name."""
        return {lane.name: lane for lane in self.lanes}

    @cached_property
    def buffers_by_name(self) -> Mapping[str, Buffer]:
        """The buffers, by name."""
        return {buffer.name: buffer for buffer in self.buffers}

    @cached_property
    def events(self) -> tuple[str, ...]:
        """Names of the events, in the order in which they first appear."""
        return tuple(
            dict.fromkeys(step.event for step in self.steps if isinstance(step, Record | Wait))
        )

    @cached_property
    def steps_by_lane(self) -> Mapping[str, tuple[int, ...]]:
        """Indices into `steps` that each lane executes, in issue order."""
        found: dict[str, list[int]] = {lane.name: [] for lane in self.lanes}
        for index, step in enumerate(self.steps):
            found[step.lane].append(index)
        return {lane: tuple(indices) for lane, indices in found.items()}

    def describe(self, index: int) -> str:
        """Name a step for a message, such as ``step 3 (lane1: run stream1)``."""
        step = self.steps[index]
        return f"step {index} ({step.lane}: {step})"

    def __str__(self) -> str:
        lanes = [
            (lane.name, lane.device, _cores(lane), "origin" if lane == self.origin else "")
            for lane in self.lanes
        ]
        buffers = [
            (
                buffer.name,
                f"{buffer.tensor.dtype}[{', '.join(str(d) for d in buffer.tensor.shape)}]",
                f"in {buffer.storage}" if buffer.storage != buffer.name else "",
                self._role(buffer.name),
            )
            for buffer in self.buffers
        ]
        steps = [
            (str(index), step.lane, step.kind, _operands(step))
            for index, step in enumerate(self.steps)
        ]
        in_flight = f"inferences in flight: {self.inferences_in_flight}"
        sections = (("lanes", lanes), ("buffers", buffers), ("steps", steps))
        lines = [line for title, rows in sections for line in (title, *_align(rows))]
        return "\n".join([in_flight, *lines]) + "\n"

    def _role(self, buffer: str) -> str:
        roles = (("input", self.inputs), ("output", self.outputs))
        return ", ".join(role for role, names in roles if buffer in names)


def _unique(what: str, names: Iterable[str]) -> set[str]:
    listed = list(names)
    unique = set(listed)
    if len(unique) != len(listed) or "" in unique:
        raise ValueError(f"{what} need unique names that are not empty")
    return unique


def _require_known(what: str, names: Iterable[str], known: set[str], user: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{user} names the unknown {what} {name!r}")


def _cores(lane: Lane) -> str:
    return f"cores {','.join(str(core) for core in lane.cores)}" if lane.cores else ""


def _operands(step: Step) -> str:
    match step:
        case Run():
            inputs, outputs = ", ".join(step.inputs), ", ".join(step.outputs)
            return f"{step.segment} ({inputs}) -> ({outputs})"
        case Copy():
            return f"{step.source} -> {step.target}"
        case Record() | Wait():
            return step.event


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines with columns of equal width, two spaces apart."""
    used = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(len(cell) for cell in column) for column in used]
    lines = zip(*used, strict=True)
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
