from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_export import pack
from parnet_export.bundle import Bundle, Provenance, open_bundle
from parnet_export.errors import CheckFailedError, InputError, MissingBackendError
from parnet_export.graphs.cost import graph_cost
from parnet_export.graphs.onnx_graph import load_onnx, prepare, tensor_spec
from parnet_export.pack import write_bundle, write_onnx
from parnet_export.splitting.split import Split, split_model
from parnet_export.stream_graph import Segment, StreamGraph
from parnet_export.weights_file import (
    ALIGNMENT_BYTES,
    INLINE_BELOW_BYTES,
    PAGE_BYTES,
    PAGED_FROM_BYTES,
    large_tensors,
    refer_to,
    write_tensors,
)

PROVENANCE = Provenance(
    "two-branches",
    "somewhere/two-branches.pth",
    source_sha256="ab" * 32,
    weights="random",
    seed=3,
    activation="silu (detected)",
    level="full",
    command=("parnet-export", "split-streams"),
    created="2026-01-01T00:00:00Z",
)
SEGMENTS = {
    "stem": (["image"], ["stem"]),
    "left/1": (["stem"], ["left"]),
    "right 2": (["stem"], ["right"]),
    "head": (["left", "right"], ["logits"]),
}


def two_branches(width: int = 32, seed: int = 0) -> ir.Model:
    """A stem, two convolutions beside each other, and a head that adds and classifies."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(value.astype(np.float32), name)

    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Conv", ["image", "w0"], ["stem"], pads=[1, 1, 1, 1]),
            node("Conv", ["stem", "w1", "b1"], ["left"], pads=[1, 1, 1, 1]),
            node("Conv", ["stem", "w2", "b1"], ["right"], pads=[1, 1, 1, 1]),
            node("Add", ["left", "right"], ["sum"]),
            node("GlobalAveragePool", ["sum"], ["pooled"]),
            node("Flatten", ["pooled"], ["flat"]),
            node("Gemm", ["flat", "w3"], ["logits"], transB=1),
        ],
        "two-branches",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch", 3, 8, 8))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", 5))],
        [
            weight("w0", width, 3, 3, 3),
            weight("w1", width, width, 3, 3),
            weight("w2", width, width, 3, 3),
            weight("b1", width),
            weight("w3", 5, width),
        ],
    )
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )


def by_hand(model: ir.Model) -> Split:
    """Split `two_branches` at fixed tensors, without the splitter."""
    whole = prepare(model)
    segments = {}
    described = []
    for name, (reads, writes) in SEGMENTS.items():
        graph = ir.convenience.extract(whole.graph, reads, writes)
        graph.name = name
        for key in sorted(graph.initializers):  # `extract` leaves them in the order of a set
            graph.initializers[key] = graph.initializers.pop(key)
        segments[name] = ir.Model(graph, ir_version=whole.ir_version)
        described.append(
            Segment(
                name,
                tuple(map(tensor_spec, graph.inputs)),
                tuple(map(tensor_spec, graph.outputs)),
                graph_cost(graph),
            )
        )
    stream_graph = StreamGraph(
        tuple(map(tensor_spec, whole.graph.inputs)),
        tuple(map(tensor_spec, whole.graph.outputs)),
        tuple(described),
    )
    return Split(stream_graph, whole, segments, ())


def with_wrong_weight(split: Split) -> Split:
    """Change one weight of one segment's copy of a tensor."""
    segment = split.segments["right 2"].clone()
    value = segment.graph.initializers["w2"]
    changed = value.const_value.numpy().copy()
    changed[0, 0, 0, 0] += 0.01
    value.const_value = ir.Tensor(changed, name="w2")
    return replace(split, segments={**split.segments, "right 2": segment})


def write(split: Split, path: Path, **options: object) -> Bundle:
    return write_bundle(split, path, **{"precision": "fp32", "provenance": PROVENANCE, **options})


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, inputs)[0]


# ----------------------------------------------------------------------------- weights file


def test_tensors_are_aligned_and_hold_their_own_bytes():
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(size).astype(np.float32) for size in (300, 5, PAGED_FROM_BYTES // 4, 9)
    ]
    stream = io.BytesIO()
    stored = write_tensors([ir.Tensor(array) for array in arrays], stream)
    content = stream.getvalue()
    for place, array in zip(stored, arrays, strict=True):
        assert place.offset_bytes % ALIGNMENT_BYTES == 0
        found = content[place.offset_bytes : place.offset_bytes + place.size_bytes]
        assert found == array.tobytes()
    assert stored[2].offset_bytes % PAGE_BYTES == 0
    assert len(content) == stored[-1].offset_bytes + stored[-1].size_bytes


def test_a_tensor_that_many_graphs_share_is_found_once_and_small_ones_stay_inline():
    split = by_hand(two_branches())
    found = large_tensors([split.whole, *split.segments.values()])
    assert [tensor.name for tensor in found] == ["w0", "w1", "w2"]
    assert all(tensor.nbytes >= INLINE_BELOW_BYTES for tensor in found)


