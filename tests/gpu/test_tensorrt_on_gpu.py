"""TensorRT on a real GPU, built and run as a user does: parity, graphs, memory, misfits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from parnet_engines.cuda.boundary import BOUNDARIES
from parnet_engines.cuda.session import CudaSession
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.proof.accuracy import LIMITS, assess
from parnet_engines.proof.device_proof import prove_on_devices
from parnet_engines.proof.device_verification import verify_on
from parnet_engines.runtimes.float32_reference import reference_tensors
from parnet_engines.tensorrt.build_place import choose_places
from parnet_engines.tensorrt.bundle_engines import build_engines, names_of, require_options
from parnet_engines.tensorrt.engine_cache import sidecar_path, store
from parnet_engines.tensorrt.engine_sidecar import read_sidecar, write_sidecar
from parnet_engines.tensorrt.options import EngineOptions, SizeRange, capability_of, target_of
from parnet_engines.timeline.analysis import analyse
from parnet_export.bundle import open_bundle
from parnet_export.errors import InputError
from parnet_export.pipeline import DYNAMIC, export_graph, make_bundle
from parnet_export.source import load_network
from parnet_export.verify import relative_error

pytestmark = pytest.mark.gpu

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXACT = EngineOptions(tf32=False)
"""Float32 as the reference has it."""
MIB = 1 << 20

open_trt = partial(CudaSession.open_on_gpus, engine="tensorrt")


@pytest.fixture(scope="module", params=list(MODULES))
def backend(request, driver):
    """Each TensorRT that is installed and knows this GPU."""
    name = MODULES[request.param]
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    capability = capability_of(driver.gpus()[0])
    if request.param == "tensorrt-rtx" and capability not in known_to_rtx(module):
        pytest.skip(f"TensorRT-RTX {module.__version__} builds nothing for {capability}")
    return request.param


def known_to_rtx(module):
    """Return the compute capabilities that TensorRT-RTX builds for."""
    names = (name for name in dir(module.ComputeCapability) if name.startswith("SM"))
    return {f"{name[2:-1]}.{name[-1]}" for name in names}


def build(bundle, backend, options=EXACT, *, capability=None, **others):
    """Build as `parnet-export build` does; return the reports by segment."""
    places = choose_places(backend, None if capability else "0", capability)
    for place in places:
        require_options(bundle, place.target.backend, options, others.get("timing_cache"))
    return {report.segment: report for report in build_engines(bundle, places, options, **others)}


def copy_of(bundle, folder):
    """Return a copy of a bundle without engines."""
    path = shutil.copytree(bundle.path, folder / "b", ignore=shutil.ignore_patterns("engines"))
    return open_bundle(path)


@pytest.fixture(scope="module")
def reports(bundle, backend, tmp_path_factory):
    """All engines of a bundle, for this GPU, and the bundle's path."""
    copy = copy_of(bundle, tmp_path_factory.mktemp(f"{backend}-{bundle.manifest.precision}"))
    return copy, build(copy, backend)


@pytest.fixture
def built(reports):
    return reports[0]


@pytest.fixture(scope="module")
def single(single_bundle, backend, tmp_path_factory):
    """A bundle in float32 with all its engines."""
    copy = copy_of(single_bundle, tmp_path_factory.mktemp(f"{backend}-single"))
    build(copy, backend)
    return copy


@pytest.fixture
def alone(single, tmp_path):
    """A copy with engines, whose files a test may change."""
    return open_bundle(shutil.copytree(single.path, tmp_path / "b"))


def as_input(bundle, image):
    return image.astype(bundle.stream_graph.inputs[0].dtype)


def require_close(bundle, found, reference):
    limits = LIMITS[bundle.manifest.precision]
    row = assess("it", [("logits", found, reference)], limits, classes=True)
    assert row.passed, row


# Building.


def test_everything_is_built_and_audited_and_stays(reports, backend):
    bundle, found = reports
    assert list(found) == list(names_of(bundle, whole=True))
    assert {report.status for report in found.values()} == {"built"}
    assert {r.sidecar.recipe.target.backend for r in found.values()} == {backend}
    again = build(bundle, backend)
    assert {report.status for report in again.values()} == {"unchanged"}


