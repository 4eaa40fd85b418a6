"""The self-test and the comparison of engines on a real GPU, with small networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parnet_bench.selftest.checks import Request as SelfTestRequest
from parnet_bench.selftest.checks import run_selftest
from parnet_bench.selftest.engine_rows import SPLIT, SPLIT_BY_VECTORS, WHOLE_ENGINE
from parnet_bench.selftest.prepared_network import prepare_network, torch_rows
from parnet_engines.clock import MonotonicClock
from parnet_engines.session import Session

pytestmark = pytest.mark.gpu


def quietly(_):
    """Stand for who is told how far it is."""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_program_of_three_devices_passes_every_check_on_one(precision):
    result = run_selftest(SelfTestRequest("0,0,0", "torch", precision=precision), quietly)
    assert [check for check in result.checks if not check.passed] == []


def test_torch_compile_captures_beside_our_own_graphs(tmp_path, image):
    network = prepare_network(
        "parnet-cifar-1.3m", tmp_path, precision="fp16", resolution=32, seed=0
    )
    with Session.open(network.bundle, "0", plan="streams", engine="torch") as session:
        expected = session.run({"image": image})["logits"]
        *eager, compiled = torch_rows(network, torch.device("cuda", 0))
        assert [row.reason for row in eager] == ["", ""]
        if compiled.run is None:
            pytest.skip(f"torch.compile does not work here: {compiled.reason}")
        assert compiled.execution == "torch.compile, reduce-overhead"
        for _ in range(5):
            for row in (*eager, compiled):
                row.run()
            found = session.run({"image": image})["logits"]
            np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_every_way_is_measured_and_limits_are_known():
    pytest.importorskip("scipy", reason="statistics need SciPy")
    from parnet_bench.selftest.engine_comparison import Request, compare_engines

    request = Request(
        ("parnet-cifar-1.3m",), ("resnet18",), "0", "torch", resolution=32, rounds=4, runs=3
    )
    result = compare_engines(request, MonotonicClock(), quietly)
    rows = {(row.network, row.name): row for row in result.rows}
    for network, name in (
        *(("parnet-cifar-1.3m", way) for way in (WHOLE_ENGINE, SPLIT, SPLIT_BY_VECTORS)),
        ("parnet-cifar-1.3m", "whole engine, no CUDA graph"),
        ("parnet-cifar-1.3m", "authors' layout"),
        ("parnet-cifar-1.3m", "torch, unfused"),
        ("parnet-cifar-1.3m", "torch, fused"),
        ("resnet18", WHOLE_ENGINE),
    ):
        row = rows[network, name]
        assert row.median_ms is not None, row
        assert row.reason == ""
    assert rows["parnet-cifar-1.3m", SPLIT].execution == "one CUDA graph"
    (limits,) = result.limits
    assert limits.path.reason == ""
    assert 0 < limits.path.critical_path_ms <= sum(limits.path.segments_ms.values())
    assert result.bandwidth_gb_per_s > 100
    assert 0 < limits.weights_ms < rows["parnet-cifar-1.3m", SPLIT].median_ms
