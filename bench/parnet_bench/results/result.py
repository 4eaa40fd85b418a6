"""What a measurement yields: raw samples, and everything needed to judge them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# msgspec reads the annotations of these dataclasses at run time.
from parnet_bench.machine.activity import Activity  # noqa: TC001
from parnet_bench.machine.energy import Energy  # noqa: TC001
from parnet_bench.machine.environment import Environment  # noqa: TC001
from parnet_bench.machine.footprint import Footprint  # noqa: TC001
from parnet_bench.machine.peaks import Peaks  # noqa: TC001
from parnet_bench.results.procedure import Procedure, StopReason  # noqa: TC001
from parnet_engines.cuda.boundary import Boundary  # noqa: TC001
from parnet_export.bundle import Precision, Provenance  # noqa: TC001
from parnet_export.stream_graph import TensorSpec  # noqa: TC001

Form = Literal["unfused", "whole", "streams"]
"""The network as trained; the fused network as one graph; as one engine per segment."""

Stage = Literal["load", "run"]
"""Where a row has failed: while it was loaded, or in a turn."""

Rounds = tuple[tuple[int, ...], ...]
"""Nanoseconds of each run, round by round."""


@dataclass(frozen=True, slots=True)
class RowDescription:
    """What a row measures.

    Parameters
    ----------
    name
        Unique within a result.
    network
        The network's name.
    form
        Which form of the network runs.
    target
        The path or catalogue name that was asked for.
    provenance
        Where the weights come from.
    precision
        Element type of the weights; None for ONNX files, which may mix them.
    batch
        Samples in one inference.
    inputs
        The tensors of one inference, without symbolic dimensions.
    parameters
        Weights of the network.
    flops
        Floating-point operations for one sample.
    depth
        Longest chain of convolutions and matrix products.
    devices
        What the row runs on, as it was asked for.
    cores
        Logical CPU cores that the row may use.
    plan
        How the bundle runs, as `parnet_engines.session.Session.open` takes it; empty
        where an old file does not tell.
    lanes
        How many segments may run at the same time; None leaves it to the plan.
    boundary
        How tensors between engines on GPUs lie in memory; None leaves it to the runtime.
    wanted_engine
        The runtime that was asked for, as `parnet_engines.session.Session.open` takes it.
    """

    name: str
    network: str
    form: Form
    target: str
    provenance: Provenance
    precision: Precision | None
    batch: int
    inputs: tuple[TensorSpec, ...]
    parameters: int
    flops: int
    depth: int
    devices: str
    cores: tuple[int, ...]
    plan: str = ""
    lanes: int | None = None
    boundary: Boundary | None = None
    wanted_engine: str = "auto"


@dataclass(frozen=True, slots=True)
class SplitTimes:
    """Parts of inferences, one in flight, for backends that can tell them apart.

    These inferences are none of those in `ProcessRecording.rounds_ns`: telling the parts
    apart costs time, so that they are run by themselves, after the rounds.

    Parameters
    ----------
    host_to_device_ns, compute_ns, device_to_host_ns
        By the device's own clock, such as CUDA timing events.
    enqueue_ns
        How long the host took to hand the computation out.
    """

    host_to_device_ns: Rounds
    compute_ns: Rounds
    device_to_host_ns: Rounds
    enqueue_ns: Rounds


@dataclass(frozen=True, slots=True)
class Pipelined:
    """Turns in which the next inference is handed over before the last one has ended.

    Parameters
    ----------
    in_flight
        Inferences under way at the same time.
    latencies_ns
        From handing an inference over to having its outputs, round by round.
    elapsed_ns
        For each round, the time in which all its inferences were done.
    """

    in_flight: int
    latencies_ns: Rounds
    elapsed_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessRecording:
    """What one worker process recorded of its row.

    Parameters
    ----------
    settled
        Whether the latency had become steady before the first round.
    warm_up_ns
        The runs until then.
    rounds_ns
        One inference at a time: the recorded runs of each round, in nanoseconds.
        Round i of process p is the same round in all rows.
    pipelined
        The same with several in flight; None where that was not measured.
    split
        Parts of further inferences; None where the backend cannot tell.
    load_ms
        From starting the process to its first result; None where nobody has looked.
    """

    settled: bool
    warm_up_ns: tuple[int, ...]
    rounds_ns: Rounds
    pipelined: Pipelined | None = None
    split: SplitTimes | None = None
    load_ms: float | None = None

    @property
    def samples_ns(self) -> tuple[int, ...]:
        """All recorded runs, one inference at a time, in the order in which they happened."""
        return tuple(latency for turn in self.rounds_ns for latency in turn)


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded of a row, by each of its worker processes in turn."""

    processes: tuple[ProcessRecording, ...]

    @property
    def rounds_ns(self) -> Rounds:
        """All rounds of all processes, in the order in which they happened."""
        return tuple(turn for process in self.processes for turn in process.rounds_ns)

    @property
    def samples_ns(self) -> tuple[int, ...]:
        """All recorded runs, one inference at a time, in the order in which they happened."""
        return tuple(latency for turn in self.rounds_ns for latency in turn)

    @property
    def settled(self) -> bool:
        """Whether the row was steady before the first round of every process."""
        return all(process.settled for process in self.processes)


