"""Ways to run one network on one device, side by side: torch, whole engines, split streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parnet_engines.cuda.devices import names_gpus, parse_gpus
from parnet_engines.cuda.session import CudaSession
from parnet_engines.session import Session
from parnet_engines.timeline.analysis import analyse
from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from torch import nn

    from parnet_engines.base_session import AnySession
    from parnet_engines.cuda.boundary import Boundary
    from parnet_export.bundle import Bundle

_RECORDED = 20
SPLIT = "split streams"
"""The name of the row of a split program."""

SPLIT_BY_VECTORS = "split streams, vectors between engines"
"""The same with channels last, in vectors of 8, between engines."""

AUX_STREAMS = 4
"""How many more CUDA streams TensorRT may use inside an engine of the whole network."""


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One way to run a network.

    Parameters
    ----------
    network
        The network.
    name
        The way, such as ``"split streams"``.
    run
        Runs one inference on data that lies where it is needed, and waits for its end; None if
        this way is not possible here.
    engine
        What computes.
    execution
        How it is launched.
    reason
        Why it is not possible.
    """

    network: str
    name: str
    run: Callable[[], object] | None
    engine: str = ""
    execution: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PathFigures:
    """What a recording of one network says.

    Parameters
    ----------
    segments_ms
        The median latency of every segment when nothing runs beside it.
    critical_path_ms
        The longest chain of them: split streams cannot be faster.
    overlap
        Time with two or more lanes at work, by time with any, of the split program.
    verdict
        Whether lanes overlap, and if not, why.
    """

    segments_ms: dict[str, float] = field(default_factory=dict)
    critical_path_ms: float = 0.0
    overlap: float = 0.0
    verdict: str = ""


def torch_row(
    network: str, name: str, module: nn.Module, image: torch.Tensor, *, compiled: bool = False
) -> EngineRow:
    """Return a row for torch without any engine of ours.

    Parameters
    ----------
    network, name
        As for `EngineRow`.
    module
        In evaluation form, on the device and in the precision of the image.
    image
        The input.
    compiled
        Whether it goes through ``torch.compile``, which captures CUDA graphs itself.
    """
    run_module: Callable[..., Any] = module
    if compiled:
        run_module = torch.compile(module, mode="reduce-overhead")
    on_gpu = image.device.type == "cuda"

    def run() -> None:
        with torch.inference_mode():
            run_module(image)
        if on_gpu:
            torch.cuda.synchronize(image.device)

    way = "torch.compile, reduce-overhead" if compiled else "eager"
    try:
        for _ in range(3):
            run()
    except (RuntimeError, ParnetError) as error:  # what torch.compile raises derives from it
        reason = str(error).strip().split("\n")[0]
        return EngineRow(network, name, None, "torch", way, reason)
    return EngineRow(network, name, run, "torch", way)


def open_session_row(
    stack: contextlib.ExitStack,
    network: str,
    name: str,
    engine: str,
    open_session: Callable[[], AnySession],
) -> EngineRow:
    """Return a row for a session, which the stack closes.

    Parameters
    ----------
    stack
        Closes it.
    network, name, engine
        As for `EngineRow`; the engine as for `Session.open`.
    open_session
        Opens it.
    """
    try:
        session = stack.enter_context(open_session())
        run = _runner(session)
        run()
    except (ParnetError, RuntimeError) as error:
        return EngineRow(network, name, None, reason=str(error).strip().split("\n")[0])
    if isinstance(session, CudaSession):
        engine = session.engine
    elif engine == "auto":
        engine = "onnxruntime"
    return EngineRow(network, name, run, engine, str(session.execution))


