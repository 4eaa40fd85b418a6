"""What a split promises about its graphs, and the odd graphs it must cope with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from parnet_export.errors import InputError
from parnet_export.graphs.cost import graph_cost
from parnet_export.splitting.segment_names import name_segments
from parnet_export.splitting.split import SplitOptions, split_model
from parnet_export.splitting.work_graph import DeviceModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parnet_export.splitting.split import Split

KEEP_ALL = SplitOptions(
    min_gain=0, min_region_gain=0, device=DeviceModel(launch_us=1, crossing_us=0)
)
"""Keeps whatever branch gains anything."""

FORKED = """(float[batch, 8, 16, 16] image) => (float[batch, 8, 16, 16] joined) {
    a = Conv <pads = [1, 1, 1, 1]> (image, first)
    shared = Relu(a)
    left0 = Conv <pads = [1, 1, 1, 1]> (shared, second)
    left1 = Relu(left0)
    right0 = Conv <pads = [1, 1, 1, 1]> (shared, third)
    right1 = Sigmoid(right0)
    sum = Add(left1, right1)
    joined = Conv <pads = [1, 1, 1, 1]> (sum, second)
}"""


def parse(body: str, *, opset: str = '"": 18', **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opset}]> main {body}")
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


def run_segments(split: Split, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = dict(feeds)
    for segment in split.stream_graph.segments:
        tensors |= run(split.segments[segment.name], tensors)
    return {output.name: tensors[output.name] for output in split.stream_graph.outputs}


@pytest.fixture(scope="module")
def source() -> ir.Model:
    random = np.random.default_rng(0)
    names = ("first", "second", "third")
    weights = {n: random.standard_normal((8, 8, 3, 3)).astype(np.float32) for n in names}
    return parse(FORKED, **weights)


@pytest.fixture(scope="module")
def split(source: ir.Model) -> Split:
    return split_model(source, KEEP_ALL)


# ---------------------------------------------------------------- promises


def test_a_fork_and_a_join_give_stem_streams_and_head(split: Split):
    assert {name: [n.op_type for n in m.graph] for name, m in split.segments.items()} == {
        "stem": ["Conv", "Relu"],
        "stream1": ["Conv", "Relu"],
        "stream2": ["Conv", "Sigmoid"],
        "head": ["Add", "Conv"],
    }
    edges = [(e.producer, e.consumer, e.tensor.name) for e in split.stream_graph.edges]
    assert edges == [
        ("stem", "stream1", "shared"),
        ("stem", "stream2", "shared"),
        ("stream1", "head", "left1"),
        ("stream2", "head", "right1"),
    ]


def test_the_source_is_left_as_it_was(source: ir.Model):
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    split_model(source, KEEP_ALL)
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before


def test_splitting_again_gives_the_same(source: ir.Model, split: Split):
    again = split_model(source, KEEP_ALL)
    assert again.stream_graph == split.stream_graph
    assert again.notes == split.notes
    for name, model in split.segments.items():
        encoded = ir.to_proto(model).SerializeToString(deterministic=True)
        assert ir.to_proto(again.segments[name]).SerializeToString(deterministic=True) == encoded


def test_segments_share_the_weights_of_the_source(source: ir.Model, split: Split):
    tensors = {name: v.const_value for name, v in source.graph.initializers.items()}
    for model in (split.whole, *split.segments.values()):
        for name, value in model.graph.initializers.items():
            assert value.const_value is tensors[name]


def test_a_segment_holds_the_weights_it_reads_and_no_others(split: Split):
    held = {name: set(model.graph.initializers) for name, model in split.segments.items()}
    assert held == {
        "stem": {"first"},
        "stream1": {"second"},
        "stream2": {"third"},
        "head": {"second"},
    }


def test_tensors_keep_their_names(source: ir.Model, split: Split):
    original = {value.name for node in source.graph for value in node.outputs}
    parts = [v.name for m in split.segments.values() for n in m.graph for v in n.outputs]
    assert set(parts) == original
    assert len(parts) == len(original)


def test_every_tensor_of_a_segment_has_a_type_and_a_shape(split: Split):
    for model in split.segments.values():
        for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
            assert value.dtype == ir.DataType.FLOAT
            assert value.shape == ir.Shape(["batch", 8, 16, 16])


def test_segments_are_valid_onnx_and_say_where_they_belong(split: Split):
    for name, model in split.segments.items():
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert model.graph.name == name
        assert model.metadata_props["parnet.segment"] == name
        assert model.metadata_props["parnet.network"] == "main"
        assert model.opset_imports == {"": 18}


def test_the_stream_graph_describes_the_segments(split: Split):
    for segment in split.stream_graph.segments:
        model = split.segments[segment.name]
        assert [t.name for t in segment.inputs] == [v.name for v in model.graph.inputs]
        assert [t.name for t in segment.outputs] == [v.name for v in model.graph.outputs]
        assert segment.cost == graph_cost(model)
    assert [t.name for t in split.stream_graph.inputs] == ["image"]
    assert [t.name for t in split.stream_graph.outputs] == ["joined"]


def test_a_split_that_leaves_no_branch_inside_has_nothing_to_note(split: Split):
    assert split.notes == ()


def test_by_default_what_gains_less_than_a_crossing_costs_stays_together(source: ir.Model):
    split = split_model(source)
    assert list(split.segments) == ["trunk"]
    (note,) = split.notes
    assert note.startswith("no parallel branch is worth a segment of its own")
    assert note.endswith("too little for what another lane costs")


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_segments_run_one_after_another_are_the_whole(split: Split, batch: int):
    image = np.random.default_rng(batch).standard_normal((batch, 8, 16, 16)).astype(np.float32)
    expected = run(split.whole, {"image": image})["joined"]
    actual = run_segments(split, {"image": image})["joined"]
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


def test_opsets_that_a_segment_does_not_use_are_not_imported():
    model = parse(
        """(float[1, 8, 64, 64] x) => (float[1, 8, 64, 64] y, float[1, 8, 64, 64] z)
        <float[1, 8, 64, 64] m> {
            m = com.microsoft.Gelu(x)
            y = Neg(m)
            a = Abs(x)
            z = Neg(a)
        }""",
        opset='"": 18, "com.microsoft": 1',
    )
    split = split_model(model, KEEP_ALL)
    assert [m.opset_imports for m in split.segments.values()] == [
        {"": 18, "com.microsoft": 1},
        {"": 18},
    ]


# ------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ([()], ["trunk"]),
        ([(), (0,)], ["stream", "head"]),
        ([(), (0,), (0,), (1, 2)], ["stem", "stream1", "stream2", "head"]),
        ([(), (0,), (1,), (1,), (2, 3)], ["stream1", "stream2", "stream3", "stream4", "head"]),
        ([(), (), (0, 1), (0, 1), (2, 3)], ["stream1", "stream2", "fusion1", "fusion2", "head"]),
        ([(), (0,), (0, 1), (2,)], ["stem", "stream", "fusion", "head"]),
        ([(), ()], ["head1", "head2"]),
    ],
    ids=["alone", "chain", "diamond", "late fork", "exchange", "skip", "apart"],
)
def test_segments_are_named_by_their_place(reads: list[tuple[int, ...]], expected: list[str]):
    names = name_segments([frozenset(before) for before in reads], range(len(reads)))
    assert list(names) == expected


def test_heads_are_numbered_like_the_outputs_they_provide():
    names = name_segments([frozenset(), frozenset({0}), frozenset({0})], [-1, 5, 2])
    assert names == ("stem", "head2", "head1")


# -------------------------------------------------------------- edge cases


def test_a_graph_that_computes_nothing_is_refused():
    with pytest.raises(InputError, match="has no operator that an output depends on"):
        split_model(parse("(float[3] x) => (float[3] x) { }"))


def test_an_output_that_is_an_input_passes_every_segment_by():
    split = split_model(parse("(float[3] x) => (float[3] x, float[3] y) { y = Relu(x) }"))
    (segment,) = split.stream_graph.segments
    assert [t.name for t in segment.outputs] == ["y"]
    feeds = {"x": np.array([-1, 0, 1], np.float32)}
    assert set(run_segments(split, feeds)) == {"x", "y"}


def test_an_output_that_is_a_constant_is_provided_by_a_segment():
    model = parse(
        "(float[2] x) => (float[2] w, float[2] y) { y = Add(x, w) }", w=np.ones(2, np.float32)
    )
    outputs = run_segments(split_model(model), {"x": np.zeros(2, np.float32)})
    assert {name: value.tolist() for name, value in outputs.items()} == {
        "w": [1, 1],
        "y": [1, 1],
    }


def test_an_input_that_nobody_reads_stays_an_input_of_the_network():
    split = split_model(parse("(float[3] x, float[5] spare) => (float[3] y) { y = Relu(x) }"))
    assert [t.name for t in split.stream_graph.inputs] == ["x", "spare"]
    assert [t.name for t in split.stream_graph.segments[0].inputs] == ["x"]
    assert [v.name for v in split.whole.graph.inputs] == ["x", "spare"]


def test_an_input_that_is_no_dense_tensor_is_refused():
    with pytest.raises(InputError, match="tensor 't': has the type STRING"):
        split_model(parse("(string[3] t) => (string[3] u) { u = Identity(t) }"))


def test_sequences_never_cross_a_boundary():
    # Both branches read the sequence, so they stay with it and so does all between them.
    model = parse(
        """(float[1, 8, 64, 64] x) => (float[1, 4, 64, 64] y, float[1, 8, 64, 64] z) {
            s = SplitToSequence <axis = 1> (x, four)
            a = SequenceAt(s, zero)
            n = Neg(a)
            b = SequenceAt(s, one)
            y = Add(n, b)
            t = Abs(x)
            z = Neg(t)
        }""",
        four=np.array(4, np.int64),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
    )
    split = split_model(model, KEEP_ALL)
    parts = [[node.op_type for node in m.graph] for m in split.segments.values()]
    assert parts == [
        ["SplitToSequence", "SequenceAt", "Neg", "SequenceAt", "Add"],
        ["Abs", "Neg"],
    ]
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 8, 64, 64)).astype(np.float32)}
    expected, actual = run(split.whole, feeds), run_segments(split, feeds)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


def test_what_lies_between_two_readers_of_a_sequence_stays_with_them():
    # The second reader of the sequence depends on the first through Abs and Cast.
    model = parse(
        """(float[2, 64, 64] x) => (float[1, 64, 64] y) {
            s = SplitToSequence(x, one)
            a = SequenceAt(s, zero)
            b = Abs(a)
            m = ReduceMax <keepdims = 0> (b)
            c = Cast <to = 7> (m)
            d = Mul(c, zero)
            y = SequenceAt(s, d)
        }""",
        one=np.array(1, np.int64),
        zero=np.array(0, np.int64),
    )
    split = split_model(model, KEEP_ALL)
    assert list(split.segments) == ["trunk"]
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)}
    np.testing.assert_array_equal(run_segments(split, feeds)["y"], feeds["x"][:1])


def test_what_depends_on_data_in_size_does_not_cross():
    """The rows of ``places`` are as many as the image has positive values."""
    body = """(float[1, 1, 8, 8] image) => (float[32] left, float[32] right) {
        positive = Relu(image)
        found = NonZero(positive)
        rows = Transpose(found)
        places = Cast <to = 1> (rows)
        left0 = MatMul(places, first)
        left1 = MatMul(left0, square)
        left2 = ReduceMax <keepdims = 0> (left1, axis)
        left = MatMul(left2, square)
        right0 = MatMul(places, second)
        right1 = MatMul(right0, square)
        right2 = ReduceMax <keepdims = 0> (right1, axis)
        right = MatMul(right2, square)
    }"""
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.standard_normal((4, 32)).astype(np.float32),
        "second": rng.standard_normal((4, 32)).astype(np.float32),
        "square": rng.standard_normal((32, 32)).astype(np.float32),
        "axis": np.array([0]),
    }
    split = split_model(parse(body, **weights), KEEP_ALL)
    segments = split.stream_graph.segments
    assert len(segments) > 1  # what follows the maxima may still run in parallel
    for segment in segments:
        for spec in (*segment.inputs, *segment.outputs):
            assert all(isinstance(size, int) for size in spec.shape), spec
    image = rng.standard_normal((1, 1, 8, 8)).astype(np.float32)
    expected = run(split.whole, {"image": image})
    found = run_segments(split, {"image": image})
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
