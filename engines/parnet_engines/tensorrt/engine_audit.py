"""In which precision the layers of an engine compute, as TensorRT's engine inspector tells.

A build that was asked for fp16 can yield float32 layers without a word. TensorRT 10 puts
format and type of a tensor in one text (``"Format/Datatype"``); 11 has a field for each.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from parnet_engines.tensorrt.engine_sidecar import Audit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet
    from pathlib import Path

_TYPES = {
    "fp32": r"FP32|FLOAT(?:32)?",
    "fp16": r"FP16|HALF|FLOAT16",
    "bf16": r"BF16|BFLOAT16",
    "fp8": r"FP8\w*",
    "fp4": r"FP4\w*",
    "int8": r"INT8",
    "int4": r"INT4",
    "int32": r"INT32",
    "int64": r"INT64",
    "uint8": r"UINT8",
    "bool": r"BOOL",
}
_TYPE = re.compile(
    r"(?<!\w)(?:" + "|".join(f"(?P<{name}>{text})" for name, text in _TYPES.items()) + r")(?!\w)",
    re.IGNORECASE,
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MOVING_LAYERS = frozenset({"constant", "noop", "reformat", "shuffle"})
"""Kinds of layers that compute nothing, so that their precision costs and loses nothing."""


def audit_layers(text: str, full_precision_nodes: AbstractSet[str] | None) -> Audit | None:
    """Read the inspector's JSON of an engine.

    Parameters
    ----------
    text
        What ``get_engine_information`` returned for an engine that was built with detailed
        profiling verbosity.
    full_precision_nodes
        Names of the ONNX nodes that are meant to compute in float32; None if all are.

    Returns
    -------
    Audit or None
        None when the text tells no layer's type.
    """
    try:
        decoded = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    layers = [layer for layer in decoded.get("Layers") or () if isinstance(layer, dict)]
    counts: Counter[str] = Counter()
    unexpected = []
    for layer in layers:
        types = [_type_of(tensor) for tensor in layer.get("Outputs") or ()]
        if not types:
            continue
        found = "fp32" if "fp32" in types else types[0]
        if found == "unknown":
            found = _type_of_weights(layer)
        counts[found] += 1
        if (
            found == "fp32"
            and full_precision_nodes is not None
            and str(layer.get("LayerType", "")).lower() not in _MOVING_LAYERS
            and not full_precision_nodes & _onnx_nodes(layer)
        ):
            unexpected.append(str(layer.get("Name", "a layer without a name")))
    return Audit(dict(counts), tuple(unexpected)) if set(counts) - {"unknown"} else None


def full_precision_nodes(onnx_path: Path) -> frozenset[str]:
    """Return the names of the nodes of an ONNX graph that produce float32 tensors."""
    import onnx

    model = onnx.load(onnx_path, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.output, *graph.input)
    }
    full = onnx.TensorProto.FLOAT
    return frozenset(
        node.name for node in graph.node if any(types.get(name) == full for name in node.output)
    )


def _type_of(tensor: Any) -> str:
    """Return the element type of a tensor that a layer reads or writes."""
    if not isinstance(tensor, dict):
        return "unknown"
    for key in ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format"):
        match = _TYPE.search(str(tensor.get(key, "")))
        if match:
            return str(match.lastgroup)
    return "unknown"


def _type_of_weights(layer: dict[str, Any]) -> str:
    """Return the type of a layer's weights: all that TensorRT 10 tells where shapes are dynamic."""
    weights = layer.get("Weights")
    return _type_of({"DataType": weights.get("Type")}) if isinstance(weights, dict) else "unknown"


def _onnx_nodes(layer: dict[str, Any]) -> set[str]:
    """Return the ONNX nodes that a layer computes, from its metadata or else its name."""
    named = _ONNX_LAYER.findall(str(layer.get("Metadata", "")))
    return set(named or _parts(str(layer.get("Name", ""))))


def _parts(name: str) -> Iterable[str]:
    return (part.strip() for part in name.split(" + "))
