from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from parnet_bench.machine.energy import (
    Energy,
    EnergyTally,
    NoMeter,
    NvmlMeter,
    RaplMeter,
    find_meter,
)
from parnet_engines.cuda.driver import Gpu

RANGE_UJ = 262_143_328_850
BUS_ID = "0A"


def gpu(ordinal, bus):
    return Gpu(ordinal, "Some GPU", (9, 0), 80 << 30, 0, f"0000:{bus:02X}:00.0")


class Counters:
    """A powercap folder with two packages and parts of them, as Linux shows it."""

    def __init__(self, folder):
        self.folder = folder
        for name, label in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
        ):
            (folder / name).mkdir(parents=True)
            (folder / name / "name").write_text(f"{label}\n")
            (folder / name / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            self.set(name, 1_000_000)

    def set(self, name, energy_uj):
        (self.folder / name / "energy_uj").write_text(f"{energy_uj}\n")


class FakeNvml:
    """Boards whose counters are given in millijoules; None for one that has no counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, *counters_mj, broken=False):
        self.counters_mj = {int(BUS_ID, 16) + n: c for n, c in enumerate(counters_mj)}
        self.broken = broken

    def nvmlInit(self):  # noqa: N802 -- NVML's name
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):  # noqa: N802 -- NVML's name
        domain, bus, _ = bus_id.split(":")
        if int(domain, 16) or int(bus, 16) not in self.counters_mj:
            raise self.NVMLError("Not Found")
        return int(bus, 16)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802 -- NVML's name
        if self.counters_mj[handle] is None:
            raise self.NVMLError("Not Supported")
        return self.counters_mj[handle]


def test_packages_are_added_and_their_parts_are_not_counted_twice(tmp_path):
    counters = Counters(tmp_path)
    meter = find_meter(powercap=tmp_path)
    assert (meter.source, meter.missing) == ("RAPL package-0, package-1", "")
    assert meter.read_j() == 0
    counters.set("intel-rapl:0", 3_000_000)
    counters.set("intel-rapl:0:0", 2_000_000)
    counters.set("intel-rapl:1", 1_500_000)
    assert meter.read_j() == 2.5
    assert meter.read_j() == 2.5


def test_a_counter_that_runs_over_goes_on_counting(tmp_path):
    counters = Counters(tmp_path)
    counters.set("intel-rapl:0", RANGE_UJ - 1_000_000)
    meter = find_meter(powercap=tmp_path)
    meter.read_j()
    counters.set("intel-rapl:0", 2_000_000)
    assert meter.read_j() == pytest.approx(3.0)


def test_a_counter_that_goes_away_yields_no_figure(tmp_path):
    Counters(tmp_path)
    meter = find_meter(powercap=tmp_path)
    tally = EnergyTally(meter)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with tally.turn("a", 10):
        pass
    energy = tally.of("a")
    assert energy.j_per_inference is None
    assert "could not be read" in energy.missing


def test_a_machine_without_counters_says_so(tmp_path):
    meter = find_meter(powercap=tmp_path)
    assert isinstance(meter, NoMeter)
    assert meter.read_j() is None
    energy = EnergyTally(meter).of("a")
    assert energy == Energy(None, "", meter.missing)
    assert "RAPL" in energy.missing


def test_counters_that_root_alone_may_read_are_named(tmp_path, monkeypatch):
    Counters(tmp_path)
    read = Path.read_text

    def guarded(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert "energy_uj may be read by root alone" in find_meter(powercap=tmp_path).missing


def test_turns_are_tallied_for_each_row(tmp_path):
    counters = Counters(tmp_path)
    tally = EnergyTally(RaplMeter((tmp_path / "intel-rapl:0",)))
    with tally.turn("a", 4):
        counters.set("intel-rapl:0", 3_000_000)
    counters.set("intel-rapl:0", 9_000_000)  # between turns: nobody's
    with tally.turn("b", 1):
        counters.set("intel-rapl:0", 10_000_000)
    with tally.turn("a", 1):
        counters.set("intel-rapl:0", 10_500_000)
    assert tally.of("a") == Energy(0.5, "RAPL package-0")
    assert tally.of("b") == Energy(1.0, "RAPL package-0")
    assert tally.of("never").j_per_inference is None


def test_a_turn_that_fails_counts_for_nothing(tmp_path):
    counters = Counters(tmp_path)
    tally = EnergyTally(find_meter(powercap=tmp_path))

    def fail():
        with tally.turn("a", 4):
            counters.set("intel-rapl:0", 3_000_000)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tally.of("a").j_per_inference is None


def test_a_counter_that_stands_still_is_no_energy_of_zero(tmp_path):
    Counters(tmp_path)
    tally = EnergyTally(find_meter(powercap=tmp_path))
    with tally.turn("a", 4):
        pass
    assert "does not count" in tally.of("a").missing


def test_boards_are_added(monkeypatch):
    nvml = FakeNvml(5_000, 7_000, 11_000)
    monkeypatch.setattr(importlib, "import_module", lambda name: {"pynvml": nvml}[name])
    gpus = (gpu(0, 0x0A), gpu(2, 0x0C))
    meter = find_meter(gpus)
    assert meter == NvmlMeter(nvml, gpus)
    assert meter.source == "NVML GPU 0, 2"
    assert meter.read_j() == 16.0


def test_a_board_counts_for_the_gpu_that_cuda_finds_on_it(monkeypatch):
    # CUDA has the fastest first: its GPU 0 is the last board on the bus.
    nvml = FakeNvml(5_000, 7_000, 11_000)
    monkeypatch.setattr(importlib, "import_module", lambda _: nvml)
    meter = find_meter((gpu(0, 0x0C),))
    assert meter.source == "NVML GPU 0"
    assert meter.read_j() == 11.0


def test_parts_of_one_board_share_its_counter(monkeypatch):
    nvml = FakeNvml(5_000)
    monkeypatch.setattr(importlib, "import_module", lambda _: nvml)
    assert find_meter((gpu(0, 0x0A), gpu(1, 0x0A))).read_j() == 5.0


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (FakeNvml(broken=True), "NVML cannot be used (Driver Not Loaded)"),
        (FakeNvml(None), "NVML GPU 0 counts no energy"),
        (FakeNvml(), "NVML does not show the board of GPU 0"),
    ],
)
def test_boards_that_count_nothing_say_why(monkeypatch, nvml, reason):
    monkeypatch.setattr(importlib, "import_module", lambda _: nvml)
    assert find_meter((gpu(0, 0x0A),)).missing == reason


def test_a_gpu_without_a_bus_id_has_no_board(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda _: FakeNvml(5_000))
    nowhere = Gpu(1, "Some GPU", (9, 0), 80 << 30)
    assert find_meter((nowhere,)).missing == "NVML does not show the board of GPU 1"


def test_an_absent_nvml_is_named_and_a_broken_one_propagates(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(_):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(importlib, "import_module", absent)
    assert "pip install nvidia-ml-py" in find_meter((gpu(0, 0x0A),)).missing
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="other"):
        find_meter((gpu(0, 0x0A),))
