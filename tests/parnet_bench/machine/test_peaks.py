from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from parnet_bench.machine import peaks
from parnet_bench.machine.environment import usable_cores
from parnet_bench.machine.peaks import (
    Peaks,
    achieved,
    copy_bytes_per_s,
    matmul_flops_per_s,
    measure_peaks,
)
from parnet_export.errors import ParnetError


def test_the_matrix_product_is_counted_as_numpy_would_count_it():
    # numpy runs the same product on the same core; the two agree on its order of magnitude.
    side = 384
    code = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'; import numpy as np, time;"
    code += f"m = np.ones(({side}, {side}), np.float32); m @ m; t = [];"
    code += "[t.append((lambda s: (m @ m, time.perf_counter() - s)[1])(time.perf_counter()))"
    code += " for _ in range(50)]; print(min(t))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = 2 * side**3 / float(done.stdout)
    ours = matmul_flops_per_s(1, side, budget_s=0.1)
    assert theirs / 8 < ours < theirs * 8


def test_a_copy_counts_what_is_read_and_what_is_written():
    size_bytes = 32_000_000
    source, target = np.ones(size_bytes // 8), np.zeros(size_bytes // 8)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - start)
    theirs = 2 * size_bytes / min(taken)
    assert theirs / 4 < copy_bytes_per_s(1, size_bytes, budget_s=0.1) < theirs * 4


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_copy_without_a_rest(threads, monkeypatch):
    copied = []
    monkeypatch.setattr(peaks, "_shortest_s", lambda run, _: run() and 1.0)
    monkeypatch.setattr(peaks.np, "copyto", lambda _, source: copied.append(len(source)))
    assert copy_bytes_per_s(threads, 8 * 1000) == 16_000
    assert sum(copied) == 1000
    assert len(copied) == threads


def test_the_probe_runs_on_the_cores_it_is_given_and_reports_them():
    found = measure_peaks(usable_cores()[:1])
    assert found.threads == 1
    assert found.flops_per_s > 1e8
    assert found.copy_bytes_per_s > 1e8
    assert "ONNX Runtime" in found.how


def test_a_probe_that_fails_says_what_its_process_said():
    with pytest.raises(ParnetError, match="probe of the processor's peaks failed"):
        measure_peaks([10**6])


def test_without_a_runtime_there_is_no_peak_of_operations(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError):
        import onnxruntime  # noqa: F401
    assert matmul_flops_per_s(1, 8, 0.0) is None


def test_shares_are_of_the_measured_peaks():
    found = Peaks(2, 100e9, 20e9, "fp32", "a test")
    got = achieved(latency_ms=10.0, flops=500_000_000, traffic_bytes=40_000_000, peaks=found)
    assert got.flops_per_s == pytest.approx(50e9)
    assert got.flops_share == pytest.approx(0.5)
    assert got.bytes_per_s == pytest.approx(4e9)
    assert got.bytes_share == pytest.approx(0.2)


def test_what_was_not_measured_has_no_share():
    got = achieved(10.0, 10**9, None, None)
    assert (got.flops_share, got.bytes_per_s, got.bytes_share) == (None, None, None)
    got = achieved(10.0, 10**9, 10**6, Peaks(1, None, 1e9, "fp32", ""))
    assert got.flops_share is None
    assert got.bytes_share is not None
