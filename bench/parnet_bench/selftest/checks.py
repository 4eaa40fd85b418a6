"""A self-test of one machine: engines, lanes, copies, capture, parity, overlap, in one result."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from parnet_bench.machine.environment import Environment, read_environment
from parnet_bench.selftest.engine_builds import build_all, choose_build_places
from parnet_bench.selftest.failure import reason_of
from parnet_bench.targets.row_devices import gpu_ordinals
from parnet_engines.clock import MonotonicClock
from parnet_engines.cuda.boundary import BOUNDARIES
from parnet_engines.cuda.devices import lanes_on, names_gpus, open_driver, parse_gpus
from parnet_engines.cuda.session import CudaSession
from parnet_engines.planning.devices import divide, parse_devices, usable_cores
from parnet_engines.proof.accuracy import LIMITS, assess
from parnet_engines.proof.device_proof import prove_on_devices
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Placement
from parnet_engines.schedule.program import Copy
from parnet_engines.schedule.program_file import encode
from parnet_engines.session import Session
from parnet_engines.tensorrt.build_place import describe_driver
from parnet_engines.timeline.analysis import analyse
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from parnet_engines.base_session import AnySession
    from parnet_engines.session import Plan
    from parnet_engines.tensorrt.build_place import BuildPlace
    from parnet_export.bundle import Bundle, Precision

SCHEMA_VERSION = 1
_TIMED = 50


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """One thing that was tried.

    Parameters
    ----------
    name
        What.
    passed
        Whether it did what it should.
    detail
        What was found, for people.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What a machine can do, to be attached to a report.

    Parameters
    ----------
    environment
        The machine and its software.
    devices, engine, network, precision, resolution
        As for `Request`.
    hardware
        The GPUs that CUDA finds here, or ``"cpu"``.
    driver
        Versions of NVIDIA's driver and of CUDA in it; empty where they are not told.
    checks
        What was tried.
    passed
        Whether all of it did what it should.
    """

    schema_version: int
    environment: Environment
    devices: str
    engine: str
    network: str
    precision: str
    resolution: int
    hardware: tuple[str, ...]
    driver: str
    checks: tuple[SelfCheck, ...]
    passed: bool


@dataclass(frozen=True, slots=True)
class Request:
    """What to test.

    Parameters
    ----------
    devices, engine
        As for `Session.open`.
    network
        A catalogue name; its weights are random.
    resolution
        Height and width in pixels.
    precision
        Of weights and of what is computed.
    """

    devices: str
    engine: str = "auto"
    network: str = "parnet-cifar-1.3m"
    resolution: int = 32
    precision: Precision = "fp32"


def run_selftest(request: Request, progress: Callable[[str], None]) -> SelfTest:
    """Try everything that the devices should do.

    A check that fails, or that an error keeps from ending, is a row; the others are made all
    the same.

    Raises
    ------
    InputError, MissingBackendError
        When the devices are not there, or TensorRT is asked for and cannot be used.
    """
    hardware = _hardware(request.devices)
    places, no_engines = choose_build_places(request.devices, request.engine)
    if no_engines:
        progress(no_engines)
    checks = []
    with tempfile.TemporaryDirectory(prefix="parnet-selftest-") as folder:
        progress(f"making a bundle of {request.network}")
        model, provenance = export_graph(
            load_network(request.network), resolution=request.resolution, batch=1
        )
        bundle, _ = make_bundle(
            model, provenance, Path(folder) / "b", precision=request.precision, prove=False
        )
        for name, check in _checks(request, bundle, Path(folder), places, progress):
            progress(name)
            try:
                passed, detail = check()
            except Exception as error:  # noqa: BLE001 - a check that breaks is what is looked for
                passed, detail = False, reason_of(error)
            checks.append(SelfCheck(name, passed, detail))
    return SelfTest(
        SCHEMA_VERSION,
        read_environment(),
        request.devices,
        request.engine,
        request.network,
        request.precision,
        request.resolution,
        hardware,
        describe_driver() if names_gpus(request.devices) else "",
        tuple(checks),
        all(check.passed for check in checks),
    )


def _hardware(devices: str) -> tuple[str, ...]:
    if not names_gpus(devices):
        return ("cpu",)
    gpus = open_driver(parse_gpus(devices)).gpus()
    return tuple(
        f"{gpu.ordinal}: {gpu.name}, compute capability "
        f"{gpu.compute_capability[0]}.{gpu.compute_capability[1]}, "
        f"{gpu.memory_bytes / 2**30:.0f} GiB" + (f", {gpu.pci_bus_id}" if gpu.pci_bus_id else "")
        for gpu in gpus
    )


def _checks(
    request: Request,
    bundle: Bundle,
    folder: Path,
    places: tuple[BuildPlace, ...],
    progress: Callable[[str], None],
) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    first = request.devices.split(",")[0]
    if places:
        yield "TensorRT engines", lambda: _build(bundle, places, folder, progress)
    yield "engines against float32", lambda: _parity(request, bundle)
    yield "lanes on one device", lambda: _same_as_whole(request, bundle, first, "streams")
    yield "copies between devices", lambda: _dealt_out(request, bundle, folder)
    if names_gpus(request.devices):
        yield "with and without a CUDA graph", lambda: _graph_and_none(request, bundle)
        if request.precision == "fp16":
            yield "linear tensors and vectors between engines", lambda: _boundaries(request, bundle)
    yield "recording and overlap", lambda: _overlap(request, bundle, first)
    yield "latency", lambda: _latency(request, bundle, first)


def _several_of(devices: str) -> str:
    """Return several devices, so that something is copied: those named, or one repeatedly."""
    named = devices.split(",")
    if len(named) > 1:
        return devices
    if names_gpus(devices):
        return ",".join([named[0]] * 3)
    return ",".join(f"cpu:{core}" for core in usable_cores()[:3])


def _image(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    generator = np.random.default_rng(0)
    return {
        spec.name: generator.standard_normal(spec.resolve()).astype(spec.dtype)
        for spec in bundle.stream_graph.inputs
    }


def _build(
    bundle: Bundle, places: tuple[BuildPlace, ...], folder: Path, progress: Callable[[str], None]
) -> tuple[bool, str]:
    built: list[str] = []

    def note(text: str) -> None:
        built.append(text)
        progress(text)

    problems = list(build_all(bundle, places, note, timing_cache=folder / "timing.cache"))
    targets = ", ".join(str(place.target) for place in places)
    return not problems, " ".join(problems) or f"{len(built)} built for {targets}"


def _parity(request: Request, bundle: Bundle) -> tuple[bool, str]:
    proof = prove_on_devices(bundle, request.devices, engine=request.engine, random_samples=2)
    rows = proof.rows
    worst = max(rows, key=lambda row: row.relative_error)
    failed = [row.subject for row in rows if not row.passed]
    text = (
        f"{len(rows)} of {proof.engine} compared, worst {worst.subject}: {worst.relative_error:.1e}"
    )
    return not failed, text + (f"; outside the limits: {', '.join(failed)}" if failed else "")


def _same_as_whole(
    request: Request, bundle: Bundle, devices: str, plan: Plan | Path
) -> tuple[bool, str]:
    image = _image(bundle)
    first = devices.split(",", maxsplit=1)[0]
    with Session.open(bundle, first, plan="whole", engine=request.engine) as session:
        expected = session.run(image)
    with Session.open(bundle, devices, plan=plan, engine=request.engine) as session:
        found = [session.run(image) for _ in range(3)][-1]
        program = session.program.program
        lanes, steps = program.lanes, program.steps
        copies = sum(isinstance(step, Copy) for step in steps)
        how = f"{len(lanes)} lanes, devices {devices}, {copies} copies, {session.execution}"
    row = assess(
        "program",
        [(name, found[name], value) for name, value in expected.items()],
        LIMITS[request.precision],
    )
    return row.passed, f"{how}; relative error {row.relative_error:.1e}"


def _dealt_out(request: Request, bundle: Bundle, folder: Path) -> tuple[bool, str]:
    """Deal segments out to devices in turn, which copies as much as can be."""
    devices = _several_of(request.devices)
    count = len(devices.split(","))
    if names_gpus(devices):
        lanes = lanes_on(parse_gpus(devices), count)
    else:
        lanes = divide(parse_devices(devices), count)
    graph = bundle.stream_graph
    assignments = tuple(
        Assignment(segment.name, lane.name)
        for segment, lane in zip(graph.segments, itertools.cycle(lanes))
    )
    path = folder / "dealt-out.json"
    path.write_bytes(encode(lower(graph, Placement(lanes, assignments))))
    return _same_as_whole(request, bundle, devices, path)


def _graph_and_none(request: Request, bundle: Bundle) -> tuple[bool, str]:
    image = _image(bundle)
    with CudaSession.open_on_gpus(bundle, request.devices, engine=request.engine) as session:
        found, how = session.run(image), session.execution
        # ONNX Runtime may refuse, and so may several GPUs that do not reach each other.
        may_refuse = session.engine == "onnxruntime" or len(gpu_ordinals([request.devices])) > 1
    with CudaSession.open_on_gpus(
        bundle, request.devices, engine=request.engine, use_graphs=False
    ) as session:
        expected = session.run(image)
    pairs = [(name, found[name], value) for name, value in expected.items()]
    row = assess("graph", pairs, LIMITS[request.precision])
    captured = how.mode != "enqueue"
    return row.passed and (
        captured or may_refuse
    ), f"{how}; relative error {row.relative_error:.1e}"


def _boundaries(request: Request, bundle: Bundle) -> tuple[bool, str]:
    rows = {
        boundary: prove_on_devices(
            bundle, request.devices, engine=request.engine, random_samples=2, boundary=boundary
        ).rows
        for boundary in BOUNDARIES
    }
    worst = {name: max(row.relative_error for row in found) for name, found in rows.items()}
    text = ", ".join(f"{name}: relative error {error:.1e}" for name, error in worst.items())
    return all(row.passed for found in rows.values() for row in found), text


def _overlap(request: Request, bundle: Bundle, device: str) -> tuple[bool, str]:
    image = _image(bundle)
    with Session.open(bundle, device, engine=request.engine, record=True) as session:
        for _ in range(10):
            session.run(image)
        recording = session.take_recording()
        program = session.program.program
    found = [analyse(program, recording.only(number)) for number in recording.inferences]
    overlap = median(one.overlap for one in found)
    complete = len(recording.inferences) == 10
    return complete, f"lanes overlap {overlap:.0%} of the time; {found[-1].verdict.sentence}"


def _latency(request: Request, bundle: Bundle, device: str) -> tuple[bool, str]:
    image, clock = _image(bundle), MonotonicClock()

    def time(session: AnySession) -> float:
        samples = []
        for _ in range(_TIMED + 5):
            begin_ns = clock.now_ns()
            session.run(image)
            samples.append((clock.now_ns() - begin_ns) / 1e6)
        return median(samples[5:])

    with Session.open(bundle, device, plan="whole", engine=request.engine) as session:
        whole_ms = time(session)
    with Session.open(bundle, device, plan="streams", engine=request.engine) as session:
        split_ms = time(session)
    return True, f"median whole {whole_ms:.3f} ms, split {split_ms:.3f} ms, transfers included"
