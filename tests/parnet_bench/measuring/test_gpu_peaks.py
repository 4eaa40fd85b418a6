from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parnet_bench.machine.peaks import Peaks
from parnet_bench.measuring import gpu_peaks, row_peaks
from parnet_bench.measuring.gpu_peaks import (
    copy_bytes_per_s,
    matmul_flops_per_s,
    measure_gpu_peaks,
    probe,
)
from parnet_bench.measuring.row_peaks import measure_row_peaks
from parnet_bench.results.cost_columns import costs_of, peaks_for, remarks_on_costs
from parnet_bench.results.summary import summarise
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_export.errors import ParnetError

SIZE_BYTES = 1 << 16


class Copying(RecordingDriver):
    """Its copies take 2 ms, on the time scale of its events."""

    def copy_on_device(self, *arguments):
        super().copy_on_device(*arguments)
        self.now_ms += 2.0


def test_a_copy_on_a_gpu_counts_what_is_read_and_what_is_written():
    driver = Copying(2)
    rate = copy_bytes_per_s(driver, 1, SIZE_BYTES)
    # Ten copies between two events, which are a microsecond apart for a recorder.
    assert rate == pytest.approx(10 * 2 * SIZE_BYTES / 0.020001, rel=1e-6)
    copies = [call for call in driver.calls if call.verb == "copy_on_device"]
    assert {call.device for call in copies} == {1}
    assert driver.open_resources == {}


def test_a_probe_that_is_refused_leaves_nothing_open():
    driver = Copying(1, fail_at=12)
    with pytest.raises(ParnetError):
        copy_bytes_per_s(driver, 0, SIZE_BYTES)
    driver.fail_at = None
    assert driver.open_resources == {}


def test_operations_of_a_product_are_two_for_each_multiplication_and_the_shortest_counts(
    monkeypatch,
):
    side, multiplications = 8, []
    matmul = torch.matmul

    def counted(a, b, out):
        multiplications.append(a.shape[0] * a.shape[1] * b.shape[1])
        return matmul(a, b, out=out)

    moments_ms = iter([0, 9, 10, 14, 20, 25, 30, 36, 40, 47])  # the shortest round takes 4 ms
    monkeypatch.setattr(torch, "matmul", counted)
    monkeypatch.setattr(gpu_peaks.time, "perf_counter_ns", lambda: next(moments_ms) * 1_000_000)
    rate = matmul_flops_per_s("cpu", "fp32", side)
    rounds = 6  # the first one is not timed
    assert rate == pytest.approx(2 * sum(multiplications) / rounds / 0.004)


def test_a_torch_without_kernels_for_the_gpu_leaves_the_copy(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", refuse)
    monkeypatch.setattr(gpu_peaks, "copy_bytes_per_s", lambda *_: 1e12)
    peaks = probe(Copying(1), "0", "fp16")
    assert (peaks.flops_per_s, peaks.copy_bytes_per_s) == (None, 1e12)
    assert "torch" not in peaks.how


def test_a_product_has_the_precision_of_the_row(monkeypatch):
    multiplied = []
    matmul = torch.matmul

    def noted(a, b, out):
        multiplied.append((a.dtype, b.dtype, out.dtype))
        return matmul(a, b, out=out)

    monkeypatch.setattr(torch, "matmul", noted)
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        multiplied.clear()
        assert matmul_flops_per_s("cpu", precision, 16) > 0
        assert set(multiplied) == {(dtype,) * 3}


@pytest.mark.parametrize(("rates", "total"), [([10e12, 20e12], 30e12), ([10e12, None], None)])
def test_several_gpus_reach_what_each_of_them_does(monkeypatch, rates, total):
    given = iter(rates)
    monkeypatch.setattr(gpu_peaks, "matmul_flops_per_s", lambda *_: next(given))
    monkeypatch.setattr(gpu_peaks, "copy_bytes_per_s", lambda _, ordinal: 1e12 + ordinal)
    found = probe(RecordingDriver(3), "0,2,0", "fp16")
    assert found.copy_bytes_per_s == 2e12 + 2
    assert found.flops_per_s == total
    assert (found.devices, found.precision, found.threads) == ("0,2,0", "fp16", 0)
    assert ("matrix product" in found.how) is (total is not None)


def test_without_torch_on_the_gpu_there_is_no_peak_of_operations(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert matmul_flops_per_s("cuda:0", "fp16") is None


def test_a_machine_without_gpus_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ParnetError, match="The probe of the peaks of GPU 0 failed: "):
        measure_gpu_peaks("0", "fp32")


@pytest.fixture
def on_gpus(make_result):
    """Rows on GPUs in both precisions, one that does not tell its own, and one on the CPU."""
    result = make_result({name: [[5_000_000] * 4] * 12 for name in "ab"}, forms=("whole",) * 2)
    rows = []
    for row, devices, precision in zip(
        result.rows * 2, ("0", "0", "0,1", "cpu"), ("fp32", "fp16", None, "fp32"), strict=True
    ):
        description = replace(row.description, devices=devices, precision=precision)
        rows.append(replace(row, description=description))
    return replace(result, rows=tuple(rows))


def test_each_set_of_devices_is_probed_once_in_each_precision(monkeypatch, on_gpus):
    probed = []
    monkeypatch.setattr(row_peaks, "measure_peaks", probed.append)
    monkeypatch.setattr(row_peaks, "measure_gpu_peaks", lambda *one: probed.append(one))
    measure_row_peaks(row.description for row in on_gpus.rows * 2)
    assert probed == [(0, 1), ("0", "fp32"), ("0", "fp16"), ("0,1", "fp32")]


def test_rows_are_compared_with_the_peaks_of_their_own_devices(on_gpus):
    peaks = (
        Peaks(0, 50e12, 1e12, "fp32", "a test", "0"),
        Peaks(0, 400e12, 1e12, "fp16", "a test", "0"),
        Peaks(0, None, 2e12, "fp32", "a test", "0,1"),
        Peaks(2, 1e11, 1e10, "fp32", "a test"),
    )
    result = replace(on_gpus, peaks=peaks)
    assert [peaks_for(result, row) for row in result.rows] == list(peaks)
    assert [peaks_for(on_gpus, row) for row in on_gpus.rows] == [None] * 4
    costs = costs_of(result, summarise(result))
    reached = [cost.achieved for cost in costs]
    assert reached[0].flops_share == pytest.approx(reached[0].flops_per_s / 50e12)
    assert reached[2].flops_share is None
    said = " ".join(remarks_on_costs(result, costs))
    assert "Peaks of GPU 0: 50.00 TFLOP/s, 1.00 TB/s (a test, fp32)." in said
    assert "Peaks of GPU 0,1: no peak of FLOP/s" in said
    assert "Peaks of 2 threads" in said
