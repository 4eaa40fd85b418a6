from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_bench.cli import app
from parnet_bench.machine.activity import Activity
from parnet_bench.machine.state import GpuState
from parnet_bench.results.comparability import refusals, remarks
from parnet_bench.results.compare import compare, ratio_of_estimates
from parnet_bench.results.result import FailedRow, ProcessRecording, Recording
from parnet_bench.results.result_file import as_dict
from parnet_bench.stats.statistics import Estimate, Interval
from parnet_export import console
from parnet_export.console import write_json
from parnet_export.stream_graph import TensorSpec

NOISE = 0.02


@pytest.fixture(scope="session")
def measured(make_result):
    """Make a result of rows given as ``{name: latency in ms}``, with noise between everything."""

    def measure(latencies_ms, *, seed=0, processes=5, rounds=8, runs=6, between=0.01):
        rng = np.random.default_rng(seed)
        result = make_result({name: [[1]] for name in latencies_ms})
        rows = []
        for row, latency_ms in zip(result.rows, latencies_ms.values(), strict=True):
            recorded = []
            for _ in range(processes):
                center = latency_ms * math.exp(rng.normal(0, between))
                samples = center * np.exp(rng.normal(0, NOISE, (rounds, runs))) * 1e6
                turns = tuple(tuple(map(int, turn)) for turn in samples)
                recorded.append(ProcessRecording(settled=True, warm_up_ns=(), rounds_ns=turns))
            rows.append(replace(row, recording=Recording(tuple(recorded))))
        orders = tuple(tuple(tuple(range(len(rows))) for _ in range(rounds)) for _ in recorded)
        return replace(result, rows=tuple(rows), orders=orders)

    return measure


@pytest.fixture
def run(capfd):
    def run(*arguments):
        code = console.run(app, ["compare", *map(str, arguments)])
        return (code, *capfd.readouterr())

    return run


def save(path, result):
    write_json(path, as_dict(result))
    return path


# ------------------------------------------------------------------------- the statistics


def test_a_slowdown_is_found_and_equal_rows_are_not_called_different(measured):
    before = measured({"a": 10.0, "b": 10.0}, seed=1)
    after = measured({"a": 11.0, "b": 10.0}, seed=2)
    slower, same = compare(before, after).rows
    assert slower.verdict == "slower"
    assert slower.is_regression
    assert slower.interval.contains(1.1)
    assert slower.ratio == pytest.approx(slower.after_ms / slower.before_ms)
    assert (same.verdict, same.is_regression) == ("unclear", False)


def test_a_row_that_is_faster_is_no_regression(measured):
    comparison = compare(measured({"a": 11.0}, seed=1), measured({"a": 10.0}, seed=2))
    assert comparison.rows[0].verdict == "faster"
    assert comparison.regressions == ()


@pytest.mark.parametrize(("threshold", "found"), [(0.0, True), (0.05, True), (0.15, False)])
def test_the_threshold_is_what_is_tolerated(measured, threshold, found):
    before, after = measured({"a": 10.0}, seed=1), measured({"a": 11.0}, seed=2)
    assert bool(compare(before, after, threshold).regressions) is found


def test_a_large_difference_that_is_not_significant_is_no_regression(measured):
    before = measured({"a": 10.0}, seed=1, processes=3, between=0.4)
    after = measured({"a": 12.0}, seed=2, processes=3, between=0.4)
    (row,) = compare(before, after).rows
    assert row.ratio > 1.05
    assert row.verdict == "unclear"
    assert not row.is_regression


def test_two_runs_of_the_same_are_seldom_called_different(measured):
    # 95 % intervals of 200 pairs: 10 are expected to exclude 1, more than 20 hardly ever.
    wrong = 0
    for index in range(200):
        before = measured({"a": 10.0}, seed=2 * index, rounds=2, runs=3)
        after = measured({"a": 10.0}, seed=2 * index + 1, rounds=2, runs=3)
        wrong += compare(before, after).rows[0].verdict != "unclear"
    assert wrong <= 20


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.1, 100),
    st.floats(0.1, 100),
    st.floats(0.001, 0.5),
    st.floats(0.001, 0.5),
)
def test_symmetric_intervals_combine_as_independent_errors_do(a, b, spread_a, spread_b):
    def estimate(value, spread):
        return Estimate(value, Interval(value * math.exp(-spread), value * math.exp(spread)))

    combined = ratio_of_estimates(estimate(a, spread_a), estimate(b, spread_b))
    spread = math.sqrt(spread_a**2 + spread_b**2)
    assert combined.value == pytest.approx(a / b)
    assert combined.interval.low == pytest.approx(a / b * math.exp(-spread))
    assert combined.interval.high == pytest.approx(a / b * math.exp(spread))


def test_a_side_without_an_interval_leaves_none(measured):
    before = measured({"a": 10.0}, processes=1, rounds=2)
    comparison = compare(before, measured({"a": 20.0}, seed=1))
    assert comparison.rows[0].verdict == "no interval"
    assert not comparison.rows[0].is_regression
    assert any("Too few processes and rounds" in remark for remark in comparison.remarks)


