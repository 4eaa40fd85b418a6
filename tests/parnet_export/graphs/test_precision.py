from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_export.errors import InputError
from parnet_export.graphs.precision import to_fp16
from parnet_export.samples import make_samples
from parnet_export.stream_graph import TensorSpec
from parnet_export.verify import relative_error

OPSET = 18


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    outputs: list[str],
    *,
    opset: int = OPSET,
    shape: tuple[int | str, ...] = ("batch", 3, 8, 8),
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def gated_network() -> ir.Model:
    """Convolution, squeeze-excite gate, pooling, classifier; the feature map is an output, too."""
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    node = helper.make_node
    return build(
        [
            node("Conv", ["image", "w1", "b1"], ["conv"], pads=[1, 1, 1, 1]),
            node("Sigmoid", ["conv"], ["sigmoid"]),
            node("Mul", ["conv", "sigmoid"], ["silu"]),
            node("ReduceMean", ["silu", "axes"], ["squeezed"]),
            node("Conv", ["squeezed", "w2", "b2"], ["excited"]),
            node("Sigmoid", ["excited"], ["gate"]),
            node("Mul", ["silu", "gate"], ["features"]),
            node("GlobalAveragePool", ["features"], ["pooled"]),
            node("Flatten", ["pooled"], ["flat"]),
            node("Gemm", ["flat", "w3", "b3"], ["logits"], transB=1),
            node("Softmax", ["logits"], ["probabilities"]),
        ],
        {
            "w1": weight(16, 3, 3, 3),
            "b1": weight(16),
            "axes": np.array([2, 3]),
            "w2": weight(16, 16, 1, 1),
            "b2": weight(16),
            "w3": weight(10, 16),
            "b3": weight(10),
        },
        ["probabilities", "features"],
    )


def run(model: ir.Model, image: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"image": image})


def types_read_by(model: ir.Model, operator: str) -> list[ir.DataType]:
    return [
        value.dtype
        for node in model.graph
        if node.op_type == operator
        for value in node.inputs
        if value is not None and value.dtype != ir.DataType.INT64
    ]


def test_half_precision_computes_nearly_the_same():
    network = gated_network()
    half = to_fp16(network)
    spec = TensorSpec("image", "float32", ("batch", 3, 8, 8))
    for sample in make_samples([spec]):
        image = sample.inputs["image"]
        for actual, reference in zip(run(half, image), run(network, image), strict=True):
            assert actual.dtype == np.float32
            assert 0 < relative_error(actual, reference) < 2e-3


def test_feature_maps_are_half_and_sums_and_classifier_are_full():
    half = to_fp16(gated_network())
    assert set(types_read_by(half, "Conv")) == {ir.DataType.FLOAT16}
    assert set(types_read_by(half, "Mul")) == {ir.DataType.FLOAT16}
    for operator in ("ReduceMean", "GlobalAveragePool", "Flatten", "Gemm", "Softmax"):
        assert set(types_read_by(half, operator)) == {ir.DataType.FLOAT}, operator


def test_there_is_no_cast_between_pooling_and_output():
    half = to_fp16(gated_network())
    operators = [node.op_type for node in half.graph]
    tail = operators[operators.index("GlobalAveragePool") : operators.index("Softmax") + 1]
    assert tail == ["GlobalAveragePool", "Flatten", "Gemm", "Softmax"]
    assert operators.count("Cast") == 5  # image; both sides of the gate; pooling; features


def test_names_and_types_of_inputs_and_outputs_stay():
    network = gated_network()
    half = to_fp16(network)
    for before, after in (
        (network.graph.inputs, half.graph.inputs),
        (network.graph.outputs, half.graph.outputs),
    ):
        assert [(v.name, v.dtype, v.shape) for v in before] == [
            (v.name, v.dtype, v.shape) for v in after
        ]
    assert set(half.graph.initializers) == set(network.graph.initializers)
    assert {"conv", "silu", "gate"} <= {v.name for node in half.graph for v in node.outputs}


def test_the_given_model_is_left_as_it_is():
    network = gated_network()
    before = ir.to_proto(network).SerializeToString(deterministic=True)
    first = ir.to_proto(to_fp16(network)).SerializeToString(deterministic=True)
    assert ir.to_proto(network).SerializeToString(deterministic=True) == before
    assert ir.to_proto(to_fp16(network)).SerializeToString(deterministic=True) == first