def session_rows(
    stack: contextlib.ExitStack, network: str, bundle: Bundle, devices: str, engine: str
) -> Iterator[EngineRow]:
    """Yield a row for each way to run a bundle.

    Parameters
    ----------
    stack
        Closes the sessions.
    network
        The network's name.
    bundle
        The bundle.
    devices
        Where: the whole engine on the first one, split streams there as well (in half
        precision with either boundary between engines), and the authors' layout on all of
        them, or on the same one three times.
    engine
        As for `Session.open`.
    """
    first = devices.split(",", maxsplit=1)[0]
    has_vectors = names_gpus(first) and bundle.manifest.precision == "fp16"

    def whole() -> AnySession:
        return Session.open(bundle, first, plan="whole", engine=engine)

    def streams(boundary: Boundary | None) -> AnySession:
        return Session.open(bundle, first, plan="streams", engine=engine, boundary=boundary)

    def authors() -> AnySession:
        places = devices if len(devices.split(",")) >= 3 else ",".join([first] * 3)
        return Session.open(bundle, places, plan="authors", engine=engine)

    def without_graph() -> AnySession:
        return CudaSession.open_on_gpus(
            bundle, first, plan="whole", engine=engine, use_graphs=False
        )

    def with_aux_streams() -> AnySession:
        return _open_with_aux_streams(bundle, first)

    row = partial(open_session_row, stack, network)
    yield row("whole engine", engine, whole)
    if names_gpus(first):
        yield row("whole engine, no CUDA graph", engine, without_graph)
        yield row("whole engine, aux streams", engine, with_aux_streams)
    boundary: Boundary | None = "linear" if has_vectors else None
    yield row(SPLIT, engine, partial(streams, boundary))
    if has_vectors:
        yield row(SPLIT_BY_VECTORS, engine, partial(streams, "vector"))
    if names_gpus(first):
        yield row("authors' layout", engine, authors)


def path_figures(bundle: Bundle, devices: str, engine: str) -> PathFigures:
    """Record the split program on one lane and on several, and return what they say."""
    first = devices.split(",", maxsplit=1)[0]
    graph = bundle.stream_graph
    with Session.open(bundle, first, lanes=1, engine=engine, record=True) as session:
        run = _runner(session)
        for _ in range(_RECORDED):
            run()
        alone = session.take_recording()
    taken: dict[str, list[float]] = {}
    for span in alone.spans:
        if span.kind == "run":
            taken.setdefault(span.label, []).append(span.duration_ns / 1e6)
    segments_ms = {name: median(values) for name, values in taken.items()}
    with Session.open(bundle, first, engine=engine, record=True) as session:
        run = _runner(session)
        for _ in range(_RECORDED):
            run()
        together = session.take_recording()
        program = session.program.program
    found = [analyse(program, together.only(number)) for number in together.inferences]
    path = graph.critical_path(segments_ms)
    return PathFigures(
        segments_ms,
        sum(segments_ms[name] for name in path),
        median(one.overlap for one in found),
        found[-1].verdict.sentence,
    )


def _runner(session: AnySession) -> Callable[[], object]:
    """Return what runs a session on data that lies where it is needed."""
    generator = np.random.default_rng(0)
    arrays = {
        spec.name: generator.standard_normal(spec.resolve()).astype(spec.dtype)
        for spec in session.inputs
    }
    if not isinstance(session, CudaSession):
        return lambda: session.run(arrays)
    device = f"cuda:{session.device}"
    inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    outputs = {
        spec.name: torch.from_numpy(np.zeros(spec.resolve(), spec.dtype)).to(device)
        for spec in session.outputs
    }
    torch.cuda.synchronize(device)
    return lambda: session.run(inputs, outputs=outputs)


def _open_with_aux_streams(bundle: Bundle, device: str) -> CudaSession:
    """Open the whole graph with TensorRT's own concurrency inside one engine."""
    from parnet_engines.cuda.devices import open_driver, ordinal_of
    from parnet_engines.cuda.gpu_plan import choose_on_gpus
    from parnet_engines.planning.cost_table import WHOLE
    from parnet_engines.tensorrt.run import load_engines

    (name,) = parse_gpus(device)
    driver = open_driver([name])
    program = choose_on_gpus(bundle, device, "whole", open_program=_refuse_to_measure)
    loaded = load_engines(bundle, [WHOLE], driver, ordinal_of(name), max_aux_streams=AUX_STREAMS)
    return CudaSession(program, {(WHOLE, "lane0"): loaded[WHOLE]}, driver, engine="tensorrt")


def _refuse_to_measure(*_: object, **__: object) -> Any:
    raise AssertionError("the plan 'whole' is not measured")
