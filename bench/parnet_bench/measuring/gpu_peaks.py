"""What GPUs can do at most: what `parnet_bench.machine.peaks` is for CPUs.

The matrix product is torch's, in the precision of the row; a float32 product may use TF32
where the GPU has it, as TensorRT does unless told otherwise. The copy is the driver's, within
one GPU's memory.

The probe runs in a process of its own, whose CUDA contexts end with it.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import msgspec

from parnet_bench.machine.peaks import Peaks, run_probe
from parnet_bench.targets.row_devices import gpu_ordinals
from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.resources import CudaResources

if TYPE_CHECKING:
    from parnet_engines.cuda.driver import CudaDriver
    from parnet_export.bundle import Precision

_SIDE = 8192
"""Of the matrices: large enough for the last wave of blocks not to matter."""

_COPY_BYTES = 512 << 20
"""Of each of the two buffers: several times the largest L2 cache."""

_COPIES = 10
_PRODUCTS = 5
_ROUNDS = 5
_MS_PER_S = 1000


def measure_gpu_peaks(devices: str, precision: Precision) -> Peaks:
    """Measure what the GPUs of a row reach together, in a process of its own.

    Parameters
    ----------
    devices
        GPUs as rows name them, such as ``"0,1"``.
    precision
        Element type of the matrix product.

    Raises
    ------
    ParnetError
        When the process cannot measure, as where memory runs out.
    """
    return run_probe(__name__, (devices, precision), f"the peaks of GPU {devices}")


def probe(driver: CudaDriver, devices: str, precision: str) -> Peaks:
    """Measure in this process, one GPU after the other."""
    ordinals = gpu_ordinals([devices])
    flops = [matmul_flops_per_s(f"cuda:{ordinal}", precision) for ordinal in ordinals]
    known = [rate for rate in flops if rate is not None]
    how = f"copy of {_COPY_BYTES >> 20} MiB by the CUDA driver"
    if len(known) == len(flops):
        how = f"{_SIDE} x {_SIDE} matrix product by torch, {how}"
    return Peaks(
        threads=0,
        flops_per_s=sum(known) if len(known) == len(flops) else None,
        copy_bytes_per_s=sum(copy_bytes_per_s(driver, ordinal) for ordinal in ordinals),
        precision=precision,
        how=how,
        devices=devices,
    )


def copy_bytes_per_s(driver: CudaDriver, ordinal: int, size_bytes: int = _COPY_BYTES) -> float:
    """Return the bytes that copying within a GPU's memory reads and writes per second."""
    resources = CudaResources(driver)
    try:
        resources.retain_context(ordinal)
        source, target = (resources.allocate(ordinal, size_bytes) for _ in range(2))
        stream = resources.create_stream(ordinal, 0)
        begin, end = (resources.create_event(ordinal, timing=True) for _ in range(2))
        taken_ms = []
        with on_device(driver, ordinal):
            driver.clear(source, size_bytes, stream)
            for _ in range(_ROUNDS):
                driver.record_event(begin, stream)
                for _ in range(_COPIES):
                    driver.copy_on_device(target, source, size_bytes, stream)
                driver.record_event(end, stream)
                driver.synchronize(stream)
                taken_ms.append(driver.elapsed_ms(ordinal, begin, end))
    finally:
        resources.close()
    return 2 * size_bytes * _COPIES * _MS_PER_S / min(taken_ms)


def matmul_flops_per_s(device: str, precision: str, side: int = _SIDE) -> float | None:
    """Return the operations per second of a matrix product in torch.

    None where torch cannot use the device: other runtimes may, whose rows are measured.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        return None
    try:
        return _matmul_flops_per_s(device, precision, side)
    except RuntimeError:  # it has no kernels for this GPU, or no memory is left
        return None


def _matmul_flops_per_s(device: str, precision: str, side: int) -> float:
    import torch

    on_gpu = device.startswith("cuda")
    dtype = torch.float16 if precision == "fp16" else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(matrix)

    def products() -> None:
        for _ in range(_PRODUCTS):
            torch.matmul(matrix, matrix, out=product)
        if on_gpu:
            torch.cuda.synchronize(device)

    products()  # chooses its kernel
    taken_ns = []
    for _ in range(_ROUNDS):
        start_ns = time.perf_counter_ns()
        products()
        taken_ns.append(time.perf_counter_ns() - start_ns)
    return float(2 * side**3 * _PRODUCTS / min(taken_ns) * 1e9)


def main() -> None:
    """Measure on the GPUs, and in the precision, that the arguments name, and print JSON."""
    import torch

    from parnet_bench.machine.own_process import end_with_parent
    from parnet_engines.cuda.devices import open_driver, parse_gpus

    end_with_parent()
    devices, precision = sys.argv[1:]
    driver = open_driver(parse_gpus(devices))
    torch.backends.cuda.matmul.allow_tf32 = True
    sys.stdout.buffer.write(msgspec.json.encode(probe(driver, devices, precision)))


if __name__ == "__main__":
    main()
