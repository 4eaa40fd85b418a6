"""The torch engine on the CPU against ONNX Runtime, on every family of the catalogue."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils._python_dispatch import TorchDispatchMode

from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.engine import DeviceTensor
from parnet_engines.cuda.memory import array_at
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.cuda.session import CudaSession
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.runtimes import torch_engine
from parnet_engines.runtimes.float32_reference import reference_tensors
from parnet_engines.runtimes.torch_engine import TorchEngine, _fits, strides_of
from parnet_engines.runtimes.torch_graph import TorchGraph
from parnet_engines.session import Session
from parnet_export.errors import InputError
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network
from parnet_export.stream_graph import Cost, Segment, TensorSpec
from parnet_export.verify import relative_error

NO_COST = Cost(0, 0, 0, 0, 0, 0)

NETWORKS = [
    ("resnet18", "none", 32),
]
LARGE_NETWORKS = [
    ("parnet-cifar-1.3m", "none", 32),
    ("parnet-cifar-1.3m", "repvgg", 32),
    ("parnet-s", "full", 32),
    ("seqresnet-k8r4", "none", 32),
    ("seqresnet-b-k16r7", "full", 32),
    ("yolov4-csp", "full", 64),
    ("parnet-m-one-stream-x2", "full", 32),
    ("parnet-xl-csp-det", "full", 64),
    ("parnet-xl-det", "full", 64),
]


def segment_of(path) -> Segment:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": "float32", "tensor(float16)": "float16"}
    inputs, outputs = (
        tuple(TensorSpec(v.name, kinds[v.type], tuple(v.shape)) for v in values)
        for values in (session.get_inputs(), session.get_outputs())
    )
    return Segment("it", inputs, outputs, NO_COST)


def arrays_for(specs, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: generator.standard_normal(spec.resolve({"batch": 2})).astype(spec.dtype)
        for spec in specs
    }


def test_every_family_is_compared():
    covered = {CATALOG[name][0].key for name, _, _ in NETWORKS + LARGE_NETWORKS}
    assert covered == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "level", "resolution"),
    [*NETWORKS, *(pytest.param(*one, marks=pytest.mark.slow) for one in LARGE_NETWORKS)],
)
def test_a_network_computes_what_onnx_runtime_computes(tmp_path, name, level, resolution):
    model, provenance = export_graph(
        load_network(name), level=level, resolution=resolution, batch="dynamic"
    )
    bundle, _ = make_bundle(model, provenance, tmp_path / "b", prove=False)
    path = bundle.whole_path
    segment = segment_of(path)
    inputs = arrays_for(segment.inputs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run([spec.name for spec in segment.outputs], inputs)
    found = TorchEngine(segment, path).run(inputs)
    for spec, reference in zip(segment.outputs, expected, strict=True):
        assert relative_error(found[spec.name], reference) < 1e-4


@pytest.fixture(scope="module")
def small_parnet():
    return export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch="dynamic")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_segments_one_after_another_compute_the_whole_network(tmp_path, small_parnet, precision):
    model, provenance = small_parnet
    bundle, _ = make_bundle(model, provenance, tmp_path / "b", precision=precision, prove=False)
    graph = bundle.stream_graph
    tensors = arrays_for(graph.inputs)
    session = onnxruntime.InferenceSession(bundle.whole_path, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in graph.outputs]
    expected = dict(zip(names, session.run(names, tensors), strict=True))
    for segment in graph.segments:
        engine = TorchEngine(segment, bundle.segment_path(segment.name))
        reads = [tensors[spec.name] for spec in segment.inputs]
        writes = [np.zeros(s.resolve({"batch": 2}), s.dtype) for s in segment.outputs]
        run = engine.bind(reads, writes)
        run()
        tensors |= {s.name: array for s, array in zip(segment.outputs, writes, strict=True)}
    limit = {"fp32": 1e-5, "fp16": 2e-2}[precision]
    for name, reference in expected.items():
        assert relative_error(tensors[name], reference) < limit


def save(path, nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in dict(initializers).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)


X = (2, 4, 7, 9)
PAIR = np.array([2, 3], np.int64)
ONE_OPERATOR = {
    "asymmetric convolution": (
        "Conv",
        {"pads": [1, 0, 0, 2], "strides": [2, 1], "dilations": [1, 2], "group": 2},
        {"w": np.random.default_rng(1).standard_normal((6, 2, 3, 2)).astype(np.float32)},
    ),
    "average without padding": (
        "AveragePool",
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]},
        {},
    ),
    "average with padding": (
        "AveragePool",
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "count_include_pad": 1, "ceil_mode": 1},
        {},
    ),
    "asymmetric maximum": (
        "MaxPool",
        {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "strides": [2, 2]},
        {},
    ),
    "mean over all axes": ("ReduceMean", {"keepdims": 0}, {}),
    "mean over some axes": ("ReduceMean", {}, {"axes": PAIR}),
    "mean over no axes": ("ReduceMean", {"noop_with_empty_axes": 1}, {}),
    "reshape that copies a size": ("Reshape", {}, {"shape": np.array([0, -1, 3], np.int64)}),
    "flatten": ("Flatten", {"axis": 2}, {}),
    "flatten from behind": ("Flatten", {"axis": -1}, {}),
    "transpose": ("Transpose", {"perm": [0, 2, 3, 1]}, {}),
    "reverse": ("Transpose", {}, {}),
    "upsampling": (
        "Resize",
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"": np.zeros(0), "s": np.array([1, 1, 2, 3], np.float32)},
    ),
    "softmax": ("Softmax", {"axis": 1}, {}),
    "mish": ("Mish", {}, {}),
    "large window": (
        "MaxPool",
        {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2], "strides": [1, 1]},
        {},
    ),
    "softplus": ("Softplus", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "division": ("Div", {}, {"d": np.full((4, 1, 1), 3, np.float32)}),
    "difference": ("Sub", {}, {"d": np.full((4, 1, 1), 3, np.float32)}),
    "global mean": ("GlobalAveragePool", {}, {}),
    "product": (
        "MatMul",
        {},
        {"w": np.random.default_rng(2).standard_normal((9, 5)).astype(np.float32)},
    ),
}


RANKS = {"mean over all axes": 0, "reshape that copies a size": 3} | dict.fromkeys(
    ["flatten", "flatten from behind"], 2
)
"""Ranks of the results that are not 4."""


@pytest.mark.parametrize("case", ONE_OPERATOR)
def test_an_operator_computes_what_onnx_runtime_computes(tmp_path, case):
    kind, attributes, constants = ONE_OPERATOR[case]
    operands = ["x", *constants]
    if kind == "Resize":
        operands = ["x", "", "s"]
    node = helper.make_node(kind, operands, ["y"], **attributes)
    path = tmp_path / "one.onnx"
    kept = {name: value for name, value in constants.items() if name}
    save(path, [node], {"x": X}, {"y": RANKS.get(case, 4) * [None]}, kept)
    x = np.random.default_rng(0).standard_normal(X).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    (found,) = TorchGraph(path, "it")({"x": torch.from_numpy(x)})
    assert tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [None, [1, 3]])
def test_a_split_has_several_outputs(tmp_path, sizes):
    constants = {} if sizes is None else {"sizes": np.array(sizes, np.int64)}
    extra = {"num_outputs": 2} if sizes is None else {}
    node = helper.make_node("Split", ["x", *constants], ["a", "b"], axis=1, **extra)
    path = tmp_path / "split.onnx"
    save(path, [node], {"x": X}, {"a": [None] * 4, "b": [None] * 4}, constants)
    x = np.random.default_rng(0).standard_normal(X).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = TorchGraph(path, "it")({"x": torch.from_numpy(x)})
    for array, expected in zip(found, session.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(array.numpy(), expected)


@pytest.mark.parametrize(
    ("second", "calls"),
    [
        (["x", "s"], 1),  # x * sigmoid(x): one kernel
        (["s", "x"], 1),
        (["s", "s"], 2),
        (["x", "x"], 2),
    ],
)
def test_only_a_gate_on_itself_is_merged(tmp_path, second, calls):
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", second, ["y"])]
    path = tmp_path / "gate.onnx"
    save(path, nodes, {"x": X}, {"y": [None] * 4})
    graph = TorchGraph(path, "it")
    assert len(graph._calls) == calls
    x = torch.randn(X, generator=torch.Generator().manual_seed(0))
    tensors = {"x": x, "s": torch.sigmoid(x)}
    (found,) = graph({"x": x})
    torch.testing.assert_close(found, tensors[second[0]] * tensors[second[1]])


def test_an_unknown_operator_is_named_with_its_node_and_segment(tmp_path):
    path = tmp_path / "odd.onnx"
    save(path, [helper.make_node("Erf", ["x"], ["y"], name="odd")], {"x": X}, {"y": X})
    with pytest.raises(InputError, match="node 'odd' of segment 'stream1' is the operator Erf"):
        TorchGraph(path, "stream1")


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear"), "mode = 'linear'"),
        (
            helper.make_node(
                "MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER", name="pool"
            ),
            "MaxPool with auto_pad = 'SAME_UPPER'",
        ),
    ],
)
def test_an_unknown_form_of_an_operator_is_named(tmp_path, node, problem):
    path = tmp_path / "odd.onnx"
    save(path, [node], {"x": X}, {"y": [None] * 4}, {"s": np.ones(4, np.float32)})
    with pytest.raises(InputError, match=problem):
        TorchGraph(path, "it")


def test_a_closed_engine_does_not_run(tmp_path):
    path = tmp_path / "relu.onnx"
    save(path, [helper.make_node("Relu", ["x"], ["y"])], {"x": X}, {"y": X})
    engine = TorchEngine(segment_of(path), path)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.run({"x": np.zeros(X, np.float32)})


def test_outputs_are_new_memory_and_inputs_stay(tmp_path):
    path = tmp_path / "same.onnx"
    save(path, [helper.make_node("Identity", ["x"], ["y"])], {"x": X}, {"y": X})
    x = np.ones(X, np.float32)
    found = TorchEngine(segment_of(path), path).run({"x": x})["y"]
    assert not np.shares_memory(found, x)


def test_channels_last_tensors_lie_as_numpy_says():
    shape = (2, 5, 3, 4)
    tensor = DeviceTensor("t", "float16", shape, 0, 0, TensorLayout.HWC8)
    memory = np.arange(tensor.size_bytes // 2, dtype=np.float16)
    seen = np.lib.stride_tricks.as_strided(memory, shape, strides_of(tensor))
    vectors = memory.reshape(2, 3, 4, 8)[..., :5]  # N, H, W, C padded to 8
    np.testing.assert_array_equal(seen, vectors.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("architecture", "capability", "fits"),
    [
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("compute_120", (9, 0), False),
        ("sm_120", (12, 0), True),
    ],
)
def test_kernels_run_on_their_generation_and_intermediate_code_on_newer_ones(
    architecture, capability, fits
):
    assert _fits(architecture, *capability) is fits


# What a GPU would run, on the CPU: memory of a recording driver, and torch without CUDA.


@pytest.fixture
def torch_without_cuda(monkeypatch):
    """Let the engines for GPUs compute in host memory, as soon as they are enqueued."""

    def as_tensor(tensor):
        strides = strides_of(tensor)
        memory = array_at(tensor.pointer, (tensor.size_bytes,), "uint8").view(tensor.dtype)
        if strides is None:
            return torch.from_numpy(memory.reshape(tensor.shape))
        shown = np.lib.stride_tricks.as_strided(memory, tensor.shape, strides)
        return torch.from_numpy(shown)

    def wait_for_all(_):
        pytest.fail("waiting for a whole device spoils the captures of other threads")

    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch_engine, "as_tensor", as_tensor)
    monkeypatch.setattr(torch_engine, "require_kernels", lambda _: None)
    graph = torch_engine.TorchGraph
    monkeypatch.setattr(
        torch_engine, "TorchGraph", lambda path, name, _, **options: graph(path, name, **options)
    )
    stand_ins = {
        "synchronize": wait_for_all,
        "current_stream": lambda _: SimpleNamespace(synchronize=lambda: None),
        "is_current_stream_capturing": lambda: False,
        "ExternalStream": lambda stream, _: stream,
        "MemPool": object,
        "stream": lambda _: nothing(),
        "device": lambda _: nothing(),
        "use_mem_pool": lambda *_: nothing(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    driver = RecordingDriver(3)
    monkeypatch.setattr(cuda_session, "open_driver", lambda _: driver)
    return driver


@pytest.mark.parametrize("devices", ["0", "0,0,0", "0,1,2"])
@pytest.mark.parametrize(
    ("precision", "boundary", "vectors"),
    [
        ("fp16", "vector", True),
        ("fp16", "linear", False),
        ("fp16", None, True),
        ("fp32", "linear", False),
        ("fp32", None, False),
    ],
)
def test_engines_for_gpus_compute_what_onnx_runtime_does_with_either_boundary(
    make_two_streams, torch_without_cuda, tmp_path, devices, precision, boundary, vectors
):
    bundle = make_two_streams(tmp_path, precision=precision)
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    with Session.open(bundle, plan="whole") as session:
        expected = session.run({"image": image})["logits"]
    options = {"plan": "authors", "engine": "torch", "use_graphs": False, "boundary": boundary}
    with CudaSession.open_on_gpus(bundle, devices, **options) as session:
        for _ in range(2):
            found = session.run({"image": image})["logits"]
        layouts = {e.layout(s.name) for e in session.engines for s in (*e.inputs, *e.outputs)}
        tensors = session.inspect({"image": image})
    assert (TensorLayout.HWC8 in layouts) == vectors
    limit = {"fp32": 1e-4, "fp16": 2e-2}[precision]  # the mean of a map of random signs is small
    np.testing.assert_allclose(found, expected, atol=limit * np.abs(expected).max())
    (reference,) = reference_tensors(bundle, [{"image": image}])
    for name in ("stem", "a1", "b1"):
        assert relative_error(tensors[name], reference[name]) < limit / 2
    assert torch_without_cuda.open_resources == {}


class Convolutions(TorchDispatchMode):
    """Notes whether the images of convolutions lie with their channels last."""

    def __init__(self):
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if "conv" in function.name():
            layout = torch.channels_last
            self.channels_last += [t.is_contiguous(memory_format=layout) for t in args[:2]]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", ["whole", "streams"])
def test_half_precision_computes_with_channels_last_in_one_engine_as_in_several(
    make_two_streams, torch_without_cuda, tmp_path, plan
):
    bundle = make_two_streams(tmp_path, precision="fp16")
    options = {"plan": plan, "engine": "torch", "use_graphs": False}
    with CudaSession.open_on_gpus(bundle, "0", **options) as session, Convolutions() as seen:
        session.run({"image": np.zeros((1, 3, 64, 64), np.float32)})
    assert seen.channels_last
    assert all(seen.channels_last)