def test_referring_to_a_file_leaves_the_model_as_it_was():
    model = two_branches()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    stored = write_tensors(large_tensors([model]), io.BytesIO())
    referring = refer_to(model, stored, "w.bin")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert len(ir.to_proto(referring).SerializeToString()) < len(before) / 4


# ---------------------------------------------------------------------------------- bundles


def test_a_bundle_holds_every_weight_once(tmp_path):
    model = two_branches(width=128)
    bundle = write(by_hand(model), tmp_path / "b")
    size_bytes = sum(len(content) for content in contents(bundle.path).values())
    assert weight_bytes(model) < size_bytes < 1.05 * weight_bytes(model)
    weights = (bundle.path / bundle.manifest.weights).read_bytes()
    assert model.graph.initializers["w1"].const_value.tobytes() in weights


def test_every_file_is_valid_onnx_and_says_what_it_is(tmp_path):
    bundle = write(by_hand(two_branches()), tmp_path / "b")
    for name in (None, *SEGMENTS):
        path = bundle.segment_path(name) if name else bundle.whole_path
        onnx.checker.check_model(path, full_check=True)
        proto = onnx.load(path, load_external_data=False)
        assert proto.producer_name == "parnet-export"
        assert {entry.key: entry.value for entry in proto.metadata_props} == {
            "parnet.network": "two-branches",
            "parnet.precision": "fp32",
            "parnet.weights": "random",
            "parnet.seed": "3",
            "parnet.source_sha256": "ab" * 32,
            "parnet.activation": "silu (detected)",
            "parnet.level": "full",
        } | ({"parnet.segment": name} if name else {})


def test_the_segments_compute_what_the_source_computes(tmp_path):
    model = two_branches()
    bundle = write(by_hand(model), tmp_path / "b")
    write_onnx(model, tmp_path / "source.onnx")
    image = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    stem = run(bundle.segment_path("stem"), image=image)
    left = run(bundle.segment_path("left/1"), stem=stem)
    right = run(bundle.segment_path("right 2"), stem=stem)
    logits = run(bundle.segment_path("head"), left=left, right=right)
    expected = run(tmp_path / "source.onnx", image=image)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(run(bundle.whole_path, image=image), expected, rtol=1e-5)


def test_the_same_input_gives_the_same_files_whenever_and_wherever(tmp_path):
    one = write(by_hand(two_branches()), tmp_path / "one")
    later = replace(PROVENANCE, created="2027-02-02T00:00:00Z", command=("elsewhere",))
    two = write(by_hand(two_branches()), tmp_path / "two", provenance=later)
    assert one.manifest.files == two.manifest.files
    first, second = contents(one.path), contents(two.path)
    assert {name: first[name] for name in one.manifest.files} == {
        name: second[name] for name in two.manifest.files
    }


def test_the_manifest_records_the_proof_or_that_there_was_none(tmp_path):
    split = by_hand(two_branches())
    assert write(split, tmp_path / "b").manifest.split_error == 0.0
    assert write(split, tmp_path / "b", prove=False).manifest.split_error is None


