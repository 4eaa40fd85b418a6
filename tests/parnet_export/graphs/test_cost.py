"""Counts of operators, against what running them on ones adds up to."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.graphs.cost import element_count, graph_cost, node_cost, size_bytes
from parnet_export.graphs.onnx_graph import prepare

OPSET = 18


def parse(body: str, *, opset: int = OPSET, **weights: np.ndarray) -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{header} main {body}")
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return prepare(ir.from_proto(proto))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def single(kind: str, inputs: dict[str, np.ndarray], **attributes: object) -> ir.Model:
    """One operator; its first input is the network's, the others are constants."""
    first, *constants = inputs
    node = onnx.helper.make_node(kind, list(inputs), ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "single",
        [onnx.helper.make_tensor_value_info(first, 1, inputs[first].shape)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(inputs[name], name) for name in constants],
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    return prepare(ir.from_proto(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)))


def sum_of_output(model: ir.Model, value: np.ndarray) -> int:
    """With ones everywhere and no padding, each multiply-accumulate adds one to the output."""
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {session.get_inputs()[0].name: value})
    return int(output.sum(dtype=np.float64))


few = st.integers(1, 3)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3).flatmap(
        lambda rank: st.tuples(
            st.tuples(*[st.integers(1, 3)] * rank), st.tuples(*[st.integers(3, 6)] * rank)
        )
    ),
    few,
    few,
    few,
    few,
    few,
)
def test_a_convolution_has_a_mac_per_output_and_weight_of_its_group(
    kernel_and_size, batch, groups, ins, outs, stride
):
    kernel, size = kernel_and_size
    x, w = ones(batch, groups * ins, *size), ones(groups * outs, ins, *kernel)
    model = single("Conv", {"x": x, "w": w}, group=groups, strides=[stride] * len(kernel))
    cost = graph_cost(model)
    assert cost.macs == sum_of_output(model, x)
    assert cost.flops == 2 * cost.macs
    assert cost.parameters == w.size
    assert cost.depth == 1


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2).flatmap(
        lambda rank: st.tuples(
            st.tuples(*[st.integers(1, 3)] * rank), st.tuples(*[st.integers(1, 4)] * rank)
        )
    ),
    few,
    few,
    few,
    few,
    few,
)
def test_a_transposed_convolution_has_a_mac_per_input_and_weight_of_its_group(
    kernel_and_size, batch, groups, ins, outs, stride
):
    kernel, size = kernel_and_size
    x, w = ones(batch, groups * ins, *size), ones(groups * ins, outs, *kernel)
    strides = [stride] * len(kernel)
    model = single("ConvTranspose", {"x": x, "w": w}, group=groups, strides=strides)
    assert graph_cost(model).macs == sum_of_output(model, x)
    assert graph_cost(model).depth == 1


@settings(deadline=None, max_examples=30)
@given(few, few, few, st.booleans(), st.booleans())
def test_a_gemm_has_a_mac_per_output_and_inner_index(m, n, k, trans_a, trans_b):
    a = ones(k, m) if trans_a else ones(m, k)
    b = ones(n, k) if trans_b else ones(k, n)
    model = single("Gemm", {"a": a, "b": b}, transA=int(trans_a), transB=int(trans_b))
    assert graph_cost(model).macs == m * n * k == sum_of_output(model, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3), (3, 4)),
        ((5, 2, 3), (3, 4)),
        ((5, 1, 2, 3), (6, 3, 4)),
        ((3,), (3, 4)),
        ((2, 3), (3,)),
        ((3,), (3,)),
        ((7, 2, 3), (7, 3, 1)),
    ],
)
def test_a_matrix_product_has_a_mac_per_output_and_inner_index(a, b):
    model = single("MatMul", {"a": ones(*a), "b": ones(*b)})
    assert graph_cost(model).macs == sum_of_output(model, ones(*a))


def test_padding_counts_as_the_field_counts_it():
    # The first layer of ResNet-50 at 224 pixels: 112 x 112 outputs, 64 channels, 3 x 7 x 7 weights.
    x, w = ones(1, 3, 224, 224), ones(64, 3, 7, 7)
    model = single("Conv", {"x": x, "w": w}, pads=[3] * 4, strides=[2, 2])
    assert graph_cost(model).macs == 112 * 112 * 64 * 3 * 7 * 7


def test_quantised_layers_count_like_their_float_forms():
    model = parse(
        """(uint8[1, 4, 8, 8] x) => (int32[1, 6, 6, 6] y, uint8[1, 6, 6, 6] z) {
            y = ConvInteger(x, w)
            z = QLinearConv(x, s, p, w, s, p, s, p)
        }""",
        w=np.ones((6, 4, 3, 3), np.uint8),
        s=np.float32(1),
        p=np.uint8(0),
    )
    macs = 6 * 6 * 6 * 4 * 9
    assert [node_cost(node).macs for node in model.graph] == [macs, macs]
    assert graph_cost(model).weight_bytes == 6 * 4 * 9 + 4 + 1
    assert graph_cost(model).depth == 1


def test_symbolic_dimensions_count_as_one():
    model = parse(
        "(float[batch, 3, h, w] x) => (float[a, b, c, d] y) { y = Conv(x, k) }", k=ones(4, 3, 1, 1)
    )
    assert graph_cost(model).macs == 12
    assert graph_cost(model).activation_bytes == (3 + 4) * 4


# --------------------------------------------------- parameters and bytes


