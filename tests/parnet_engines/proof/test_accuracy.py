"""Metrics against formulas written out, and what a wrong result does to them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parnet_engines.proof.accuracy import LIMITS, Limits, assess, cosine, require, top1_agreement
from parnet_engines.proof.device_proof import compare, prove_on_devices
from parnet_engines.proof.polygraphy_results import compare_and_save
from parnet_engines.runtimes.float32_reference import reference_tensors
from parnet_engines.session import Session
from parnet_export.errors import CheckFailedError
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.samples import make_samples
from parnet_export.source import load_network

VECTORS = hnp.arrays(np.float64, 7, elements=st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3))


@given(VECTORS, VECTORS)
def test_the_cosine_is_the_one_of_the_angle(a, b):
    expected = sum(x * y for x, y in zip(a, b, strict=True))
    expected /= math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    assert cosine(a, b) == pytest.approx(expected, abs=1e-9)
    assert cosine(3 * a, a) == pytest.approx(1)


def test_cosines_of_zeros_are_defined():
    assert cosine(np.zeros(3), np.zeros(3)) == 1
    assert cosine(np.zeros(3), np.ones(3)) == 0


SCORES = np.array([[1.0, 5.0, 2.0], [3.0, 0.0, 2.9]])


@pytest.mark.parametrize(
    ("actual", "tie", "share"),
    [
        (SCORES, 0.0, 1.0),
        (SCORES[:, ::-1], 0.0, 0.5),
        ([[1, 5, 2], [2.95, 0, 3]], 0.0, 0.5),
        ([[1, 5, 2], [2.95, 0, 3]], 0.03, 1.0),  # 3.0 and 2.9 are closer than 3 % of 5
        ([[9, 5, 2], [2.95, 0, 3]], 0.03, 0.5),
    ],
)
def test_top1_counts_rows_and_lets_ties_pass(actual, tie, share):
    assert top1_agreement(np.asarray(actual), SCORES, tie) == share


STRICT = Limits(0.999, 0.01)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda x: x * np.nan, "'y' has NaN or infinite values"),
        (lambda x: np.where(x == x.max(), np.inf, x), "'y' has NaN or infinite values"),
        (lambda x: x[:1], "'y' has shape (1, 4), the reference (3, 4)"),
        (lambda x: x * 1.02, "is outside the limits"),
        (lambda x: x + np.eye(3, 4), "is outside the limits"),
    ],
)
def test_wrong_results_fail(change, detail):
    reference = np.random.default_rng(0).standard_normal((3, 4))
    good = assess("it", [("y", reference * 1.001, reference)], STRICT, classes=True)
    assert good.passed
    assert good.top1 == 1.0
    assert good.detail == ""
    bad = assess("it", [("y", reference, reference), ("y", change(reference), reference)], STRICT)
    assert not bad.passed
    assert bad.detail == detail
    with pytest.raises(CheckFailedError, match=r"1 of 2 disagree: it \("):
        require([good, bad], "Do it again.")
    require([good], "")


def test_a_reference_that_is_not_finite_and_no_results_fail():
    one = np.ones(2)
    assert not assess("it", [("y", one, one * np.inf)], STRICT).passed
    assert not assess("it", [], STRICT).passed


def test_another_class_fails_even_within_the_error():
    reference = np.array([[1.0, 0.9, -1.0]])
    flipped = np.array([[0.9, 1.0, -1.0]])
    loose = Limits(0.9, 0.099)
    assert assess("it", [("y", reference, reference)], loose, classes=True).passed
    found = assess("it", [("y", flipped, reference)], Limits(0.9, 0.2), classes=True)
    assert found.top1 == 1.0  # a tie within 20 %
    assert top1_agreement(flipped, reference, 0.05) == 0.0


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request, tmp_path_factory):
    model, provenance = export_graph(load_network("parnet-cifar-1.3m"), resolution=32, batch=1)
    path = tmp_path_factory.mktemp("bundle") / "b"
    return make_bundle(model, provenance, path, precision=request.param, prove=False)[0]


def test_engines_on_the_cpu_agree_with_the_reference(bundle):
    proof = prove_on_devices(bundle, "cpu", random_samples=1)
    assert proof.engines == ()
    assert proof.engine == "onnxruntime"
    rows = proof.rows
    segments = [segment.name for segment in bundle.stream_graph.segments]
    assert [row.subject for row in rows] == [*segments, "split", "whole"]
    assert all(row.passed for row in rows), rows
    assert rows[-1].top1 == 1.0
    assert 0 < rows[-1].relative_error < LIMITS[bundle.manifest.precision].relative_error / 3


def test_a_wrong_segment_is_named(bundle):
    samples = [next(iter(make_samples(bundle.stream_graph.inputs))).inputs]
    references = reference_tensors(bundle, samples)
    broken = bundle.stream_graph.segments[1]
    found = [dict(references[0])]
    found[0][broken.outputs[0].name] = found[0][broken.outputs[0].name] * 1.1
    rows = compare(bundle, references, found, references)
    assert [row.subject for row in rows if not row.passed] == [broken.name]


def test_polygraphy_compares_and_repeats_the_comparison(bundle, tmp_path):
    samples = [sample.inputs for sample in make_samples(bundle.stream_graph.inputs)][:2]
    with Session.open(bundle) as session:
        results = [session.run(sample) for sample in samples]
    limit = {"fp32": 1e-4, "fp16": 1e-2}[bundle.manifest.precision]
    kept = compare_and_save(bundle, samples, results, tmp_path / "r", name="ours", limit=limit)
    assert kept.passed
    again = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), *kept.command.split()[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    wrong = [{name: array + 1 for name, array in result.items()} for result in results]
    assert not compare_and_save(bundle, samples, wrong, tmp_path, name="ours", limit=limit).passed


def test_verify_shows_every_engine_and_repeats_with_polygraphy(bundle, run_cli, tmp_path):
    options = ("--devices", "cpu", "--samples", 1, "--json")
    done = run_cli("parnet-export", "verify", bundle.path, *options, "--save", tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["devices"]
    assert found["passed"]
    assert [row["subject"] for row in found["rows"]][-2:] == ["split", "whole"]
    assert found["polygraphy"]["passed"]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"inputs.json", "outputs.json"}


def test_saving_without_devices_is_refused(bundle, run_cli, tmp_path):
    done = run_cli("parnet-export", "verify", bundle.path, "--save", tmp_path)
    assert done.returncode == 2
    assert "--save: keeps what engines on devices compute" in done.stderr
