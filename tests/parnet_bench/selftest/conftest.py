"""A machine with recorders for GPUs, whose engines compute on the CPU."""

from __future__ import annotations

import pytest

from parnet_bench.selftest import checks as selftest
from parnet_bench.targets import row_devices
from parnet_engines.cuda import session as cuda_session
from parnet_engines.cuda.boundary import choose_layouts
from parnet_engines.cuda.hosted_engine import HostedEngine
from parnet_engines.cuda.recording_driver import RecordingDriver
from parnet_engines.runtimes import ort_cuda
from parnet_engines.runtimes.ort import OrtEngine
from parnet_engines.tensorrt.bundle_engines import segment_of
from parnet_engines.tensorrt.engine_cache import onnx_path
from parnet_export.pipeline import export_graph
from parnet_export.source import load_network


@pytest.fixture(scope="module")
def exported():
    return export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch=1)


@pytest.fixture
def recorder(monkeypatch, exported):
    """A machine with three recorders for GPUs, whose engines compute on the CPU."""
    found = RecordingDriver(3)
    monkeypatch.setattr(selftest, "export_graph", lambda *_, **__: exported)

    def load(bundle, names, driver, device, *, boundary=None):
        return {
            name: HostedEngine(
                OrtEngine(segment_of(bundle, name), onnx_path(bundle, name), threads=1),
                found,
                device,
                layouts_between(bundle, name, boundary or "linear"),
            )
            for name in names
        }

    monkeypatch.setattr(ort_cuda, "load_engines", load)
    for module in (selftest, cuda_session, row_devices):
        monkeypatch.setattr(module, "open_driver", lambda _: found)
    return found


def layouts_between(bundle, name, boundary):
    segment, graph = segment_of(bundle, name), bundle.stream_graph
    outside = [spec.name for spec in (*graph.inputs, *graph.outputs)]
    return choose_layouts((*segment.inputs, *segment.outputs), boundary, outside)
