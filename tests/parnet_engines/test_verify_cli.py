from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import typer

from parnet_engines import cli
from parnet_engines.proof.bundle_proof import prove_bundle
from parnet_export import bundle as bundle_module
from parnet_export import console, pipeline
from parnet_export.bundle import open_bundle
from parnet_export.models.parnet import ParNetConfig
from parnet_export.source import load_network
from parnet_export.verify import SOURCE_LIMIT, SPLIT_LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from parnet_export.bundle import Provenance

CONFIG = ParNetConfig((8, 16, 32), (1, 1, 2), 24, num_classes=10, variant="cifar")
CATALOGUE_NAME = "parnet-cifar-1.3m"
COMPARISONS = ["split against whole", "whole against source", "split against source"]


class Ran(NamedTuple):
    exit_code: int
    out: str
    err: str


@pytest.fixture
def verify(capsys, monkeypatch):
    """Run the command as `parnet-export` mounts it."""
    monkeypatch.setenv("COLUMNS", "120")
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli.register(app)

    def run(*arguments: object) -> Ran:
        exit_code = console.run(app, ["verify", *map(str, arguments)])
        return Ran(exit_code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_parnet) -> list[Path]:
    """Two networks of the same structure with other weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [folder / "one.pth", folder / "two.pth"]
    for seed, path in enumerate(paths):
        torch.save(make_parnet(CONFIG, seed=seed).state_dict(), path)
    return paths


def export(source: str | Path, *, seed: int = 0) -> tuple[ir.Model, Provenance]:
    return pipeline.export_graph(
        load_network(source, seed=seed), level="full", resolution=None, batch=pipeline.DYNAMIC
    )


@pytest.fixture(scope="module")
def exported(checkpoints) -> tuple[ir.Model, Provenance]:
    """The graph of the first checkpoint, with a dynamic batch."""
    return export(checkpoints[0])


@pytest.fixture(scope="module")
def bundle(exported, tmp_path_factory) -> Path:
    """A bundle of the first checkpoint."""
    path = tmp_path_factory.mktemp("bundle") / "b"
    pipeline.make_bundle(*exported, path)
    return path


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory) -> Path:
    """A bundle of a catalogue name with weights from seed 3."""
    path = tmp_path_factory.mktemp("random") / "b"
    pipeline.make_bundle(*export(CATALOGUE_NAME, seed=3), path)
    return path


# --------------------------------------------------------------------------------- passing


def test_a_bundle_agrees_with_itself_and_with_its_checkpoint(verify, bundle, checkpoints):
    ran = verify(bundle, "--ckpt", checkpoints[0], "--samples", 2, "--json")
    assert (ran.exit_code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert result["passed"]
    assert (result["network"], result["weights"], result["precision"]) == ("one", "trained", "fp32")
    assert result["source"]["source"] == str(checkpoints[0])
    checks = result["checks"]
    assert list(dict.fromkeys(check["name"] for check in checks)) == COMPARISONS
    assert {"normal", "normal, batch 2", "zeros", "checkerboard"} <= {c["inputs"] for c in checks}
    assert {c["limit"] for c in checks} == {SPLIT_LIMIT["fp32"], SOURCE_LIMIT["fp32"]}
    assert all(c["passed"] and 0 <= c["error"] <= c["limit"] for c in checks)
    assert any(c["error"] > 0 for c in checks if c["name"] != COMPARISONS[0])


def test_the_table_has_a_column_for_each_comparison(verify, bundle, checkpoints):
    alone = verify(bundle)
    assert alone.exit_code == 0
    assert "one, fp32" in alone.out
    assert "split against whole" in alone.out
    assert "source" not in alone.out
    both = verify(bundle, "--ckpt", checkpoints[0])
    assert "one, fp32, against one" in both.out
    for text in (*COMPARISONS, "limit 1e-06", "limit 1e-04", "checkerboard", "digests"):
        assert text in both.out


def test_random_weights_are_labelled_and_agree_for_the_same_seed(verify, random_bundle, tmp_path):
    output = tmp_path / "result.json"
    ran = verify(random_bundle, "--ckpt", CATALOGUE_NAME, "--seed", 3, "--output", output)
    assert ran.exit_code == 0
    label = f"{CATALOGUE_NAME} (random weights)"
    assert f"{label}, fp32, against {label}" in ran.out
    result = json.loads(output.read_text())
    assert (result["weights"], result["seed"], result["source"]["seed"]) == ("random", 3, 3)


def test_half_precision_agrees_within_its_own_limits(verify, exported, checkpoints, tmp_path):
    path = tmp_path / "b"
    pipeline.make_bundle(*exported, path, precision="fp16")
    ran = verify(path, "--ckpt", checkpoints[0], "--json")
    assert ran.exit_code == 0
    result = json.loads(ran.out)
    assert result["precision"] == "fp16"
    against_source = [c for c in result["checks"] if c["name"] == "whole against source"]
    assert {c["limit"] for c in against_source} == {SOURCE_LIMIT["fp16"]}
    assert max(c["error"] for c in against_source) > 1e-5  # it really is half precision


# --------------------------------------------------------------------------------- failing


def test_random_weights_of_another_seed_fail_and_the_message_says_why(verify, random_bundle):
    ran = verify(random_bundle, "--ckpt", CATALOGUE_NAME, "--samples", 1)
    assert ran.exit_code == 0  # by default the seed that the bundle was made with
    ran = verify(random_bundle, "--ckpt", CATALOGUE_NAME, "--samples", 1, "--seed", 0)
    assert ran.exit_code == 1
    assert "FAILED" in ran.out
    assert "The bundle's random weights are of seed 3" in ran.err
    assert f"those of {CATALOGUE_NAME} of seed 0." in ran.err


def test_another_checkpoint_fails_and_the_bundle_alone_still_agrees(verify, bundle, checkpoints):
    ran = verify(bundle, "--ckpt", checkpoints[1], "--json")
    assert ran.exit_code == 1
    result = json.loads(ran.out)
    assert not result["passed"]
    by_name = {c["name"]: c for c in result["checks"] if c["inputs"] == "normal"}
    assert [by_name[name]["passed"] for name in COMPARISONS] == [True, False, False]
    assert "The bundle does not compute what" in ran.err


def test_another_number_of_classes_fails_with_both_shapes(verify, bundle, tmp_path, make_parnet):
    path = tmp_path / "more.pth"
    torch.save(make_parnet(replace(CONFIG, num_classes=11)).state_dict(), path)
    ran = verify(bundle, "--ckpt", path)
    assert ran.exit_code == 1
    assert "'logits' has shape (1, 10), the reference (1, 11)" in ran.err


def test_a_source_that_cannot_take_the_input_is_named(bundle):
    source = load_network(CATALOGUE_NAME)
    wrong = replace(source, module=torch.nn.Conv2d(5, 5, 1))
    with pytest.raises(Exception, match="cannot run on the bundle's input") as caught:
        prove_bundle(open_bundle(bundle), source=wrong)
    assert caught.value.exit_code == 2


def with_a_wrong_segment(bundle: Path, path: Path) -> Path:
    """Copy a bundle and damage a weight the way only somebody who corrects digests could."""
    shutil.copytree(bundle, path)
    manifest = open_bundle(path).manifest
    file = path / manifest.segment_files["stream2"]
    proto = onnx.load(file)
    largest = max(proto.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = onnx.numpy_helper.to_array(largest).copy()
    values.flat[:100] += 1.0
    largest.CopyFrom(onnx.numpy_helper.from_array(values, largest.name))
    file.write_bytes(proto.SerializeToString())
    stored = bundle_module.StoredFile(bundle_module.files.sha256_of(file), file.stat().st_size)
    changed = replace(manifest, files={**manifest.files, file.name: stored})
    (path / "bundle.json").write_bytes(bundle_module._encode(changed))
    return path


def test_a_wrong_segment_behind_right_digests_fails(verify, bundle, checkpoints, tmp_path):
    path = with_a_wrong_segment(bundle, tmp_path / "wrong")
    ran = verify(path, "--ckpt", checkpoints[0], "--json")
    assert ran.exit_code == 1
    by_name = {c["name"]: c for c in json.loads(ran.out)["checks"] if c["inputs"] == "normal"}
    assert [by_name[name]["passed"] for name in COMPARISONS] == [False, True, False]


# ------------------------------------------------------------------------------- bad input


def test_one_changed_byte_in_any_file_is_one_message_with_exit_code_two(verify, bundle, tmp_path):
    path = shutil.copytree(bundle, tmp_path / "b")
    for file in list(path.iterdir()):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        file.write_bytes(changed)
        ran = verify(path)
        assert ran.exit_code == 2
        assert ran.out == ""
        assert file.name in ran.err
        assert ran.err.count("error:") == 1
        assert "Traceback" not in ran.err
        file.write_bytes(content)
    assert verify(path, "--samples", 1).exit_code == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: next(path.glob("whole-*.onnx")).unlink(), "cannot be read"),
        (lambda path: (path / "bundle.json").write_bytes(b'{"schema_version": 2}'), "Upgrade"),
        (lambda path: (path / "bundle.json").write_bytes(b'{"schema_ver'), "is damaged"),
        (lambda path: (path / "bundle.json").unlink(), "so it is not a bundle"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_bundle_that_is_not_whole_is_one_message_with_exit_code_two(
    verify, bundle, tmp_path, damage, message
):
    path = shutil.copytree(bundle, tmp_path / "b")
    damage(path)
    ran = verify(path)
    assert ran.exit_code == 2
    assert ran.out == ""
    assert message in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "parnet-q"], "parnet-q"),
        (["--ckpt", "missing.pth"], "missing.pth"),
        (["--samples", "0"], "samples"),
        (["--activation", "gelu"], "gelu"),
    ],
)
def test_options_that_cannot_be_used_have_exit_code_two(verify, bundle, arguments, message):
    ran = verify(bundle, *arguments)
    assert ran.exit_code == 2
    assert message in ran.err


def test_without_a_runtime_the_message_names_the_command_that_installs_it(
    verify, bundle, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ran = verify(bundle)
    assert ran.exit_code == 2
    assert "pip install 'parnet-export[cpu]'" in ran.err


def test_a_place_for_the_output_that_cannot_be_written_is_named(verify, bundle, tmp_path):
    ran = verify(bundle, "--samples", 1, "--output", tmp_path / "missing" / "result.json")
    assert ran.exit_code == 2
    assert "cannot be written" in ran.err


def test_the_module_loads_nothing_heavy():
    code = (
        "import sys, parnet_engines.cli\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'rich.table'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == "[]\n"
