from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from parnet_bench.machine.activity import (
    Activity,
    Disturbance,
    GpuWatch,
    disturbance,
    read_activity,
)
from parnet_bench.machine.activity import throttle_events as count_throttle_events
from parnet_bench.machine.state import GpuState
from parnet_bench.report.page_facts import facts_of
from parnet_bench.workers.cache_flush import CacheFlush, last_level_cache_bytes
from parnet_engines.cuda.driver import Gpu


def reading(**times_s):
    times = dict.fromkeys(("moment_s", "total_s", "idle_s", "steal_s", "own_s"), 0.0) | times_s
    return Activity(**times, load_average=0.0, available_memory_bytes=0)


def test_time_that_is_neither_idle_nor_stolen_nor_ours_is_that_of_others():
    after = reading(total_s=100.0, idle_s=40.0, steal_s=10.0, own_s=30.0)
    assert disturbance(reading(), after) == Disturbance(steal=0.1, others=pytest.approx(0.2))


def test_counters_that_stand_still_or_disagree_tell_no_disturbance():
    assert disturbance(reading(), reading()) == Disturbance(0.0, 0.0)
    # Counters of different clocks need not add up exactly.
    after = reading(total_s=10.0, idle_s=5.0, own_s=5.1)
    assert disturbance(reading(), after).others == 0.0


def test_a_reading_is_that_of_this_machine_and_counts_workers_that_have_ended():
    before = read_activity()
    subprocess.run(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True
    )
    after = read_activity()
    assert after.own_s - before.own_s >= 0.25  # counters tick every 10 ms
    assert after.moment_s > before.moment_s
    elapsed_s = after.total_s - before.total_s
    assert elapsed_s <= 3 * (os.cpu_count() or 1) * (after.moment_s - before.moment_s) + 1
    assert after.total_s >= after.idle_s > 0
    assert 0 < after.available_memory_bytes <= psutil.virtual_memory().total


def test_overheated_cores_are_counted_where_linux_counts_them(tmp_path):
    assert count_throttle_events(tmp_path) is None
    for core, events in enumerate((3, 4)):
        folder = tmp_path / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{events}\n")
    assert count_throttle_events(tmp_path) == 7


class Nvml:
    """Just enough of pynvml: one board whose clock and reasons are given."""

    NVMLError = RuntimeError
    clock_mhz = 2000
    reasons = 0
    temperature_c = 50
    power_mw = 300_000

    def __getattr__(self, name):
        numbers = {
            "NVML_CLOCK_SM": 1,
            "NVML_TEMPERATURE_GPU": 8,
            "nvmlClocksThrottleReasonSwPowerCap": 4,
            "nvmlClocksThrottleReasonSwThermalSlowdown": 32,
            "nvmlClocksThrottleReasonHwThermalSlowdown": 64,
            "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": 128,
        }
        answers = {
            "nvmlSystemGetDriverVersion": "600",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByPciBusId": object(),
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetComputeRunningProcesses": [1],
            "nvmlDeviceGetCurrentClocksThrottleReasons": self.reasons,
            "nvmlDeviceGetName": "Some GPU",
            "nvmlDeviceGetClockInfo": self.clock_mhz,
            "nvmlDeviceGetMaxClockInfo": 2000,
            "nvmlDeviceGetTemperature": self.temperature_c,
            "nvmlDeviceGetPowerUsage": self.power_mw,
        }
        return numbers.get(name) or (lambda *_: answers[name])


def test_a_watch_remembers_the_extremes_and_all_reasons_until_asked():
    nvml = Nvml()
    watch = GpuWatch(nvml, (Gpu(0, "Some GPU", (9, 0), 80 << 30, 0, "0000:3B:00.0"),))
    for clock_mhz, reasons, temperature_c, power_mw in (
        (1900, 4, 60, 350_000),
        (1200, 0, 82, 698_500),
        (1800, 64, 75, 500_000),
    ):
        nvml.clock_mhz, nvml.reasons = clock_mhz, reasons
        nvml.temperature_c, nvml.power_mw = temperature_c, power_mw
        watch.look()
    (seen,) = watch.take()
    assert seen.clock_mhz == 1200
    assert (seen.temperature_c, seen.power_w) == (82, 698.5)
    assert seen.slowed_by == ("its power limit", "heat")
    assert watch.take() == ()


def test_a_page_tells_the_extremes_of_each_board(make_result):
    result = make_result({"net whole": [[5_000_000] * 4] * 12})
    assert not [name for name, _ in facts_of(result) if name.startswith("GPU")]
    state = GpuState(0, "H100", "600", None, 1900, 1980, (), None, 60, 350.0)
    hot = replace(state, clock_mhz=1200, temperature_c=82)
    silent = GpuState(1, "L4", "600", None, None, None, (), None)
    activities = (replace(reading(), gpus=(state, silent)), replace(reading(), gpus=(hot, silent)))
    facts = dict(facts_of(replace(result, activities=activities)))
    assert facts["GPU 0"] == "H100, driver 600, 1200 of 1980 MHz at least, 82 °C, 350 W"
    assert facts["GPU 1"] == "L4, driver 600"


def test_without_boards_there_is_nothing_to_watch():
    watch = GpuWatch()
    watch.look()
    assert watch.take() == ()


def test_flushing_writes_twice_what_the_cache_holds():
    flush = CacheFlush(1 << 20)
    before = flush._memory.copy()
    flush()
    assert flush._memory.nbytes == 2 << 20
    assert (flush._memory != before).all()


def test_the_largest_cache_is_the_last_level(tmp_path):
    assert last_level_cache_bytes(tmp_path) is None
    for index, size in enumerate(("48K", "2048K", "33M", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 33 << 20


@pytest.mark.slow
def test_a_flush_makes_the_next_read_slow():
    import numpy as np

    data = np.ones((1 << 20) // 8)
    flush = CacheFlush()

    def quickest(prepare):
        times = []
        for _ in range(20):
            prepare()
            start = time.perf_counter_ns()
            data.sum()
            times.append(time.perf_counter_ns() - start)
        return min(times)

    assert quickest(flush) > 1.3 * quickest(lambda: None)
