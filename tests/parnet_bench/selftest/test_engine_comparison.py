"""The comparison of engines, as far as a machine without a GPU goes."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from parnet_bench.engines_command import render
from parnet_bench.machine.peaks import Peaks
from parnet_bench.selftest import device_limits, engine_builds, engine_comparison, engine_rows
from parnet_bench.selftest.engine_builds import build_all, choose_build_places
from parnet_bench.selftest.engine_comparison import Request, compare_engines
from parnet_bench.selftest.engine_rows import SPLIT, SPLIT_BY_VECTORS, torch_row
from parnet_bench.selftest.failure import reason_of
from parnet_bench.selftest.path_figures import path_figures
from parnet_bench.selftest.prepared_network import prepare_network, torch_rows
from parnet_engines.clock import MonotonicClock
from parnet_engines.cuda import engines as cuda_engines
from parnet_engines.planning.cost_table import WHOLE
from parnet_engines.runtimes import ort_cuda
from parnet_export.console import stdout
from parnet_export.errors import CheckFailedError, InputError, ParnetError
from parnet_export.pipeline import make_bundle


@pytest.mark.parametrize(
    ("precision", "devices", "wanted"),
    [
        ("fp16", "0", {SPLIT: "linear", SPLIT_BY_VECTORS: "vector"}),
        ("fp32", "0", {SPLIT: None}),
        ("fp16", "cpu", {SPLIT: None}),
    ],
)
def test_both_boundaries_have_a_row_where_there_are_two(monkeypatch, precision, devices, wanted):
    asked = []

    def note(*_, plan="whole", boundary=None, **__):
        if plan == "streams":
            asked.append(boundary)
        raise InputError("it", "is not here", "Wait")

    monkeypatch.setattr(engine_rows.Session, "open", note)
    monkeypatch.setattr(engine_rows.CudaSession, "open_on_gpus", note)
    bundle = SimpleNamespace(manifest=SimpleNamespace(precision=precision))
    with contextlib.ExitStack() as stack:
        rows = engine_rows.session_rows(stack, "net", bundle, devices, "torch")
        names = [found.name for found in rows if found.name.startswith("split")]
    assert dict(zip(names, asked, strict=True)) == wanted


def test_a_session_whose_first_run_fails_is_closed_at_once(
    recorder, exported, tmp_path, monkeypatch
):
    bundle, _ = make_bundle(*exported, tmp_path / "b", precision="fp16", prove=False)

    def refuse(_):
        def run():
            raise RuntimeError("no memory")

        return run

    monkeypatch.setattr(engine_rows, "resident_runs", refuse)
    with contextlib.ExitStack() as stack:
        rows = list(engine_rows.session_rows(stack, "net", bundle, "0", "onnxruntime"))
        assert not any(row.run for row in rows)
        assert recorder.open_resources == {}


def test_every_way_to_run_a_bundle_on_gpus_is_a_row(recorder, exported, tmp_path):
    bundle, _ = make_bundle(*exported, tmp_path / "b", precision="fp16", prove=False)
    with contextlib.ExitStack() as stack:
        rows = list(engine_rows.session_rows(stack, "net", bundle, "0", "onnxruntime"))
        assert {row.name: bool(row.run) for row in rows} == {
            "whole engine": True,
            "whole engine, no CUDA graph": True,
            "whole engine, aux streams": False,
            SPLIT: True,
            SPLIT_BY_VECTORS: True,
            "authors' layout": True,
        }
        by_name = {row.name: row for row in rows}
        assert by_name["whole engine"].execution == "one CUDA graph"
        assert by_name["whole engine, no CUDA graph"].execution.startswith("step by step")
        wanted = "one CUDA graph, copies within one memory"
        assert by_name["authors' layout"].execution == wanted
        assert "engines of onnxruntime do not have" in by_name["whole engine, aux streams"].reason
        for row in rows:
            if row.run:
                before = len(recorder.calls)
                row.run()
                verbs = {call.verb for call in recorder.calls[before:]}
                assert not verbs & {"copy_to_device", "copy_to_host"}, row.name  # data stays there
    assert recorder.open_resources == {}
    figures = path_figures(bundle, "0", "onnxruntime")
    assert set(figures.segments_ms) == {s.name for s in bundle.stream_graph.segments}
    assert 0 < figures.critical_path_ms <= sum(figures.segments_ms.values())


@pytest.mark.slow
def test_engines_are_compared_on_the_cpu(run_cli, tmp_path):
    output = tmp_path / "result.json"
    sizes = ("--resolution", 32, "--rounds", 3, "--runs", 3, "--precision", "fp32")
    done = run_cli(
        *("parnet-bench", "engines", "parnet-cifar-1.3m", "--devices", "cpu", "--output", output),
        *("--baseline", "resnet18", *sizes),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert [(r["network"], r["name"]) for r in found["rows"]] == [
        ("parnet-cifar-1.3m", "torch, unfused"),
        ("parnet-cifar-1.3m", "torch, fused"),
        ("parnet-cifar-1.3m", "whole engine"),
        ("parnet-cifar-1.3m", "split streams"),
        ("resnet18", "torch, fused"),
        ("resnet18", "whole engine"),
    ]
    assert all(r["median_ms"] > 0 for r in found["rows"])
    (limits,) = found["limits"]
    assert 0 < limits["path"]["critical_path_ms"] <= sum(limits["path"]["segments_ms"].values())


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """Prepare each network once: no test changes it."""
    known = {}

    def prepare(name, folder, **options):
        if name not in known:
            known[name] = prepare_network(name, tmp_path_factory.mktemp(name), **options)
        return known[name]

    return prepare


@pytest.fixture
def small(monkeypatch, recorder, prepare):
    """A comparison of small networks on a recorder, without torch's rows and the probe."""
    monkeypatch.setattr(cuda_engines, "CUDA_ENGINES", {"onnxruntime": ort_cuda.__name__})
    monkeypatch.setattr(engine_comparison, "prepare_network", prepare)
    monkeypatch.setattr(engine_comparison, "torch_rows", lambda *_, **__: ())
    peaks = Peaks(0, 1e12, 1e12, "fp16", "as a test says", "0")
    monkeypatch.setattr(engine_comparison, "measure_gpu_peaks", lambda *_: peaks)
    return Request(("parnet-cifar-1.3m",), ("resnet18",), resolution=32, rounds=3, runs=2)