def test_a_single_process_is_remarked_on(measured):
    several, alone = measured({"a": 10.0}), measured({"a": 10.0}, processes=1, seed=1)
    assert any("several processes" in remark for remark in compare(several, alone).remarks)
    assert not any("processes" in remark for remark in compare(several, several).remarks)


def test_a_negative_threshold_is_refused(measured):
    result = measured({"a": 1.0})
    with pytest.raises(ValueError, match="negative"):
        compare(result, result, -0.1)


# ----------------------------------------------------------------------- what is comparable


def in_environment(**changes):
    return lambda result: replace(result, environment=replace(result.environment, **changes))


def with_libraries(**versions):
    return in_environment(libraries={"numpy": "2.0", "onnxruntime": "1.22.0"} | versions)


def described(**changes):
    def change(result):
        rows = (replace(r, description=replace(r.description, **changes)) for r in result.rows)
        return replace(result, rows=tuple(rows))

    return change


def with_procedure(**changes):
    return lambda result: replace(result, procedure=replace(result.procedure, **changes))


def with_gpu(driver):
    gpu = GpuState(0, "H100", driver, None, None, None, (), None)
    return lambda result: replace(
        result, activities=(Activity(0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1, gpus=(gpu,)),)
    )


IMAGE = TensorSpec("image", "float32", (1, 3, 64, 64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_environment(cpu_model="Other CPU"), "the processor is Other CPU instead of Some CPU"),
        (in_environment(logical_cores=8), "the number of logical cores is 8 instead of 4"),
        (in_environment(physical_cores=None), "physical cores is absent instead of 2"),
        (in_environment(governors=("powersave",)), "governor is powersave instead of performance"),
        (with_libraries(onnxruntime="1.23.0"), "onnxruntime is 1.23.0 instead of 1.22.0"),
        (described(inputs=(IMAGE,)), "a: the input is image 1x3x64x64 float32 instead of"),
        (described(batch=8), "a: the batch is 8 instead of 1"),
        (described(precision="fp16"), "a: the precision is fp16 instead of fp32"),
        (described(devices="cpu:0-1"), "a: the device is cpu:0-1 instead of cpu"),
        (described(cores=(0,)), "a: the number of threads is 1 instead of 2"),
        (described(form="whole"), "a: the form is whole instead of unfused"),
        (with_procedure(l2_flush=True), "--l2-flush is on instead of off"),
        (with_procedure(data_transfers=False), "--data-transfers is off instead of on"),
        (with_gpu("570"), "the GPU and its driver is H100 (driver 570) instead of absent"),
        (described(name="other"), "a: the row is absent instead of measured"),
    ],
)
def test_what_is_not_comparable_is_refused_with_its_reason(measured, change, reason):
    result = measured({"a": 10.0})
    assert refusals(result, result) == ()
    found = [str(difference) for difference in refusals(result, change(result))]
    assert len(found) == 1
    assert reason in found[0]


def test_drivers_of_the_same_gpu_are_compared(measured):
    result = measured({"a": 10.0})
    old, new = with_gpu("570")(result), with_gpu("580")(result)
    assert refusals(old, old) == ()
    assert "driver 580" in str(refusals(old, new)[0])


def test_plans_are_compared_where_both_results_tell_them(measured):
    old = measured({"a": 10.0})
    planned = described(plan="streams", lanes=3)(old)
    other = described(plan="streams", lanes=2)(old)
    assert refusals(old, planned) == ()  # an old file does not tell
    assert str(refusals(planned, other)[0]) == "a: the number of lanes is 2 instead of 3"


def test_runtimes_that_no_row_can_have_used_do_not_matter(measured):
    result = measured({"a": 10.0})
    other = with_libraries(tensorrt="10.8")(result)
    assert refusals(result, other) == ()
    assert "tensorrt was absent first, and 10.8 then." in remarks(result, other)


def test_a_row_that_fails_in_the_second_result_is_named_with_its_reason(measured):
    before = measured({"a": 10.0, "b": 5.0})
    after = measured({"a": 10.0})
    failed = FailedRow(before.rows[1].description, "run", 0, "It ran out of memory.")
    (difference,) = refusals(before, replace(after, failed=(failed,)))
    assert "b: the row is failed (It ran out of memory.) instead of measured" in str(difference)


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (in_environment(system="Linux 7"), "The system was Linux first, and Linux 7 then."),
        (in_environment(python="CPython 3.13.0"), "Python was CPython 3.11.7 first"),
        (in_environment(affinity=(0,)), "Usable cores were 0, 1, 2, 3 first, and 0 then."),
        (with_libraries(numpy="2.1"), "numpy was 2.0 first, and 2.1 then."),
        (described(flops=1), "a has changed: 306,632,000 FLOPs first, and 1 then."),
        (lambda r: replace(r, stopped="interrupted"), "Second result: Partial: interrupted"),
        (in_environment(load_average=(9.0, 0.0, 0.0)), "Second result: The machine was busy"),
    ],
)
def test_what_may_differ_is_remarked_on(measured, change, remark):
    result = measured({"a": 10.0})
    other = change(result)
    assert refusals(result, other) == ()
    assert remarks(result, result) == ()
    (found,) = remarks(result, other)
    assert found.startswith(remark)


