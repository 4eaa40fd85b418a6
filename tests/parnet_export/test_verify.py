from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper, numpy_helper

from parnet_export.errors import CheckFailedError, InputError, MissingBackendError
from parnet_export.graphs.onnx_runtime import open_session
from parnet_export.samples import LARGE_MAGNITUDE, Sample, batch_symbol, make_samples
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec
from parnet_export.verify import (
    SPLIT_LIMIT,
    Check,
    Proof,
    compare_outputs,
    prove_split,
    relative_error,
)

if TYPE_CHECKING:
    from pathlib import Path

NO_COST = Cost(parameters=0, macs=0, weight_bytes=0, activation_bytes=0, nodes=0, depth=0)
IMAGE = ("batch", 2, 4, 4)


def tensor(name: str, shape: tuple[int | str, ...] = IMAGE) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


# ------------------------------------------------------------------------------ the metric


@settings(deadline=None)
@given(
    npst.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)),
    npst.arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)),
)
def test_the_metric_is_the_largest_difference_over_the_largest_reference(actual, reference):
    pairs = [(float(a), float(r)) for a, r in zip(actual.flat, reference.flat, strict=True)]
    difference = max(abs(a - r) for a, r in pairs)
    scale = max(abs(r) for _, r in pairs)
    expected = 0.0 if difference == 0 else (difference / scale if scale else math.inf)
    assert relative_error(actual, reference) == expected
    assert relative_error(reference, reference) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_infinitely_wrong_on_either_side(bad):
    good, spoilt = np.ones(3), np.array([1.0, bad, 1.0])
    assert relative_error(spoilt, good) == math.inf
    assert relative_error(good, spoilt) == math.inf
    assert relative_error(spoilt, spoilt) == math.inf


def test_other_shapes_are_infinitely_wrong_even_where_they_would_broadcast():
    assert relative_error(np.ones((2, 1)), np.ones((2, 2))) == math.inf
    assert relative_error(np.ones(4), np.ones((2, 2))) == math.inf
    assert relative_error(np.ones((0, 2)), np.ones((0, 2))) == 0.0


def test_half_precision_overflow_in_the_difference_does_not_hide_an_error():
    big = np.full(2, 60000, dtype=np.float16)
    assert relative_error(big, -big) == 2.0
    assert relative_error(np.array([0], np.uint8), np.array([255], np.uint8)) == 1.0


# ---------------------------------------------------------------------- checks and proofs


def test_a_check_passes_up_to_its_limit_and_never_on_nan():
    assert Check("c", "n", 1e-6, 1e-6).passed
    assert not Check("c", "n", 1.1e-6, 1e-6).passed
    assert not Check("c", "n", math.nan, 1e-6).passed
    assert not Check("c", "n", math.inf, 1e-6).passed


def test_a_proof_needs_checks_and_all_of_them():
    assert not Proof("p", ()).passed
    good, bad = Check("good", "n", 0, 1), Check("bad", "n", 2, 1, "off by 2")
    assert Proof("p", (good,)).passed
    assert not Proof("p", (good, bad)).passed
    Proof("p", (good,)).require("Nothing was written.")
    with pytest.raises(
        CheckFailedError,
        match=r"^p: 1 of 2 checks failed: bad \(n, off by 2\)\. Nothing was written\.$",
    ):
        Proof("p", (good, bad)).require("Nothing was written.")


def test_a_failed_proof_names_the_worst_inputs_of_each_comparison():
    checks = [
        Check("a", inputs, error, 1, f"off by {error}")
        for inputs, error in (("few", 2), ("most", 9), ("some", 5))
    ]
    with pytest.raises(CheckFailedError) as caught:
        Proof("p", (*checks, Check("nodes", "", 3, 0, "3 are lost"))).require("Stop.")
    assert str(caught.value) == (
        "p: 4 of 4 checks failed: a (most, off by 9); nodes (3 are lost). Stop."
    )


def test_checks_are_ready_for_json():
    encoded = msgspec.json.decode(msgspec.json.encode(Check("c", "n", 0.5, 1.0, "why")))
    assert encoded == {
        "name": "c",
        "inputs": "n",
        "error": 0.5,
        "limit": 1.0,
        "detail": "why",
        "passed": True,
    }


def outputs(*values: object) -> list[dict[str, np.ndarray]]:
    return [{"y": np.asarray(value, dtype=np.float64)} for value in values]


def samples(*names: str) -> list[Sample]:
    return [Sample(name, {}) for name in names]


def test_samples_of_one_kind_share_a_check_that_reports_the_worst():
    checks = compare_outputs(
        "a against b", samples("n", "n", "z"), outputs(1, 3, 5), outputs(1, 2, 5), 0.1
    )
    assert [(c.name, c.inputs, c.error, c.passed) for c in checks] == [
        ("a against b", "n", 0.5, False),
        ("a against b", "z", 0.0, True),
    ]
    assert checks[0].detail == "'y' is off by 0.5, the limit is 0.1"


