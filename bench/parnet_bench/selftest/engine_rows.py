"""Ways to run one network on one device, side by side: torch, whole engines, split streams."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from parnet_bench.selftest.engine_builds import AUX_STREAMS
from parnet_bench.selftest.failure import reason_of
from parnet_bench.selftest.resident_runs import resident_runs
from parnet_engines.cuda.devices import names_gpus
from parnet_engines.cuda.session import CudaSession
from parnet_engines.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from parnet_engines.base_session import AnySession
    from parnet_engines.cuda.boundary import Boundary
    from parnet_export.bundle import Bundle

_WARM_UPS = 3
"""Of torch.compile, the first compiles, the second captures, and the third launches."""

TORCH = "torch"
"""What the names of rows begin with that torch runs without any engine of ours."""

WHOLE_ENGINE = "whole engine"
"""The name of the row of the whole graph as one engine."""

SPLIT = "split streams"
"""The name of the row of a split program."""

SPLIT_BY_VECTORS = "split streams, vectors between engines"
"""The same with channels last, in vectors of 8, between engines."""


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


def torch_row(
    network: str,
    name: str,
    place: Callable[[], tuple[nn.Module, torch.Tensor]],
    *,
    compiled: bool = False,
) -> EngineRow:
    """Return a row for torch without any engine of ours.

    Parameters
    ----------
    network, name
        As for `EngineRow`.
    place
        Returns the module, in evaluation form, and its input, both in their precision on the
        device.
    compiled
        Whether it goes through ``torch.compile``, which captures CUDA graphs itself.
    """
    way = "torch.compile, reduce-overhead" if compiled else "eager"
    try:
        module, image = place()
        if image.is_cuda and image.dtype is torch.float32 and _convolves_in_tf32():
            way += ", convolutions in TF32"  # as torch does unless told otherwise
        run = _torch_runs(module, image, compiled=compiled)
        skipped = _graphs_skipped()
        for _ in range(_WARM_UPS):
            run()
    except Exception as error:  # noqa: BLE001 - torch, compilers and kernels raise anything
        return EngineRow(network, name, None, "torch", way, reason_of(error))
    if compiled and _graphs_skipped() > skipped:
        way += ", without a CUDA graph, which torch refused"
    return EngineRow(network, name, run, "torch", way)


def _torch_runs(module: nn.Module, image: torch.Tensor, *, compiled: bool) -> Callable[[], object]:
    run_module: Callable[..., Any] = module
    if compiled:
        run_module = torch.compile(module, mode="reduce-overhead")
    on_gpu = image.device.type == "cuda"

    def run() -> None:
        with torch.inference_mode():
            run_module(image)
        if on_gpu:
            torch.cuda.synchronize(image.device)

    return run


def _convolves_in_tf32() -> bool:
    # Torch does not tell the older setting, `allow_tf32`, to everybody who has used this one.
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(convolutions.fp32_precision == "tf32")


def _graphs_skipped() -> int:
    """Return how many graphs torch.compile has run without a CUDA graph so far."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    found: int = counters.get("inductor", {}).get("cudagraph_skips", 0)
    return found


def open_session_row(
    stack: contextlib.ExitStack,
    network: str,
    name: str,
    open_session: Callable[[], AnySession],
) -> EngineRow:
    """Return a row for a session, which the stack closes.

    Parameters
    ----------
    stack
        Closes it.
    network, name
        As for `EngineRow`.
    open_session
        Opens it.
    """
    try:
        with contextlib.ExitStack() as undo:  # one that cannot run must not keep its memory
            session = undo.enter_context(open_session())
            run = resident_runs(session)
            run()
            stack.push(undo.pop_all())
    except Exception as error:  # noqa: BLE001 - whatever one way raises, the others are tried
        return EngineRow(network, name, None, reason=reason_of(error))
    return EngineRow(network, name, run, session.engine, str(session.execution))


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
        As for `Session.open`. Where it is ``"auto"``, all ways run with what the whole engine
        was found to run with, so that they can be compared.
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
        return CudaSession.open_on_gpus(
            bundle, first, plan="whole", engine=engine, max_aux_streams=AUX_STREAMS
        )

    row = partial(open_session_row, stack, network)
    found = row(WHOLE_ENGINE, whole)
    yield found
    if engine == "auto" and found.run is not None:
        engine = found.engine
    if names_gpus(first):
        yield row("whole engine, no CUDA graph", without_graph)
        yield row("whole engine, aux streams", with_aux_streams)
    boundary: Boundary | None = "linear" if has_vectors else None
    yield row(SPLIT, partial(streams, boundary))
    if has_vectors:
        yield row(SPLIT_BY_VECTORS, partial(streams, "vector"))
    if names_gpus(first):
        yield row("authors' layout", authors)
