"""Comparing engines on one device: rows measured in turns, and the limits of the device."""

from __future__ import annotations

import contextlib
import copy
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from parnet_bench.machine.environment import Environment, read_environment
from parnet_bench.selftest.engine_rows import (
    AUX_STREAMS,
    SPLIT,
    SPLIT_BY_VECTORS,
    EngineRow,
    PathFigures,
    open_session_row,
    path_figures,
    session_rows,
    torch_row,
)
from parnet_bench.stats import statistics
from parnet_engines.cuda.devices import names_gpus, ordinal_of, parse_gpus
from parnet_engines.planning.rounds import ratio_of
from parnet_engines.session import Session
from parnet_export.errors import InputError, MissingBackendError
from parnet_export.pipeline import export_graph, fuse_and_prove, make_bundle
from parnet_export.source import load_network

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from parnet_engines.clock import Clock
    from parnet_engines.planning.rounds import Ratio
    from parnet_export.bundle import Bundle, Precision

SCHEMA_VERSION = 1
AIM = 1.5
"""How many times as fast split streams are to be as the whole engine."""

_PROBE_S = 0.5


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare.

    Parameters
    ----------
    networks
        Catalogue names that are run in every way.
    references
        Catalogue names that are run as a whole engine only.
    devices, engine
        As for `Session.open`.
    precision
        Of everything.
    resolution
        Height and width in pixels.
    rounds, runs
        How many rounds, and how many timed runs each row has in a round.
    seed
        Of weights, and of the order of rows.
    """

    networks: tuple[str, ...]
    references: tuple[str, ...]
    devices: str = "0"
    engine: str = "auto"
    precision: Precision = "fp16"
    resolution: int = 224
    rounds: int = 30
    runs: int = 20
    seed: int = 0


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """One way to run a network, measured.

    Parameters
    ----------
    network, name, engine, execution, reason
        As for `EngineRow`.
    median_ms, p99_ms
        Of all samples; None without, p99 also where there are too few samples to tell.
    against_whole
        How many times as fast as the whole engine of the same network, from ratios within
        rounds.
    samples_ms
        One tuple for each round.
    """

    network: str
    name: str
    engine: str
    execution: str
    reason: str
    median_ms: float | None
    p99_ms: float | None
    against_whole: Ratio | None
    samples_ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What no engine of a network can be below on this device.

    Parameters
    ----------
    network
        The network.
    weights_ms
        Reading every weight once at the measured bandwidth.
    compute_ms
        Its floating-point operations at the measured rate of a large matrix product.
    path
        What recordings say of its segments.
    """

    network: str
    weights_ms: float
    compute_ms: float
    path: PathFigures


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """Everything that was measured, to be kept as JSON."""

    schema_version: int
    environment: Environment
    device: str
    precision: str
    resolution: int
    rows: tuple[MeasuredRow, ...]
    limits: tuple[Limits, ...]
    bandwidth_gb_per_s: float
    tflops: float
    findings: tuple[str, ...]


def compare_engines(
    request: Request, clock: Clock, progress: Callable[[str], None]
) -> EngineComparison:
    """Build bundles of the networks in a temporary folder, run every way, and compare.

    Raises
    ------
    InputError
        When a network, the devices or the engine cannot be used.
    """
    device = _torch_device(request.devices)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parnet-engines-")))
        rows: list[EngineRow] = []
        bundles: dict[str, Bundle] = {}
        for name in (*request.networks, *request.references):
            progress(f"preparing {name}")
            bundles[name] = _bundle(request, name, folder)
            _build_engines(request, bundles[name], progress)
            if name in request.networks:
                rows += _torch_rows(request, name, device)
                rows += session_rows(stack, name, bundles[name], request.devices, request.engine)
            else:
                rows.append(_reference_row(stack, request, name, bundles[name]))
        progress("measuring")
        samples = measure_in_turns(rows, request, clock)
        progress("recording segments")
        bandwidth, flops_per_s = measure_peaks(device)
        limits = tuple(
            _limits(request, name, bundles[name], bandwidth, flops_per_s)
            for name in request.networks
        )
    measured = summarise(rows, samples)
    return EngineComparison(
        SCHEMA_VERSION,
        read_environment(),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        request.precision,
        request.resolution,
        measured,
        limits,
        bandwidth / 1e9,
        flops_per_s / 1e12,
        findings(measured, limits),
    )


