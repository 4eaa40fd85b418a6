from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from parnet_engines.runtimes.openvino import OpenVinoEngine
from parnet_engines.runtimes.ort import OrtEngine
from parnet_engines.session import Session
from parnet_export.bundle import Bundle
from parnet_export.errors import InputError, MissingBackendError
from parnet_export.models.parnet import ParNetConfig
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network
from parnet_export.stream_graph import Cost, Segment, TensorSpec

if TYPE_CHECKING:
    from parnet_engines.engine import Engine

pytest.importorskip("openvino")

NO_COST = Cost(parameters=0, macs=0, weight_bytes=0, activation_bytes=0, nodes=0, depth=0)
SEGMENT = Segment(
    "product",
    (TensorSpec("x", "float32", ("batch", 64)),),
    (TensorSpec("y", "float32", ("batch", 32)), TensorSpec("z", "float32", ("batch", 32))),
    NO_COST,
)
WEIGHT = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
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
    path = tmp_path_factory.mktemp("openvino") / "product.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def parnet(make_parnet, tmp_path_factory) -> tuple[torch.nn.Module, Bundle]:
    """A small ParNet with random statistics, and the bundle of its fused form."""
    config = ParNetConfig((16, 32, 64), (1, 1, 1), 64, num_classes=10)
    module = make_parnet(config)
    network = replace(load_network("parnet-s"), module=module, config=config)
    model, provenance = export_graph(network, level="full", resolution=64, batch=1)
    bundle, _ = make_bundle(model, provenance, tmp_path_factory.mktemp("bundles") / "parnet")
    return module, bundle


