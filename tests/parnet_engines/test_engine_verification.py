"""What `parnet-export verify --devices` notes beside engines, and how they are found.

TensorRT and the GPU are stand-ins here: a plan is the name of its segment, torch computes it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

from parnet_engines import cli, cuda_session, tensorrt_run
from parnet_engines.cost_table import WHOLE
from parnet_engines.cuda_memory import array_at
from parnet_engines.device_verification import table, verify_on
from parnet_engines.engine_cache import onnx_path, recipe_of, sidecar_path, store
from parnet_engines.engine_sidecar import SCHEMA_VERSION, EngineTensor, Sidecar, read_sidecar
from parnet_engines.recording_driver import RecordingDriver
from parnet_engines.tensor_layout import TensorLayout
from parnet_engines.tensorrt_build import FORMATS
from parnet_engines.tensorrt_module import TensorRt
from parnet_engines.tensorrt_options import EngineOptions, target_of
from parnet_engines.torch_engine import TorchEngine
from parnet_export import console
from parnet_export.errors import CheckFailedError, InputError

VERSION = "10.9.0.34"
SEGMENTS = ["stem", "stream1", "stream2", "head"]


class ComputingTensorRt:
    """A TensorRT module whose engines compute, but for what `spoil` does to their results."""

    ILogger = SimpleNamespace(VERBOSE=0, INFO=1, ERROR=2, INTERNAL_ERROR=3)

    def __init__(self, bundle, driver):
        self.spoil = {}
        module = self

        class Context:
            def __init__(self, name):
                self.name = name
                self.addresses = {}

            def set_tensor_address(self, name, address):
                self.addresses[name] = address
                return True

            def execute_async_v3(self, stream):
                graph = bundle.stream_graph
                segment = graph[self.name] if self.name != WHOLE else graph
                named = SimpleNamespace(
                    name=self.name, inputs=segment.inputs, outputs=segment.outputs
                )
                engine = TorchEngine(named, onnx_path(bundle, self.name))
                reads, writes = (
                    [array_at(self.addresses[spec.name], spec.shape, spec.dtype) for spec in specs]
                    for specs in (segment.inputs, segment.outputs)
                )
                compute = engine.bind(reads, writes)

                def work():
                    compute()
                    for array in writes:
                        array[...] = module.spoil.get(self.name, lambda x: x)(array)

                driver.run(stream, self.name, work)
                return True

        class Engine:
            def __init__(self, plan):
                self.name = plan.decode()

            def get_tensor_format(self, _):
                return SimpleNamespace(name=FORMATS[TensorLayout.LINEAR])

            def create_execution_context(self):
                return Context(self.name)

        self.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=Engine)


@pytest.fixture
def bundle(make_two_streams, tmp_path):
    return make_two_streams(tmp_path)


def install(bundle, driver, names=(*SEGMENTS, WHOLE)):
    """Store engines as a build does; return their sidecars."""
    found = {}
    for name in names:
        target = target_of("tensorrt", driver.gpus()[0])
        recipe = recipe_of(bundle, name, target, EngineOptions(), VERSION)
        segment = bundle.stream_graph[name] if name != WHOLE else bundle.stream_graph
        tensors = tuple(
            EngineTensor(spec.name, spec.dtype, spec.shape, direction, "linear", 0)
            for direction, specs in (("input", segment.inputs), ("output", segment.outputs))
            for spec in specs
        )
        path = sidecar_path(bundle, target, name, EngineOptions())
        sidecar = Sidecar(SCHEMA_VERSION, recipe, "", "", 0, tensors, 1.0, "2026-01-01")
        store(path, name.encode(), sidecar)
        found[name] = path
    return found


@pytest.fixture
def driver(monkeypatch):
    found = RecordingDriver(1)
    monkeypatch.setattr(cuda_session, "open_driver", lambda _: found)
    return found


@pytest.fixture
def module(bundle, driver, monkeypatch):
    found = ComputingTensorRt(bundle, driver)
    monkeypatch.setattr(tensorrt_run, "choose_backend", lambda _: "tensorrt")
    monkeypatch.setattr(
        tensorrt_run, "import_tensorrt", lambda backend: TensorRt(backend, found, VERSION)
    )
    monkeypatch.setattr(tensorrt_run, "logger_of", lambda _: None)
    return found


@pytest.fixture
def sidecars(bundle, driver, module):
    return install(bundle, driver)


verify = partial(verify_on, devices="0", engine="tensorrt", samples=1, seed=0, save=None)


def verified(sidecars):
    return {name: read_sidecar(path).is_verified for name, path in sidecars.items()}


def test_engines_are_verified_by_running_them_on_a_device_and_not_before(bundle, sidecars, driver):
    assert not any(verified(sidecars).values())
    found = verify(bundle)
    assert found.passed
    assert found.problems == ()
    assert sorted(found.recorded) == sorted(map(str, sidecars.values()))
    assert all(verified(sidecars).values())
    rows = {row.subject: row for row in found.rows}
    for name, path in sidecars.items():
        noted = read_sidecar(path).checked
        assert (noted.gpu, noted.plan_sha256) == ("Recorder 0", read_sidecar(path).plan_sha256)
        assert (noted.error, noted.cosine) == (rows[name].relative_error, rows[name].cosine)
        assert (noted.limit, noted.least_cosine) == (1e-3, 0.99999)
        assert noted.samples > 1
        assert noted.when.endswith("+00:00")
    assert read_sidecar(sidecars[WHOLE]).checked.top1 == 1.0
    assert read_sidecar(sidecars["stem"]).checked.top1 is None
    assert "Noted in the sidecars of 5 engines." in table(found).caption
    assert driver.open_resources == {}


def test_an_engine_that_computes_something_else_is_marked_and_those_after_it_are_not(
    bundle, sidecars, module
):
    module.spoil["stem"] = lambda x: x * 1.1
    found = verify(bundle)
    with pytest.raises(CheckFailedError, match="stem"):
        found.require()
    # Nothing is known of those that were given a wrong tensor.
    assert verified(sidecars) == dict.fromkeys(SEGMENTS, False) | {WHOLE: True}
    assert {n for n, p in sidecars.items() if read_sidecar(p).checked} == {"stem", WHOLE}
    module.spoil.clear()
    assert verify(bundle).passed
    assert all(verified(sidecars).values())
    module.spoil["stream2"] = lambda x: np.full_like(x, np.nan)
    verify(bundle)
    assert verified(sidecars) == {
        "stem": True, "stream1": True, "stream2": False, "head": True, WHOLE: True,
    }  # fmt: skip
    assert read_sidecar(sidecars["stream2"]).checked.error is None


def test_a_changed_plan_file_is_no_longer_verified(bundle, sidecars, driver):
    verify(bundle)
    path = sidecars["stream1"]
    plan = path.with_name(read_sidecar(path).plan)
    plan.write_bytes(b"stream2")
    with pytest.raises(InputError, match="its digest differs"):  # it never runs
        verify(bundle)
    install(bundle, driver, ["stream1"])  # as `build` mends it
    assert verified(sidecars) == dict.fromkeys((*SEGMENTS, WHOLE), True) | {"stream1": False}


def test_a_bundle_that_nobody_may_write_is_verified_all_the_same(bundle, sidecars, monkeypatch):
    from parnet_engines import engine_verification

    def refuse(path, _):
        raise InputError(path, "cannot be written (Read-only file system)", "Copy the bundle")

    monkeypatch.setattr(engine_verification, "record_verification", refuse)
    found = verify(bundle)
    assert found.passed
    assert found.recorded == ()
    assert len(found.problems) == len(sidecars)
    assert "Read-only file system" in table(found).caption


def test_the_command_tells_which_sidecars_it_has_written(bundle, sidecars, capsys):
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli.register(app)
    arguments = ["--devices", "0", "--engine", "tensorrt", "--samples", "1", "--json"]
    console.run(app, ["verify", str(bundle.path), *arguments])
    noted = json.loads(capsys.readouterr().out)["devices"]
    assert noted["passed"]
    assert {Path(path) for path in noted["recorded"]} == set(sidecars.values())
    assert all(verified(sidecars).values())
