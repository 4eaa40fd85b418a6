"""`parnet-export build`, as `parnet-export` mounts it, on TensorRT-RTX without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from parnet_engines import build_command
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.tensorrt import build_progress, bundle_engines, engine_cache
from parnet_engines.tensorrt import module as tensorrt_module
from parnet_engines.tensorrt.build_place import choose_places
from parnet_engines.tensorrt.engine_sidecar import Verification, read_sidecar, record_verification
from parnet_engines.tensorrt.options import EngineOptions
from parnet_export import console, files

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")
pytestmark = pytest.mark.tensorrt

SEGMENTS = ["stem", "stream1", "stream2", "head"]
RTX = ("--backend", "tensorrt-rtx")


class Ran(NamedTuple):
    exit_code: int
    out: str
    err: str

    @property
    def statuses(self) -> dict[str, str]:
        return {e["segment"]: e["status"] for e in json.loads(self.out)["engines"]}

    @property
    def causes(self) -> dict[str, list[str]]:
        return {e["segment"]: e["causes"] for e in json.loads(self.out)["engines"]}


@pytest.fixture
def build(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    build_command.register(app)

    def run(bundle: Path, *arguments: object) -> Ran:
        exit_code = console.run(app, ["build", str(bundle), *map(str, arguments)])
        return Ran(exit_code, *capsys.readouterr())

    return run


@pytest.fixture
def bundle(make_two_streams, tmp_path):
    return make_two_streams(tmp_path).path


@pytest.fixture(scope="module")
def built_once(make_two_streams, tmp_path_factory):
    """A bundle whose engines are built; tests that change it take a copy."""
    made = make_two_streams(tmp_path_factory.mktemp("built"))
    places = choose_places("tensorrt-rtx", None, None)
    list(bundle_engines.build_engines(made, places, EngineOptions()))
    return made.path


@pytest.fixture
def built(built_once, tmp_path):
    return Path(shutil.copytree(built_once, tmp_path / "copy.bundle"))


def sidecar_of(bundle: Path, segment: str = "stream1") -> Path:
    (path,) = bundle.glob(f"engines/tensorrt-rtx-any/{segment}-*.json")
    return path


def plan_of(bundle: Path, segment: str = "stream1") -> Path:
    (path,) = bundle.glob(f"engines/tensorrt-rtx-any/{segment}-*.plan")
    return path


# --------------------------------------------------------------------------------- building


@needs_rtx
def test_every_segment_and_the_whole_graph_get_an_engine(build, bundle):
    ran = build(bundle, *RTX, "--json")
    assert ran.exit_code == 0, ran.err
    assert ran.statuses == dict.fromkeys([*SEGMENTS, WHOLE], "built")
    assert ran.causes == {name: ["there is none yet"] for name in [*SEGMENTS, WHOLE]}
    assert "built stem, stream1, stream2, head, whole: there is none yet" in ran.err
    for engine in json.loads(ran.out)["engines"]:
        sidecar = json.loads(Path(engine["sidecar_file"]).read_text())
        assert sidecar == engine["sidecar"]
        plan = Path(engine["sidecar_file"]).with_name(sidecar["plan"])
        assert files.sha256_of(plan) == sidecar["plan_sha256"]
        assert (engine["verified"], sidecar["audit"]) == (False, None)
    assert not list(bundle.rglob(f"*{files.TEMPORARY_SUFFIX}"))


@needs_rtx
def test_the_table_says_what_is_not_known_without_a_gpu(build, built):
    ran = build(built, *RTX)
    assert ran.exit_code == 0
    assert "for compute capability 8.0 and later by TensorRT-RTX" in " ".join(ran.out.split())
    assert ran.out.count("not audited") == len(SEGMENTS) + 1
    assert ran.out.count("unchanged") == len(SEGMENTS) + 1


@needs_rtx
def test_the_log_of_tensorrt_goes_to_a_file(build, bundle):
    ran = build(bundle, *RTX, "--no-whole")
    logs = list(bundle.glob("engines/*/*.log"))
    assert sorted(log.name.partition("-")[0] for log in logs) == sorted(SEGMENTS)
    assert all("INFO" in log.read_text() for log in logs)
    assert "INFO" not in ran.out + ran.err


@needs_rtx
def test_the_result_goes_to_a_file_too(build, built, tmp_path):
    ran = build(built, *RTX, "--json", "--output", tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == ran.out


@needs_rtx
def test_engines_to_compare_lie_side_by_side(build, make_two_streams, tmp_path):
    bundle = make_two_streams(tmp_path, precision="fp16").path
    for arguments in ((), ("--boundary", "vector"), ("--max-aux-streams", 2)):
        assert build(bundle, *RTX, *arguments).exit_code == 0
    names = sorted(path.stem for path in bundle.glob("engines/*/*.json"))
    assert [name for name in names if name.startswith("stream1")] == [
        "stream1-linear-aux0",
        "stream1-linear-aux2",
        "stream1-vector-aux0",
    ]
    # The whole graph has no boundary inside.
    assert [n for n in names if n.startswith("whole")] == [
        "whole-linear-aux2",
        "whole-linear-auxauto",
    ]
    vector, linear = (
        json.loads(next(bundle.glob(f"engines/*/stream1-{kind}-aux0.json")).read_text())["tensors"]
        for kind in ("vector", "linear")
    )
    # 12 channels take the memory of 16.
    assert {t["size_bytes"] for t in linear} == {12 * 64 * 64 * 2}
    assert {t["size_bytes"] for t in vector} == {16 * 64 * 64 * 2}


@needs_rtx
def test_a_dynamic_batch_needs_its_range(build, make_two_streams, tmp_path):
    bundle = make_two_streams(tmp_path, batch="batch").path
    refused = build(bundle, *RTX)
    assert refused.exit_code == 2
    assert "the bundle leaves batch open" in refused.err
    assert not (bundle / "engines").exists()
    assert build(bundle, *RTX, "--shapes", "1/2/8").exit_code == 0
    again = build(bundle, *RTX, "--shapes", "batch=1/2/4", "--json")
    assert again.causes["head"] == ["--shapes was batch=1/2/8 then, and is batch=1/2/4 now"]


# ------------------------------------------------------------------------------------ cache


def forbid_tensorrt(monkeypatch):
    def refuse(backend):
        raise AssertionError(f"{backend} was imported")

    monkeypatch.setattr(bundle_engines, "import_tensorrt", refuse)


@needs_rtx
def test_an_unchanged_build_imports_nothing_of_tensorrt(build, built, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    forbid_tensorrt(monkeypatch)
    ran = build(built, *RTX, "--json")
    assert ran.statuses == dict.fromkeys([*SEGMENTS, WHOLE], "unchanged")
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@needs_rtx
def test_an_unchanged_build_loads_no_runtime_at_all(built):
    code = (
        "import sys; from parnet_export.cli import app; from parnet_export import console;"
        f"code = console.run(app, ['build', {str(built)!r}, '--backend', 'tensorrt-rtx']);"
        "loaded = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx'} & set(sys.modules);"
        "sys.exit(f'{code} {loaded}' if code or loaded else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@needs_rtx
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--no-tf32"], "--tf32 was on then, and is off now"),
        (
            ["--optimization-level", 1],
            "--optimization-level was TensorRT's default then, and is 1 now",
        ),
        (["--workspace-mib", 64], "--workspace-mib was TensorRT's default then, and is 64 now"),
    ],
)
def test_a_changed_flag_is_named(build, built, arguments, cause):
    ran = build(built, *RTX, *arguments, "--json")
    assert ran.causes == {name: [cause] for name in [*SEGMENTS, WHOLE]}
    # What was built for the other flag is gone, and only that.
    assert len(list(built.glob("engines/*/*.plan"))) == len(SEGMENTS) + 1
    assert build(built, *RTX, *arguments, "--json").statuses["head"] == "unchanged"


@needs_rtx
def test_a_changed_version_is_named(build, built, monkeypatch):
    version = tensorrt_module.installed_version("tensorrt-rtx")
    monkeypatch.setattr(bundle_engines, "installed_version", lambda _: "9.9.9")
    ran = build(built, *RTX, "--json")
    assert ran.causes["stem"] == [f"TensorRT-RTX was {version} then, and is 9.9.9 now"]


@needs_rtx
def test_another_platform_is_named(build, built, monkeypatch):
    here = engine_cache.this_platform()
    monkeypatch.setattr(engine_cache, "this_platform", lambda: "windows-amd64")
    ran = build(built, *RTX, "--json")
    assert ran.causes["stem"] == [f"it was built on {here}, and this is windows-amd64"]


@needs_rtx
def test_a_changed_graph_is_named(build, built, make_two_streams, tmp_path):
    digest = json.loads(sidecar_of(built).read_text())["recipe"]["onnx_sha256"]
    other = make_two_streams(tmp_path / "other", seed=1).path
    shutil.copytree(built / "engines", other / "engines")
    ran = build(other, *RTX, "--json")
    (cause,) = ran.causes["stream1"]
    assert cause.startswith(f"its ONNX graph has changed (sha256 {digest[:12]} then, ")
    assert set(ran.statuses.values()) == {"built"}


@needs_rtx
def test_another_precision_is_named(build, built, make_two_streams, tmp_path):
    half = make_two_streams(tmp_path / "half", precision="fp16").path
    shutil.copytree(built / "engines", half / "engines")
    assert "it was fp32, and the bundle is fp16" in build(half, *RTX, "--json").causes["head"]


@needs_rtx
def test_another_target_is_named(build, built):
    engines = built / "engines"
    (engines / "tensorrt-rtx-any").rename(engines / "tensorrt-rtx-sm89")
    ran = build(built, *RTX, "--compute-capability", "8.9", "--json")
    assert ran.causes["stem"] == [
        "it was built for compute capability 8.0 and later, not for compute capability 8.9"
    ]


@needs_rtx
def test_an_engine_of_another_segment_is_named(build, built):
    sidecar_of(built, "stream2").replace(sidecar_of(built, "stream1"))
    assert "it is of segment 'stream2'" in build(built, *RTX, "--json").causes["stream1"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda b: flip_a_byte(plan_of(b)), "is damaged (its digest differs)"),
        (lambda b: os.truncate(plan_of(b), 100), "is damaged (its digest differs)"),
        (lambda b: plan_of(b).unlink(), "cannot be read (No such file or directory)"),
        (lambda b: flip_a_byte(sidecar_of(b)), "its sidecar is "),
        (lambda b: sidecar_of(b).write_text("{"), "its sidecar is damaged"),
        (
            lambda b: sidecar_of(b).write_text('{"schema_version": 99}'),
            "its sidecar has schema version 99",
        ),
        (lambda b: sidecar_of(b).unlink(), "there is none yet"),
    ],
)
def test_damage_is_named_and_mended(build, built, damage, cause):
    damage(built)
    ran = build(built, *RTX, "--json")
    assert ran.exit_code == 0
    assert cause in ran.causes["stream1"][0]
    assert [name for name, status in ran.statuses.items() if status == "built"] == ["stream1"]
    assert set(build(built, *RTX, "--json").statuses.values()) == {"unchanged"}
    plan_of(built)  # the damaged one is gone


# ---------------------------------------------------------------------- failing and stopping


@needs_rtx
def test_an_unsupported_operator_names_node_and_segment(build, make_two_streams, tmp_path):
    bundle = make_two_streams(tmp_path, odd_operator="Warp").path
    ran = build(bundle, *RTX)
    assert ran.exit_code == 2
    assert ran.out == ""
    assert "error: segment 'stream2' (stream2-" in ran.err
    assert "does not accept node 'b/odd' (Warp)" in ran.err
    log = next(bundle.glob("engines/*/stream2-*.log"))
    assert str(log) in ran.err
    assert "b/odd" in log.read_text()
    # What was built before it stays, nothing of it is left.
    assert {path.name.partition("-")[0] for path in bundle.glob("engines/*/*.plan")} == {
        "stem",
        "stream1",
    }
    assert not list(bundle.rglob(f"*{files.TEMPORARY_SUFFIX}"))


@needs_rtx
def test_a_failed_build_leaves_the_engine_before_it(build, built, make_two_streams, tmp_path):
    odd = make_two_streams(tmp_path / "odd", odd_operator="Warp").path
    shutil.copytree(built / "engines", odd / "engines")
    before = plan_of(odd, "stream2"), sidecar_of(odd, "stream2").read_bytes()
    assert build(odd, *RTX).exit_code == 2
    assert before == (plan_of(odd, "stream2"), sidecar_of(odd, "stream2").read_bytes())


@needs_rtx
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("repeatedly", [False, True])
def test_ctrl_c_cancels_a_build_and_leaves_nothing_half_written(
    build, bundle, monkeypatch, repeatedly
):
    started, sent = [], []
    real = build_progress.TerminalProgress.engine_start

    def start(self, name):
        started.append(name)
        real(self, name)

    def step(self, phase, number):
        if started[-1].startswith("stream1") and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # until it has been taken
                time.sleep(0.001)
            if repeatedly:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(build_progress.TerminalProgress, "engine_start", start)
    monkeypatch.setattr(build_progress.TerminalProgress, "step_complete", step)
    ran = build(bundle, *RTX)
    assert ran.exit_code == 130
    assert [name.partition(" ")[0] for name in started] == ["stem", "stream1"]
    assert (
        sorted(path.name.partition("-")[0] for path in bundle.glob("engines/*/*")) == ["stem"] * 3
    )
    monkeypatch.undo()
    again = build(bundle, *RTX, "--json")
    assert again.statuses == {"stem": "unchanged"} | dict.fromkeys([*SEGMENTS[1:], WHOLE], "built")


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([*RTX, "--timing-cache", "cache"], "--timing-cache: TensorRT-RTX has no timing cache"),
        ([*RTX, "--version-compatible"], "--version-compatible: TensorRT-RTX has no engines"),
        ([*RTX, "--boundary", "vector"], "there are no channels-last vectors for fp32"),
        ([*RTX, "--shapes", "1/2/3"], "--shapes: all shapes of the bundle are fixed"),
        ([*RTX, "--compute-capability", "9"], "'9' is no compute capability"),
        ([*RTX, "--compute-capability", "8.9", "--devices", "0"], "the devices tell it already"),
        ([*RTX, "--devices", "gpu one"], "devices 'gpu one': 'gpu one' is no GPU"),
        (
            ["--backend", "tensorrt", "--compute-capability", "8.9"],
            "needs the Python module 'tensorrt'",
        ),
        (["--backend", "tensorrt"], "Install it: pip install 'parnet-export[gpu]'"),
    ],
)
def test_bad_options_say_what_to_do(build, bundle, monkeypatch, tmp_path, arguments, problem):
    if not HAS_RTX and "tensorrt-rtx" in arguments:
        pytest.skip("tensorrt_rtx is not installed")
    monkeypatch.chdir(tmp_path)
    ran = build(bundle, *arguments)
    assert (ran.exit_code, ran.out) == (2, "")
    assert problem in ran.err
    assert ran.err.count("\n") == 1
    assert not (bundle / "engines").exists()


@needs_rtx
def test_an_architecture_that_tensorrt_rtx_lacks_is_refused(build, bundle):
    ran = build(bundle, *RTX, "--compute-capability", "9.0")
    assert ran.exit_code == 2
    assert "compute capability 9.0: TensorRT-RTX" in ran.err
    assert "8.0, 8.6, 8.9" in ran.err
    assert not list(bundle.rglob("*.plan"))


@needs_rtx
def test_a_machine_without_a_gpu_says_what_needs_none(build, bundle, monkeypatch):
    from parnet_engines.cuda import bindings as cuda_bindings
    from parnet_engines.cuda.driver import CudaError

    class Absent:
        def __init__(self):
            raise CudaError("cuInit", "no NVIDIA driver")

    monkeypatch.setattr(cuda_bindings, "BindingsDriver", Absent)
    ran = build(bundle, *RTX, "--devices", "0")
    assert ran.exit_code == 2
    assert "no NVIDIA driver that works" in ran.err
    assert "Use --backend tensorrt-rtx without --devices" in ran.err


# --------------------------------------------------------------------------------- verified


@needs_rtx
def test_a_verified_engine_stays_so_until_its_plan_changes(build, built):
    path = sidecar_of(built)
    digest = read_sidecar(path).plan_sha256
    checked = Verification("NVIDIA L4", digest, 2e-4, 1e-3, 0.99999, 0.9999, 4, "2026-01-02")
    record_verification(path, checked)
    record_verification(
        sidecar_of(built, "head"),
        replace(checked, plan_sha256=read_sidecar(sidecar_of(built, "head")).plan_sha256, error=1),
    )

    def verified(ran: Ran) -> list[str]:
        return [e["segment"] for e in json.loads(ran.out)["engines"] if e["verified"]]

    ran = build(built, *RTX)
    assert ran.out.count("yes, 2.0e-04") == 1
    assert ran.out.count("FAILED, 1.0e+00") == 1
    ran = build(built, *RTX, "--json")
    assert verified(ran) == ["stream1"]
    found = next(e for e in json.loads(ran.out)["engines"] if e["verified"])
    assert found["sidecar"]["verification"]["gpu"] == "NVIDIA L4"
    flip_a_byte(plan_of(built))
    ran = build(built, *RTX, "--json")
    assert ran.statuses["stream1"] == "built"
    assert verified(ran) == []
