from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from datetime import UTC, datetime

import psutil
import pytest

from parnet_bench.machine import environment
from parnet_bench.machine.environment import (
    cpu_model,
    governors,
    library_versions,
    read_environment,
)


def test_the_environment_is_that_of_this_process():
    read = read_environment()
    assert read.python.endswith(".".join(map(str, sys.version_info[:3])))
    assert set(read.affinity) == set(psutil.Process().cpu_affinity())
    assert read.memory_bytes == psutil.virtual_memory().total
    assert 0 < read.available_memory_bytes <= read.memory_bytes
    assert abs((datetime.now(UTC) - datetime.fromisoformat(read.created)).total_seconds()) < 60
    assert read.command[1:] == tuple(sys.argv[1:])
    assert read.load_average == pytest.approx(os.getloadavg(), abs=0.5)


def test_versions_are_those_of_the_installed_distributions_and_of_no_others():
    versions = library_versions(("numpy", "no-such-distribution-anywhere"))
    assert versions == {"numpy": importlib.metadata.version("numpy")}


def test_the_processor_is_named_as_the_table_of_processors_names_it(tmp_path):
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: A: fast one\n\nprocessor\t: 1\n")
    assert cpu_model(table) == "A: fast one"
    assert cpu_model(tmp_path / "missing")


def test_governors_are_listed_once_and_cores_without_one_are_left_out(tmp_path):
    for core, name in ((0, "powersave"), (1, "performance"), (3, "powersave")):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(name + "\n")
    assert governors(range(5), tmp_path) == ("powersave", "performance")
    assert governors([2], tmp_path) == ()


def test_reading_the_environment_loads_none_of_the_libraries_it_names():
    code = (
        "import sys; from parnet_bench.machine.environment import read_environment;"
        "read_environment();"
        "print(*({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_system_without_affinity_masks_offers_all_its_cores(monkeypatch):
    monkeypatch.setattr(environment.psutil, "Process", object)
    assert environment.usable_cores() == tuple(range(os.cpu_count()))