def test_layers_compute_in_the_precision_of_the_graph(reports, backend):
    bundle, found = reports
    audits = {name: report.sidecar.audit for name, report in found.items()}
    if backend == "tensorrt-rtx" and None in audits.values():
        pytest.skip("this TensorRT-RTX does not tell in which types layers compute")
    assert None not in audits.values()
    assert {name: audit.unexpected_fp32 for name, audit in audits.items()} == dict.fromkeys(
        audits, ()
    )
    if bundle.manifest.precision == "fp16":
        assert all(audit.layers.get("fp16") for audit in audits.values()), audits
    else:
        assert not any(audit.layers.get("fp16") for audit in audits.values()), audits


def test_a_timing_cache_is_taken_up_again(backend, single_bundle, tmp_path):
    copy, cache = copy_of(single_bundle, tmp_path), tmp_path / "timings"
    if backend == "tensorrt-rtx":
        with pytest.raises(InputError, match="has no timing cache"):
            build(copy, backend, timing_cache=cache)
        return
    build(copy, backend, timing_cache=cache)
    size_bytes = cache.stat().st_size
    assert size_bytes > 0
    shutil.rmtree(copy.path / "engines")
    assert build(copy, backend, timing_cache=cache)[WHOLE].status == "built"
    assert cache.stat().st_size >= size_bytes


# Parity.


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_segment_the_split_and_the_whole_agree_with_float32(built, lanes):
    proof = prove_on_devices(built, "0", engine="tensorrt", lanes=lanes, random_samples=4)
    assert all(row.passed for row in proof.rows), proof.rows
    assert {engine.name for engine in proof.engines} == set(names_of(built, whole=True))


def test_engines_count_as_verified_once_they_have_run(reports):
    bundle, found = reports
    result = verify_on(bundle, "0", "tensorrt", samples=2, seed=0, save=None)
    assert (result.passed, result.problems) == (True, ()), result.rows
    assert sorted(result.recorded) == sorted(str(report.path) for report in found.values())
    assert all(read_sidecar(report.path).is_verified for report in found.values())


@pytest.mark.parametrize("plan", ["streams", "authors"])
@pytest.mark.parametrize("devices", ["0", "0,0,0"])
def test_the_program_for_several_devices_runs_on_one(built, backend, image, devices, plan):
    image = as_input(built, image)
    with open_trt(built, "0", plan="whole") as session:
        reference = session.run({"image": image})["logits"]
        assert session.execution.mode == "graph", session.execution
    with open_trt(built, devices, plan=plan) as session:
        assert {e.sidecar.recipe.target.backend for e in session.engines} == {backend}
        for _ in range(3):
            found = session.run({"image": image})["logits"]
        assert session.execution.mode == "graph", session.execution
        several = len({lane.device for lane in session.program.program.lanes}) > 1
        assert session.execution.copies == ("memory" if several else "none")
    require_close(built, found, reference)


@pytest.mark.parametrize("devices", ["0", "0,0,0"])
def test_with_and_without_a_graph_the_results_are_the_same(built, devices):
    generator = np.random.default_rng(1)
    images = [
        as_input(built, generator.standard_normal((1, 3, 32, 32)).astype(np.float32))
        for _ in range(5)
    ]
    with open_trt(built, devices) as graph, open_trt(built, devices, use_graphs=False) as without:
        for image in images:
            found = graph.run({"image": image})["logits"]
            expected = without.run({"image": image})["logits"]
            limit = LIMITS[built.manifest.precision].relative_error
            assert relative_error(found, expected) < limit / 2
        assert graph.execution.mode == "graph", graph.execution
        assert without.execution.mode == "enqueue"