def test_rows_that_only_the_second_result_has_are_remarked_on(measured):
    before, after = measured({"a": 10.0}), measured({"a": 10.0, "b": 5.0})
    assert "b is in the second result alone." in remarks(before, after)
    assert [row.name for row in compare(before, after).rows] == ["a"]


def test_versions_of_our_own_are_what_is_compared(measured):
    result = measured({"a": 10.0})
    other = with_libraries(**{"parnet-export": "9.9"})(result)
    assert (refusals(result, other), remarks(result, other)) == ((), ())


# ------------------------------------------------------------------------------ the command


def test_exit_code_1_gates_a_regression_and_0_passes(run, measured, tmp_path):
    before = save(tmp_path / "before.json", measured({"a": 10.0}, seed=1))
    after = save(tmp_path / "after.json", measured({"a": 11.0}, seed=2))
    code, table, _ = run(before, after)
    assert code == 1
    assert "REGRESSION" in table
    assert "Slower by more than 0 %, significantly: a." in table
    code, table, _ = run(before, after, "--threshold", 15)
    assert code == 0
    assert "No row has become slower by more than 15 % significantly." in table
    assert run(after, before)[0] == 0


def test_json_and_markdown_say_the_same(run, measured, tmp_path):
    before = save(tmp_path / "before.json", measured({"a": 10.0, "b|c": 3.0}, seed=1))
    after = save(tmp_path / "after.json", measured({"a": 11.0, "b|c": 3.0}, seed=2))
    output, markdown = tmp_path / "out.json", tmp_path / "out.md"
    code, printed, error = run(before, after, "--json", "--output", output, "--markdown", markdown)
    assert (code, error) == (1, "")
    result = json.loads(printed)
    assert result == json.loads(output.read_text())
    assert result["regressions"] == ["a"]
    assert result["comparable"] is True
    text = markdown.read_text()
    assert "| a | " in text
    assert "| b\\|c | " in text
    assert f"{result['rows'][0]['ratio']:.3f}" in text


def test_other_machines_are_refused_unless_forced(run, measured, tmp_path):
    result = measured({"a": 10.0})
    before = save(tmp_path / "before.json", result)
    changed = with_libraries(onnxruntime="1.23.0")(in_environment(cpu_model="Other")(result))
    after = save(tmp_path / "after.json", in_environment(cpu_model="Other")(changed))
    output = tmp_path / "out.json"
    output.write_text("earlier")
    code, printed, error = run(before, after, "--output", output)
    assert (code, printed) == (2, "")
    assert "is not comparable with" in error
    assert "the processor is Other instead of Some CPU" in error
    assert "give --force" in error
    assert output.read_text() == "earlier"
    code, table, _ = run(before, after, "--force")
    assert code == 0
    assert "Compared by force, although latencies are not comparable:" in table
    assert "the processor is Other instead of Some CPU." in table


def test_results_without_a_common_row_are_refused_even_by_force(run, measured, tmp_path):
    before = save(tmp_path / "before.json", measured({"a": 10.0}))
    after = save(tmp_path / "after.json", measured({"b": 10.0}))
    code, _, error = run(before, after, "--force")
    assert code == 2
    assert "shares no row" in error


def test_many_reasons_are_counted(run, measured, tmp_path):
    result = measured({"a": 1.0})
    before = save(tmp_path / "before.json", result)
    changes = {"batch": 2, "precision": "fp16", "devices": "cpu:0", "cores": (0,), "form": "whole"}
    environment = {"cpu_model": "x", "logical_cores": 9, "physical_cores": 9, "governors": ()}
    other = described(inputs=(IMAGE,), **changes)(in_environment(**environment)(result))
    after = save(tmp_path / "after.json", with_gpu("570")(other))
    code, _, error = run(before, after)
    assert code == 2
    assert "and 1 more" in error


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda _: "", "is empty"),
        (lambda _: "{}", "is no result"),
        (lambda text: text.replace('"rows": [', '"rows": [], "old": ['), "no samples"),
    ],
)
def test_files_that_are_no_result_are_refused(run, measured, tmp_path, damage, message):
    good = save(tmp_path / "good.json", measured({"a": 1.0}))
    bad = tmp_path / "bad.json"
    bad.write_text(damage(good.read_text()))
    for pair in ((good, bad), (bad, good)):
        code, printed, error = run(*pair)
        assert (code, printed) == (2, "")
        assert "bad.json" in error
        assert message in error
        assert "Traceback" not in error


def test_a_missing_file_is_named(run, tmp_path):
    code, _, error = run(tmp_path / "absent.json", tmp_path / "absent.json")
    assert code == 2
    assert "absent.json: cannot be read" in error
