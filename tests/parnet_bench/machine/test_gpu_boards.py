"""Which board is whose: NVML counts boards by their place on the bus, CUDA as it likes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from parnet_bench.machine.activity import GpuWatch, read_activity
from parnet_bench.machine.state import all_boards, gpu_states
from parnet_bench.measuring import latency
from parnet_bench.results.findings import find
from parnet_bench.results.procedure import Procedure
from parnet_bench.targets import row_devices
from parnet_bench.targets.row_devices import gpus_of
from parnet_engines.cuda.driver import Gpu
from parnet_engines.cuda.recording_driver import RecordingDriver

T4, L4, H100 = "00000000:07:00.0", "00000000:08:00.0", "00000000:09:00.0"
NAMES = {T4: "Tesla T4", L4: "NVIDIA L4", H100: "NVIDIA H100"}


class Boards:
    """Just enough of pynvml: three boards, each at clocks and energies of its own."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    class NVMLError(Exception):
        pass

    def __init__(self, *, hidden=(), ids=(T4, L4, H100)):
        self.ids, self.hidden = ids, hidden
        self.answers = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.65",
            "nvmlDeviceGetCount": lambda: len(ids),
            "nvmlDeviceGetHandleByIndex": lambda index: self.seen(ids[index]),
            "nvmlDeviceGetHandleByPciBusId": self.by_bus_id,
            "nvmlDeviceGetPciInfo": lambda board: SimpleNamespace(busId=board),
            "nvmlDeviceGetName": lambda board: NAMES.get(board, "board"),
            "nvmlDeviceGetPersistenceMode": lambda _: 1,
            "nvmlDeviceGetComputeRunningProcesses": lambda _: [],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda board: 32 * (board == T4),
            "nvmlDeviceGetClockInfo": lambda *_: 1900,
            "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
            "nvmlDeviceGetTemperature": lambda *_: 50,
            "nvmlDeviceGetPowerUsage": lambda _: 300_000,
            "nvmlDeviceGetTotalEnergyConsumption": lambda board: 1000 * int(board[9:11], 16),
        }

    def __getattr__(self, name):
        return self.answers[name]

    def seen(self, board):
        if board in self.hidden:
            raise self.NVMLError("Insufficient Permissions")
        return board

    def by_bus_id(self, text):
        """Compare numbers, as NVML does, whatever their digits."""
        wanted = [int(part, 16) for part in text.replace(".", ":").split(":")]
        for board in self.ids:
            if [int(part, 16) for part in board.replace(".", ":").split(":")] == wanted:
                return self.seen(board)
        raise self.NVMLError("Not Found")


# As CUDA has them: the fastest first, and the T4 hidden by CUDA_VISIBLE_DEVICES.
VISIBLE = (
    Gpu(0, "NVIDIA H100", (9, 0), 80 << 30, 0, "0000:09:00.0"),
    Gpu(1, "NVIDIA L4", (8, 9), 24 << 30, 0, "0000:08:00.0"),
)


def test_the_state_of_a_gpu_is_that_of_its_board():
    states = gpu_states(Boards(), VISIBLE)
    assert [(s.index, s.name, s.bus_id) for s in states] == [
        (0, "NVIDIA H100", "0000:09:00.0"),
        (1, "NVIDIA L4", "0000:08:00.0"),
    ]


def test_boards_that_no_row_runs_on_are_not_watched():
    watch = GpuWatch(Boards(), VISIBLE[1:])
    watch.look()
    (seen,) = watch.take()
    assert (seen.index, seen.name, seen.slowed_by) == (1, "NVIDIA L4", ())


@pytest.mark.parametrize("bus_id", ["", "0000:0F:00.0"])
def test_a_gpu_whose_board_nvml_does_not_know_is_left_out(bus_id):
    watch = GpuWatch(Boards(), (Gpu(0, "Some GPU", (9, 0), 1 << 30, 0, bus_id), VISIBLE[1]))
    watch.look()
    assert [seen.index for seen in watch.take()] == [1]


def test_all_boards_are_listed_by_nvmls_numbers_but_those_it_hides():
    found = all_boards(Boards(hidden=(L4,)))
    assert [(s.index, s.name, s.bus_id) for s in found] == [
        (0, "Tesla T4", "0000:07:00.0"),
        (2, "NVIDIA H100", "0000:09:00.0"),
    ]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("00000001:00:00.0", "0001:00:00.0"),
        (b"0000DBF4:3B:00.0", "DBF4:3B:00.0"),
        ("00010000:E1:00.0", "10000:E1:00.0"),
        ("", ""),
    ],
)
def test_bus_ids_are_shown_as_cuda_writes_them(told, shown):
    (state,) = all_boards(Boards(ids=(told,)))
    assert state.bus_id == shown


def test_the_gpus_of_rows_are_told_once_each_with_their_bus_ids(monkeypatch):
    monkeypatch.setattr(row_devices, "open_driver", lambda _: RecordingDriver(3))
    found = gpus_of(["cpu", "2", "2,0,2"])
    assert [(gpu.ordinal, gpu.pci_bus_id) for gpu in found] == [
        (0, "0000:09:00.0"),
        (2, "0000:07:00.0"),
    ]


def test_rows_on_the_cpu_need_no_driver(monkeypatch):
    monkeypatch.setattr(row_devices, "open_driver", None)
    assert gpus_of(["cpu", "cpu:0"]) == ()


def test_a_measurement_looks_at_the_boards_of_its_rows(monkeypatch):
    monkeypatch.setattr(row_devices, "open_driver", lambda _: RecordingDriver(3))
    monkeypatch.setattr(importlib, "import_module", lambda _: Boards())
    row = SimpleNamespace(description=SimpleNamespace(name="row", devices="0"))
    run = latency._Run([row], Procedure())
    with run._energy.turn("row", 1):
        pass
    assert run._energy._meter.source == "NVML GPU 0"
    assert run._energy._meter.read_j() == 9.0  # the H100's, which NVML counts last
    run._watch.look()
    assert [(s.index, s.name) for s in run._watch.take()] == [(0, "NVIDIA H100")]


def test_the_command_against_heat_names_the_board(make_result):
    result = make_result({"net whole": [[5_000_000] * 4] * 12})
    (hot,) = gpu_states(Boards(), (Gpu(1, "Tesla T4", (7, 5), 0, 0, "0000:07:00.0"),))
    result = replace(result, activities=(replace(read_activity(), gpus=(hot,)),))
    (finding,) = [f for f in find(result) if f.kind == "throttled"]
    assert finding.sentence.startswith("GPU 1 (Tesla T4) was held down by heat")
    assert "`sudo nvidia-smi --id=0000:07:00.0 --lock-gpu-clocks=MIN,MAX`" in finding.remedy
