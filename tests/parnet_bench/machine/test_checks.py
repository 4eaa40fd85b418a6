"""Every finding has a machine that provokes it and one that does not.

The machines are folders with the files that Linux shows, read by the code that reads a
real one.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from parnet_bench.cli import app
from parnet_bench.machine import nvml as nvml_module
from parnet_bench.machine.checks import advise
from parnet_bench.machine.state import read_machine
from parnet_export import console

CORES = (0, 1, 2, 3)

QUIET = {
    "proc/cpuinfo": "model name\t: Intel(R) Some Processor\n",
    "proc/loadavg": "0.05 0.10 0.20 1/100 1\n",
    "proc/meminfo": "SwapTotal: 1000000 kB\nSwapFree: 1000000 kB\n",
    "proc/stat": "cpu 0 0 0 0 0 0 0 0 0 0\n"
    + "".join(f"cpu{i} 10 0 10 1000 0 0 0 5 0 0\n" for i in CORES),
    "sys/devices/system/cpu/intel_pstate/no_turbo": "1\n",
    "sys/fs/cgroup/cpu.max": "max 100000\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
} | {
    f"sys/devices/system/cpu/cpu{i}/{name}": text
    for i in CORES
    for name, text in (
        ("cpufreq/scaling_governor", "performance\n"),
        ("topology/thread_siblings_list", f"{i}\n"),
    )
}


def write(root, contents):
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def stat(*, busy=0, steal=0, idle=100):
    """The cores' times after a while in which each did so many ticks of everything."""
    return "".join(f"cpu{i} {10 + busy} 0 10 {1000 + idle} 0 0 0 {5 + steal} 0 0\n" for i in CORES)


class Nvml:
    """One board, as NVML describes it; the attributes are what a test changes."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self, *, persistence=1, clock=1980, processes=(), reasons=0, heat=41):
        answers = {
            "nvmlSystemGetDriverVersion": "570.1",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "board",
            "nvmlDeviceGetName": "NVIDIA H100",
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"00000000:3B:00.0"),
            "nvmlDeviceGetPersistenceMode": persistence,
            "nvmlDeviceGetClockInfo": clock,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetTemperature": heat,
            "nvmlDeviceGetPowerUsage": heat if isinstance(heat, Exception) else 1000 * heat,
            "nvmlDeviceGetComputeRunningProcesses": processes,
            "nvmlDeviceGetCurrentClocksThrottleReasons": reasons,
        }
        for name, answer in answers.items():
            setattr(self, name, self.answering(answer))

    def answering(self, answer):
        def ask(*_):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Read a machine that differs from a quiet one in some files."""

    def read(changes=None, *, after=None, nvml=None, logical_cores=4):
        write(tmp_path, QUIET | (changes or {}))
        monkeypatch.setattr("psutil.cpu_count", lambda **_: logical_cores)
        later = {"proc/stat": after or stat()}
        return read_machine(
            tmp_path, cores=CORES, nvml=nvml, sleep=lambda _: write(tmp_path, later)
        )

    return read


def test_a_quiet_machine_needs_no_advice(look):
    assert advise(look(nvml=Nvml())) == ()


CPU = "sys/devices/system/cpu"