def measure_in_turns(
    rows: Sequence[EngineRow], request: Request, clock: Clock
) -> dict[int, tuple[tuple[float, ...], ...]]:
    """Return the latencies of each possible row in milliseconds, round by round.

    In a round every row has one turn, in random order: one untimed run, which finds caches and
    clocks as its own, and the timed ones.
    """
    order = random.Random(request.seed)  # noqa: S311 - an order, no secret
    turns = [(number, row.run) for number, row in enumerate(rows) if row.run is not None]
    found: dict[int, list[tuple[float, ...]]] = {number: [] for number, _ in turns}
    for _ in range(request.rounds):
        order.shuffle(turns)
        for number, run in turns:
            run()
            samples = []
            for _ in range(request.runs):
                begin_ns = clock.now_ns()
                run()
                samples.append((clock.now_ns() - begin_ns) / 1e6)
            found[number].append(tuple(samples))
    return {number: tuple(rounds) for number, rounds in found.items()}


def summarise(
    rows: Sequence[EngineRow], samples: Mapping[int, tuple[tuple[float, ...], ...]]
) -> tuple[MeasuredRow, ...]:
    """Return rows with their statistics."""
    whole = {row.network: n for n, row in enumerate(rows) if row.name == "whole engine"}
    found = []
    for number, row in enumerate(rows):
        rounds = samples.get(number, ())
        base = samples.get(whole.get(row.network, -1), ())
        every = [sample for one in rounds for sample in one]
        p99 = statistics.percentile(every, 99) if every else None
        ratio = None
        if rounds and base:
            ratio = ratio_of([median(r) for r in base], [median(r) for r in rounds])
        found.append(
            MeasuredRow(
                row.network,
                row.name,
                row.engine,
                row.execution,
                row.reason,
                median(every) if every else None,
                p99.value if p99 else None,
                ratio,
                rounds,
            )
        )
    return tuple(found)


def findings(rows: Sequence[MeasuredRow], limits: Sequence[Limits]) -> tuple[str, ...]:
    """Say whether the aims are met; where they are not, where the time goes."""
    found = []
    by_name = {(row.network, row.name): row for row in rows}
    for limit in limits:
        linear, vectors = (by_name.get((limit.network, n)) for n in (SPLIT, SPLIT_BY_VECTORS))
        if linear and vectors and linear.samples_ms and vectors.samples_ms:
            gain = ratio_of(*([median(r) for r in row.samples_ms] for row in (linear, vectors)))
            found.append(
                f"{limit.network}: with vectors between engines split streams are "
                f"{gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f}) as fast as with linear ones"
            )
        measured = [row for row in (linear, vectors) if row and row.median_ms is not None]
        split = min(measured, key=lambda row: row.median_ms or 0.0, default=None)
        if split is None or split.against_whole is None or split.median_ms is None:
            continue
        ratio = split.against_whole
        text = f"{limit.network}: {split.name} are {ratio.value:.2f}x as fast as the whole engine"
        if ratio.value < AIM:
            path = limit.path
            longest = sorted(path.segments_ms, key=lambda name: -path.segments_ms[name])[:3]
            shares = ", ".join(f"{name} {path.segments_ms[name]:.3f} ms" for name in longest)
            text += (
                f" (aim {AIM}x). Of {split.median_ms:.3f} ms the critical path takes "
                f"{path.critical_path_ms:.3f} ms ({shares}), and lanes overlap "
                f"{path.overlap:.0%} of the time: {path.verdict}"
            )
        found.append(text)
    return tuple(found)


