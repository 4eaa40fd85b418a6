"""What people see of a result.

Run with the environment variable UPDATE_GOLDEN=1 to rewrite the expected tables in
tests/golden, and read the difference before you keep it.
"""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from parnet_bench.report.table import render


def printed(result):
    stream = io.StringIO()
    Console(file=stream, width=120, markup=False).print(render(result))
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def ramp(start_ns, rounds=10, runs=4):
    """Latencies that rise by 1.4 % from first to last."""
    values = start_ns * (1 + 0.014 * np.linspace(0, 1, rounds * runs))
    return np.random.default_rng(0).permutation(values).reshape(rounds, runs).astype(int).tolist()


def test_tables_show_latencies_networks_and_what_a_reader_must_know(make_result, root):
    rows = {
        "net unfused": ramp(10**7),
        "net whole": ramp(5 * 10**6),
        "net streams": ramp(25 * 10**5),
    }
    text = printed(make_result(rows))
    golden = root / "tests" / "golden" / "latency-table.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text()


def test_an_interrupted_measurement_says_so_first(make_result):
    text = printed(make_result({"a": ramp(10**6)}, stopped="interrupted"))
    assert "Partial: interrupted after 10 rounds in 1 of 1 processes." in text
    assert "Partial" not in printed(make_result({"a": ramp(10**6)}))


def test_a_row_that_had_not_settled_is_named(make_result):
    text = printed(make_result({"a": ramp(10**6)}, settled=False))
    assert "a had not become steady when its warm-up ended." in text
    assert "steady" not in printed(make_result({"a": ramp(10**6)}))


def test_a_machine_that_was_busy_is_mentioned(make_result):
    result = make_result({"a": ramp(10**6)})
    assert "busy" not in printed(result)
    busy = replace(result.environment, load_average=(2.5, 0.0, 0.0))
    assert "busy when this began (load 2.5 on 4 cores)" in printed(
        replace(result, environment=busy)
    )


def test_only_random_weights_are_called_random(make_result):
    assert "andom weights" not in printed(make_result({"a": ramp(10**6)}, weights="trained"))


def test_percentiles_that_are_there_need_no_advice(make_result):
    text = printed(make_result({"a": ramp(10**6, rounds=10, runs=80)}))
    assert "--min-time" not in text
    text = printed(make_result({"a": ramp(10**6, rounds=8, runs=2)}))
    assert "p90 takes 64 and p99 takes 662" in text


def test_what_the_harness_adds_is_printed(make_result):
    result = make_result({"a": ramp(10**6)})
    text = printed(replace(result, overhead_ns=(8000, 9000, 10000)))
    assert "Harness and session add 9.0 us to a latency." in text


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        ("target", "stopped when intervals were expected within 1.0%."),
        ("time", "stopped when 110 s were up."),
        ("rounds", "as many as were asked for."),
    ],
)
def test_why_measuring_ended_is_said(make_result, stopped, said):
    assert said in printed(make_result({"a": ramp(10**6)}, stopped=stopped))


def test_names_of_others_cannot_steer_the_terminal(make_result):
    assert "\x1b" not in printed(make_result({"a\x1b[2J": ramp(10**6)}, notes=("b\x1b[2J",)))
