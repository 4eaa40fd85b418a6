"""The wheel, not the checkout: what it declares must be enough to run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(root)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {"parnet_export", "parnet_engines", "parnet_bench"}
    assert packages <= tops
    assert all(top in packages or top.endswith(".dist-info") for top in tops)
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any(name.endswith("/LICENSE-WordNet.txt") and "/licenses/" in name for name in names)
    assert "parnet_export/imagenet_names.txt" in names


@pytest.mark.network
def test_the_wheel_runs_in_a_clean_environment(wheel, root, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    binaries = tmp_path / "venv" / "bin"
    constraints = root / "constraints.txt"
    install = [str(binaries / "pip"), "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*install, f"{wheel}[cpu]"], check=True, cwd=tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        return done.stdout

    assert "split-streams" in run("parnet-export", "--help")
    assert "latency" in run("parnet-bench", "--help")
    run("parnet-export", "fuse", "--ckpt", "parnet-cifar-1.3m")
    assert (tmp_path / "parnet-cifar-1.3m.fused.safetensors").is_file()
    run("parnet-export", "split-streams", "parnet-cifar-1.3m.fused.safetensors")
    assert (tmp_path / "parnet-cifar-1.3m.bundle" / "bundle.json").is_file()