def test_a_split_that_fails_its_proof_is_not_written(tmp_path):
    wrong = with_wrong_weight(by_hand(two_branches()))
    with pytest.raises(CheckFailedError, match=r"split against whole \(.*Nothing was written"):
        write(wrong, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    write(by_hand(two_branches(seed=9)), tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(CheckFailedError):
        write(wrong, tmp_path / "b")
    assert contents(tmp_path / "b") == before
    write(wrong, tmp_path / "b", prove=False)
    assert contents(tmp_path / "b") != before


def test_a_graph_that_is_not_valid_onnx_is_not_written(tmp_path):
    split = by_hand(two_branches())
    broken = split.segments["head"].clone()
    broken.graph.node(0).op_type = "NoSuchOperator"
    with pytest.raises(CheckFailedError, match="is not valid ONNX"):
        write(replace(split, segments={**split.segments, "head": broken}), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_a_runtime_nothing_is_written_unless_asked_not_to_prove(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackendError):
        write(by_hand(two_branches()), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    write(by_hand(two_branches()), tmp_path / "b", prove=False)


def test_a_network_without_large_weights_has_no_weights_file(tmp_path):
    bundle = write(by_hand(two_branches(width=2)), tmp_path / "b")
    assert bundle.manifest.weights == ""
    assert all(name.endswith(".onnx") for name in bundle.manifest.files)


@pytest.mark.parametrize("size_threshold", [1024, 0])
def test_an_onnx_file_with_its_weights_elsewhere_is_copied_into_the_bundle_once(
    tmp_path, size_threshold
):
    source = tmp_path / "source"
    source.mkdir()
    model = two_branches(width=128)
    onnx.save(
        ir.to_proto(model),
        source / "net.onnx",
        save_as_external_data=True,
        location="net.data",
        size_threshold=size_threshold,
    )
    bundle = write(split_model(load_onnx(source / "net.onnx")), tmp_path / "b")
    size_bytes = sum(len(content) for content in contents(bundle.path).values())
    assert size_bytes < 1.05 * weight_bytes(model)
    (source / "net.data").unlink()
    image = np.ones((1, 3, 8, 8), dtype=np.float32)
    assert run(open_bundle(bundle.path).whole_path, image=image).shape == (1, 5)


@pytest.mark.parametrize("name", ["../../up", ".hidden", "a b/c", "größe", "x" * 300, "..."])
def test_any_segment_name_gives_a_harmless_file_name(tmp_path, name):
    split = by_hand(two_branches())
    segments = {(name if key == "stem" else key): m for key, m in split.segments.items()}
    graph = replace(
        split.stream_graph,
        segments=tuple(
            replace(segment, name=name) if segment.name == "stem" else segment
            for segment in split.stream_graph.segments
        ),
    )
    bundle = write(replace(split, stream_graph=graph, segments=segments), tmp_path / "b")
    assert bundle.segment_path(name).parent == tmp_path / "b"
    assert bundle.manifest.segment_files[name].isascii()
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def run_python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run code that can use this module as ``tests``."""
    prelude = f"""
import importlib.util, resource, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("tests", {str(Path(__file__))!r})
tests = importlib.util.module_from_spec(spec)
sys.modules["tests"] = tests
spec.loader.exec_module(tests)
from parnet_export.errors import ParnetError
"""
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_full_disk_leaves_the_bundle_as_it_was(tmp_path):
    write(by_hand(two_branches(seed=9)), tmp_path / "b")
    before = contents(tmp_path / "b")
    result = run_python(
        """
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    tests.write(tests.by_hand(tests.two_branches()), Path(sys.argv[1]))
except ParnetError as error:
    print(error)
""",
        tmp_path / "b",
    )
    assert "cannot be written (File too large)" in result.stdout
    assert contents(tmp_path / "b") == before


def test_a_process_killed_at_any_moment_leaves_the_bundle_as_it_was(tmp_path):
    moments = ("weights", "graphs", "proof", "manifest")
    old = {moment: write(by_hand(two_branches(seed=9)), tmp_path / moment) for moment in moments}
    result = run_python(
        """
import os, signal
from parnet_export import bundle, pack

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def write_and_die(tensors, stream):
    write_tensors(tensors, stream)
    stream.flush()
    die()

write_tensors = pack.write_tensors
deaths = {
    "weights": (pack, "write_tensors", write_and_die),
    "graphs": (pack, "_check_onnx", die),
    "proof": (pack, "prove_split", die),
    "manifest": (bundle.files, "write_bytes", die),
}
for moment, (module, name, death) in deaths.items():
    child = os.fork()
    if child == 0:
        setattr(module, name, death)
        tests.write(tests.by_hand(tests.two_branches()), Path(sys.argv[1]) / moment)
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        tmp_path,
    )
    expected = "".join(f"{moment} {-signal.SIGKILL}\n" for moment in moments)
    assert result.stdout == expected, result.stderr
    for moment in moments:
        path = tmp_path / moment
        assert open_bundle(path).manifest == old[moment].manifest
        assert set(contents(path)) > {*old[moment].manifest.files, "bundle.json"}
        new = write(by_hand(two_branches()), path)
        assert set(contents(path)) == {*new.manifest.files, "bundle.json"}


def test_an_unwritable_place_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write(by_hand(two_branches()), tmp_path / "file" / "b")


# ------------------------------------------------------------------------ single ONNX files


def test_a_small_network_is_one_file(tmp_path):
    write_onnx(two_branches(), tmp_path / "net.onnx")
    assert set(contents(tmp_path)) == {"net.onnx"}
    onnx.checker.check_model(tmp_path / "net.onnx", full_check=True)


def test_a_large_network_has_a_data_file_that_changes_with_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "INLINE_UP_TO_BYTES", 10_000)
    (tmp_path / "net-0123456789abcdef.data").write_bytes(b"mine")
    image = np.ones((1, 3, 8, 8), dtype=np.float32)
    write_onnx(two_branches(seed=1), tmp_path / "net.onnx")
    first, result = set(contents(tmp_path)), run(tmp_path / "net.onnx", image=image)
    write_onnx(two_branches(seed=2), tmp_path / "net.onnx")
    second = set(contents(tmp_path))
    assert len(first) == len(second) == 3
    assert first & second == {"net.onnx", "net-0123456789abcdef.data"}
    assert not np.allclose(run(tmp_path / "net.onnx", image=image), result)
    monkeypatch.setattr(pack, "INLINE_UP_TO_BYTES", 1 << 30)
    write_onnx(two_branches(seed=2), tmp_path / "net.onnx")
    assert set(contents(tmp_path)) == {"net.onnx", "net-0123456789abcdef.data"}


def test_an_onnx_file_that_cannot_be_written_leaves_no_data_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "INLINE_UP_TO_BYTES", 10_000)
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_onnx(two_branches(), tmp_path / "net.onnx")
    assert set(contents(tmp_path)) == set()
    with pytest.raises(InputError, match="cannot be written"):
        write_onnx(two_branches(), tmp_path / "missing" / "net.onnx")
