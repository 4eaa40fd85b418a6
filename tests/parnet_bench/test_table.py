"""What people see of a result.

Run with the environment variable UPDATE_GOLDEN=1 to rewrite the expected tables in
tests/golden, and read the difference before you keep it.
"""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
from rich.console import Console

from parnet_bench.table import render


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
    assert "Partial: interrupted after 10 rounds in random order." in text
    assert "Partial" not in printed(make_result({"a": ramp(10**6)}))


def test_a_row_that_had_not_settled_is_named(make_result):
    text = printed(make_result({"a": ramp(10**6)}, settled=False))
    assert "a had not settled when its warm-up ended." in text
    assert "settled" not in printed(make_result({"a": ramp(10**6)}))


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
    text = printed(make_result({"a": ramp(10**6, rounds=10, runs=40)}))
    assert "--min-time" not in text
    text = printed(make_result({"a": ramp(10**6, rounds=8, runs=2)}))
    assert "p90 takes 36 samples" in text
    assert "p99 takes 368 samples" in text


def test_names_of_others_cannot_steer_the_terminal(make_result):
    assert "\x1b" not in printed(make_result({"a\x1b[2J": ramp(10**6)}, notes=("b\x1b[2J",)))