def measure_peaks(device: torch.device) -> tuple[float, float]:
    """Return bytes per second of copies, read and written, and FLOP/s of a large product."""
    on_gpu = device.type == "cuda"
    side, dtype = (8192, torch.float16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros((1 << 30) if on_gpu else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _shortest_s(lambda: target.copy_(source), device)
    product_s = _shortest_s(lambda: torch.mm(a, b), device)
    return 2 * source.numel() / copy_s, 2 * side**3 / product_s


def _shortest_s(run: Callable[[], object], device: torch.device) -> float:
    best, end_s = float("inf"), time.monotonic() + _PROBE_S
    while time.monotonic() < end_s:
        begin_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin_s)
    return best


def _torch_device(devices: str) -> torch.device:
    if names_gpus(devices):
        return torch.device("cuda", ordinal_of(parse_gpus(devices)[0]))
    return torch.device("cpu")


def _bundle(request: Request, name: str, folder: Path) -> Bundle:
    network = load_network(name, seed=request.seed)
    model, provenance = export_graph(network, resolution=request.resolution, batch=1)
    bundle, _ = make_bundle(
        model, provenance, folder / f"{name}.bundle", precision=request.precision, prove=False
    )
    return bundle


def _build_engines(request: Request, bundle: Bundle, progress: Callable[[str], None]) -> None:
    """Build TensorRT engines, where TensorRT is wanted and installed."""
    if not names_gpus(request.devices) or request.engine not in {"auto", "tensorrt"}:
        return
    from parnet_engines.tensorrt.build_place import choose_places
    from parnet_engines.tensorrt.bundle_engines import build_engines
    from parnet_engines.tensorrt.options import EngineOptions

    try:
        places = choose_places("auto", request.devices.split(",")[0], None)
    except (InputError, MissingBackendError) as error:
        if request.engine == "tensorrt":
            raise
        progress(f"no TensorRT engines: {error}")
        return
    for options in (EngineOptions(), EngineOptions(max_aux_streams=AUX_STREAMS)):
        for report in build_engines(bundle, places, options):
            progress(f"engine of {report.segment}: {report.status}")
    if request.precision == "fp16":
        for report in build_engines(bundle, places, EngineOptions(boundary="vector"), whole=False):
            progress(f"engine of {report.segment} with vectors: {report.status}")


def _torch_rows(request: Request, name: str, device: torch.device) -> list[EngineRow]:
    network = load_network(name, seed=request.seed)
    fused, _ = fuse_and_prove(network, "full")
    dtype = torch.float16 if request.precision == "fp16" else torch.float32
    shape = (1, 3, request.resolution, request.resolution)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    image = image.to(device, dtype, memory_format=torch.channels_last)

    def placed(module: torch.nn.Module) -> Any:
        own: Any = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
        return own.to(device, dtype).to(memory_format=torch.channels_last)

    rows = [
        torch_row(name, "torch, unfused", placed(network.module), image),
        torch_row(name, "torch, fused", placed(fused.module), image),
    ]
    if device.type == "cuda":
        module = placed(fused.module)
        rows.append(torch_row(name, "torch.compile, fused", module, image, compiled=True))
    return rows


def _reference_row(
    stack: contextlib.ExitStack, request: Request, name: str, bundle: Bundle
) -> EngineRow:
    first = request.devices.split(",")[0]
    return open_session_row(
        stack,
        name,
        "whole engine",
        request.engine,
        lambda: Session.open(bundle, first, plan="whole", engine=request.engine),
    )


def _limits(
    request: Request, name: str, bundle: Bundle, bandwidth: float, flops_per_s: float
) -> Limits:
    cost = bundle.manifest.whole_cost
    return Limits(
        name,
        cost.weight_bytes / bandwidth * 1e3,
        cost.flops / flops_per_s * 1e3,
        path_figures(bundle, request.devices, request.engine),
    )