@dataclass(frozen=True, slots=True)
class RowTimeline:
    """One inference of a row, step by step; recorded apart, so that it costs no sample time.

    Parameters
    ----------
    program
        The JSON of `parnet_engines.schedule.program_file.encode`: what has run.
    recording
        The JSON of `parnet_engines.schedule.recording.encode`: when each step began and ended,
        in the inference whose latency was the median of those recorded.
    """

    program: dict[str, Any]
    recording: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row and what was recorded of it; in old files, only its latencies.

    Parameters
    ----------
    description
        What was measured.
    recording
        The latencies.
    timeline
        One inference, step by step.
    footprint
        What the row takes besides time.
    energy
        What one inference takes.
    engine
        The runtime that ran; empty in old files, and where a row on GPUs has not told it.
    execution
        On GPUs, how an inference was launched: as one CUDA graph, or otherwise and why.
    """

    description: RowDescription
    recording: Recording
    timeline: RowTimeline | None = None
    footprint: Footprint | None = None
    energy: Energy | None = None
    engine: str = ""
    execution: str = ""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row that could not be measured to the end.

    Parameters
    ----------
    description
        What it was to measure.
    stage
        Where it failed.
    process
        In which of its worker processes, from 0.
    reason
        What happened, as one or more sentences.
    """

    description: RowDescription
    stage: Stage
    process: int
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """One run of ``parnet-bench latency``.

    Parameters
    ----------
    environment
        The machine and the software, before anything was measured.
    procedure
        How long and in what order rows were measured.
    stopped
        Why the measurement ended.
    orders
        For each process and each of its rounds, the rows' indices in the order of their
        turns.
    rows
        The rows that were measured to the end; each is compared with the first one of
        its batch size.
    failed
        The rows that were not.
    activities
        What the machine was doing before the first process, between processes and after the
        last one; empty in old files.
    peaks
        What the rows' cores can do at most; empty where that was not measured.
    overhead_ns
        What the harness adds to a sample: latencies of an engine that does nothing, timed in
        the same way; empty where that was not measured.
    notes
        What a reader of the numbers must know, one sentence each.
    """

    environment: Environment
    procedure: Procedure
    stopped: StopReason
    orders: tuple[tuple[tuple[int, ...], ...], ...]
    rows: tuple[Row, ...]
    failed: tuple[FailedRow, ...] = ()
    activities: tuple[Activity, ...] = ()
    peaks: tuple[Peaks, ...] = ()
    overhead_ns: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows or not any(self.orders):
            raise ValueError("there are no samples")
        counts = [len(orders) for orders in self.orders]
        for row in self.rows:
            processes = row.recording.processes
            rounds = [process.rounds_ns for process in processes]
            if [len(turns) for turns in rounds] != counts or not all(map(all, rounds)):
                raise ValueError(f"rounds of {row.description.name!r} are missing")
            if min(row.recording.samples_ns) <= 0:
                raise ValueError(f"latencies of {row.description.name!r} are not positive")

    @property
    def partial(self) -> bool:
        """Whether the measurement was cut off before it was done."""
        return self.stopped == "interrupted"
