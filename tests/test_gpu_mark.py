"""What ``pytest -m gpu`` needs: the package's own dependencies, and nothing that tests want."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OF_OTHER_TESTS = (
    *("hypothesis", "sklearn", "ortools", "openvino", "polygraphy", "mlperf_loadgen"),
    *("tensorrt", "tensorrt_rtx", "pynvml", "cupy", "scipy", "PIL", "jinja2"),
)


def test_tests_of_gpus_are_collected_without_what_other_tests_need(root):
    code = f"""
import sys, pytest

class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {OF_OTHER_TESTS!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
sys.exit(pytest.main(["-m", "gpu", "-q", "--collect-only", "-p", "no:cacheprovider"]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    files = set(re.findall(r"^(\S+)::", ran.stdout, flags=re.MULTILINE))
    assert files == {f"tests/gpu/{path.name}" for path in (root / "tests/gpu").glob("test_*.py")}


def test_tests_of_gpus_are_all_in_one_folder(root):
    mark = re.compile(r"\bmark\.gpu\b")
    marked = {path for path in (root / "tests").rglob("test_*.py") if mark.search(path.read_text())}
    marked.discard(Path(__file__))
    assert marked == set((root / "tests/gpu").glob("test_*.py"))


_STAND_IN = """#!/bin/sh
echo "$@" >> "$OUT_LOG"
case "$*" in *pytest,*) exit 0 ;; *"{fails}"*) exit 1 ;; esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("-m gpu", "failed: tests; results are in"),
        ("selftest --devices", "failed: selftest selftest-fp16; results are in"),
        ("--no-such-option", ""),
    ],
)
def test_what_fails_keeps_nothing_after_it_from_being_measured(root, tmp_path, fails, said):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(_STAND_IN.format(fails=fails))
    python.chmod(0o755)
    ran = subprocess.run(
        ["make", "gpu", f"PY={python}", f"OUT={tmp_path / 'out'}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OUT_LOG": str(log)},
    )
    assert bool(ran.returncode) == bool(said), ran.stderr
    assert said in ran.stderr
    calls = log.read_text().splitlines()[1:]  # after the one that looks for what is needed
    assert [call.split()[1] if call.startswith("-m") else call.split()[6] for call in calls] == [
        "pytest",
        "selftest",
        "selftest",
        "engines",
    ]
