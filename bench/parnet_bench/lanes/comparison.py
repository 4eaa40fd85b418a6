"""``--plan auto`` against ONNX Runtime by itself, in the same rounds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from parnet_bench.lanes.networks import SMALL
from parnet_bench.lanes.overhead import sample_inputs
from parnet_engines.planning.auto_plan import decide
from parnet_engines.planning.bundle_program import program_of
from parnet_engines.planning.devices import parse_devices
from parnet_engines.planning.rounds import ratio_of, run_rounds
from parnet_engines.session import Session
from parnet_export.graphs.onnx_runtime import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from parnet_engines.clock import Clock
    from parnet_engines.planning.rounds import Ratio
    from parnet_export.bundle import Bundle

LEAST_SPEEDUP = {SMALL: 1.1}
"""How many times as fast as ONNX Runtime auto is to be; see `DEFAULT_SPEEDUP`."""

DEFAULT_SPEEDUP = 1 / 1.03
"""Where nothing can be gained, auto may take so little longer."""


_FORMS: tuple[Mapping[str, tuple[int, int]], ...] = (
    {"1 thread": (1, 1), "2 threads": (2, 1)},
    {"parallel, 1 thread each": (1, 2), "parallel, 2 threads each": (2, 2)},
)
"""Threads that share an operator, and operators at a time. Each group has rounds of its own:
the parallel forms have more threads than cores, which slow down whatever runs after them."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``--plan auto`` against ONNX Runtime with its default settings.

    Parameters
    ----------
    network
        The network.
    chosen
        What auto has chosen.
    latencies_ms
        Median over the rounds, of auto (beside one and two threads) and of each form of
        ONNX Runtime.
    against
        How many times as long each form of ONNX Runtime takes as auto in the same rounds.
    best
        The quicker one of ONNX Runtime's forms with one and two threads.
    least_speedup
        What its ratio is to reach.
    """

    network: str
    chosen: str
    latencies_ms: dict[str, float]
    against: dict[str, Ratio]
    best: str
    least_speedup: float

    @property
    def passed(self) -> bool:
        """Whether auto is as fast as it has to be."""
        return self.against[self.best].value >= self.least_speedup


def compare(name: str, bundle: Bundle, *, budget_s: float, clock: Clock) -> Comparison:
    """Decide anew what auto is, then measure it beside ONNX Runtime.

    Parameters
    ----------
    name, bundle
        The network.
    budget_s
        Seconds that the rounds may take.
    clock
        By which runs are timed.

    Raises
    ------
    MissingBackendError
        When ONNX Runtime is not installed.
    """
    load = partial(Session.load, bundle)
    decision = decide(bundle, parse_devices("cpu"), open_program=load, again=True)
    chosen = decision.chosen
    program = program_of(bundle, chosen.placement, chosen.inferences_in_flight)
    inputs = sample_inputs(bundle)
    medians_ms: dict[str, float] = {}
    against: dict[str, Ratio] = {}
    with load(program) as session:
        for forms in _FORMS:
            candidates: dict[str, Callable[[], object]] = {"auto": lambda: session.run(inputs)}
            candidates |= _onnx_runtimes(bundle, inputs, forms)
            latencies_ms = run_rounds(
                candidates,
                spinners=candidates,
                budget_s=budget_s / len(_FORMS),
                min_rounds=20,
                max_rounds=400,
                clock=clock,
                order=random.Random(1),  # noqa: S311 - shuffles rounds
            )
            for form in forms:
                medians_ms[form] = median(latencies_ms[form])
                against[form] = ratio_of(latencies_ms[form], latencies_ms["auto"])
            medians_ms.setdefault("auto", median(latencies_ms["auto"]))
    best = min(_FORMS[0], key=medians_ms.__getitem__)
    least_speedup = LEAST_SPEEDUP.get(name, DEFAULT_SPEEDUP)
    return Comparison(bundle.label, chosen.name, medians_ms, against, best, least_speedup)


def _onnx_runtimes(
    bundle: Bundle, inputs: dict[str, NDArray[Any]], forms: Mapping[str, tuple[int, int]]
) -> dict[str, Callable[[], object]]:
    return {
        form: _onnx_runtime(bundle, inputs, threads=threads, operators=operators)
        for form, (threads, operators) in forms.items()
    }


def _onnx_runtime(
    bundle: Bundle, inputs: dict[str, NDArray[Any]], *, threads: int, operators: int = 1
) -> Callable[[], object]:
    """Return what runs the whole graph as ONNX Runtime does by default.

    Parameters
    ----------
    bundle, inputs
        What is run.
    threads
        Threads that share one operator.
    operators
        Operators that run at the same time.
    """
    onnxruntime = import_onnxruntime("The comparison")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if operators > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        options.inter_op_num_threads = operators
    session = onnxruntime.InferenceSession(
        bundle.whole_path, options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, inputs)
