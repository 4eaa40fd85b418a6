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

from parnet_engines import cli
from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.boundary import BOUNDARIES, choose_layouts
from parnet_engines.cuda.memory import array_at
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.proof.device_verification import table, verify_on
from parnet_engines.runtimes import ort_cuda
from parnet_engines.runtimes.torch_engine import TorchEngine
from parnet_engines.session import Session
from parnet_engines.tensorrt import engine_finder
from parnet_engines.tensorrt import module as tensorrt_module
from parnet_engines.tensorrt import run as tensorrt_run
from parnet_engines.tensorrt.build import FORMATS
from parnet_engines.tensorrt.bundle_engines import segment_of
from parnet_engines.tensorrt.engine_cache import onnx_path, recipe_of, sidecar_path, store
from parnet_engines.tensorrt.engine_sidecar import (
    SCHEMA_VERSION,
    EngineTensor,
    Sidecar,
    read_sidecar,
)
from parnet_engines.tensorrt.module import TensorRt
from parnet_engines.tensorrt.options import EngineOptions, target_of
from parnet_export import console
from parnet_export.errors import CheckFailedError, InputError

VERSION = "10.9.0.34"
SEGMENTS = ["stem", "stream1", "stream2", "head"]


def to_hwc8(array: np.ndarray) -> np.ndarray:
    """Lay an image out as TensorRT's HWC8 does: pixel by pixel, channels padded to eights."""
    pixels = np.moveaxis(array, 1, -1)
    padding = [(0, 0)] * 3 + [(0, -array.shape[1] % 8)]
    return np.ascontiguousarray(np.pad(pixels, padding))


class ComputingTensorRt:
    """A TensorRT module whose engines compute, but for what `spoil` does to their results.

    A plan is the engine's name and its boundary.
    """

    ILogger = SimpleNamespace(VERBOSE=0, INFO=1, ERROR=2, INTERNAL_ERROR=3)
    ProfilingVerbosity = SimpleNamespace(LAYER_NAMES_ONLY=1)

    def __init__(self, bundle, driver):
        self.spoil = {}
        self.loaded = []
        module = self

        class Context:
            def __init__(self, name, layouts):
                self.segment = segment_of(bundle, name)
                self.layouts = layouts
                self.addresses = {}

            def set_tensor_address(self, name, address):
                self.addresses[name] = address
                return True

            def memory(self, spec):
                size_bytes = self.layouts[spec.name].size_bytes(spec.shape, spec.dtype)
                return array_at(self.addresses[spec.name], (size_bytes,), "uint8")

            def read(self, spec):
                values = self.memory(spec).view(spec.dtype)
                if self.layouts[spec.name] is TensorLayout.LINEAR:
                    return values.reshape(spec.shape)
                _, channels, height, width = spec.shape
                pixels = values.reshape(1, height, width, -1)[..., :channels]
                return np.moveaxis(pixels, -1, 1)

            def write(self, spec, array):
                if self.layouts[spec.name] is not TensorLayout.LINEAR:
                    array = to_hwc8(array)
                self.memory(spec)[...] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

            def work(self):
                segment = self.segment
                engine = TorchEngine(segment, onnx_path(bundle, segment.name))
                found = engine.run({spec.name: self.read(spec) for spec in segment.inputs})
                for spec in segment.outputs:
                    change = module.spoil.get(segment.name, lambda x: x)
                    self.write(spec, change(found[spec.name]))

            def execute_async_v3(self, stream):
                driver.run(stream, self.segment.name, self.work)
                return True

        class Engine:
            def __init__(self, plan):
                module.loaded.append(plan.decode())
                self.name, boundary = plan.decode().split()
                self.layouts = layouts_of(bundle, self.name, boundary)

            def get_tensor_format(self, name):
                return SimpleNamespace(name=FORMATS[self.layouts[name]])

            def create_execution_context(self):
                return Context(self.name, self.layouts)

        self.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=Engine)


def layouts_of(bundle, name, boundary):
    segment, graph = segment_of(bundle, name), bundle.stream_graph
    outside = [spec.name for spec in (*graph.inputs, *graph.outputs)]
    return choose_layouts((*segment.inputs, *segment.outputs), boundary, outside)


@pytest.fixture
def bundle(make_two_streams, tmp_path):
    return make_two_streams(tmp_path)