def test_vectors_between_engines_compute_what_linear_tensors_do(built, backend, image, tmp_path):
    copy = copy_of(built, tmp_path)
    options = replace(EXACT, boundary="vector")
    if copy.manifest.precision == "fp32":
        with pytest.raises(InputError, match="no channels-last vectors for fp32"):
            build(copy, backend, options)
        return
    for boundary in BOUNDARIES:
        build(copy, backend, replace(EXACT, boundary=boundary))
    image, found = as_input(copy, image), {}
    for boundary in BOUNDARIES:
        with open_trt(copy, "0,0,0", plan="authors", boundary=boundary) as session:
            found[boundary] = session.run({"image": image})["logits"]
            assert session.execution.mode == "graph", session.execution
            layouts = {e.layout(s.name) for e in session.engines for s in (*e.inputs, *e.outputs)}
            assert (TensorLayout.HWC8 in layouts) == (boundary == "vector")
    assert relative_error(found["vector"], found["linear"]) < LIMITS["fp16"].relative_error
    rows = prove_on_devices(copy, "0", engine="tensorrt", boundary="vector", random_samples=2).rows
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("use_graphs", [True, False])
def test_the_whole_engine_may_have_streams_of_its_own(alone, backend, image, use_graphs):
    with open_trt(alone, "0", plan="whole") as session:
        expected = session.run({"image": image})["logits"]
    found = build(alone, backend, replace(EXACT, max_aux_streams=3))
    with open_trt(alone, "0", plan="whole", max_aux_streams=3, use_graphs=use_graphs) as session:
        (engine,) = session.engines
        assert engine.path == found[WHOLE].path
        assert 0 <= engine.aux_streams <= 3
        for _ in range(20):
            actual = session.run({"image": image})["logits"]
            require_close(alone, actual, expected)
        assert session.execution.mode == ("graph" if use_graphs else "enqueue"), session.execution
    result = verify_on(alone, "0", "auto", samples=1, seed=0, save=None, max_aux_streams=3)
    assert result.passed, result.rows
    assert all(read_sidecar(report.path).is_verified for report in found.values())


# Sizes.


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def dynamic(request, backend, tmp_path_factory):
    """A bundle of a dynamic batch, with engines for 1 to 8 images."""
    model, provenance = export_graph(
        load_network("parnet-cifar-1.3m"), resolution=32, batch=DYNAMIC
    )
    path = tmp_path_factory.mktemp(f"{backend}-dynamic-{request.param}") / "b"
    bundle, _ = make_bundle(model, provenance, path, precision=request.param, prove=False)
    (size,) = (d for d in bundle.stream_graph.inputs[0].shape if isinstance(d, str))
    options = replace(EXACT, sizes={size: SizeRange(1, 4, 8)})
    return bundle, build(bundle, backend, options)


def batch_of(bundle, count):
    generator = np.random.default_rng(count)
    return as_input(bundle, generator.standard_normal((count, 3, 32, 32)).astype(np.float32))


@pytest.mark.parametrize("plan", ["whole", "streams"])
def test_a_dynamic_batch_runs_at_every_size_of_its_range(dynamic, plan):
    bundle, _ = dynamic
    batches = [batch_of(bundle, count) for count in (1, 8, 3, 4, 2, 1)]
    references = reference_tensors(bundle, [{"image": batch} for batch in batches])
    with open_trt(bundle, "0", plan=plan) as session:
        for batch, reference in zip(batches, references, strict=True):
            for _ in range(3):
                found = session.run({"image": batch})["logits"]
            require_close(bundle, found, reference["logits"])
            assert session.execution.mode == "graph", session.execution
        with pytest.raises(InputError, match=r"refuses shape \(9, 3, 32, 32\) of tensor 'image'"):
            session.run({"image": batch_of(bundle, 9)})
        found = session.run({"image": batches[0]})["logits"]  # it is none the worse for it
        require_close(bundle, found, references[0]["logits"])


def test_engines_of_a_dynamic_batch_are_audited(dynamic, backend):
    bundle, found = dynamic
    audits = {name: report.sidecar.audit for name, report in found.items()}
    if backend == "tensorrt-rtx" and None in audits.values():
        pytest.skip("this TensorRT-RTX does not tell in which types layers compute")
    wanted = bundle.manifest.precision
    assert all(audit is not None and audit.layers.get(wanted) for audit in audits.values()), audits


def test_sizes_that_come_and_go_take_no_more_memory(dynamic, memory_taken):
    bundle, _ = dynamic
    batches = [batch_of(bundle, count) for count in range(1, 9)]
    with open_trt(bundle, "0") as session:

        def run_all():
            for batch in batches:  # more sizes than a session keeps memory for
                session.run({"image": batch})

        assert memory_taken(run_all, first=3, then=10) < 8 * MIB


# Concurrency.


def test_streams_of_a_network_overlap(single, image):
    with open_trt(single, "0", lanes=3, record=True) as session:
        for _ in range(10):
            session.run({"image": image})
        assert session.execution.mode == "graph", session.execution
        recording = session.take_recording()
        program = session.program.program
    lanes = [name for name, spans in recording.busy_by_lane.items() if spans]
    if len(lanes) < 2:
        pytest.skip("the plan puts everything on one lane")
    found = [analyse(program, recording.only(number)) for number in recording.inferences[5:]]
    assert max(one.overlap for one in found) > 0, found[-1].verdict.sentence