def test_where_the_reference_is_not_finite_the_other_must_be_the_same():
    reference = outputs([1, np.nan, np.inf], [1, 2, 3])
    two = samples("log", "n")
    same = compare_outputs("c", two, outputs([1, np.nan, np.inf], [1, 2, 3]), reference, 0)
    assert all(check.passed for check in same)
    for other in ([1, 5, np.inf], [1, np.nan, -np.inf], [2, np.nan, np.inf], [np.nan] * 3):
        checks = compare_outputs("c", two, outputs(other, [1, 2, 3]), reference, 0)
        assert [check.passed for check in checks] == [False, True], other


def test_a_reference_that_is_never_finite_proves_nothing():
    reference = [
        {"y": np.array([1.0, np.nan]), "z": np.ones(1)},
        {"y": np.array([np.inf, 1.0]), "z": np.ones(1)},
    ]
    checks = compare_outputs("c", samples("n", "m"), reference, reference, 1.0)
    assert [check.passed for check in checks] == [True, True, False]
    assert checks[-1].detail == "'y' of the reference has NaN or infinite values"


def test_an_output_of_another_shape_says_so():
    (check,) = compare_outputs("c", samples("n"), outputs([1, 2]), outputs([1, 2, 3]), 1.0)
    assert check.detail == "'y' has shape (2,), the reference (3,)"


# --------------------------------------------------------------------------------- samples


def test_samples_depend_on_nothing_but_the_seed():
    specs = [tensor("x"), TensorSpec("tokens", "int64", ("batch", 7))]
    first, second, other = (
        list(make_samples(specs, seed=seed, random_samples=3)) for seed in (1, 1, 2)
    )
    assert [sample.name for sample in first] == [sample.name for sample in other]
    for a, b in zip(first, second, strict=True):
        for name, value in a.inputs.items():
            np.testing.assert_array_equal(value, b.inputs[name])
    assert not np.array_equal(first[0].inputs["x"], first[1].inputs["x"])
    assert not np.array_equal(first[0].inputs["x"], other[0].inputs["x"])


def test_samples_have_the_declared_types_and_shapes():
    specs = [tensor("x"), TensorSpec("tokens", "int64", ("batch", 7)), tensor("s", ())]
    found = list(make_samples(specs))
    assert {sample.inputs["x"].shape[0] for sample in found} == {1, 2}
    for sample in found:
        batch = sample.inputs["x"].shape[0]
        assert sample.inputs["x"].shape == (batch, 2, 4, 4)
        assert sample.inputs["x"].dtype == np.float32
        assert sample.inputs["tokens"].shape == (batch, 7)
        assert sample.inputs["tokens"].dtype == np.int64
        assert set(np.unique(sample.inputs["tokens"])) <= {0, 1}


def test_a_fixed_batch_stays_and_given_sizes_are_taken():
    fixed = make_samples([tensor("x", (3, 2))])
    assert {sample.inputs["x"].shape for sample in fixed} == {(3, 2)}
    given_sizes = make_samples([tensor("x", ("n", "h"))], sizes={"n": 5, "h": 6})
    assert {sample.inputs["x"].shape for sample in given_sizes} == {(5, 6)}
    assert batch_symbol([tensor("y", ()), tensor("x", ("n", "h"))]) == "n"
    assert batch_symbol([tensor("x", (1, "h"))]) is None


def test_samples_hold_every_kind_of_extreme():
    found = {sample.name: sample.inputs["x"] for sample in make_samples([tensor("x")])}
    assert not found["zeros"].any()
    assert (found["ones"] == 1).all()
    assert np.abs(found["normal x 16"]).max() > LARGE_MAGNITUDE
    assert 0 < np.abs(found["normal x 0.001"]).max() < 0.01
    assert (found["one pixel"].sum(axis=(2, 3)) == 1).all()
    board = found["checkerboard"]
    assert set(np.unique(board)) == {-1, 1}
    for axis in (1, 2, 3):
        assert (np.diff(board, axis=axis) != 0).all()


# ----------------------------------------------------------------------- proofs of a split


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    reads: list[str],
    writes: list[str],
    scale: float = 2.0,
) -> Path:
    weight = numpy_helper.from_array(np.array([scale], dtype=np.float32), "scale")
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, IMAGE) for name in reads],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, IMAGE) for name in writes],
        [weight],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        path,
    )
    return path


NODES = {
    "left": [helper.make_node("Mul", ["x", "scale"], ["l"], name="any")],
    "right": [helper.make_node("Tanh", ["x"], ["r"])],
    "join": [helper.make_node("Add", ["l", "r"], ["y"])],
}
GRAPH = StreamGraph(
    (tensor("x"),),
    (tensor("y"), tensor("l")),
    (
        Segment("left", (tensor("x"),), (tensor("l"),), NO_COST),
        Segment("right", (tensor("x"),), (tensor("r"),), NO_COST),
        Segment("join", (tensor("l"), tensor("r")), (tensor("y"),), NO_COST),
    ),
)


