"""What the tests of the bench share: small graphs, and results that were never measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from parnet_bench.machine.environment import Environment
from parnet_bench.measuring.measure import measure
from parnet_bench.results.procedure import Procedure
from parnet_bench.results.result import ProcessRecording, Recording, Result, Row, RowDescription
from parnet_bench.workers.turn import Turn
from parnet_engines.clock import FakeClock
from parnet_engines.planning.cost_table import COSTS_NAME
from parnet_engines.planning.decision import DECISIONS_NAME
from parnet_export.bundle import Provenance, open_bundle
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.models.family import Entry
from parnet_export.models.parnet import ParNetConfig
from parnet_export.models.resnet import ResNetConfig
from parnet_export.pipeline import make_bundle, read_graph
from parnet_export.stream_graph import TensorSpec


def write_forked_network(path, *, channels=48, batch=1, branches=2):
    """Write a stem, equal branches of two convolutions each, a sum and a classifier."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def convolution(name, read, inputs):
        weight = rng.normal(0, 0.1, (channels, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        nodes.append(
            helper.make_node("Conv", [read, f"{name}.weight"], [name], name=name, pads=[1, 1, 1, 1])
        )
        return name

    stem = convolution("stem", "image", 3)
    ends = []
    for index in range(branches):
        middle = convolution(f"branch{index}.0", stem, channels)
        ends.append(convolution(f"branch{index}.1", middle, channels))
    nodes.append(helper.make_node("Sum", ends, ["sum"], name="sum"))
    nodes.append(helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"))
    graph = helper.make_graph(
        nodes,
        "forked",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, channels])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def forked_onnx(tmp_path_factory):
    """An ONNX file of two parallel branches, batch 1, 32 x 32."""
    return write_forked_network(tmp_path_factory.mktemp("forked") / "forked.onnx")


@pytest.fixture(scope="session")
def dynamic_onnx(tmp_path_factory):
    """The same network with an open batch."""
    path = tmp_path_factory.mktemp("dynamic") / "dynamic.onnx"
    return write_forked_network(path, batch="batch")


@pytest.fixture(scope="session")
def straight_onnx(tmp_path_factory):
    """A network without parallel branches."""
    path = tmp_path_factory.mktemp("straight") / "straight.onnx"
    return write_forked_network(path, branches=1)


@pytest.fixture(scope="session")
def forked_bundle(forked_onnx, tmp_path_factory):
    """The bundle of `forked_onnx`."""
    return make_bundle(*read_graph(forked_onnx), tmp_path_factory.mktemp("bundles") / "forked")[0]


@pytest.fixture
def unmeasured_bundle(forked_bundle, tmp_path):
    """A copy of `forked_bundle` without what other tests may have measured on it."""
    measured = shutil.ignore_patterns(COSTS_NAME, DECISIONS_NAME)
    return open_bundle(shutil.copytree(forked_bundle.path, tmp_path / "forked", ignore=measured))


@pytest.fixture(scope="session")
def dynamic_bundle(dynamic_onnx, tmp_path_factory):
    """The bundle of `dynamic_onnx`."""
    return make_bundle(*read_graph(dynamic_onnx), tmp_path_factory.mktemp("bundles") / "dynamic")[0]


@pytest.fixture(scope="module")
def tiny_catalogue(tmp_path_factory):
    """A catalogue with a tiny ParNet and a tiny ResNet, and an empty cache of graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARNET_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        parnet = ParNetConfig((48, 96), (1, 1), 64, num_classes=10, variant="cifar")
        resnet = ResNetConfig("basic", (1, 1), width=8, num_classes=10)
        for family, name, config in (
            (FAMILIES["parnet"], "parnet-tiny", parnet),
            (FAMILIES["resnet"], "resnet-tiny", resnet),
        ):
            entry = Entry(name, name, config, 32, "reconstruction", "for tests")
            patch.setitem(CATALOG, name, (family, entry))
        yield Path(os.environ["PARNET_EXPORT_CACHE"])


class SimulatedRow:
    """A worker whose latencies are drawn, on a clock that only rows move."""

    load_ms = 1000.0

    def __init__(self, clock, draw):
        self.clock = clock
        self.draw = draw
        self.requests = []

    def take_turn(self, request):
        self.requests.append(request)
        count = request.lead_in + request.runs
        latencies_ns = np.maximum(1, self.draw(count, self.clock.now_ns())).astype(np.int64)
        self.clock.sleep_until(self.clock.now_ns() + int(latencies_ns.sum()))
        recorded = tuple(latencies_ns[request.lead_in :].tolist())
        return Turn(recorded, sum(recorded))

    def close(self):
        pass


@pytest.fixture(scope="session")
def simulated_row():
    """The class of rows whose latencies are drawn: ``(clock, draw)``."""
    return SimulatedRow


@pytest.fixture(scope="session")
def simulate():
    """Measure simulated rows, ``{name: draw(generator, count) in ns}``, by the shipped rules.

    Each process of a row has a level of its own, of relative standard deviation
    `process_noise`, and the machine a speed that `drift` tells for a moment in ns.
    """

    def simulate(draws, seed, *, process_noise=0.0, drift=lambda _: 1.0, **options):
        generator = np.random.default_rng(seed)
        clock = FakeClock()

        def launch(name, _):
            clock.advance_ms(1000)
            level = np.exp(process_noise * generator.standard_normal())
            return SimulatedRow(
                clock, lambda count, now: draws[name](generator, count) * level * drift(now)
            )

        procedure = Procedure(seed=seed, **options)
        return measure(dict.fromkeys(draws, 1), launch, procedure, clock)

    return simulate


@pytest.fixture(scope="session")
def make_result():
    """Make a result of rows given as ``{name: rounds in nanoseconds}``.

    `processes` of them, of equally many rounds, recorded them.
    """

    def make(rounds_by_row, *, forms=("unfused", "whole", "streams"), stopped="rounds", **options):
        rows, processes = [], options.get("processes", 1)
        for name, form in zip(rounds_by_row, forms, strict=False):
            provenance = Provenance(
                network="net",
                source="net",
                weights=options.get("weights", "random"),
                seed=0,
                level="none" if form == "unfused" else "full",
            )
            description = RowDescription(
                name=name,
                network="net",
                form=form,
                target="net",
                provenance=provenance,
                precision="fp32",
                batch=options.get("batch", 1),
                inputs=(TensorSpec("image", "float32", (1, 3, 32, 32)),),
                parameters=1_267_146,
                flops=306_632_000,
                depth=12,
                devices="cpu",
                cores=(0, 1),
            )
            rounds = tuple(map(tuple, rounds_by_row[name]))
            share = len(rounds) // processes
            recording = Recording(
                tuple(
                    ProcessRecording(
                        options.get("settled", True),
                        (900, 500),
                        rounds[index * share : (index + 1) * share],
                    )
                    for index in range(processes)
                )
            )
            rows.append(Row(description, recording))
        count = len(rows[0].recording.rounds_ns)
        return Result(
            environment=Environment(
                created="2030-01-02T03:04:05+00:00",
                command=("parnet-bench", "latency", "net"),
                cpu_model="Some CPU",
                logical_cores=4,
                physical_cores=2,
                affinity=(0, 1, 2, 3),
                governors=("performance",),
                load_average=(0.5, 0.25, 0.125),
                memory_bytes=1 << 34,
                available_memory_bytes=1 << 33,
                system="Linux",
                python="CPython 3.11.7",
                libraries={"numpy": "2.0", "onnxruntime": "1.22.0"},
            ),
            procedure=Procedure(rounds=count // processes, processes=processes),
            stopped=stopped,
            orders=(tuple(tuple(range(len(rows))) for _ in range(count // processes)),) * processes,
            rows=tuple(rows),
            notes=options.get("notes", ()),
        )

    return make
