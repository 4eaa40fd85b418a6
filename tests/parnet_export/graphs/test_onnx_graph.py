"""Reading ONNX files, and the one form into which every graph is brought."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from parnet_export.errors import InputError
from parnet_export.graphs.onnx_graph import (
    constant_values,
    is_transferable,
    load_onnx,
    node_inputs,
    prepare,
    tensor_spec,
)
from parnet_export.stream_graph import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HEADER = '<ir_version: 10, opset_import: ["": 18, "local": 1]>'


def parse(body: str, functions: str = "", **weights: NDArray[np.generic]) -> ir.Model:
    proto = onnx.parser.parse_model(f"{HEADER} main {body} {functions}")
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return ir.from_proto(proto)


def floats(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for n in model.graph for v in n.outputs}


def shapes_of(model: ir.Model) -> dict[str, tuple[int | str, ...]]:
    return {name: tensor_spec(value).shape for name, value in values_of(model).items()}


CONV = """(float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {
    c = Conv(x, w)
    y = Relu(c)
}"""


@pytest.fixture
def with_external_weights(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    ir.save(
        parse(CONV, w=floats(4, 3, 3, 3)), path, external_data="net.data", size_threshold_bytes=0
    )
    return path


# ------------------------------------------------------------------ files


def test_a_saved_graph_loads_with_its_names(tmp_path: Path):
    path = tmp_path / "net.onnx"
    ir.save(parse(CONV, w=floats(4, 3, 3, 3)), path)
    model = load_onnx(path)
    assert [node.op_type for node in model.graph] == ["Conv", "Relu"]
    assert list(model.graph.initializers) == ["w"]


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"absent\.onnx: does not exist"):
        load_onnx(tmp_path / "absent.onnx")


def test_a_folder_is_no_onnx_file(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        load_onnx(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b"this is a text\n" * 20, b"\x08\x0a", bytes(range(256)) * 8],
    ids=["empty", "zeros", "text", "version only", "bytes"],
)
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"net\.onnx: is (damaged|empty) or not an ONNX file"):
        load_onnx(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path):
    path = tmp_path / "net.onnx"
    ir.save(parse(CONV, w=floats(4, 3, 3, 3)), path)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"net\.onnx"):
            prepare(load_onnx(path))


def test_external_weights_stay_on_disk_and_are_shared(with_external_weights: Path):
    model = load_onnx(with_external_weights)
    prepared = prepare(model)
    tensor = prepared.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor is model.graph.initializers["w"].const_value
    assert tensor.raw is None  # not even mapped into memory
    np.testing.assert_array_equal(tensor.numpy(), floats(4, 3, 3, 3))


def test_missing_external_weights_are_named(with_external_weights: Path):
    with_external_weights.with_name("net.data").unlink()
    with pytest.raises(InputError, match=r"net\.data: holds weights of .*net\.onnx and cannot"):
        load_onnx(with_external_weights)


def test_external_weights_that_are_too_short_are_named(with_external_weights: Path):
    data = with_external_weights.with_name("net.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"net\.data: .* is too short: 'w' ends at byte 432"):
        load_onnx(with_external_weights)


def test_external_weights_outside_the_folder_are_refused(tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(432))
    (tmp_path / "inner").mkdir()
    proto = ir.to_proto(parse(CONV, w=floats(4, 3, 3, 3)))
    weights = proto.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret")
    path = tmp_path / "inner" / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"secret: holds weights of .* cannot be read"):
        load_onnx(path)


def test_shapes_kept_as_external_data_take_part_in_inference(tmp_path: Path):
    model = parse(
        "(float[2, 6] x) => (float[a, b] y) { y = Reshape(x, s) }", s=np.array([3, 4], np.int64)
    )
    path = tmp_path / "net.onnx"
    ir.save(model, path, external_data="net.data", size_threshold_bytes=0)
    assert shapes_of(prepare(load_onnx(path))) == {"y": (3, 4)}


# --------------------------------------------------------------- prepared


def test_preparing_leaves_the_source_as_it_was():
    model = parse(
        """(float[1, 3] x) => (float[1, 3] y) {
            two = Constant <value_float = 2.0> ()
            unused = Relu(x)
            y = Mul(x, two)
        }"""
    )
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    prepare(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_constants_become_initializers_under_their_names():
    prepared = prepare(
        parse(
            """(float[2, 3] x) => (float[3, 2] y) {
                shape = Constant <value_ints = [3, 2]> ()
                two = Constant <value = float {2.0}> ()
                r = Reshape(x, shape)
                y = Mul(r, two)
            }"""
        )
    )
    assert [node.op_type for node in prepared.graph] == ["Reshape", "Mul"]
    assert set(prepared.graph.initializers) == {"shape", "two"}
    assert shapes_of(prepared) == {"r": (3, 2), "y": (3, 2)}


def test_nodes_that_no_output_depends_on_are_removed():
    prepared = prepare(
        parse("(float[3] x) => (float[3] y) { a = Relu(x) b = Relu(a) y = Sigmoid(x) }")
    )
    assert [node.op_type for node in prepared.graph] == ["Sigmoid"]


def test_initializers_listed_as_inputs_are_constants():
    proto = ir.to_proto(parse(CONV, w=floats(4, 3, 3, 3)))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [4, 3, 3, 3]))
    prepared = prepare(ir.from_proto(proto))
    assert [value.name for value in prepared.graph.inputs] == ["x"]


def test_nodes_in_any_order_are_sorted():
    prepared = prepare(
        parse("(float[3] x) => (float[3] y) { y = Relu(b) b = Sigmoid(a) a = Tanh(x) }")
    )
    assert [node.op_type for node in prepared.graph] == ["Tanh", "Sigmoid", "Relu"]


def test_sorted_nodes_keep_their_order():
    body = "{ a = Tanh(x) b = Relu(x) c = Abs(a) d = Neg(b) y = Add(c, d) }"
    prepared = prepare(parse(f"(float[3] x) => (float[3] y) {body}"))
    assert [node.op_type for node in prepared.graph] == ["Tanh", "Relu", "Abs", "Neg", "Add"]


def test_a_cycle_is_refused():
    with pytest.raises(InputError, match="has a cycle"):
        prepare(parse("(float[3] x) => (float[3] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }"))


def test_nodes_get_names_and_tensors_keep_theirs():
    model = parse("(float[3] x) => (float[3] y) { a = Relu(x) b = Relu(a) y = Add(a, b) }")
    model.graph[1].name = model.graph[2].name = "twice"
    prepared = prepare(model)
    names = [node.name for node in prepared.graph]
    assert len(set(names)) == 3
    assert "twice" in names
    assert list(values_of(prepared)) == ["a", "b", "y"]


def test_functions_are_inlined_and_tensors_at_the_calls_keep_their_names():
    function = """<domain: "local", opset_import: ["": 18, "local": 1]>
    swish (v) => (o) { s = Sigmoid(v) o = Mul(v, s) }
    <domain: "local", opset_import: ["": 18, "local": 1]>
    twice (v) => (o) { m = local.swish(v) o = local.swish(m) }"""
    body = "(float[2, 3] x) => (float[2, 3] y) { a = local.twice(x) y = local.swish(a) }"
    prepared = prepare(parse(body, function))
    assert [node.op_type for node in prepared.graph] == ["Sigmoid", "Mul"] * 3
    assert not prepared.functions
    assert set(prepared.opset_imports) == {""}
    assert {"a", "y"} <= set(values_of(prepared))
    assert len(values_of(prepared)) == 6
    assert set(shapes_of(prepared).values()) == {(2, 3)}


def test_functions_that_call_each_other_are_refused():
    function = """<domain: "local", opset_import: ["": 18, "local": 1]>
    f (v) => (o) { o = local.g(v) }
    <domain: "local", opset_import: ["": 18, "local": 1]>
    g (v) => (o) { o = local.f(v) }"""
    with pytest.raises(InputError, match="cannot be flattened"):
        prepare(parse("(float[3] x) => (float[3] y) { y = local.f(x) }", function))


def test_every_tensor_has_a_type_and_a_shape():
    prepared = prepare(
        parse(
            """(float[batch, 3, 8, 8] x) => (float[a, b] y, int64[c] z) {
                c = Conv <pads = [1, 1, 1, 1]> (x, w)
                p = GlobalAveragePool(c)
                y = Flatten(p)
                z = Shape(y)
                n = Gather <axis = 0> (z, zero)
            }""",
            w=floats(4, 3, 3, 3),
            zero=np.array(0, np.int64),
        )
    )
    assert shapes_of(prepared) == {
        "c": ("batch", 4, 8, 8),
        "p": ("batch", 4, 1, 1),
        "y": ("batch", 4),
        "z": (2,),
    }


def test_a_scalar_has_a_shape_without_dimensions():
    prepared = prepare(
        parse("(float[3] x) => (float[3] y) { s = ReduceSum <keepdims = 0> (x) y = Add(x, s) }")
    )
    assert shapes_of(prepared)["s"] == ()


def test_a_symbolic_batch_survives_a_reshape_to_minus_one():
    prepared = prepare(
        parse(
            """(float[batch, 6, 2, 2] x) => (float[n, c, h, w] y) {
                r = Reshape(x, apart)
                t = Transpose <perm = [0, 2, 1, 3, 4]> (r)
                b = Reshape(t, together)
                y = Relu(b)
            }""",
            apart=np.array([-1, 2, 3, 2, 2], np.int64),
            together=np.array([-1, 6, 2, 2], np.int64),
        )
    )
    assert {shape[0] for shape in shapes_of(prepared).values()} == {"batch"}


def test_a_size_that_only_the_data_knows_has_the_first_name_the_source_gave_it():
    prepared = prepare(
        parse(
            """(float[4] x) => (int64[rank, hits] y) <int64[r, found] n> {
                n = NonZero(x)
                y = Neg(n)
            }"""
        )
    )
    assert shapes_of(prepared) == {"n": (1, "found"), "y": (1, "found")}


def test_a_size_without_any_name_gets_one():
    prepared = prepare(parse("(float[4] x) => (int64[a, b] y) { n = NonZero(x) y = Neg(n) }"))
    rows, columns = shapes_of(prepared)["n"]
    assert rows == 1
    assert isinstance(columns, str)


def test_tensors_without_an_inferable_shape_are_named():
    model = parse("(float[4] x) => (float[4] y) { odd = local.Mystery(x) y = Relu(odd) }")
    with pytest.raises(InputError, match=r"cannot be inferred: odd \(Mystery\)"):
        prepare(model)


def test_an_operator_of_another_domain_is_fine_when_its_shape_is_given():
    model = parse(
        "(float[4] x) => (float[4] y) <float[4] odd> { odd = local.Mystery(x) y = Relu(odd) }"
    )
    assert shapes_of(prepare(model)) == {"odd": (4,), "y": (4,)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(float[1, 3] x) => (float[1, 4] y) { y = Relu(x) }", "shape differ"),
        ("(float[3] x, float[4] z) => (float[4] y) { y = Add(x, z) }", "Incompatible dimensions"),
        ("(float[3] x) => (float[3] y) { y = Reluu(x) }", "No Op registered for Reluu"),
        ("(float[3] x) => (float[3] y) { y = Relu(gone) }", "reads tensors nobody provides: gone"),
        ("(float[3] x) => (float[3] y) { a = Relu(x) }", "reads tensors nobody provides: y"),
        ("(float[3] x) => (float[3] x) { a = Relu(x) }", "has no operator that an output depends"),
        ("(float[3] x) => () { a = Relu(x) }", "has no operator that an output depends"),
    ],
)
def test_an_invalid_network_is_refused_with_the_reason(body: str, message: str):
    with pytest.raises(InputError, match=message):
        prepare(parse(body))


def test_a_message_names_the_file_that_the_graph_came_from(tmp_path: Path):
    path = tmp_path / "wrong.onnx"
    ir.save(parse("(float[1, 3] x) => (float[1, 4] y) { y = Relu(x) }"), path)
    with pytest.raises(InputError, match=r"^/.*wrong\.onnx: is not a valid network"):
        prepare(load_onnx(path))


def test_a_constant_output_gets_a_producer_and_keeps_its_name():
    prepared = prepare(
        parse("(float[2] x) => (float[2] w, float[2] y) { y = Add(x, w) }", w=floats(2))
    )
    assert [node.op_type for node in prepared.graph] == ["Add", "Identity"]
    assert [value.name for value in prepared.graph.outputs] == ["w", "y"]
    assert list(prepared.graph.initializers) == ["w_constant"]


def test_an_output_that_is_an_input_stays_one():
    prepared = prepare(parse("(float[2] x) => (float[2] x, float[2] y) { y = Relu(x) }"))
    assert prepared.graph.outputs[0] is prepared.graph.inputs[0]


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("onnx_type", "numpy_name"),
    [
        ("float", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("double", "float64"),
        ("int64", "int64"),
        ("uint8", "uint8"),
        ("bool", "bool"),
    ],
)
def test_a_tensor_is_described_in_numpys_terms(onnx_type: str, numpy_name: str):
    prepared = prepare(
        parse(f"({onnx_type}[n, 3] x) => ({onnx_type}[n, 3] y) {{ y = Identity(x) }}")
    )
    assert tensor_spec(prepared.graph.inputs[0]) == TensorSpec("x", numpy_name, ("n", 3))


def test_what_is_no_dense_tensor_of_numbers_cannot_cross():
    prepared = prepare(
        parse(
            """(float[3] x, string[3] t) => (float[3] y, string[3] u) {
                s = SequenceConstruct(x, x)
                i = Constant <value_int = 0> ()
                y = SequenceAt(s, i)
                u = Identity(t)
            }"""
        )
    )
    values = values_of(prepared)
    assert is_transferable(values["y"])
    assert not is_transferable(values["s"])
    assert not is_transferable(values["u"])
    with pytest.raises(InputError, match=r"tensor 'u': has the type STRING, which cannot cross"):
        tensor_spec(values["u"])


def test_a_node_reads_what_its_branches_capture_at_any_depth():
    model = parse(
        """(bool c, float[3] x, float[3] z) => (float[3] y) {
            a = Relu(x)
            b = Sigmoid(z)
            y = If (c) <
                then_branch = one () => (float[3] o) {
                    o = If (c) <
                        then_branch = two () => (float[3] p) { i = Add(a, w) p = Neg(i) },
                        else_branch = three () => (float[3] q) { q = Neg(b) }
                    >
                },
                else_branch = four () => (float[3] r) { r = Abs(x) }
            >
        }""",
        w=floats(3),
    )
    node = model.graph[-1]
    assert {value.name for value in node_inputs(node)} == {"c", "a", "b", "w", "x"}
    assert node_inputs(node)[0].name == "c"


def test_a_node_that_reads_a_value_twice_reads_it_once():
    model = parse("(float[3] x) => (float[3] y) { y = Mul(x, x) }")
    assert [value.name for value in node_inputs(model.graph[0])] == ["x"]


def test_constants_flow_through_operators_that_read_nothing_else():
    model = parse(
        """(float[3] x) => (float[3] y) {
            n = Neg(w)
            a = Abs(n)
            r = RandomNormal <shape = [3]> ()
            s = Add(r, n)
            t = Add(x, s)
            y = Add(t, a)
        }""",
        w=floats(3),
    )
    assert {value.name for value in constant_values(model.graph)} == {"n", "a"}
