from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.cuda.driver import Gpu
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.tensorrt.engine_sidecar import (
    SCHEMA_VERSION,
    Audit,
    EngineTensor,
    Recipe,
    Sidecar,
    Verification,
    misfit,
    read_sidecar,
    record_verification,
    write_sidecar,
)
from parnet_engines.tensorrt.options import EngineOptions, SizeRange, Target
from parnet_export.errors import InputError

A100 = Gpu(0, "NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30)
ADA = Gpu(1, "NVIDIA L4", (8, 9), 24 << 30)
TURING = Gpu(2, "Tesla T4", (7, 5), 16 << 30)
LINUX = "linux-x86_64"


def make(target=None, version="10.9.0.34", **options):
    recipe = Recipe(
        segment="stream1",
        onnx_sha256="ab" * 32,
        precision="fp16",
        version=version,
        platform=LINUX,
        target=target or Target("tensorrt", ("8.0",), A100.name),
        options=EngineOptions(sizes={"batch": SizeRange(1, 4, 8)}, **options),
    )
    return Sidecar(
        schema_version=SCHEMA_VERSION,
        recipe=recipe,
        plan="stream1-linear-aux0-0123456789abcdef.plan",
        plan_sha256="cd" * 32,
        plan_bytes=1000,
        tensors=(
            EngineTensor("x", "float32", ("batch", 3, 8, 8), "input", "linear", 6144),
            EngineTensor("y", "float16", ("batch", 12, 8, 8), "output", "hwc8", 16384),
        ),
        build_s=1.5,
        created="2026-01-01T00:00:00+00:00",
        command=("parnet-export", "build"),
        driver="570.86.10, CUDA 12.8",
        audit=Audit({"fp16": 20, "fp32": 3}, ("stray",)),
        verification=Verification(
            A100.name, "cd" * 32, 1e-3, 1e-2, 0.9999, 0.999, 9, "2026-01-01T00:00:00+00:00"
        ),
    )


def test_a_sidecar_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "engine.json"
    written = write_sidecar(path, make())
    assert read_sidecar(path) == written
    assert replace(written, sidecar_sha256="0" * 64) == make()
    assert [t.tensor_layout for t in written.tensors] == [TensorLayout.LINEAR, TensorLayout.HWC8]
    assert json.loads(path.read_text())["recipe"]["options"]["sizes"]["batch"]["largest"] == 8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_changed_byte_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.json"
    write_sidecar(path, make())
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
    content[at] = new
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"changed\.json"):
        read_sidecar(path)


def test_what_cannot_be_read_names_the_file_and_the_command(tmp_path):
    path = tmp_path / "engine.json"
    with pytest.raises(InputError, match=r"cannot be read .* `parnet-export build`"):
        read_sidecar(path)
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(InputError, match=r"schema version 2; this version reads up to 1"):
        read_sidecar(path)


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({}, True),
        ({"top1": 1.0}, True),
        ({"top1": 0.5}, False),
        ({"top1": 0.5, "least_top1": 0.4}, True),
        ({"cosine": 0.998}, False),
        ({"cosine": math.nan}, False),
        ({"error": 2e-2}, False),
        ({"error": math.nan}, False),
        ({"error": math.inf}, False),
    ],
)
def test_an_engine_is_verified_only_by_a_check_that_holds(tmp_path, figures, holds):
    path = tmp_path / "engine.json"
    unchecked = write_sidecar(path, replace(make(), verification=None))
    assert not unchecked.is_verified
    checked = Verification(
        ADA.name, "cd" * 32, 2e-3, 1e-2, 0.9999, 0.999, 4, "2026-01-02T00:00:00+00:00"
    )
    found = record_verification(path, replace(checked, **figures))
    assert found.is_verified is holds
    assert found.checked == found.verification
    assert read_sidecar(path) == found


def test_a_check_of_another_plan_says_nothing_about_this_one(tmp_path):
    path = tmp_path / "engine.json"
    written = write_sidecar(path, make())
    stale = replace(make().verification, plan_sha256="ef" * 32, when="2026-01-03T00:00:00+00:00")
    assert record_verification(path, stale) == written == read_sidecar(path)
    rebuilt = replace(written, plan_sha256="ef" * 32)
    assert written.is_verified
    assert (rebuilt.is_verified, rebuilt.checked) == (False, None)


# ----------------------------------------------------------------------------------- fitting


def why(sidecar, *, version="10.9.0.34", platform=LINUX, gpu=A100):
    return misfit(sidecar, version=version, platform=platform, gpu=gpu)


def test_an_engine_fits_where_it_was_built():
    assert why(make()) == ""
    assert why(make(), gpu=None) == ""
    assert make().built_for == (
        "built for NVIDIA A100-SXM4-80GB (compute capability 8.0) by TensorRT 10.9.0.34 "
        "on linux-x86_64"
    )


def test_an_engine_of_another_architecture_says_what_is_here():
    assert why(make(), gpu=ADA) == "device 1 is NVIDIA L4 (compute capability 8.9)"


def test_an_engine_of_another_version_or_platform_says_what_is_here():
    assert why(make(), version="11.0.0.1") == "TensorRT 11.0.0.1 is installed here"
    assert why(make(), platform="windows-amd64") == "this is windows-amd64"


@pytest.mark.parametrize(
    ("version", "fits"),
    [("10.9.0.34", True), ("10.12.0.1", True), ("11.0.0.1", True), ("10.8.0.1", False)],
)
def test_later_versions_run_an_engine_that_was_built_for_them(version, fits):
    assert (why(make(version_compatible=True), version=version) == "") is fits


@pytest.mark.parametrize(
    ("capabilities", "gpu", "fits"),
    [
        ((), A100, True),
        ((), ADA, True),
        ((), TURING, False),
        (("7.5",), TURING, True),
        (("8.0", "8.9"), ADA, True),
        (("8.0",), ADA, False),
    ],
)
def test_engines_of_tensorrt_rtx_fit_the_architectures_they_name(capabilities, gpu, fits):
    sidecar = make(Target("tensorrt-rtx", capabilities), "1.7.1.116")
    assert (why(sidecar, version="1.7.1.116", gpu=gpu) == "") is fits
