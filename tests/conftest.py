"""What several test modules share: small networks with statistics that matter, and a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.parnet import ParNet, ParNetConfig

# Several workers share the machine; one thread each is the quickest.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import nothing but the tests of GPUs under ``-m gpu``.

    A machine with a GPU need not have what the other tests compare with.
    """
    if config.getoption("markexpr") != "gpu":
        return None
    folder = ROOT / "tests" / "gpu"
    leads_there = collection_path in {folder, *folder.parents}
    return None if leads_there or folder in collection_path.parents else True


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def make_parnet() -> Callable[..., ParNet]:
    """Build a ParNet in training form with random weights, statistics and affine terms."""

    def make(config: ParNetConfig, seed: int = 0) -> ParNet:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            network = ParNet(config)
        randomise_batch_norm(network, torch.Generator().manual_seed(seed))
        return network.eval().requires_grad_(requires_grad=False)

    return make


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``parnet-export`` or ``parnet-bench`` as a user does, in a process of its own."""

    def run(program: str, *arguments: object, cwd: Path | None = None, timeout_s: float = 300):
        module = {"parnet-export": "parnet_export.cli", "parnet-bench": "parnet_bench.cli"}[program]
        code = f"import sys; from {module} import main; sys.argv[0] = {program!r}; main()"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=environment,
            timeout=timeout_s,
        )

    return run
