"""What ``pytest -m gpu`` needs: the package's own dependencies, and nothing that tests want."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