def test_only_the_last_product_before_an_output_is_the_classifier():
    node = helper.make_node
    model = build(
        [
            node("MatMul", ["image", "w"], ["hidden"]),
            node("Relu", ["hidden"], ["active"]),
            node("MatMul", ["active", "w"], ["last"]),
            node("Add", ["last", "b"], ["logits"]),
        ],
        {"w": np.eye(8, dtype=np.float32), "b": np.ones(8, dtype=np.float32)},
        ["logits"],
    )
    half = to_fp16(model)
    first, second = (node for node in half.graph if node.op_type == "MatMul")
    assert {value.dtype for value in first.inputs} == {ir.DataType.FLOAT16}
    assert {value.dtype for value in second.inputs} == {ir.DataType.FLOAT}
    assert set(types_read_by(half, "Add")) == {ir.DataType.FLOAT}
    # The weight they share exists in both precisions.
    assert {value.dtype for value in half.graph.initializers.values()} == {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
    }
    image = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    (actual,), (reference,) = run(half, image), run(model, image)
    assert relative_error(actual, reference) < 1e-3


def test_inputs_that_onnx_defines_as_float32_stay_float32():
    resize = helper.make_node("Resize", ["image", "", "scales"], ["large"], mode="nearest")
    scales = np.array([1, 1, 2, 2], dtype=np.float32)
    model = build([resize], {"scales": scales}, ["large"])
    half = to_fp16(model)
    (node,) = (node for node in half.graph if node.op_type == "Resize")
    assert node.inputs[0].dtype == ir.DataType.FLOAT16
    assert node.inputs[2].dtype == ir.DataType.FLOAT
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    assert run(half, image)[0].shape == (1, 3, 16, 16)


def test_a_type_that_an_attribute_decides_stays_and_is_cast_for_its_readers():
    node = helper.make_node
    model = build(
        [
            node("Greater", ["image", "zero"], ["positive"]),
            node("Cast", ["positive"], ["mask"], to=TensorProto.FLOAT),
            node("Mul", ["image", "mask"], ["masked"]),
        ],
        {"zero": np.zeros(1, dtype=np.float32)},
        ["masked"],
    )
    half = to_fp16(model)
    assert set(types_read_by(half, "Mul")) == {ir.DataType.FLOAT16}
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(half, image)[0], np.maximum(image, 0), rtol=1e-3)


def test_an_operator_outside_of_the_onnx_standard_stays_float32():
    image = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 3]))
    custom = ir.node("Mystery", [image], domain="example.org")
    custom.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    custom.outputs[0].shape = ir.Shape([1, 3])
    custom.outputs[0].name = "out"
    graph = ir.Graph(
        [image],
        custom.outputs,
        nodes=[custom],
        name="g",
        opset_imports={"": OPSET, "example.org": 1},
    )
    half = to_fp16(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in half.graph] == ["Mystery"]


def test_weights_outside_of_the_range_are_named():
    model = build(
        [
            helper.make_node("Mul", ["image", "huge"], ["a"]),
            helper.make_node("Add", ["a", "large"], ["b"]),
        ],
        {
            "huge": np.array([-1e5], dtype=np.float32),
            "large": np.array([65504, np.inf, -np.inf, np.nan, 1e-9, 0, 1, 2], dtype=np.float32),
        },
        ["b"],
    )
    with pytest.raises(InputError, match=r"fp16's range of 65504: huge\. Use --precision fp32"):
        to_fp16(model)


def test_control_flow_is_refused_with_one_sentence():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["same"])],
        "branch",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, ("batch", 3, 8, 8))],
    )
    condition = np.array(True)
    model = build(
        [helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)],
        {"condition": condition},
        ["y"],
    )
    with pytest.raises(InputError, match=r"control flow \(If\)"):
        to_fp16(model)


def test_a_graph_that_is_half_precision_already_is_not_changed():
    half = to_fp16(gated_network())
    inner = [node for node in half.graph if node.op_type == "Conv"]
    again = to_fp16(half)
    assert [node.op_type for node in again.graph] == [node.op_type for node in half.graph]
    assert len([node for node in again.graph if node.op_type == "Conv"]) == len(inner)