def install(bundle, driver, names=(*SEGMENTS, WHOLE), boundary="linear", aux=None):
    """Store engines as a build does; return their sidecars."""
    found = {}
    options = EngineOptions(boundary=boundary, max_aux_streams=aux)
    for name in names:
        target = target_of("tensorrt", driver.gpus()[0])
        recipe = recipe_of(bundle, name, target, options, VERSION)
        segment = segment_of(bundle, name)
        layouts = layouts_of(bundle, name, boundary)
        tensors = tuple(
            EngineTensor(s.name, s.dtype, s.shape, direction, layouts[s.name].label, 0)
            for direction, specs in (("input", segment.inputs), ("output", segment.outputs))
            for s in specs
        )
        path = sidecar_path(bundle, target, name, options)
        sidecar = Sidecar(SCHEMA_VERSION, recipe, "", "", 0, tensors, 1.0, "2026-01-01")
        store(path, f"{name} {boundary}".encode(), sidecar)
        found[name] = path
    return found


@pytest.fixture
def driver(monkeypatch):
    found = RecordingDriver(2)
    monkeypatch.setattr(cuda_session, "open_driver", lambda _: found)
    return found


@pytest.fixture
def module(bundle, driver, monkeypatch):
    found = ComputingTensorRt(bundle, driver)
    monkeypatch.setattr(engine_finder, "choose_backend", lambda _: "tensorrt")
    monkeypatch.setattr(
        tensorrt_run, "import_tensorrt", lambda backend: TensorRt(backend, found, VERSION)
    )
    monkeypatch.setattr(tensorrt_module, "logger_of", lambda _: None)
    return found


@pytest.fixture
def sidecars(bundle, driver, module):
    return install(bundle, driver)


verify = partial(verify_on, devices="0", engine="tensorrt", samples=1, seed=0, save=None)


def run_verify(bundle, *arguments):
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli.register(app)
    options = ["--samples", "1", *map(str, arguments)]
    return console.run(app, ["verify", str(bundle.path), *options])


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
    plan.write_bytes(b"stream2 linear")
    with pytest.raises(InputError, match="its digest differs"):  # it never runs
        verify(bundle)
    install(bundle, driver, ["stream1"])  # as `build` mends it
    assert verified(sidecars) == dict.fromkeys((*SEGMENTS, WHOLE), True) | {"stream1": False}


def test_a_bundle_that_nobody_may_write_is_verified_all_the_same(bundle, sidecars, monkeypatch):
    from parnet_engines.proof import engine_verification

    def refuse(path, _):
        raise InputError(path, "cannot be written (Read-only file system)", "Copy the bundle")

    monkeypatch.setattr(engine_verification, "record_verification", refuse)
    found = verify(bundle)
    assert found.passed
    assert found.recorded == ()
    assert len(found.problems) == len(sidecars)
    assert "Read-only file system" in table(found).caption


def test_the_command_tells_which_sidecars_it_has_written(bundle, sidecars, capsys):
    run_verify(bundle, "--devices", 0, "--engine", "tensorrt", "--json")
    noted = json.loads(capsys.readouterr().out)["devices"]
    assert noted["passed"]
    assert {Path(path) for path in noted["recorded"]} == set(sidecars.values())
    assert all(verified(sidecars).values())


# ------------------------------------------------------------------------ auxiliary streams


def test_engines_with_auxiliary_streams_are_verified_by_their_number(
    bundle, sidecars, driver, capsys
):
    with_streams = install(bundle, driver, aux=2)
    assert set(with_streams.values()).isdisjoint(sidecars.values())
    run_verify(bundle, "--devices", 0, "--max-aux-streams", 2, "--json")
    noted = json.loads(capsys.readouterr().out)["devices"]
    assert (noted["engine"], noted["passed"]) == ("tensorrt", True)
    assert set(map(Path, noted["recorded"])) == set(with_streams.values())
    assert all(verified(with_streams).values())
    assert not any(verified(sidecars).values())
    # The others are still those that count without a word.
    run_verify(bundle, "--devices", 0, "--engine", "tensorrt")
    assert all(verified(sidecars).values())


def test_saved_results_are_those_of_the_engines_that_were_asked_for(
    bundle, sidecars, driver, module, tmp_path
):
    pytest.importorskip("polygraphy")
    install(bundle, driver, aux=2)
    with_streams = install(bundle, driver, ["stem"], aux=2)
    damaged = read_sidecar(sidecars["stem"]).plan
    sidecars["stem"].with_name(damaged).write_bytes(b"never to be loaded")
    found = verify(bundle, max_aux_streams=2, save=tmp_path / "saved")
    assert found.polygraphy.passed
    assert str(with_streams["stem"]) in found.recorded


