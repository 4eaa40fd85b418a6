"""What the processor can do at most, measured by a small probe.

The most floating-point operations per second are those of a large matrix product in the
runtime that runs the networks; the most bytes per second those of copying arrays that fit
in no cache, counted as STREAM's *copy* counts them: what is read and what is written. A
network that reaches a large part of either is near what the machine gives.

The probe runs in a process of its own, whose thread pools end with it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from parnet_export.errors import ParnetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from parnet_export.bundle import Precision

DEFAULT_PRECISION: Precision = "fp32"
"""Of the products that rows are compared with that do not tell their precision."""

_SIDE = 1536
"""Of the matrices. Their 28 MB are reused so often that memory is not the limit."""

_COPY_BYTES = 256 * 1024 * 1024
"""Of each of the two arrays that are copied: several times the largest caches."""

_PROBE_S = 0.6
_FEWEST_RUNS = 3
_NS_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that a number of CPU threads, or some GPUs, reached.

    Parameters
    ----------
    threads
        How many threads, one for each core; 0 of GPUs.
    flops_per_s
        Floating-point operations per second of a matrix product in `precision`; None where
        no runtime is installed that could run it.
    copy_bytes_per_s
        Bytes read and written per second.
    precision
        Element type of the matrix product.
    how
        How it was measured, for people.
    devices
        The GPUs, as rows name them; empty of CPU threads. What several reach is added up.
    """

    threads: int
    flops_per_s: float | None
    copy_bytes_per_s: float
    precision: str
    how: str
    devices: str = ""


@dataclass(frozen=True, slots=True)
class Achieved:
    """What a row does per second, and which part of the machine's most that is.

    Parameters
    ----------
    flops_per_s, bytes_per_s
        Operations and counted memory traffic of an inference divided by its latency.
    flops_share, bytes_share
        The same divided by the measured peaks; None where there is no peak to compare with.
        Weights and activations that stay in caches, and algorithms that need fewer
        operations than they are credited with, can take a share beyond 1.
    """

    flops_per_s: float
    bytes_per_s: float | None
    flops_share: float | None
    bytes_share: float | None


def achieved(
    latency_ms: float, flops: int, traffic_bytes: int | None, peaks: Peaks | None
) -> Achieved:
    """Return what a latency amounts to.

    Parameters
    ----------
    latency_ms
        Of one inference.
    flops
        Floating-point operations of one inference.
    traffic_bytes
        Weights and activations of one inference; None where nobody has counted.
    peaks
        Of as many threads as the row had; None where they were not measured.
    """
    flops_per_s = flops * 1000 / latency_ms
    bytes_per_s = None if traffic_bytes is None else traffic_bytes * 1000 / latency_ms
    most_flops = peaks.flops_per_s if peaks else None
    most_bytes = peaks.copy_bytes_per_s if peaks else None
    return Achieved(
        flops_per_s,
        bytes_per_s,
        flops_share=flops_per_s / most_flops if most_flops else None,
        bytes_share=bytes_per_s / most_bytes if most_bytes and bytes_per_s is not None else None,
    )


def measure_peaks(cores: Sequence[int]) -> Peaks:
    """Measure what some cores reach, in a process of its own that may use them alone.

    Parameters
    ----------
    cores
        Logical CPU cores; one thread runs on each.

    Raises
    ------
    ParnetError
        When the process cannot measure, as where memory runs out.
    """
    return run_probe(__name__, map(str, cores), "the processor's peaks")


def run_probe(module: str, arguments: Iterable[str], what: str) -> Peaks:
    """Run a module that prints peaks as JSON, in a process of its own.

    Raises
    ------
    ParnetError
        When it fails; `what` says what it was to measure.
    """
    done = subprocess.run(  # noqa: S603 -- our own module and numbers
        [sys.executable, "-P", "-m", module, *arguments], capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise ParnetError(f"The probe of {what} failed: {last[0]}.")
    return msgspec.json.decode(done.stdout, type=Peaks)


def probe(threads: int) -> Peaks:
    """Measure in this process, on the cores that it may use."""
    flops_per_s = matmul_flops_per_s(threads)
    how = f"copy of {_COPY_BYTES >> 20} MiB by numpy"
    if flops_per_s is not None:
        how = f"{_SIDE} x {_SIDE} matrix product by ONNX Runtime, {how}"
    return Peaks(threads, flops_per_s, copy_bytes_per_s(threads), "fp32", how)


def matmul_flops_per_s(threads: int, side: int = _SIDE, budget_s: float = _PROBE_S) -> float | None:
    """Return the operations per second of a float32 matrix product in ONNX Runtime.

    None where ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _matmul_model(side), options, providers=["CPUExecutionProvider"]
    )
    matrix = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    inputs: dict[str, NDArray[Any]] = {"a": matrix, "b": matrix}
    shortest_s = _shortest_s(lambda: session.run(None, inputs), budget_s)
    return float(2 * side**3 / shortest_s)


def copy_bytes_per_s(
    threads: int, size_bytes: int = _COPY_BYTES, budget_s: float = _PROBE_S
) -> float:
    """Return the bytes that copying an array reads and writes per second."""
    count = size_bytes // 8
    source, target = np.ones(count), np.zeros(count)  # ones and zeros are written, so they exist
    parts = [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the interpreter's lock

        def copy(part: slice) -> None:
            np.copyto(target[part], source[part])

        shortest_s = _shortest_s(lambda: list(pool.map(copy, parts)), budget_s)
    return 2 * count * 8 / shortest_s


def _shortest_s(run: Callable[[], object], budget_s: float) -> float:
    """Return the shortest of the runs that fit into a time: what disturbs only prolongs."""
    run()  # allocates
    taken: list[int] = []
    while len(taken) < _FEWEST_RUNS or sum(taken) < budget_s * _NS_PER_S:
        start = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - start)
    return min(taken) / _NS_PER_S


def _matmul_model(side: int) -> bytes:
    from onnx import TensorProto, helper

    a, b, c = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "abc"
    )
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "peak", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def main() -> None:
    """Measure on the cores that the arguments name, and print JSON."""
    from parnet_bench.machine.own_process import end_with_parent, use_cores

    end_with_parent()
    cores = tuple(map(int, sys.argv[1:]))
    use_cores(cores)
    sys.stdout.buffer.write(msgspec.json.encode(probe(len(cores))))


if __name__ == "__main__":
    main()
