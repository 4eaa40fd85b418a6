"""Sessions on NVIDIA's bindings, over a driver library that computes in host memory.

The library is compiled here, and found by the bindings of a process of its own: this file.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parnet_engines.cuda.devices import open_driver, parse_gpus
from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.session import CudaSession
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.engine import NullEngine
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Run
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NAMES = ("image", "stem", "left", "right", "joined")
SPECS = {name: TensorSpec(name, "float32", (4, 8)) for name in NAMES}
NO_COST = Cost(0, 0, 0, 0, 0, 0)


def segment(name: str, *inputs: str) -> Segment:
    return Segment(name, tuple(SPECS[i] for i in inputs), (SPECS[name],), NO_COST)


GRAPH = StreamGraph(
    (SPECS["image"],),
    (SPECS["right"], SPECS["joined"]),
    (
        segment("stem", "image"),
        segment("left", "stem"),
        segment("right", "stem"),
        segment("joined", "left"),
    ),
)


class Copying(NullEngine):
    """An engine whose kernel is a copy of its first input, so that a library in C computes it."""

    def __init__(self, segment, driver, device, *, synchronises=False):
        super().__init__(segment)
        self.driver, self.device, self.synchronises = driver, device, synchronises

    def layout(self, _tensor):
        return TensorLayout.LINEAR

    def bind(self, inputs, outputs):
        def enqueue(stream):
            size_bytes = inputs[0].size_bytes
            self.driver.copy_on_device(outputs[0].pointer, inputs[0].pointer, size_bytes, stream)
            if self.synchronises:
                self.driver.synchronize(stream)

        return enqueue


def open_session(driver, devices, *, synchronises=False, in_flight=1, **options):
    names = parse_gpus(devices)
    lanes = tuple(Lane(f"lane{i}", names[i % len(names)]) for i in range(3))
    on = {"stem": 0, "left": 1, "right": 2, "joined": 1}
    placement = Placement(lanes, tuple(Assignment(s, f"lane{lane}") for s, lane in on.items()))
    program = checked(lower(GRAPH, placement, in_flight), GRAPH)
    ordinal = {lane.name: int(lane.device[5:].partition("#")[0]) for lane in lanes}
    engines = {
        (step.segment, step.lane): Copying(
            GRAPH[step.segment], driver, ordinal[step.lane], synchronises=synchronises
        )
        for step in program.program.steps
        if isinstance(step, Run)
    }
    return CudaSession(program, engines, driver, **options)


def run(devices: str, kind: str) -> dict[str, object]:
    """Run a few inferences, and return how and whether they went well."""
    driver = open_driver(parse_gpus(devices))
    options = {
        "plain": {},
        "no graphs": {"use_graphs": False},
        "recorded": {"record": True},
        "overlapping": {"in_flight": 2},
        "synchronising": {"synchronises": True},
        "limited": {"timeout_s": 60.0},
        "in place": {},
        "resident": {},
        "refused": {},
    }[kind]
    images = np.random.default_rng(0).standard_normal((5, 4, 8)).astype(np.float32)
    right, spans, refusal = 0, 0, ""
    with open_session(driver, devices, **options) as session:
        for image in images:
            if kind == "in place":
                found = run_in_place(driver, session, image)
            elif kind == "resident":
                found = run_resident(driver, session, image)
            else:
                found = session.run({"image": image})
            right += all(np.array_equal(found[name], image) for name in ("right", "joined"))
        if kind == "recorded":
            spans = len(session.take_recording().only(4).spans)
        if kind == "refused":
            try:
                session.run({"image": images.ctypes.data})
            except InputError as error:
                refusal = str(error)
        how = session.execution
    return {
        "right": right,
        "spans": spans,
        "mode": how.mode,
        "copies": how.copies,
        "reason": how.reason,
        "refusal": refusal,
        "bus_ids": [gpu.pci_bus_id for gpu in driver.gpus()],
        "alive": ctypes.CDLL("libcuda.so.1").host_cuda_alive(),
    }


def run_in_place(driver, session, image):
    """Run on memory of the GPU, after a stream and before it, and read what is there then."""
    driver.retain_context(0)
    stream = driver.create_stream(0, 0)
    address, target = (driver.allocate(0, image.nbytes) for _ in range(2))
    found = np.empty_like(image)
    with on_device(driver, 0):
        driver.copy_to_device(address, image.ctypes.data, image.nbytes, stream)
    outputs = {"joined": target, "right": driver.allocate(0, image.nbytes)}
    session.run({"image": address}, outputs=outputs, stream=stream)
    with on_device(driver, 0):
        driver.copy_to_host(found.ctypes.data, target, image.nbytes, stream)
        driver.synchronize(stream)
    for memory in (address, *outputs.values()):
        driver.free(0, memory)
    driver.destroy_stream(0, stream)
    driver.release_context(0)
    return {"joined": found, "right": found}


def run_resident(driver, session, image):
    """Run on inputs that stay in the GPU, time the parts, and look at the GPU's memory."""
    session.upload({"image": image})
    session.run_resident()
    parts = session.time_parts()
    driver.retain_context(0)
    taken_bytes = driver.gpus()[0].memory_bytes - driver.free_bytes(0)
    driver.release_context(0)
    if not parts.compute_ns > 0 < taken_bytes:
        return {"joined": None, "right": None}
    return session.run({"image": image})