def test_engines_that_were_not_built_with_auxiliary_streams_name_the_command(
    bundle, sidecars, capsys
):
    assert run_verify(bundle, "--devices", 0, "--max-aux-streams", 3) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds no TensorRT engine of 'stem'" in said
    assert f"parnet-export build {bundle.path} --backend tensorrt" in said
    assert "--max-aux-streams 3" in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-aux-streams", 2], "is for engines on devices, and none are named"),
        (["--devices", "cpu", "--max-aux-streams", 2], "engines on the CPU do not have"),
        (["--devices", 0, "--engine", "torch", "--max-aux-streams", 0], "engines of torch do not"),
    ],
)
def test_auxiliary_streams_where_there_are_none_are_refused(
    bundle, sidecars, capsys, arguments, problem
):
    assert run_verify(bundle, *arguments) == 2
    assert problem in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------- boundaries


@pytest.fixture
def half(make_two_streams, tmp_path, driver, monkeypatch):
    """A bundle in half precision, with engines for both boundaries."""
    made = make_two_streams(tmp_path / "half", precision="fp16")
    found = ComputingTensorRt(made, driver)
    monkeypatch.setattr(engine_finder, "choose_backend", lambda _: "tensorrt")
    monkeypatch.setattr(
        tensorrt_run, "import_tensorrt", lambda backend: TensorRt(backend, found, VERSION)
    )
    monkeypatch.setattr(tensorrt_module, "logger_of", lambda _: None)
    install(made, driver)
    return made, found, install(made, driver, SEGMENTS, "vector")


IMAGE = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("devices", ["0", "0,0", "0,1"])
def test_vectors_between_engines_compute_the_same_and_take_the_memory_that_they_say(
    half, driver, devices
):
    bundle, module, _ = half
    results, sizes, copied = {}, {}, {}
    for boundary in BOUNDARIES:
        module.loaded.clear()
        before = len(driver.calls)
        with Session.open(
            bundle, devices, plan="authors", engine="tensorrt", boundary=boundary
        ) as session:
            results[boundary] = session.run({"image": IMAGE})["logits"]
            (host,) = next(iter(session._slots)).hosts.values()
            sizes[boundary] = {r.size_bytes for r in host.regions.values() if len(r.shape) == 4}
        calls = driver.calls[before:]
        verbs = {"copy_peer", "copy_on_device"}
        copied[boundary] = {call.operands[3] for call in calls if call.verb in verbs}
        assert {plan.split()[1] for plan in module.loaded} == {boundary}
    # Runtimes may choose other kernels for memory that lies otherwise; a wrong layout is far off.
    np.testing.assert_allclose(results["linear"], results["vector"], rtol=1e-3, atol=1e-4)
    image_bytes, pixels = 3 * 64 * 64 * 4, 64 * 64 * 2
    # 12 channels take the memory of 16 in vectors of 8; the network's input stays linear.
    assert sizes["linear"] == {image_bytes, 12 * pixels}
    assert sizes["vector"] == {image_bytes, 16 * pixels}
    if devices != "0":
        assert copied["linear"] - {image_bytes} == {12 * pixels}
        assert copied["vector"] - {image_bytes} == {16 * pixels}


def test_verify_takes_the_engines_of_the_boundary_and_marks_those(half, driver):
    bundle, _, vectors = half
    linear = {name: path.with_name(path.name.replace("vector", "linear"))
              for name, path in vectors.items()}  # fmt: skip
    found = verify(bundle, boundary="vector")
    assert found.passed
    assert all(verified(vectors).values())
    assert not any(verified(linear).values())
    assert verify(bundle).passed  # without a word it is the linear ones
    assert all(verified(linear).values())


def test_boundaries_that_cannot_be_are_refused(bundle, sidecars, half):
    with pytest.raises(InputError, match=r"no channels-last vectors for fp32\. Use linear"):
        Session.open(bundle, "0", engine="tensorrt", boundary="vector")
    with pytest.raises(
        InputError, match=r"boundary 'diagonal'.* is unknown\. Use linear or vector"
    ):
        Session.open(bundle, "0", engine="tensorrt", boundary="diagonal")
    with pytest.raises(InputError, match="is between engines on GPUs, and these are on the CPU"):
        Session.open(bundle, "cpu", boundary="linear")
    names = [segment.name for segment in half[0].stream_graph.segments]
    with pytest.raises(InputError, match="takes and gives tensors row by row only"):
        ort_cuda.load_engines(half[0], names, RecordingDriver(), 0, boundary="vector")
