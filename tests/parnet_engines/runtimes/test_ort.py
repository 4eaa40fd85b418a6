from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_engines.engine import NullEngine
from parnet_engines.runtimes.ort import OrtEngine
from parnet_export.errors import InputError, MissingBackendError
from parnet_export.stream_graph import Cost, Segment, TensorSpec

if TYPE_CHECKING:
    from parnet_engines.engine import Engine

NO_COST = Cost(parameters=0, macs=0, weight_bytes=0, activation_bytes=0, nodes=0, depth=0)
SEGMENT = Segment(
    "product",
    (TensorSpec("x", "float32", ("batch", 64)),),
    (TensorSpec("y", "float32", ("batch", 32)), TensorSpec("z", "float32", ("batch", 32))),
    NO_COST,
)
WEIGHT = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Neg", ["y"], ["z"]),
        ],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 64))],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 32))
            for name in ("z", "y")
        ],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "product.onnx")
    return tmp_path / "product.onnx"


def image(rows: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_an_engine_returns_its_outputs_by_name(path, threads):
    engine: Engine = OrtEngine(SEGMENT, path, threads=threads)
    x = image()
    outputs = engine.run({"x": x, "of another segment": x})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_allclose(outputs["y"], x @ WEIGHT, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs["z"], -outputs["y"])
    assert (engine.name, engine.inputs, engine.outputs) == (
        "product",
        SEGMENT.inputs,
        SEGMENT.outputs,
    )


def test_arrays_that_are_not_contiguous_are_read_as_they_look(path):
    x = image(seed=2)
    strided = np.asfortranarray(x)
    assert not strided.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(
        OrtEngine(SEGMENT, path).run({"x": strided})["y"],
        OrtEngine(SEGMENT, path).run({"x": x})["y"],
    )


def test_many_threads_may_share_an_engine(path):
    engine = OrtEngine(SEGMENT, path, threads=2)
    inputs = [image(rows=1 + seed % 5, seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: engine.run({"x": x})["y"], inputs))
    for x, y in zip(inputs, results, strict=True):
        np.testing.assert_allclose(y, x @ WEIGHT, rtol=1e-4, atol=1e-5)


def test_closing_ends_the_threads_and_running_then_is_an_error(path, watch_threads):
    started = watch_threads()
    engine = OrtEngine(SEGMENT, path, threads=4)
    assert len(started.new) == 3
    engine.run({"x": image()})
    engine.close()
    engine.close()
    assert started.all_end()
    with pytest.raises(ValueError, match="'product' is closed"):
        engine.run({"x": image()})


def test_threads_are_pinned_to_the_given_cores(path, watch_threads):
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("needs two processors")
    first, second = usable[:2]
    started = watch_threads()
    engine = OrtEngine(SEGMENT, path, cores=(first, second))
    (worker,) = started.new
    deadline_s = time.monotonic() + 5  # the thread pins itself as it starts
    while os.sched_getaffinity(worker) != {second} and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert os.sched_getaffinity(worker) == {second}
    assert os.sched_getaffinity(threading.get_native_id()) == set(usable)
    engine.close()


def test_sessions_do_not_spin(path, monkeypatch):
    seen = {}
    real = onnxruntime.InferenceSession

    def spy(model: object, options: onnxruntime.SessionOptions, **rest: object) -> object:
        seen["spinning"] = options.get_session_config_entry("session.intra_op.allow_spinning")
        return real(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    OrtEngine(SEGMENT, path, threads=2).close()
    assert seen == {"spinning": "0"}


def test_an_absent_runtime_names_the_command_that_installs_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'parnet-export\[cpu\]'"):
        OrtEngine(SEGMENT, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.onnx: cannot be loaded by ONNX Runtime"):
        OrtEngine(SEGMENT, tmp_path / "missing.onnx")


def test_the_null_engine_has_the_interface_and_allocates_nothing():
    engine: Engine = NullEngine(SEGMENT, {"batch": 3})
    first, second = engine.run({}), engine.run({})
    assert {name: value.shape for name, value in first.items()} == {"y": (3, 32), "z": (3, 32)}
    assert all(first[name] is second[name] for name in first)
    assert (engine.name, engine.inputs, engine.outputs) == (
        "product",
        SEGMENT.inputs,
        SEGMENT.outputs,
    )
    engine.close()