def write_split(folder: Path) -> tuple[Path, dict[str, Path]]:
    whole = save(
        folder / "whole.onnx",
        [node for nodes in NODES.values() for node in nodes],
        ["x"],
        ["y", "l"],
    )
    renamed = onnx.load(whole)
    renamed.graph.node[0].name = "names of operators carry no meaning"
    onnx.save(renamed, whole)
    return whole, {
        "left": save(folder / "left.onnx", NODES["left"], ["x"], ["l"]),
        "right": save(folder / "right.onnx", NODES["right"], ["x"], ["r"]),
        "join": save(folder / "join.onnx", NODES["join"], ["l", "r"], ["y"]),
    }


def failed(proof: Proof) -> list[str]:
    return [check.inputs or check.name for check in proof.checks if not check.passed]


def test_a_right_split_passes_every_check_exactly(tmp_path):
    whole, segments = write_split(tmp_path)
    proof = prove_split(GRAPH, whole, segments, precision="fp32")
    assert proof.passed
    assert proof.worst_error == 0.0
    names = [check.name for check in proof.checks]
    assert names[:3] == [
        "operators kept",
        "segment inputs and outputs",
        "shapes of computed tensors",
    ]
    assert "normal, batch 2" in [check.inputs for check in proof.checks]
    assert {check.limit for check in proof.checks} == {0.0, SPLIT_LIMIT["fp32"]}


def test_a_wrong_weight_in_a_segment_is_found(tmp_path):
    whole, segments = write_split(tmp_path)
    save(segments["left"], NODES["left"], ["x"], ["l"], scale=2.0001)
    names = failed(prove_split(GRAPH, whole, segments, precision="fp32"))
    assert "normal" in names
    assert "zeros" not in names


def test_a_segment_that_reads_the_wrong_tensor_is_found(tmp_path):
    whole, segments = write_split(tmp_path)
    crossed = [helper.make_node("Add", ["l", "l"], ["y"]), helper.make_node("Tanh", ["r"], ["u"])]
    save(segments["join"], crossed, ["l", "r"], ["y"])
    proof = prove_split(GRAPH, whole, segments, precision="fp32")
    assert failed(proof) == ["operators kept"]
    assert proof.checks[0].error == 3


def test_a_repeated_operator_is_found_although_the_result_is_the_same(tmp_path):
    whole, segments = write_split(tmp_path)
    save(
        segments["right"], [*NODES["right"], helper.make_node("Tanh", ["x"], ["r2"])], ["x"], ["r"]
    )
    proof = prove_split(GRAPH, whole, segments, precision="fp32")
    assert failed(proof) == ["operators kept"]
    assert "1 are in a segment only" in proof.checks[0].detail


def test_another_attribute_counts_as_another_operator(tmp_path):
    whole, segments = write_split(tmp_path)
    onnx_model = onnx.load(whole)
    onnx_model.graph.node[1].attribute.append(helper.make_attribute("alpha", 1.0))
    onnx.save(onnx_model, whole)
    assert failed(prove_split(GRAPH, whole, segments, precision="fp32")) == ["operators kept"]


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("r", "float32", ("batch", 2, 4, 5)),
        TensorSpec("r", "float16", IMAGE),
        TensorSpec("r", "float32", ("n", 2, 4, 4)),
        TensorSpec("q", "float32", IMAGE),
    ],
)
def test_a_segment_that_declares_other_tensors_than_the_stream_graph_is_found(tmp_path, spec):
    whole, segments = write_split(tmp_path)
    left, right, join = GRAPH.segments
    graph = dataclasses.replace(
        GRAPH,
        segments=(
            left,
            dataclasses.replace(right, outputs=(spec,)),
            dataclasses.replace(join, inputs=(tensor("l"), spec)),
        ),
    )
    proof = prove_split(graph, whole, segments, precision="fp32")
    assert failed(proof) == ["segment inputs and outputs"]
    assert "right/r" in proof.checks[1].detail


def test_a_graph_that_the_runtime_cannot_run_is_named(tmp_path):
    whole, segments = write_split(tmp_path)
    with pytest.raises(CheckFailedError, match=r"whole\.onnx: ONNX Runtime cannot run this graph"):
        prove_split(
            dataclasses.replace(GRAPH, inputs=(tensor("x", ("batch", 2, 9, 9)),)),
            whole,
            segments,
            precision="fp32",
        )


def test_a_file_that_the_runtime_cannot_load_is_named(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(InputError, match=r"broken\.onnx: cannot be loaded by ONNX Runtime"):
        open_session(tmp_path / "broken.onnx", purpose="Testing")


def test_without_the_runtime_the_message_names_both_ways_out(tmp_path, monkeypatch):
    whole, segments = write_split(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackendError) as caught:
        prove_split(GRAPH, whole, segments, precision="fp32")
    assert "--no-verify" in str(caught.value)
    assert "pip install 'parnet-export[cpu]'" in str(caught.value)


def test_a_broken_runtime_is_not_taken_for_an_absent_one(tmp_path, monkeypatch):
    whole, _ = write_split(tmp_path)
    broken = tmp_path / "site" / "onnxruntime"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import a_module_that_is_not_there")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(broken.parent)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there") as caught:
        open_session(whole, purpose="Testing")
    assert not isinstance(caught.value, MissingBackendError)