def image(rows: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_an_engine_returns_its_outputs_by_name(path, threads):
    engine: Engine = OpenVinoEngine(SEGMENT, path, threads=threads)
    x = image()
    for given in (x, np.asfortranarray(x)):
        outputs = engine.run({"x": given, "of another segment": x})
        assert list(outputs) == ["y", "z"]
        np.testing.assert_allclose(outputs["y"], x @ WEIGHT, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(outputs["z"], -outputs["y"])
    kept = outputs["y"].copy()
    engine.run({"x": image(seed=3)})
    np.testing.assert_array_equal(outputs["y"], kept)  # belongs to the caller
    assert (engine.name, engine.inputs, engine.outputs) == (
        "product",
        SEGMENT.inputs,
        SEGMENT.outputs,
    )


@pytest.mark.parametrize("rows", [1, 7])
def test_a_binding_reads_and_writes_the_same_memory_every_time(path, rows):
    engine, reference = OpenVinoEngine(SEGMENT, path, threads=1), OrtEngine(SEGMENT, path)
    x, y, z = np.zeros((rows, 64), np.float32), *np.zeros((2, rows, 32), np.float32)
    run = engine.bind([x], [y, z])
    for seed in range(3):
        x[...] = image(rows, seed)
        run()
        wanted = reference.run({"x": x})
        np.testing.assert_allclose(y, wanted["y"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(z, wanted["z"], rtol=1e-4, atol=1e-5)


def test_a_run_of_a_binding_allocates_no_arrays(path):
    x, y, z = image(rows=4000), *np.zeros((2, 4000, 32), np.float32)
    run = OpenVinoEngine(SEGMENT, path, threads=1).bind([x], [y, z])
    run()
    tracemalloc.start()
    try:
        for _ in range(3):
            run()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < y.nbytes / 10


def test_bindings_and_runs_of_one_engine_may_go_on_side_by_side(path):
    engine = OpenVinoEngine(SEGMENT, path, threads=1)

    def bound(x: np.ndarray) -> np.ndarray:
        y, z = np.zeros((2, len(x), 32), np.float32)
        run = engine.bind([x], [y, z])
        for _ in range(20):
            run()
        return y

    inputs = [image(rows=1 + seed % 5, seed=seed) for seed in range(12)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(bound, inputs))
        results += pool.map(lambda x: engine.run({"x": x})["y"], inputs)
    for x, y in zip(inputs * 2, results, strict=True):
        np.testing.assert_allclose(y, x @ WEIGHT, rtol=1e-4, atol=1e-5)


def test_one_thread_computes_where_it_is_called_and_lets_python_run_meanwhile(parnet):
    _, bundle = parnet
    graph = bundle.stream_graph
    whole = Segment("whole", graph.inputs, graph.outputs, NO_COST)
    engine = OpenVinoEngine(whole, bundle.whole_path, threads=1)
    arrays = [np.zeros(spec.resolve(), spec.dtype) for spec in (*graph.inputs, *graph.outputs)]
    run = engine.bind(arrays[: len(graph.inputs)], arrays[len(graph.inputs) :])
    run()
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    inside, begin_s, wall_s = 0, time.thread_time(), time.monotonic()
    while time.monotonic() < wall_s + 0.3:
        before = counted
        run()
        inside += counted - before
    busy_s = time.thread_time() - begin_s
    stop.set()
    counter.join()
    assert inside > 0
    assert busy_s > 0.02  # the work is this thread's


def test_closing_twice_does_no_harm_and_running_then_is_an_error(path):
    engine = OpenVinoEngine(SEGMENT, path)
    x, y, z = image(), *np.zeros((2, 2, 32), np.float32)
    run = engine.bind([x], [y, z])
    engine.close()
    engine.close()
    run()  # a binding outlives its engine
    np.testing.assert_allclose(y, x @ WEIGHT, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'product' is closed"):
        engine.run({"x": image()})
    with pytest.raises(ValueError, match="'product' is closed"):
        engine.bind([x], [y, z])


def test_an_absent_runtime_names_the_command_that_installs_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'parnet-export\[openvino\]'"):
        OpenVinoEngine(SEGMENT, path)


def test_a_broken_runtime_is_no_absent_one(path, tmp_path, monkeypatch):
    (tmp_path / "openvino.py").write_text("import a_module_that_openvino_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_openvino_needs") as caught:
        OpenVinoEngine(SEGMENT, path)
    assert not isinstance(caught.value, MissingBackendError)


def test_files_that_cannot_be_loaded_are_named(tmp_path):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no graph")
    for file in (damaged, tmp_path / "missing.onnx"):
        with pytest.raises(InputError, match=rf"{file.name}: cannot be loaded by OpenVINO") as e:
            OpenVinoEngine(SEGMENT, file)
        assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("options", [{}, {"plan": "whole"}, {"lanes": 1}, {"timeout_s": 60}])
def test_a_session_computes_what_torch_and_onnx_runtime_compute(parnet, options):
    module, bundle = parnet
    x = np.random.default_rng(5).standard_normal((1, 3, 64, 64)).astype(np.float32)
    wanted = module(torch.from_numpy(x)).numpy()
    with (
        Session.open(bundle, engine="openvino", record=True, **options) as session,
        Session.open(bundle, plan="whole") as reference,
    ):
        for _ in range(3):
            (logits,) = session.run({"image": x}).values()
        (ours,) = reference.run({"image": x}).values()
        runs = {span.label for span in session.take_recording().spans if span.kind == "run"}
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * scale)
    np.testing.assert_allclose(logits, ours, atol=1e-4 * scale)
    segments = {segment.name for segment in bundle.stream_graph.segments}
    assert runs == ({"whole"} if options.get("plan") == "whole" else segments)


def test_lanes_of_one_core_are_pinned_and_wider_ones_are_not(parnet):
    _, bundle = parnet
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two processors")

    def seen(devices: str) -> set[int]:
        found: set[int] = set()
        with Session.open(bundle, devices, engine="openvino", plan="whole") as session:
            (engine,) = session._engines.values()
            bind = engine.bind

            def spy(reads, writes):
                run = bind(reads, writes)
                return lambda: (found.update(os.sched_getaffinity(0)), run())

            engine.bind = spy
            x = np.zeros((1, 3, 64, 64), np.float32)
            session.run({"image": x})
        return found

    assert seen(f"cpu:{cores[1]}") == {cores[1]}
    if cores[1] == cores[0] + 1:
        assert seen(f"cpu:{cores[0]}-{cores[1]}") == set(cores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tvm"}, r"engine 'tvm': is unknown\. Use one of onnxruntime, openvino"),
        ({"engine": "openvino", "plan": "auto"}, r"plan 'auto': measures with onnxruntime, not"),
    ],
)
def test_engines_that_cannot_be_used_are_one_message(parnet, options, message):
    with pytest.raises(InputError, match=message):
        Session.open(parnet[1], **options)


def test_a_forked_process_may_drop_the_session_of_its_parent(parnet):
    code = """if True:
        import gc, os, sys, numpy as np
        from parnet_engines.session import Session
        session = Session.open(sys.argv[1], engine="openvino")
        session.run({"image": np.zeros((1, 3, 64, 64), np.float32)})
        child = os.fork()
        if child == 0:
            session.close()
            session = None
            gc.collect()
            os._exit(7)
        _, status = os.waitpid(child, 0)
        session.close()
        print(os.waitstatus_to_exitcode(status))
    """
    command = [sys.executable, "-c", code, str(parnet[1].path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "7\n", "")


def test_a_signal_is_survived_after_another_thread_dropped_the_last_engine(parnet):
    code = """if True:
        import gc, signal, sys, threading, numpy as np
        from parnet_engines.session import Session
        sessions = [Session.open(sys.argv[1], engine="openvino")]
        sessions[0].run({"image": np.zeros((1, 3, 64, 64), np.float32)})
        def drop():
            sessions.pop().close()
            gc.collect()
        thread = threading.Thread(target=drop)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGINT)
    """
    command = [sys.executable, "-c", code, str(parnet[1].path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stderr.endswith("KeyboardInterrupt\n"), ended.returncode