def test_a_shared_weight_counts_once():
    model = parse(
        """(float[1, 4, 5, 5] x) => (float[1, 4, 1, 1] y) {
            a = Conv(x, w)
            y = Conv(a, w)
        }""",
        w=ones(4, 4, 3, 3),
    )
    cost = graph_cost(model)
    assert cost.parameters == 4 * 4 * 9
    assert cost.weight_bytes == 4 * 4 * 9 * 4
    assert cost.macs == (9 + 1) * 4 * 4 * 9
    assert sum(node_cost(node).parameters for node in model.graph) == 2 * cost.parameters


def test_parameters_are_what_frameworks_count():
    model = parse(
        """(float[1, 4, 2, 2] x) => (float[1, 4, 4, 4] y) {
            n = BatchNormalization(x, gamma, beta, mean, var)
            m = Mul(n, two)
            i = Reshape(m, shape)
            y = Resize <mode = "nearest"> (i, roi, scales)
        }""",
        gamma=ones(4),
        beta=ones(4),
        mean=ones(4),
        var=ones(4),
        two=np.float32(2),
        shape=np.array([1, 4, 2, 2], np.int64),
        roi=ones(8),
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    cost = graph_cost(model)
    assert cost.parameters == 8  # neither statistics, nor literals, shapes and scales
    assert cost.weight_bytes == 4 * 4 * 4 + 4 + 4 * 8 + 8 * 4 + 4 * 4
    assert cost.macs == 0
    assert cost.nodes == 4


def test_activation_bytes_are_what_operators_read_and_write():
    model = parse(
        """(float[2, 3] x) => (float16[2, 3] y) {
            a = Mul(x, x)
            b = Add(a, w)
            y = Cast <to = 10> (b)
        }""",
        w=ones(3),
    )
    assert [node_cost(node).activation_bytes for node in model.graph] == [48, 48, 36]
    assert graph_cost(model).activation_bytes == 132


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("FLOAT", 24), ("FLOAT16", 12), ("INT64", 48), ("BOOL", 6), ("INT4", 3), ("STRING", 0)],
)
def test_sizes_follow_the_element_type(dtype: str, expected: int):
    value = ir.Value(name="v", type=ir.TensorType(ir.DataType[dtype]), shape=ir.Shape([2, "n", 3]))
    assert element_count(value) == 6
    assert size_bytes(value) == expected


# ------------------------------------------------------------------ depth


def test_depth_is_the_longest_chain_of_layers():
    model = parse(
        """(float[1, 4, 6, 6] x) => (float[1, 10] y) {
            a = Conv(x, w)
            r = Relu(a)
            b = Conv(r, w)
            p = GlobalAveragePool(r)
            g = Conv(p, k)
            s = Sigmoid(g)
            m = Mul(b, s)
            q = GlobalAveragePool(m)
            f = Flatten(q)
            y = Gemm(f, d)
        }""",
        w=ones(4, 4, 3, 3),
        k=ones(4, 4, 1, 1),
        d=ones(4, 10),
    )
    assert graph_cost(model).depth == 3  # the gate runs beside the second convolution


def test_products_of_activations_are_no_layers():
    model = parse(
        """(float[1, 5, 8] x) => (float[1, 5, 8] y) {
            q = MatMul(x, w)
            k = MatMul(x, w)
            t = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul(q, t)
            p = Softmax(s)
            o = MatMul(p, q)
            y = MatMul(o, w)
        }""",
        w=ones(8, 8),
    )
    cost = graph_cost(model)
    assert cost.depth == 2
    assert cost.macs == 3 * 5 * 8 * 8 + 2 * 5 * 5 * 8


def test_weights_may_be_cast_reshaped_or_dequantised_on_the_way():
    model = parse(
        """(float[1, 4] x) => (float[1, 4] y) {
            d = DequantizeLinear(q, scale)
            t = Transpose(d)
            a = MatMul(x, t)
            h = Cast <to = 1> (half)
            y = MatMul(h, a)
        }""",
        q=np.ones((4, 4), np.int8),
        scale=np.float32(0.5),
        half=np.ones((1, 1), np.float16),
    )
    assert graph_cost(model).depth == 2


# ----------------------------------------------------------- control flow


BRANCHES = """(bool c, float[1, 4, 6, 6] x) => (float[1, 4, 2, 2] y) {
    y = If (c) <
        then_branch = deep () => (float[1, 4, 2, 2] o) {
            a = Conv(x, w)
            o = Conv(a, w)
        },
        else_branch = flat () => (float[1, 4, 2, 2] p) {
            p = Conv(x, v)
        }
    >
}"""


def test_an_if_costs_its_dearer_branch_and_holds_the_weights_of_both():
    weights = {"w": ones(4, 4, 3, 3), "v": ones(4, 4, 5, 5)}
    cost = graph_cost(parse(BRANCHES, **weights))
    assert cost.macs == max((16 + 4) * 4 * 4 * 9, 4 * 4 * 4 * 25)
    assert cost.parameters == 4 * 4 * (9 + 25)
    assert cost.depth == 2
    assert cost.nodes == 1
    assert cost.activation_bytes == 1 + 4 * (4 * 36 + 4 * 4)


def test_a_graph_without_layers_has_no_depth():
    cost = graph_cost(parse("(float[3] x) => (float[3] y) { a = Relu(x) y = Neg(a) }"))
    assert (cost.depth, cost.macs, cost.parameters, cost.weight_bytes) == (0, 0, 0, 0)
    assert cost.nodes == 2
