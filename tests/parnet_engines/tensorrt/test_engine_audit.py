from __future__ import annotations

import json

import pytest

from parnet_engines.tensorrt.engine_audit import audit_layers, full_precision_nodes

# As TensorRT 10 has it: one text for format and type, inputs and outputs listed by name.
TENSORRT_10 = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to stem/conv",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "image", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
            "Metadata": "",
        },
        {
            "Name": "stem/conv + stem/act",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [
                {
                    "Name": "y",
                    "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
                }
            ],
            "Metadata": "[ONNX Layer: stem/conv]\u001e[ONNX Layer: stem/act]",
        },
        {
            "Name": "__myl_MeanCast_myl0_1",
            "LayerType": "kgen",
            "Inputs": [{"Name": "y", "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "m", "Format/Datatype": "Float"}],
            "Metadata": "[ONNX Layer: gate/pool]",
        },
        {
            "Name": "stray/conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "m", "Format/Datatype": "Float"}],
            "Outputs": [{"Name": "z", "Format/Datatype": "Row major linear FP32 format (kLINEAR)"}],
            "Metadata": "[ONNX Layer: stray/conv]",
        },
        {"Name": "signal", "LayerType": "signal", "Inputs": [], "Outputs": []},
    ],
    "Bindings": ["image", "logits"],
}

# As TensorRT 11 has it: a field for each, and objects for the engine's tensors.
TENSORRT_11 = {
    "Layers": [
        {
            "Name": "stem/conv + stem/act",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "x",
                    "DataType": "Half",
                    "Format": "Row major linear FP16 format (kLINEAR)",
                }
            ],
            "Outputs": [
                {
                    "Name": "y",
                    "DataType": "Half",
                    "Format": "Channel major FP16 format where channel % 8 == 0 (kHWC8)",
                }
            ],
        },
        {
            "Name": "gate/pool",
            "LayerType": "Reduce",
            "Inputs": [{"Name": "y", "DataType": "Half", "Format": "N/A"}],
            "Outputs": [{"Name": "m", "DataType": "Float", "Format": "N/A"}],
        },
        {
            "Name": "stray/conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "m", "DataType": "Float"}],
            "Outputs": [{"Name": "z", "DataType": "Float"}],
        },
    ],
    "I/O Tensors": [
        {
            "Name": "image",
            "IOMode": "Input",
            "DataType": "Float",
            "Dimensions": [1, 3, 224, 224],
            "Location": "Device",
            "IsShapeInferenceIO": False,
            "ProfileInfo": [{"Format": "Row major linear FP32 format (kLINEAR)"}],
        }
    ],
}


def test_tensorrt_10_and_11_name_the_same_layers():
    ten = audit_layers(json.dumps(TENSORRT_10), {"gate/pool"})
    eleven = audit_layers(json.dumps(TENSORRT_11), {"gate/pool"})
    assert ten.layers == {"fp32": 3, "fp16": 1}
    assert eleven.layers == {"fp16": 1, "fp32": 2}
    # Moving an input about is no computation, and the pooling is meant to be in float32.
    assert ten.unexpected_fp32 == eleven.unexpected_fp32 == ("stray/conv",)


def test_a_float32_bundle_expects_float32():
    audit = audit_layers(json.dumps(TENSORRT_11), None)
    assert (audit.layers["fp32"], audit.unexpected_fp32) == (2, ())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16 format (kLINEAR)", "bf16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Thirty-two wide channel vectorized row major FP32 format (kCHW32)", "fp32"),
        ("Int64", "int64"),
        ("FP8E4M3", "fp8"),
        ("Bool", "bool"),
    ],
)
def test_every_way_to_write_a_type_is_known(text, kind):
    layers = {"Layers": [{"Name": "l", "LayerType": "X", "Outputs": [{"Format/Datatype": text}]}]}
    assert audit_layers(json.dumps(layers), None).layers == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        '{"Layers": ["stem/conv", "head"], "Bindings": ["image"]}',  # names only
        '{"Layers": []}',
        '{"Layers": [{"Name": "l", "Outputs": [{"Name": "y", "Format/Datatype": "??"}]}]}',
    ],
)
def test_a_text_that_tells_no_types_is_no_audit(text):
    assert audit_layers(text, None) is None


def test_the_graph_tells_what_is_meant_to_be_float32(make_two_streams, tmp_path):
    half = make_two_streams(tmp_path, precision="fp16")
    assert full_precision_nodes(half.segment_path("stream1")) == frozenset()
    names = full_precision_nodes(half.segment_path("head"))
    assert "head/pool" in names
    assert "head/add" not in names


def test_where_shapes_are_dynamic_the_weights_tell_the_type():
    """TensorRT 10 then says of every tensor that its format is not available."""
    hidden = [{"Name": "y", "Format/Datatype": "N/A due to dynamic shapes"}]

    def conv(name, kind):
        weights = {"Type": kind, "Count": 9408}
        return {"Name": name, "LayerType": "CaskConvolution", "Outputs": hidden, "Weights": weights}

    layers = [
        conv("a", "Half"),
        conv("b", "Float"),
        {"Name": "r", "LayerType": "Reformat", "Outputs": hidden},
    ]
    audit = audit_layers(json.dumps({"Layers": layers}), frozenset())
    assert audit.layers == {"fp16": 1, "fp32": 1, "unknown": 1}
    assert audit.unexpected_fp32 == ("b",)
