"""Engines of ONNX Runtime's CUDA provider, on a stand-in for a provider that is not here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from parnet_engines.cuda.engine import DeviceTensor
from parnet_engines.runtimes import ort_cuda
from parnet_engines.runtimes.ort_cuda import OrtCudaEngine
from parnet_export.stream_graph import Cost, Segment, TensorSpec

SPEC = TensorSpec("x", "float32", (2, 3))
SEGMENT = Segment("it", (SPEC,), (SPEC,), Cost(0, 0, 0, 0, 0, 0))


class CudaSession:
    """A session as the CUDA provider has it: it allocates memory in its first two runs."""

    def __init__(self, path, options, providers):
        del path, options
        ((self.provider, self.settings),) = providers
        self.runs = 0
        self.bound = []
        self.allocations = 0
        OPENED.append(self)

    def get_providers(self):
        return [self.provider, "CPUExecutionProvider"]

    def io_binding(self):
        return SimpleNamespace(
            bind_input=lambda *place: self.bound.append(("input", *place)),
            bind_output=lambda *place: self.bound.append(("output", *place)),
        )

    def run_with_iobinding(self, _binding, options):
        assert options.entries == {"disable_synchronize_execution_providers": "1"}
        self.runs += 1
        self.allocations += self.runs <= 2


OPENED: list[CudaSession] = []


class RunOptions:
    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, key, value):
        self.entries[key] = value


@pytest.fixture
def enqueue(monkeypatch):
    """What enqueues an engine on tensors at two addresses."""
    OPENED.clear()
    module = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace,
        RunOptions=RunOptions,
        InferenceSession=CudaSession,
    )
    monkeypatch.setattr(ort_cuda, "import_onnxruntime", lambda _: module)
    source, target = (DeviceTensor("x", "float32", (2, 3), at, 1) for at in (4096, 8192))
    return OrtCudaEngine(SEGMENT, Path("it.onnx"), 1).bind([source], [target])


def test_each_stream_has_a_session_of_its_own_on_the_same_memory(enqueue):
    for stream in (77, 78, 77):
        enqueue(stream)
    assert [session.settings["user_compute_stream"] for session in OPENED] == ["77", "78"]
    for session in OPENED:
        assert session.settings["device_id"] == "1"
        assert session.settings["use_tf32"] == "0"
        assert [(side, place[-1]) for side, *place in session.bound] == [
            ("input", 4096),
            ("output", 8192),
        ]


def test_after_the_first_call_nothing_is_allocated_so_that_a_graph_can_capture_it(enqueue):
    enqueue(77)
    (session,) = OPENED
    before = session.allocations
    enqueue(77)
    assert session.allocations == before == 2
