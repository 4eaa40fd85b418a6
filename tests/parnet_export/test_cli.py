from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from parnet_export import console, pipeline
from parnet_export.bundle import open_bundle
from parnet_export.cli import app
from parnet_export.fuse import FusionProof
from parnet_export.models.parnet import ParNetConfig

CONFIG = ParNetConfig((8, 16, 32), (1, 1, 2), 24, num_classes=10, variant="cifar")
SEGMENTS = ["stem1", "stem2", "stream1", "stream2", "stream3", "fusion", "head"]


@pytest.fixture
def cli(capsys):
    """Run a command in this process; returns exit code, standard output and standard error."""

    def run(*arguments):
        code = console.run(app, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_parnet):
    """A small network in the official file layout."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth.tar"
    network = make_parnet(CONFIG, seed=1)
    state = network.state_dict()
    torch.save(
        {
            "epoch": 3,
            "arch": "simplenet_repvgg",
            "state_dict": state,
            "args": argparse.Namespace(lr=0.1),
            "version": 2,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def made_bundle(checkpoint, tmp_path_factory):
    """A bundle of the small network with a dynamic batch."""
    path = tmp_path_factory.mktemp("bundle") / "small.bundle"
    arguments = ["split-streams", str(checkpoint), "--batch", "dynamic", "--out", str(path)]
    assert console.run(app, arguments) == 0
    return path


@pytest.fixture
def bundle(made_bundle, tmp_path):
    """A copy of the bundle that a test may change."""
    return shutil.copytree(made_bundle, tmp_path / "small.bundle")


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("program", ["parnet-export", "parnet-bench"])
def test_help_loads_neither_torch_nor_a_runtime(program):
    module = {"parnet-export": "parnet_export.cli", "parnet-bench": "parnet_bench.cli"}[program]
    code = (
        f"import sys\nfrom {module} import app\nfrom parnet_export import console\n"
        "code = console.run(app, ['--help'])\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'tensorrt'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"
    assert "latency" in done.stdout or "fuse" in done.stdout


@pytest.mark.parametrize("package", ["parnet_export", "parnet_engines", "parnet_bench"])
def test_importing_a_package_loads_neither_torch_nor_a_runtime(package):
    code = (
        f"import sys, {package}\n"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_from_a_checkpoint_to_a_verified_bundle(cli, checkpoint, tmp_path):
    weights = shutil.copy(checkpoint, tmp_path)
    code, out, _ = cli("fuse", "--ckpt", weights)
    fused = tmp_path / "small.fused.safetensors"
    assert code == 0
    assert fused.is_file()
    assert "silu (detected: " in out

    code, out, _ = cli("split-streams", fused)
    bundle = tmp_path / "small.bundle"
    assert code == 0
    assert [s.name for s in open_bundle(bundle).stream_graph.segments] == SEGMENTS

    code, out, _ = cli("inspect", bundle, "--svg", tmp_path / "graph.svg")
    assert code == 0
    assert all(name in out for name in SEGMENTS)
    assert (tmp_path / "graph.svg").read_text().startswith("<svg")

    code, out, _ = cli("verify", bundle, "--ckpt", weights)
    assert code == 0
    assert "FAILED" not in out


def test_a_bundles_outputs_are_the_checkpoints(made_bundle, checkpoint, make_parnet):
    network = make_parnet(CONFIG, seed=1)
    whole = onnxruntime.InferenceSession(open_bundle(made_bundle).whole_path)
    for batch in (1, 2, 7):
        image = torch.randn(batch, 3, 32, 32)
        expected = network(image).numpy()
        actual = whole.run(None, {"image": image.numpy()})[0]
        assert np.abs(actual - expected).max() / np.abs(expected).max() <= 1e-4


def test_both_forms_split_into_the_same_seven_segments(cli, checkpoint, tmp_path):
    for level in ("none", "repvgg", "full"):
        path = tmp_path / f"{level}.bundle"
        code, out, _ = cli("split-streams", checkpoint, "--level", level, "--out", path, "--json")
        assert code == 0
        assert [segment["name"] for segment in json.loads(out)["segments"]] == SEGMENTS
        assert open_bundle(path).manifest.provenance.level == level


def test_half_precision_bundles_keep_float32_at_their_ends(cli, checkpoint, tmp_path):
    path = tmp_path / "half.bundle"
    assert cli("split-streams", checkpoint, "--precision", "fp16", "--out", path)[0] == 0
    bundle = open_bundle(path)
    assert bundle.manifest.precision == "fp16"
    assert {t.dtype for t in (*bundle.stream_graph.inputs, *bundle.stream_graph.outputs)} == {
        "float32"
    }
    crossing = {edge.tensor.dtype for edge in bundle.stream_graph.edges}
    assert "float16" in crossing


def test_an_onnx_file_is_a_source_too(cli, made_bundle, tmp_path):
    source = tmp_path / "other.onnx"
    whole = onnx.load(open_bundle(made_bundle).whole_path)
    onnx.save(whole, source)
    code, _, _ = cli("split-streams", source)
    assert code == 0
    bundle = open_bundle(tmp_path / "other.bundle")
    assert [segment.name for segment in bundle.stream_graph.segments] == SEGMENTS
    assert bundle.manifest.provenance.weights == "unknown"


@pytest.mark.parametrize(
    "option",
    [
        ("--batch", 2),
        ("--level", "full"),
        ("--activation", "relu"),
        ("--use-ema",),
        ("--seed", 7),
    ],
)
def test_options_that_a_graph_fixes_are_refused_with_an_onnx_file(cli, option, tmp_path):
    code, _, err = cli("split-streams", tmp_path / "any.onnx", *option)
    assert code == 2
    assert err.startswith(f"error: {option[0]}: ")


def test_a_catalogue_name_is_a_source_and_labelled_random(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("fuse", "--ckpt", "parnet-cifar-1.3m", "--seed", 4)
    assert code == 0
    assert "(random weights)" in out
    code, out, _ = cli("split-streams", "parnet-cifar-1.3m.fused.safetensors")
    assert code == 0
    assert "(random weights)" in " ".join(out.split())
    for command in ("inspect", "verify"):
        shown = cli(command, "parnet-cifar-1.3m.bundle")[1]
        assert "(random weights)" in " ".join(shown.split())
    svg = tmp_path / "graph.svg"
    cli("inspect", "parnet-cifar-1.3m.bundle", "--svg", svg)
    assert "random weights" in svg.read_text()
    assert open_bundle(tmp_path / "parnet-cifar-1.3m.bundle").manifest.provenance.seed == 4


def test_verify_with_other_weights_fails(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("split-streams", "parnet-cifar-1.3m", "--seed", 1)[0] == 0
    arguments = ("verify", "parnet-cifar-1.3m.bundle", "--ckpt", "parnet-cifar-1.3m")
    assert cli(*arguments, "--seed", 1)[0] == 0
    code, out, err = cli(*arguments, "--seed", 2)
    assert code == 1
    assert "FAILED" in out
    assert err.startswith("error: ")


def test_a_network_without_parallel_branches_stays_whole_and_says_so(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("split-streams", "resnet18", "--resolution", 64)
    assert code == 0
    bundle = open_bundle(tmp_path / "resnet18.bundle")
    assert [segment.name for segment in bundle.stream_graph.segments] == ["trunk"]
    assert "no parallel branch" in err


def test_json_is_alone_on_standard_output_and_equals_the_written_file(cli, bundle, tmp_path):
    written = tmp_path / "result.json"
    code, out, _ = cli("inspect", bundle, "--json", "--output", written)
    assert code == 0
    result = json.loads(out)
    assert json.loads(written.read_text()) == result
    assert [segment["name"] for segment in result["segments"]] == SEGMENTS


def test_models_lists_the_catalogue(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PARNET_EXPORT_CACHE", str(tmp_path))
    code, out, _ = cli("models")
    assert code == 0
    code, as_json, _ = cli("models", "--json")
    names = [row["name"] for row in json.loads(as_json)]
    assert {"parnet-s", "parnet-xl", "parnet-cifar-35m", "resnet50"} <= set(names)
    assert all(name in out for name in names)
    assert "reconstruction" in out


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_a_fusion_that_is_not_proven_is_not_written(
    cli, checkpoint, tmp_path, monkeypatch, json_flag
):
    def fails(*_arguments, **_options):
        return FusionProof(float64_error=3e-3, float32_error=3e-3)

    monkeypatch.setattr(pipeline, "prove_fusion", fails)
    out_file = tmp_path / "kept.safetensors"
    out_file.write_bytes(b"earlier")
    code, out, err = cli("fuse", "--ckpt", checkpoint, "--out", out_file, *json_flag)
    assert code == 1
    assert out == ""
    assert "3.0e-03" in err
    assert out_file.read_bytes() == b"earlier"
    assert snapshot(tmp_path).keys() == {"kept.safetensors"}


def bad_files(folder, good):
    """Write files that are no checkpoint; yields name, file and what the message says."""
    content = good.read_bytes()
    for name, damaged, says in (
        ("missing.pth", None, "does not exist"),
        ("empty.pth", b"", "empty"),
        ("truncated.pth", content[: len(content) // 2], "truncated|damaged|cut"),
        ("random.pth", np.random.default_rng(0).bytes(5000), "no checkpoint|not a|neither"),
        ("page.pth", b"<!DOCTYPE html><html></html>", "web page"),
    ):
        path = folder / name
        if damaged is not None:
            path.write_bytes(damaged)
        yield path, says


def test_bad_checkpoints_are_one_message_and_leave_earlier_outputs(cli, checkpoint, tmp_path):
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"earlier")
    for path, _says in bad_files(tmp_path, checkpoint):
        for command in (
            ("fuse", "--ckpt", path, "--out", kept),
            ("split-streams", path, "--out", tmp_path / "new.bundle"),
        ):
            code, out, err = cli(*command)
            assert code == 2, path
            assert out == ""
            assert err.count("\n") == 1, err
            assert err.startswith(f"error: {path}: ")
            assert "Traceback" not in err
    assert kept.read_bytes() == b"earlier"
    assert not (tmp_path / "new.bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--resolution", 30), "--resolution: 30 is not a multiple of 4"),
        (("--batch", "many"), "--batch: 'many' is not a number of images"),
        (("--batch", 0), "--batch: 0"),
        (("--arch", "parnet-l"), "not the ParNet-L that --arch asks for"),
        (("--arch", "parnet-7"), "--arch: 'parnet-7'"),
    ],
)
def test_bad_options_are_one_message_and_leave_the_bundle(cli, checkpoint, bundle, arguments, says):
    before = snapshot(bundle)
    code, out, err = cli("split-streams", checkpoint, "--out", bundle, *arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert snapshot(bundle) == before


def test_a_changed_byte_in_any_file_of_a_bundle_is_found(cli, bundle):
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for command in ("inspect", "verify"):
            code, _, err = cli(command, bundle)
            assert code == 2, path.name
            assert err.startswith("error: ")
            assert err.count("\n") == 1
        path.write_bytes(content)
    assert cli("inspect", bundle)[0] == 0


def test_an_unwritable_place_is_one_message(cli, checkpoint, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for command in (
        ("fuse", "--ckpt", checkpoint, "--out", file / "x.safetensors"),
        ("split-streams", checkpoint, "--out", file / "x.bundle"),
    ):
        code, _, err = cli(*command)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert file.read_text() == "not a folder"


def test_unknown_options_and_levels_are_usage_errors(cli, checkpoint):
    assert cli("fuse", "--ckpt", checkpoint, "--level", "most")[0] == 2
    assert cli("fuse", "--nonsense")[0] == 2
    assert cli("split-streams", checkpoint, "--precision", "fp8")[0] == 2


@pytest.mark.parametrize("level", ["repvgg", "full"])
def test_a_fused_file_can_be_fused_again(cli, checkpoint, tmp_path, level):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert cli("fuse", "--ckpt", checkpoint, "--level", level, "--out", first)[0] == 0
    assert cli("fuse", "--ckpt", first, "--level", level, "--out", second)[0] == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_fused_file_is_not_split_at_another_level(cli, checkpoint, tmp_path):
    fused = tmp_path / "a.safetensors"
    assert cli("fuse", "--ckpt", checkpoint, "--out", fused)[0] == 0
    code, _, err = cli("split-streams", fused, "--level", "none", "--out", tmp_path / "b")
    assert code == 2
    assert "already fused at level full" in err
    assert not (tmp_path / "b").exists()


def test_a_result_is_not_written_over_its_source_or_another_result(cli, checkpoint, tmp_path):
    mine = tmp_path / "mine.pth.tar"
    shutil.copy(checkpoint, mine)
    before = mine.read_bytes()
    assert cli("fuse", "--ckpt", mine, "--out", mine)[0] == 2
    assert cli("fuse", "--ckpt", mine, "--out", tmp_path / "x", "--output", tmp_path / "x")[0] == 2
    assert mine.read_bytes() == before
    assert snapshot(tmp_path).keys() == {"mine.pth.tar"}


def test_a_bad_place_for_the_json_is_found_before_anything_is_written(
    cli, checkpoint, bundle, tmp_path
):
    nowhere = tmp_path / "nowhere" / "x.json"
    before = snapshot(bundle)
    fused = tmp_path / "w.safetensors"
    assert cli("fuse", "--ckpt", checkpoint, "--out", fused, "--output", nowhere)[0] == 2
    assert not fused.exists()
    assert cli("split-streams", checkpoint, "--out", bundle, "--output", nowhere)[0] == 2
    assert snapshot(bundle) == before


def test_names_that_no_file_system_takes_are_one_message(cli, checkpoint, tmp_path):
    endless = tmp_path / ("x" * 300)
    for command in (
        ("fuse", "--ckpt", endless),
        ("fuse", "--ckpt", checkpoint, "--out", endless),
        ("split-streams", checkpoint, "--out", endless),
        ("inspect", endless),
        ("models", "--output", endless),
    ):
        code, out, err = cli(*command)
        assert code == 2, command
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_a_folder_with_another_programs_manifest_is_left_alone(cli, checkpoint, tmp_path):
    manifest = tmp_path / "bundle.json"
    manifest.write_text('{"name": "webpack"}')
    code, _, err = cli("split-streams", checkpoint, "--out", tmp_path)
    assert code == 2
    assert "not ours" in err
    assert snapshot(tmp_path) == {"bundle.json": b'{"name": "webpack"}'}


def test_catalogue_names_take_any_case_and_separator(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("fuse", "--ckpt", "ParNet_CIFAR-1.3M", "--out", "x.safetensors")[0] == 0


def test_seeds_out_of_range_are_usage_errors(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("fuse", "--ckpt", "parnet-s", "--seed", -1)[0] == 2
    assert cli("fuse", "--ckpt", "parnet-s", "--seed", 10**20)[0] == 2


def test_a_graph_with_a_scalar_input_is_a_source(cli, tmp_path):
    helper = onnx.helper
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"], name="scale")],
        "scalar",
        [
            helper.make_tensor_value_info("x", floats, [2, 3]),
            helper.make_tensor_value_info("factor", floats, []),
        ],
        [helper.make_tensor_value_info("y", floats, [2, 3])],
    )
    source = tmp_path / "scalar.onnx"
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), source)
    assert cli("split-streams", source)[0] == 0