def rows_of(result):
    return {(row.network, row.name): row for row in result.rows}


def test_engines_are_compared_on_gpus(small, recorder):
    told = []
    result = compare_engines(small, MonotonicClock(), told.append)
    rows = rows_of(result)
    assert (result.device, result.peaks) == ("Recorder 0", "as a test says")
    assert rows["resnet18", "whole engine"].median_ms > 0
    split = rows["parnet-cifar-1.3m", SPLIT]
    assert (split.engine, len(split.samples_ms), split.reason) == ("onnxruntime", 3, "")
    assert rows["parnet-cifar-1.3m", "whole engine, aux streams"].median_ms is None
    (limits,) = result.limits
    assert limits.weights_ms > 0 < limits.compute_ms
    assert limits.path.segments_ms
    assert any(text.startswith("No TensorRT engines: ") for text in result.notes)
    assert any("as fast as resnet18" in text for text in result.findings)
    assert f"parnet-cifar-1.3m, {SPLIT}: one CUDA graph" in told
    assert recorder.open_resources == {}


def broken(*_, **__):
    raise ZeroDivisionError("it is broken")


BROKEN = "ZeroDivisionError: it is broken"


def test_a_network_that_cannot_be_prepared_is_a_row_with_its_reason(small, prepare, monkeypatch):
    def only_one(name, *arguments, **options):
        return (broken if name == "resnet18" else prepare)(name, *arguments, **options)

    monkeypatch.setattr(engine_comparison, "prepare_network", only_one)
    rows = rows_of(compare_engines(small, MonotonicClock(), lambda _: None))
    assert rows["resnet18", "whole engine"].reason == BROKEN
    assert rows["parnet-cifar-1.3m", "whole engine"].median_ms > 0


@pytest.mark.parametrize(("devices", "named"), [("1,0", "Recorder 1"), ("0,2", "Recorder 0")])
def test_a_comparison_names_the_gpu_that_its_rows_run_on(small, monkeypatch, devices, named):
    monkeypatch.setattr(engine_comparison, "prepare_network", broken)
    result = compare_engines(replace(small, devices=devices), MonotonicClock(), lambda _: None)
    assert result.device == named


