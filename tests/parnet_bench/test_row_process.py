from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import onnxruntime
import psutil
import pytest

from parnet_bench.job import Job
from parnet_bench.measure import Procedure, measure, timed
from parnet_bench.row_process import RowFailedError, RowProcess


@pytest.fixture
def job(forked_bundle):
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Job(str(forked_bundle.path), plan="whole", devices="cpu", cores=cores, sizes={})


def process_of(row):
    return psutil.Process(row._process.pid)


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("plan", ["whole", "streams"])
def test_a_turn_returns_one_latency_for_each_run(job, plan):
    with RowProcess("row", replace(job, plan=plan)) as row:
        start = time.perf_counter_ns()
        latencies_ns = row.turn(20)
        elapsed_ns = time.perf_counter_ns() - start
    assert len(latencies_ns) == 20
    assert all(latency > 0 for latency in latencies_ns)
    assert sum(latencies_ns) < elapsed_ns


def test_open_dimensions_take_the_sizes_of_the_job(job, dynamic_bundle):
    path = str(dynamic_bundle.path)
    (batch,) = (size for size in dynamic_bundle.manifest.inputs[0].shape if isinstance(size, str))
    with (
        RowProcess("one", replace(job, bundle=path, sizes={batch: 1})) as one,
        RowProcess("many", replace(job, bundle=path, sizes={batch: 32})) as many,
    ):
        assert min(many.turn(5)) > 4 * min(one.turn(5))


def test_a_row_uses_no_processor_time_between_its_turns(job):
    with RowProcess("row", job) as row:
        row.turn(3)
        process = process_of(row)
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
        before = process.cpu_times()
        time.sleep(0.3)
        assert process.cpu_times() == before
        assert len(row.turn(3)) == 3


def test_a_row_keeps_to_its_cores(job):
    with RowProcess("row", replace(job, cores=job.cores[:1])) as row:
        assert process_of(row).cpu_affinity() == list(job.cores[:1])


def test_ctrl_c_at_the_terminal_does_not_reach_a_row(job):
    with RowProcess("row", job) as row:
        assert os.getsid(process_of(row).pid) != os.getsid(0)


def test_closing_ends_the_process_and_twice_does_no_harm(job):
    row = RowProcess("row", job)
    pid = row._process.pid
    row.close()
    row.close()
    assert not psutil.pid_exists(pid)


def test_a_row_that_cannot_be_loaded_says_why(job, tmp_path):
    with pytest.raises(RowFailedError, match=r"my row: .*absent.*does not exist") as caught:
        RowProcess("my row", replace(job, bundle=str(tmp_path / "absent")))
    assert caught.value.exit_code == 2


def test_a_process_that_is_killed_is_reported_by_row_and_signal(job):
    with RowProcess("my row", job) as row:
        process_of(row).kill()
        with pytest.raises(RowFailedError, match="my row: its process was ended by SIGKILL"):
            row.turn(1)


def test_a_bug_in_the_worker_is_no_message_for_users(job):
    with pytest.raises(RuntimeError, match="exit code 1"):
        RowProcess("row", replace(job, plan=3))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_a_suspended_row_ends_with_the_process_that_started_it(job):
    code = textwrap.dedent(f"""
        import time
        from parnet_bench.row_process import RowProcess
        from parnet_bench.job import Job
        row = RowProcess("row", {job!r})
        print(row._process.pid, flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_a_whole_graph_takes_as_long_as_in_a_plain_loop_of_onnx_runtime(job, dynamic_bundle):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    plain = onnxruntime.InferenceSession(dynamic_bundle.whole_path, options)
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    job = replace(job, bundle=str(dynamic_bundle.path), sizes={"batch": 4}, cores=job.cores[:1])
    with RowProcess("ours", job) as row:
        turns = {"ours": row.turn, "plain": timed(lambda: plain.run(None, {"image": images}))}
        measurement = measure(turns, Procedure(min_time_s=6))
    # The quickest runs are those that no neighbour on a shared machine has disturbed.
    quickest_ns = [
        min(min(done.latencies_ns[name]) for done in measurement.rounds) for name in turns
    ]
    assert quickest_ns[0] == pytest.approx(quickest_ns[1], rel=0.05)
