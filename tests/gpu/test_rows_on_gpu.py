"""Rows of the bench on a real GPU: resident inputs, parts, memory, caches, peaks, boards."""

from __future__ import annotations

import os
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch

from parnet_bench.forecasts.cost_place import on_gpu
from parnet_bench.machine.energy import find_meter
from parnet_bench.machine.nvml import open_nvml
from parnet_bench.machine.state import all_boards, gpu_states
from parnet_bench.measuring.gpu_peaks import measure_gpu_peaks
from parnet_bench.workers.job import Job
from parnet_bench.workers.row_gpus import RowGpus
from parnet_bench.workers.row_process import RowProcess
from parnet_bench.workers.turn import TurnRequest
from parnet_engines.cuda.session import CudaSession

pytestmark = pytest.mark.gpu


def open_torch(bundle, **options):
    return CudaSession.open_on_gpus(bundle, "0", engine="torch", **options)


def output_in_gpu(session):
    (host,) = session._slots[0].hosts.values()
    return host.read(session.program.program.outputs[0])


@pytest.mark.parametrize("use_graphs", [True, False])
def test_a_resident_run_computes_what_a_run_with_transfers_does(single_bundle, image, use_graphs):
    with open_torch(single_bundle, use_graphs=use_graphs) as session:
        expected = session.run({"image": image})["logits"]
        session.run({"image": image + 1})
        session.upload({"image": image})
        session.run_resident()
        np.testing.assert_allclose(output_in_gpu(session), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("is_resident", [True, False])
def test_parts_add_up_to_less_than_the_whole(single_bundle, image, use_graphs, is_resident):
    with open_torch(single_bundle, use_graphs=use_graphs) as session:
        session.upload({"image": image})
        for _ in range(20):
            begin_ns = time.perf_counter_ns()
            parts = session.time_parts(None if is_resident else {"image": image})
            whole_ns = time.perf_counter_ns() - begin_ns
            on_device_ns = parts.host_to_device_ns + parts.compute_ns + parts.device_to_host_ns
            assert 0 < parts.compute_ns <= on_device_ns < whole_ns + 2000
            assert 0 < parts.enqueue_ns < whole_ns


def test_memory_that_is_taken_is_seen_and_what_flushes_take_is_not(driver):
    torch.cuda.empty_cache()  # so that what follows has to be asked for
    gpus = RowGpus(driver, (0,))
    size_bytes = 256 << 20
    held = torch.empty(size_bytes, dtype=torch.uint8, device="cuda:0")
    gpus.empty_caches()
    gpus.look()
    assert 0.9 * size_bytes < gpus.peak_bytes < 1.5 * size_bytes
    del held
    torch.cuda.empty_cache()
    gpus.close()
    assert driver.gpus()[0].l2_cache_bytes > 1 << 20


@pytest.mark.parametrize("data_transfers", [True, False])
def test_a_row_in_a_process_of_its_own_tells_its_figures(single_bundle, data_transfers):
    cores = tuple(sorted(os.sched_getaffinity(0)))
    job = Job(str(single_bundle.path), "streams", "0", cores, {}, data_transfers=data_transfers)
    with RowProcess("row", job) as row:
        turn = row.take_turn(TurnRequest(20, lead_in=5, l2_flush=True))
        row.take_turn(TurnRequest(20, lead_in=2, in_flight=2))
        figures = row.device_figures(TurnRequest(20, lead_in=5, l2_flush=True))
    median_ns = np.median(turn.latencies_ns)
    assert 0 < np.median(figures.split.compute_ns) < median_ns
    assert figures.peak_device_bytes > 1_000_000
    assert len(turn.latencies_ns) == len(figures.split.enqueue_ns[0]) == 20


def test_a_row_that_is_loaded_later_takes_nothing_of_another_ones_memory(single_bundle):
    cores = tuple(sorted(os.sched_getaffinity(0)))
    job = Job(str(single_bundle.path), "whole", "0", cores, {})
    request = TurnRequest(5, lead_in=2)
    with RowProcess("alone", job) as row:
        row.take_turn(request)
        alone_bytes = row.device_figures(request).peak_device_bytes
    with RowProcess("first", job) as first, RowProcess("second", job) as second:
        for row in (first, second):
            row.take_turn(request)
        found = [row.device_figures(request).peak_device_bytes for row in (first, second)]
    # A CUDA context alone would be several times as much.
    assert all(0.5 * alone_bytes < one < 1.5 * alone_bytes for one in found), (alone_bytes, found)


def test_the_board_of_a_gpu_is_the_one_that_nvml_calls_by_its_name(driver):
    nvml, missing = open_nvml()
    if missing:
        pytest.skip(missing)
    gpus = driver.gpus()
    states = gpu_states(nvml, gpus)
    if not states:
        pytest.skip("NVML shows no board here")
    names = {gpu.ordinal: gpu.name for gpu in gpus}
    for state in states:
        assert state.name in names[state.index] or names[state.index] in state.name
        assert state.bus_id in {board.bus_id for board in all_boards(nvml)}


def test_energy_of_a_gpu_is_counted(driver):
    meter = find_meter(driver.gpus()[:1])
    if meter.missing:
        pytest.skip(meter.missing)
    before_j = meter.read_j()
    end_s = time.monotonic() + 1.0
    matrix = torch.randn(4096, 4096, device="cuda")
    while time.monotonic() < end_s:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()
    assert 5.0 < meter.read_j() - before_j < 3000.0


def test_peaks_are_of_the_order_of_a_gpu():
    found = measure_gpu_peaks("0", "fp16")
    assert 1e11 < found.copy_bytes_per_s < 2e13
    assert found.flops_per_s is None or 1e12 < found.flops_per_s < 1e16
    assert found.devices == "0"


def test_what_segments_take_is_measured_alone_and_side_by_side(driver, single_bundle):
    measured = on_gpu(single_bundle, "0", lanes=2, engine="torch").measure()
    names = {segment.name for segment in single_bundle.stream_graph.segments}
    for busy in (1, 2):
        found = {e.segment: e.latency_ms for e in measured if e.busy_lanes == busy}
        assert names <= set(found)
        assert all(0 < latency_ms < 50 for latency_ms in found.values())
    assert {entry.environment for entry in measured} == {
        f"{driver.gpus()[0].name}, torch {version('torch')}"
    }