def test_limits_that_cannot_be_measured_leave_the_rows(small, monkeypatch):
    monkeypatch.setattr(device_limits, "path_figures", broken)
    monkeypatch.setattr(engine_comparison, "measure_gpu_peaks", broken)
    result = compare_engines(small, MonotonicClock(), lambda _: None)
    assert rows_of(result)["parnet-cifar-1.3m", SPLIT].median_ms > 0
    (limits,) = result.limits
    assert (limits.weights_ms, limits.compute_ms, limits.path.reason) == (None, None, BROKEN)
    assert (result.bandwidth_gb_per_s, result.tflops, result.peaks) == (None, None, BROKEN)
    with stdout().capture() as capture:
        stdout().print(render(result), width=200)
    assert capture.get().count("it is broken") == 3  # for each limit


def test_an_interrupted_comparison_is_kept_without_limits(small, monkeypatch):
    measure = engine_comparison.measure_in_turns
    monkeypatch.setattr(
        engine_comparison,
        "measure_in_turns",
        lambda *a, **o: replace(measure(*a, **o), interrupted=True),
    )
    monkeypatch.setattr(engine_comparison, "measure_gpu_peaks", broken)
    result = compare_engines(small, MonotonicClock(), lambda _: None)
    assert result.measured
    assert (result.limits, result.peaks) == ((), "interrupted")
    assert "Interrupted: there are fewer rounds, and no limits." in result.notes


def test_sessions_that_cannot_be_closed_after_a_failure_are_a_note(small, monkeypatch):
    close = engine_rows.CudaSession.close

    def close_and_fail(session):
        close(session)
        raise ParnetError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(engine_rows.CudaSession, "close", close_and_fail)
    monkeypatch.setattr(engine_comparison, "limits_of", lambda name, *_: limits_without(name))
    result = compare_engines(small, MonotonicClock(), lambda _: None)
    assert result.measured
    assert "Sessions could not be closed: CUDA_ERROR_ILLEGAL_ADDRESS" in result.notes


