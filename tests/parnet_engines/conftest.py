"""A small bundle of several segments, made without torch; the threads of a test."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_export import pipeline
from parnet_export.bundle import Bundle, Precision
from parnet_export.splitting.split import SplitOptions


def write_two_streams(path: Path, batch: int | str, odd_operator: str, seed: int) -> None:
    """Write a network of a stem, two streams and a head, some operator of one stream odd."""
    rng = np.random.default_rng(seed)
    channels = 12  # no multiple of 8, so that vectors of 8 pad them

    def weight(name: str, out: int, into: int) -> onnx.TensorProto:
        values = rng.standard_normal((out, into, 3, 3)) / (3 * into**0.5)
        return numpy_helper.from_array(values.astype(np.float32), name)

    def conv(name: str, source: str, target: str, weights: str) -> onnx.NodeProto:
        return helper.make_node("Conv", [source, weights], [target], name=name, pads=[1, 1, 1, 1])

    nodes = [conv("stem/conv", "image", "stem", "w_stem")]
    tensors = [weight("w_stem", channels, 3)]
    for stream in ("a", "b"):
        before = "stem"
        for depth in range(2):
            name = f"{stream}{depth}"
            nodes.append(conv(f"{stream}/conv{depth}", before, name, f"w_{name}"))
            tensors.append(weight(f"w_{name}", channels, channels))
            before = name
    if odd_operator:
        nodes.append(helper.make_node(odd_operator, ["b1"], ["b2"], name="b/odd", domain="acme"))
    nodes += [
        helper.make_node("Add", ["a1", "b2" if odd_operator else "b1"], ["sum"], name="head/add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="head/pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="head/flatten"),
    ]
    feature_map = [batch, channels, 64, 64]
    graph = helper.make_graph(
        nodes,
        "two-streams",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, channels])],
        tensors,
        value_info=[helper.make_tensor_value_info("b2", TensorProto.FLOAT, feature_map)]
        if odd_operator
        else [],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, opset_imports=opsets[: 2 if odd_operator else 1])
    model.ir_version = 10
    onnx.save(model, path)


@pytest.fixture(scope="session")
def make_two_streams() -> Callable[..., Bundle]:
    """Make a bundle of the two-stream network in a folder."""

    def make(
        folder: Path,
        *,
        precision: Precision = "fp32",
        batch: int | str = 1,
        odd_operator: str = "",
        seed: int = 0,
    ) -> Bundle:
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "two-streams.onnx"
        write_two_streams(source, batch, odd_operator, seed)
        bundle, _ = pipeline.make_bundle(
            *pipeline.read_graph(source),
            folder / "two-streams.bundle",
            precision=precision,
            options=SplitOptions(min_gain=0),
            prove=False,
        )
        return bundle

    return make


class Threads:
    """The threads that have started since this was made."""

    def __init__(self) -> None:
        self._before = self._all()

    @staticmethod
    def _all() -> set[int]:
        return {int(task.name) for task in Path("/proc/self/task").iterdir()}

    @property
    def new(self) -> set[int]:
        """Those of now. Threads of earlier tests may end meanwhile, so only new ones count."""
        return self._all() - self._before

    def all_end(self, within_s: float = 5.0) -> bool:
        """Whether they end: the system lists a thread a moment longer than it can be joined."""
        deadline_s = time.monotonic() + within_s
        while self.new and time.monotonic() < deadline_s:
            time.sleep(0.001)
        return not self.new


@pytest.fixture
def watch_threads() -> type[Threads]:
    return Threads