def test_inferences_overlap_and_stay_apart(single, served_wrongly):
    with (
        open_trt(single, "0", plan="whole") as whole,
        open_trt(single, "0", in_flight=2) as shared,
    ):
        assert served_wrongly(whole, shared) == []


# Memory.


@pytest.mark.parametrize("plan", ["whole", "streams"])
def test_ten_thousand_inferences_take_no_more_memory(single, image, memory_taken, plan):
    with open_trt(single, "0", plan=plan) as session:
        source = torch.from_numpy(image).cuda()

        def run_both():
            session.run({"image": image})
            session.run({"image": source})

        assert abs(memory_taken(run_both, then=5000)) < 4 * MIB


def test_sessions_give_their_memory_back(single, image, memory_taken):
    def run_once():
        with open_trt(single, "0") as session:
            session.run({"image": image})

    assert memory_taken(run_once, first=2, then=5) < 8 * MIB


# Other libraries.


def test_torch_tensors_go_in_and_out_without_a_copy(single, image, run_in_place):
    with open_trt(single, "0") as session:
        written, expected = run_in_place(session, image)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-5)


def test_a_torch_stream_is_ordered_before_and_after(single, image, run_in_order):
    with open_trt(single, "0") as session:
        written, expected = run_in_order(session, image)
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-5)


# Engines that do not fit.


def with_target(bundle, report, target):
    """Have an engine's sidecar say that it is for another target, in that one's folder."""
    sidecar = report.sidecar
    path = sidecar_path(bundle, target, report.segment, sidecar.recipe.options)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(report.path.with_name(sidecar.plan), path.with_name(sidecar.plan))
    write_sidecar(path, replace(sidecar, recipe=replace(sidecar.recipe, target=target)))
    return path


def test_an_engine_for_another_gpu_is_a_sentence(driver, backend, single_bundle, tmp_path):
    gpu = driver.gpus()[0]
    copy = copy_of(single_bundle, tmp_path)
    if backend == "tensorrt-rtx":
        other = min(known_to_rtx(pytest.importorskip("tensorrt_rtx")) - {capability_of(gpu)})
        found = build(copy, backend, capability=other)
    else:
        other = "5.3"
        found = build(copy, backend)
        for report in found.values():
            target = replace(report.sidecar.recipe.target, compute_capabilities=(other,))
            with_target(copy, report, target)
            report.path.unlink()
    command = f"parnet-export build {copy.path} --backend {backend} --devices 0"
    with pytest.raises(InputError) as caught:
        open_trt(copy, "0")
    assert f"(compute capability {other})" in str(caught.value) or (
        f"built for compute capability {other}" in str(caught.value)
    )
    assert f"device 0 is {gpu.name} (compute capability {capability_of(gpu)})" in str(caught.value)
    assert caught.value.remedy == f"Build it again: {command} --no-tf32"
    if backend == "tensorrt-rtx":
        # One whose sidecar lies comes as far as TensorRT, which refuses it.
        for report in found.values():
            with_target(copy, report, target_of(backend, gpu))
        with pytest.raises(InputError, match="device 0 cannot load it") as caught:
            open_trt(copy, "0")
        assert "no reason given" not in str(caught.value)


def test_a_plan_with_a_flipped_byte_is_a_sentence(alone, driver, backend):
    target = target_of(backend, driver.gpus()[0])
    path = sidecar_path(alone, target, WHOLE, EXACT)
    sidecar = read_sidecar(path)
    plan = path.with_name(sidecar.plan)
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    with pytest.raises(InputError, match="its digest differs"):
        open_trt(alone, "0", plan="whole")
    assert build(alone, backend)[WHOLE].causes[0].endswith("is damaged (its digest differs)")
    with open_trt(alone, "0", plan="whole"):
        pass


def test_a_plan_that_is_none_is_refused_by_tensorrt_in_a_sentence(alone, driver, backend):
    target = target_of(backend, driver.gpus()[0])
    path = sidecar_path(alone, target, WHOLE, EXACT)
    sidecar = read_sidecar(path)
    content = bytes(64) + path.with_name(sidecar.plan).read_bytes()[64:]
    store(path, content, sidecar)  # with its digest, so that TensorRT gets to see it
    with pytest.raises(InputError, match="device 0 cannot load it") as caught:
        open_trt(alone, "0", plan="whole")
    assert "parnet-export build" in caught.value.remedy