@pytest.mark.parametrize(
    ("changes", "check", "problem", "command"),
    [
        (
            {f"{CPU}/cpu2/cpufreq/scaling_governor": "powersave\n"},
            "governor",
            "governor is powersave",
            "cpupower frequency-set --governor performance",
        ),
        (
            {f"{CPU}/intel_pstate/no_turbo": "0\n"},
            "turbo",
            "above their nominal frequency",
            "intel_pstate/no_turbo",
        ),
        (
            {
                f"{CPU}/intel_pstate/no_turbo": "",
                f"{CPU}/cpufreq/boost": "1\n",
                "proc/cpuinfo": "model name\t: AMD Some Processor\n",
            },
            "turbo",
            "above their nominal frequency",
            "cpufreq/boost",
        ),
        (
            {
                f"{CPU}/cpu{core}/topology/thread_siblings_list": text
                for core, text in zip(CORES, ("0,2", "1,3", "0,2", "1,3"), strict=True)
            },
            "SMT",
            "share physical cores (0,2 do)",
            "taskset --cpu-list 0,1 ",
        ),
        (
            {"proc/meminfo": "SwapTotal: 1000000 kB\nSwapFree: 800000 kB\n"},
            "swap",
            "204.80 MB of memory are swapped out",
            "swapoff",
        ),
        (
            {"sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n"},
            "huge pages",
            "merges any memory",
            "echo madvise",
        ),
        (
            {"sys/fs/cgroup/cpu.max": "250000 100000\n"},
            "CPU quota",
            "2.5 cores' worth",
            "--cpuset-cpus 0,1 ",
        ),
        (
            {
                "sys/fs/cgroup/cpu.max": "",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            "CPU quota",
            "0.5 cores' worth",
            "--cpuset-cpus 0 ",
        ),
    ],
)
def test_what_the_machine_is_set_to(look, changes, check, problem, command):
    (advice,) = advise(look(changes))
    assert advice.check == check
    assert problem in advice.problem
    assert command in advice.command


@pytest.mark.parametrize(
    ("times", "checks"),
    [
        ({"busy": 20}, ["load"]),
        ({"busy": 4}, []),
        ({"steal": 3}, ["steal"]),
        ({"steal": 0}, []),
        ({"busy": 20, "steal": 9}, ["load", "steal"]),
    ],
)
def test_what_else_the_cores_do(look, times, checks):
    assert [advice.check for advice in advise(look(after=stat(**times)))] == checks


def test_shares_are_of_all_ticks_of_the_cores(look):
    state = look(after=stat(busy=15, steal=5, idle=80))
    assert state.steal_share == pytest.approx(0.05)
    assert state.busy_share == pytest.approx(0.20)


def test_a_process_that_may_use_some_cores_only(look):
    (advice,) = advise(look(logical_cores=8))
    assert advice.check == "affinity"
    assert "4 of 8 cores" in advice.problem
    assert "taskset --cpu-list 0-7" in advice.command


@pytest.mark.parametrize(
    ("nvml", "check", "problem", "command"),
    [
        (Nvml(persistence=0), "GPU 0 persistence", "unloaded", "--persistence-mode=1"),
        (Nvml(clock=345), "GPU 0 clocks", "345 of 1980 MHz", "--lock-gpu-clocks=1980"),
        (Nvml(processes=[1, 2]), "GPU 0 processes", "2 other processes", "query-compute-apps"),
        (Nvml(reasons=4), "GPU 0 slowdown", "its power limit", "PERFORMANCE"),
        (Nvml(reasons=64 + 128), "GPU 0 slowdown", "heat and the power supply", "PERFORMANCE"),
    ],
)
def test_what_gpus_are_set_to(look, nvml, check, problem, command):
    (advice,) = advise(look(nvml=nvml))
    assert advice.check == check
    assert problem in advice.problem
    assert command in advice.command


def test_what_a_board_does_not_tell_is_no_finding(look):
    silent = Nvml.NVMLError("Not Supported")
    state = look(
        nvml=Nvml(persistence=silent, clock=silent, processes=silent, reasons=silent, heat=silent),
    )
    assert advise(state) == ()
    assert state.gpus[0].persistent is None
    assert (state.gpus[0].temperature_c, state.gpus[0].power_w) == (None, None)


def test_a_system_that_tells_nothing_is_described_all_the_same(tmp_path):
    state = read_machine(tmp_path, cores=CORES, sleep=lambda _: None)
    assert (state.turbo, state.steal_share, state.cpu_quota) == (None, None, None)
    assert (state.governors, state.siblings, state.huge_pages) == ((), (), "")
    assert {advice.check for advice in advise(state)} <= {"affinity"}


@pytest.fixture
def run(capfd):
    def run(*arguments):
        code = console.run(app, ["env", *map(str, arguments)])
        return (code, *capfd.readouterr())

    return run


def test_the_command_describes_this_machine_as_a_table_and_as_json(run, tmp_path):
    code, table, error = run("--seconds", "0.1")
    assert (code, error) == (0, "")
    assert "processor" in table
    assert "before measuring" in table
    output = tmp_path / "env.json"
    code, printed, error = run("--seconds", "0.1", "--json", "--output", output)
    assert (code, error) == (0, "")
    result = json.loads(printed)
    assert result == json.loads(output.read_text())
    assert result["machine"]["usable_cores"] == result["environment"]["affinity"]
    for advice in result["advice"]:
        assert advice["command"]


def test_the_command_shows_each_advice_with_its_command(run, monkeypatch):
    nvml = Nvml(persistence=0)
    monkeypatch.setattr(nvml_module.importlib, "import_module", lambda _: nvml)
    nvml.nvmlInit = lambda: None
    code, table, _ = run("--seconds", "0.1")
    assert code == 0
    words = " ".join(table.split())
    assert "NVIDIA H100, 0000:3B:00.0, driver 570.1, 1980 of 1980 MHz, 41 °C, 41 W" in words
    assert "These are NVML's numbers" in words
    assert "sudo nvidia-smi --id=0 --persistence-mode=1" in table


def test_a_place_that_cannot_be_written_is_refused_before_watching(run, tmp_path):
    code, printed, error = run("--output", tmp_path)
    assert (code, printed) == (2, "")
    assert "is a folder" in error