@pytest.fixture(scope="module")
def library(tmp_path_factory, root) -> Path:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no C compiler, or this is not Linux")
    folder = tmp_path_factory.mktemp("driver")
    source = root / "tests/parnet_engines/cuda/host_cuda.c"
    options = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", folder / "libcuda.so.1", source], check=True)
    return folder


CASES = [
    ("0", "plain", "", {"mode": "graph", "copies": "none"}),
    ("0", "no graphs", "", {"mode": "enqueue"}),
    ("0", "recorded", "", {"mode": "graph", "spans": 4}),
    ("0", "overlapping", "", {"mode": "graph"}),
    ("0", "limited", "", {"mode": "graph"}),
    ("0", "synchronising", "", {"mode": "enqueue"}),
    ("0", "in place", "", {"mode": "graph"}),
    ("0", "refused", "", {"mode": "graph"}),
    ("0", "resident", "", {"mode": "graph"}),
    ("0,0,0", "plain", "", {"mode": "graph", "copies": "memory"}),
    ("0,1,2", "plain", "", {"mode": "graph", "copies": "peer"}),
    ("0,1,2", "recorded", "", {"mode": "graph", "copies": "peer"}),
    ("0,1,2", "plain", "PEERS", {"mode": "graph", "copies": "pinned host"}),
    ("0,1,2", "plain", "JOINT_GRAPHS", {"mode": "device graphs", "copies": "peer"}),
    ("0,1,2", "plain", "PEERS JOINT_GRAPHS", {"mode": "enqueue"}),
]


@pytest.fixture(scope="module")
def outcomes(library) -> dict[tuple[str, str, str], dict[str, object]]:
    """What `run` returns for every case, from a process for each set of lacking abilities."""
    found = {}
    for lacking in dict.fromkeys(case[2] for case in CASES):
        environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
        environment |= {f"HOST_CUDA_NO_{ability}": "1" for ability in lacking.split()}
        own = [case[:2] for case in CASES if case[2] == lacking]
        ran = subprocess.run(
            [sys.executable, __file__, json.dumps(own)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert ran.returncode == 0, ran.stderr
        for case, outcome in zip(own, json.loads(ran.stdout), strict=True):
            found[*case, lacking] = outcome
    return found


@pytest.mark.parametrize(("devices", "kind", "lacking", "wanted"), CASES)
def test_programs_run_by_the_bindings_and_release_everything(
    outcomes, devices, kind, lacking, wanted
):
    found = outcomes[devices, kind, lacking]
    assert found["right"] == 5
    assert found["alive"] == 0
    assert found["bus_ids"] == ["0000:3B:00.0", "", "0000:39:00.0"]  # the second tells none
    assert {key: found[key] for key in wanted} == wanted
    if kind == "synchronising":
        assert "failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in found["reason"]
    if kind == "refused":
        assert found["refusal"].startswith("input 'image': does not lie in a GPU's memory")


if __name__ == "__main__":
    print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))  # noqa: T201