def limits_without(name):
    return device_limits.Limits(name, None, None, device_limits.PathFigures(reason="none"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"networks": ("parnet-q",)}, "parnet-q: is neither a file nor a network"),
        ({"references": ("resnet-7",)}, "resnet-7: is neither"),
        ({"engine": "openvino"}, "engine 'openvino': is none for GPUs"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_prepared(
    small, monkeypatch, changes, said
):
    monkeypatch.setattr(engine_comparison, "prepare_network", broken)
    with pytest.raises(InputError, match=said):
        compare_engines(replace(small, **changes), MonotonicClock(), lambda _: None)


def test_tensorrt_that_is_asked_for_and_not_there_is_refused(monkeypatch):
    def refuse(*_):
        raise InputError("TensorRT", "is not here", "Install it")

    monkeypatch.setattr(engine_builds, "choose_places", refuse)
    with pytest.raises(InputError, match="is not here"):
        choose_build_places("0", "tensorrt")
    assert choose_build_places("0", "auto") == (
        (),
        "No TensorRT engines: TensorRT: is not here. Install it.",
    )
    assert choose_build_places("0", "torch") == choose_build_places("cpu", "auto") == ((), "")


@pytest.mark.parametrize(
    ("precision", "whole_only", "wanted"),
    [
        ("fp16", True, [(None, "linear", False, True)]),
        (
            "fp16",
            False,
            [
                (None, "linear", True, True),
                (4, "linear", False, True),
                (None, "vector", True, False),
            ],
        ),
        ("fp32", False, [(None, "linear", True, True), (4, "linear", False, True)]),
    ],
)
def test_engines_that_no_row_runs_are_not_built(
    monkeypatch, tmp_path, precision, whole_only, wanted
):
    asked, cache = [], tmp_path / "timing.cache"

    def build(_, __, options, *, segments, whole, timing_cache):
        asked.append((options.max_aux_streams, options.boundary, segments, whole))
        assert timing_cache == cache
        if options.max_aux_streams:
            raise InputError("segment 'whole'", "cannot be built", "Try another")
        yield SimpleNamespace(segment="s", status="built", sidecar=SimpleNamespace(build_s=1.5))

    monkeypatch.setattr(engine_builds, "build_engines", build)
    bundle = SimpleNamespace(manifest=SimpleNamespace(precision=precision), label="net")
    places = (SimpleNamespace(target=SimpleNamespace(backend="tensorrt")),)
    told = []
    notes = list(build_all(bundle, places, told.append, timing_cache=cache, whole_only=whole_only))
    assert asked == wanted
    assert told[0] == "engine of s built in 1.5 s"
    failed = "net: engines with aux streams could not all be built: segment 'whole': cannot be"
    assert [note.startswith(failed) for note in notes] == [True] * (not whole_only)


def test_segments_need_no_engines_where_only_the_whole_graph_runs(exported, tmp_path):
    from parnet_engines.tensorrt.bundle_engines import names_of

    bundle, _ = make_bundle(*exported, tmp_path / "b", prove=False)
    assert names_of(bundle, whole=True, segments=False) == (WHOLE,)


def test_all_ways_run_with_the_runtime_of_the_whole_engine(
    recorder, exported, monkeypatch, tmp_path
):
    # TensorRT has an engine of the whole graph, and none of the segments.
    bundle, _ = make_bundle(*exported, tmp_path / "b", prove=False)
    load = ort_cuda.load_engines

    def only_whole(bundle, names, *arguments, **options):
        if list(names) != [WHOLE]:
            raise InputError("segment", "was not built", "Build it")
        return load(bundle, names, *arguments, **options)

    monkeypatch.setattr("parnet_engines.tensorrt.run.load_engines", only_whole)
    with contextlib.ExitStack() as stack:
        rows = {
            row.name: row for row in engine_rows.session_rows(stack, "net", bundle, "0", "auto")
        }
    assert rows["whole engine"].engine == "tensorrt"
    assert rows[SPLIT].run is None
    assert "was not built" in rows[SPLIT].reason


def test_torch_rows_run_a_prepared_network_in_its_layout(tmp_path, monkeypatch):
    network = prepare_network(
        "parnet-cifar-1.3m", tmp_path, precision="fp32", resolution=32, seed=0
    )
    seen = []
    make = engine_rows._torch_runs
    monkeypatch.setattr(
        engine_rows,
        "_torch_runs",
        lambda module, image, **o: seen.append((module, image)) or make(module, image, **o),
    )
    rows = list(torch_rows(network, torch.device("cpu")))
    assert [(row.name, row.execution, row.reason) for row in rows] == [
        ("torch, unfused", "eager", ""),
        ("torch, fused", "eager", ""),
    ]
    outputs = []
    for module, image in seen:
        assert not module.training
        assert image.is_contiguous()
        outputs.append(module(image))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
    assert seen[1][0] is not network.fused  # other rows have theirs


def test_whatever_torch_compile_raises_is_the_reason_of_its_row():
    def refuse():
        raise AssertionError("Torch not compiled with CUDA enabled")

    row = torch_row("net", "torch.compile, fused", refuse, compiled=True)
    assert row.run is None
    assert row.reason == "AssertionError: Torch not compiled with CUDA enabled"


def test_graphs_that_torch_compile_did_not_capture_are_said(monkeypatch):
    from collections import Counter

    import torch._dynamo.utils as dynamo

    counters = {"inductor": Counter()}
    monkeypatch.setattr(dynamo, "counters", counters)

    def refuse(module, **_):
        def run(image):
            counters["inductor"]["cudagraph_skips"] = 1
            return module(image)

        return run

    monkeypatch.setattr(engine_rows.torch, "compile", refuse)
    row = torch_row("net", "it", lambda: (torch.nn.Identity(), torch.zeros(1)), compiled=True)
    assert row.execution == (
        "torch.compile, reduce-overhead, without a CUDA graph, which torch refused"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("it", "is wrong", "Mend it"), "it: is wrong. Mend it"),
        (RuntimeError("\n  first \nsecond"), "RuntimeError: first"),
        (
            RuntimeError("backend='inductor' raised:\nOSError: no cc\n"),
            "RuntimeError: backend='inductor' raised: OSError: no cc",
        ),
        (KeyError(), "KeyError"),
        (CheckFailedError("x" * 400), "x" * 297 + "..."),
    ],
)
def test_reasons_fit_a_line(error, said):
    assert reason_of(error).rstrip(".") == said.rstrip(".")


def test_no_row_at_all_is_a_failure_after_the_result_is_written(small, monkeypatch, tmp_path):
    from parnet_bench.cli import app
    from parnet_export import console

    monkeypatch.setattr(engine_comparison, "prepare_network", broken)
    output = tmp_path / "engines.json"
    code = console.run(
        app, ["engines", "parnet-s", "--baseline", "resnet18", "--output", str(output)]
    )
    assert code == 1
    assert {row["reason"] for row in json.loads(output.read_text())["rows"]} == {BROKEN}
