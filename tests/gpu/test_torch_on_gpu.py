"""Programs on a real GPU with torch's engines: parity, overlap, graphs, memory, other libraries."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch

from parnet_engines.cuda.boundary import BOUNDARIES
from parnet_engines.cuda.session import CudaSession
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.engine import NullEngine
from parnet_engines.proof.accuracy import LIMITS, assess
from parnet_engines.proof.device_proof import prove_on_devices
from parnet_engines.runtimes import torch_engine
from parnet_engines.schedule.check import checked
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Run
from parnet_engines.session import Session
from parnet_engines.timeline.analysis import analyse
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec
from parnet_export.verify import relative_error

pytestmark = pytest.mark.gpu

open_torch = partial(CudaSession.open_on_gpus, engine="torch")


def as_input(bundle, image):
    return image.astype(bundle.stream_graph.inputs[0].dtype)


# Parity.


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_segment_the_split_and_the_whole_agree_with_float32(bundle, lanes):
    rows = prove_on_devices(bundle, "0", engine="torch", lanes=lanes, random_samples=4).rows
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("plan", ["streams", "authors"])
@pytest.mark.parametrize("devices", ["0", "0,0", "0,0,0"])
def test_the_program_for_several_devices_runs_on_one(bundle, image, devices, plan):
    image = as_input(bundle, image)
    with open_torch(bundle, "0", plan="whole") as session:
        reference = session.run({"image": image})["logits"]
    with open_torch(bundle, devices, plan=plan) as session:
        for _ in range(3):
            found = session.run({"image": image})["logits"]
        assert session.execution.mode == "graph", session.execution
        several = len({lane.device for lane in session.program.program.lanes}) > 1
        assert session.execution.copies == ("memory" if several else "none")
    limits = LIMITS[bundle.manifest.precision]
    row = assess("it", [("logits", found, reference)], limits, classes=True)
    assert row.passed, row


@pytest.mark.parametrize("devices", ["0,1", "0,1,2"])
@pytest.mark.parametrize("use_graphs", [True, False])
def test_several_gpus_compute_the_same(driver, bundle, image, devices, use_graphs):
    if len(driver.gpus()) < len(devices.split(",")):
        pytest.skip(f"this machine has {len(driver.gpus())} GPUs")
    image = as_input(bundle, image)
    with open_torch(bundle, "0", plan="whole") as session:
        reference = session.run({"image": image})["logits"]
    with open_torch(bundle, devices, plan="authors", use_graphs=use_graphs) as session:
        found = session.run({"image": image})["logits"]
    assert relative_error(found, reference) < LIMITS[bundle.manifest.precision].relative_error


def test_a_process_that_allows_tf32_gets_float32_all_the_same(single_bundle, image):
    with open_torch(single_bundle, "0") as session:
        expected = session.run({"image": image})["logits"]
    torch.backends.fp32_precision = "tf32"
    try:
        with open_torch(single_bundle, "0") as session:
            found = session.run({"image": image})["logits"]
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True  # as torch starts
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Boundaries.


def test_vectors_between_engines_compute_what_linear_tensors_do(bundle, image):
    if bundle.manifest.precision == "fp32":
        with pytest.raises(InputError, match="no channels-last vectors for fp32"):
            open_torch(bundle, "0", boundary="vector")
        return
    image = as_input(bundle, image)
    found = {}
    for boundary in BOUNDARIES:
        with open_torch(bundle, "0,0,0", plan="authors", boundary=boundary) as session:
            found[boundary] = session.run({"image": image})["logits"]
            assert session.execution.mode == "graph", session.execution
            layouts = {e.layout(s.name) for e in session.engines for s in (*e.inputs, *e.outputs)}
            assert (TensorLayout.HWC8 in layouts) == (boundary == "vector")
    assert relative_error(found["vector"], found["linear"]) < LIMITS["fp16"].relative_error


# Graphs.


@pytest.mark.parametrize("devices", ["0", "0,0,0"])
def test_with_and_without_a_graph_the_results_are_the_same(bundle, devices):
    generator = np.random.default_rng(1)
    images = [
        as_input(bundle, generator.standard_normal((1, 3, 32, 32)).astype(np.float32))
        for _ in range(5)
    ]
    with (
        open_torch(bundle, devices) as with_graph,
        open_torch(bundle, devices, use_graphs=False) as without,
    ):
        for image in images:
            found = with_graph.run({"image": image})["logits"]
            expected = without.run({"image": image})["logits"]
            limit = LIMITS[bundle.manifest.precision].relative_error
            assert relative_error(found, expected) < limit / 2
        assert with_graph.execution.mode == "graph"
        assert without.execution.mode == "enqueue"


TENSOR = TensorSpec("image", "float32", (4,))


class OnGpu(NullEngine):
    """A CUDA engine that enqueues any torch function of its stream."""

    def __init__(self, segment, enqueue):
        super().__init__(segment)
        self.device = 0
        self.file = None
        self.enqueue = enqueue

    def layout(self, _tensor):
        return TensorLayout.LINEAR

    def bind(self, inputs, outputs):
        source, target = torch_engine.as_tensor(inputs[0]), torch_engine.as_tensor(outputs[0])

        def run(stream):
            with torch.cuda.stream(torch.cuda.ExternalStream(stream, 0)):
                self.enqueue()
                target.copy_(source)

        return run


def open_fork(driver, enqueue, **options):
    """Two segments that need only the input, each on a lane of its own."""
    left, right = (TensorSpec(name, "float32", (4,)) for name in ("left", "right"))
    no_cost = Cost(0, 0, 0, 0, 0, 0)
    graph = StreamGraph(
        (TENSOR,),
        (left, right),
        (Segment("l", (TENSOR,), (left,), no_cost), Segment("r", (TENSOR,), (right,), no_cost)),
    )
    lanes = (Lane("lane0", "cuda:0"), Lane("lane1", "cuda:0"))
    placement = Placement(lanes, (Assignment("l", "lane0"), Assignment("r", "lane1")))
    program = checked(lower(graph, placement), graph)
    engines = {
        (step.segment, step.lane): OnGpu(graph[step.segment], enqueue)
        for step in program.program.steps
        if isinstance(step, Run)
    }
    return CudaSession(program, engines, driver, **options)


def test_an_engine_that_synchronises_leaves_no_capture_open(driver, bundle, image):
    with open_fork(driver, lambda: torch.cuda.current_stream().synchronize()) as session:
        values = np.arange(4, dtype=np.float32)
        for _ in range(2):
            found = session.run({"image": values})
            np.testing.assert_array_equal(found["right"], values)
        assert session.execution.mode == "enqueue"
        assert session.execution.reason
    with open_torch(bundle, "0") as session:  # others can be captured all the same
        session.run({"image": as_input(bundle, image)})
        assert session.execution.mode == "graph"


# Concurrency.


@pytest.mark.parametrize("use_graphs", [True, False])
def test_lanes_overlap(driver, use_graphs):
    # Ten milliseconds or so of waiting on one multiprocessor: nothing keeps two from overlapping.
    sleep = partial(torch.cuda._sleep, 15_000_000)
    with open_fork(driver, sleep, record=True, use_graphs=use_graphs) as session:
        for _ in range(4):
            session.run({"image": np.zeros(4, np.float32)})
        recording = session.take_recording()
        program = session.program.program
        analysis = analyse(program, recording.only(recording.inferences[-1]))
    assert analysis.overlap > 0.7
    assert analysis.wall.total_ns > 1e6


def test_streams_of_a_network_overlap(single_bundle, image):
    with open_torch(single_bundle, "0", lanes=3, record=True) as session:
        for _ in range(5):
            session.run({"image": image})
        recording = session.take_recording()
        program = session.program.program
    lanes = [name for name, spans in recording.busy_by_lane.items() if spans]
    if len(lanes) < 2:
        pytest.skip("the plan puts everything on one lane")
    assert analyse(program, recording.only(recording.inferences[-1])).overlap > 0


def test_inferences_overlap_and_stay_apart(single_bundle, served_wrongly):
    with (
        open_torch(single_bundle, "0", plan="whole") as whole,
        open_torch(single_bundle, "0", in_flight=2) as shared,
    ):
        assert served_wrongly(whole, shared) == []


def test_sessions_come_and_go_while_another_enqueues(single_bundle, image):
    with open_torch(single_bundle, "0", use_graphs=False) as busy:
        expected = busy.run({"image": image})["logits"]
        is_over, wrong = threading.Event(), []

        def serve():
            while not is_over.is_set():
                found = busy.run({"image": image})["logits"]
                if relative_error(found, expected) > 1e-3:
                    wrong.append(found)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            for _ in range(10):
                with open_torch(single_bundle, "0") as other:
                    found = other.run({"image": image})["logits"]
                    assert relative_error(found, expected) < 1e-3
                    assert other.execution.mode == "graph", other.execution
        finally:
            is_over.set()
            thread.join()
    assert wrong == []


# Memory.


def test_ten_thousand_inferences_take_no_more_memory(single_bundle, image, memory_taken):
    with open_torch(single_bundle, "0") as session:
        source = torch.from_numpy(image).cuda()

        def run_both():
            session.run({"image": image})
            session.run({"image": source})

        assert abs(memory_taken(run_both, then=5000)) < 4 << 20


def test_sessions_give_their_memory_back(single_bundle, image):
    free = []
    for _ in range(6):
        with open_torch(single_bundle, "0") as session:
            session.run({"image": image})
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(0)[0])
    assert free[1] - free[-1] < 8 << 20  # the first loads the kernels


# Other libraries.


@pytest.fixture
def session(single_bundle):
    with open_torch(single_bundle, "0") as found:
        yield found


@pytest.fixture
def expected(session, image):
    return session.run({"image": image})["logits"]


def test_torch_tensors_go_in_and_out_without_a_copy(session, image, run_in_place):
    written, expected = run_in_place(session, image)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-5)


def test_an_output_that_is_still_being_written_is_waited_for(session, image, expected):
    target = torch.empty(expected.shape, device="cuda")
    session.run({"image": image}, outputs={"logits": target})
    torch.cuda._sleep(50_000_000)  # tens of milliseconds on torch's own stream
    target.zero_()
    session.run({"image": image}, outputs={"logits": target})
    np.testing.assert_allclose(target.cpu().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_output_that_is_still_being_read_is_not_overwritten(session, image, expected):
    source = torch.from_numpy(image).cuda()
    target = torch.full(expected.shape, 7.0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        kept = target.clone()
        # Addresses that are new are captured anew, after a warm-up that writes there, too.
        session.run({"image": source}, outputs={"logits": target}, stream=stream)
    stream.synchronize()
    assert (kept == 7.0).all()
    np.testing.assert_allclose(target.cpu().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_graphs_outlive_what_cublas_keeps_for_other_streams(single_bundle, image):
    with open_torch(single_bundle, "0") as kept:
        expected = kept.run({"image": image})["logits"]
        for _ in range(3):
            with open_torch(single_bundle, "0") as other:  # its streams come and go
                other.run({"image": image})
            torch._C._cuda_clearCublasWorkspaces()  # as torch.compile does
            torch.cuda.empty_cache()
            torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
            found = kept.run({"image": image})["logits"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_torch_stream_is_ordered_before_and_after(session, image, run_in_order):
    written, expected = run_in_order(session, image)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-5)


def test_cupy_arrays_and_streams_are_taken(session, image, expected):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        source = cupy.asarray(image)
        target = cupy.zeros(expected.shape, cupy.float32)
        session.run({"image": source}, outputs={"logits": target}, stream=stream)
    stream.synchronize()
    np.testing.assert_allclose(cupy.asnumpy(target), expected, rtol=1e-4, atol=1e-5)


def test_arrays_that_speak_only_dlpack_are_taken(session, image, expected):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")

    class OnlyDlpack:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

    source = OnlyDlpack(torch.from_numpy(image).cuda())
    found = session.run({"image": source})["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_address_is_taken(session, image, expected):
    source = torch.from_numpy(image).cuda()
    found = session.run({"image": source.data_ptr()})["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_array_of_another_context_is_refused(session, image):
    from cuda.bindings import driver as cuda

    (failure, device) = cuda.cuDeviceGet(0)
    try:
        failure, context = cuda.cuCtxCreate(None, 0, device)  # CUDA 13
    except TypeError:
        failure, context = cuda.cuCtxCreate(0, device)
    assert not int(failure)
    failure, address = cuda.cuMemAlloc(image.nbytes)
    assert not int(failure)
    cuda.cuCtxPopCurrent()
    try:
        with pytest.raises(InputError, match="belongs to another CUDA context than the primary"):
            session.run({"image": int(address)})
    finally:
        cuda.cuCtxDestroy(context)


def test_memory_of_the_host_is_refused_by_address(session, image):
    with pytest.raises(InputError, match="does not lie in a GPU's memory"):
        session.run({"image": image.ctypes.data})


# Engines that do not fit.


def test_a_torch_for_other_gpus_is_a_sentence(single_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_35"])
    with pytest.raises(InputError, match=r"GPU 0: is sm_\d+, and this torch was built for sm_35"):
        open_torch(single_bundle, "0")


def test_a_tensorrt_engine_for_another_gpu_is_a_sentence(driver, single_bundle):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    with pytest.raises(InputError, match="parnet-export build"):
        Session.open(single_bundle, "0", engine="tensorrt")
