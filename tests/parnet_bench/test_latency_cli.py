from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import typer

from parnet_bench.cli import app
from parnet_bench.latency_command import FAILED_EXIT_CODE
from parnet_bench.measuring import latency
from parnet_bench.measuring.measurement import NextTurn
from parnet_bench.measuring.progress import describe
from parnet_bench.results.comparability import refusals
from parnet_bench.results.result import RowTimeline
from parnet_bench.results.result_file import read_result
from parnet_bench.workers.row_process import RowFailedError
from parnet_bench.workers.turn import Turn
from parnet_export import console

BRIEF = ("--processes", "1", "--rounds", "3", "--max-time", "2")


@pytest.fixture
def run(capfd):
    """Run a command in this process; returns exit code, standard output and error."""

    def run(*arguments):
        code = console.run(app, ["latency", *map(str, arguments)])
        return (code, *capfd.readouterr())

    return run


class InstantRow:
    """A row of 1 ms that does in its `last`th turn what `then` says."""

    last = 0
    load_ms = 1.0

    @staticmethod
    def then():
        raise KeyboardInterrupt

    def __init__(self, name, job):
        self.name, self.job, self.pid = name, job, os.getpid()

    def take_turn(self, request):
        InstantRow.last -= 1
        if InstantRow.last == 0:
            self.then()
        return Turn((1_000_000,) * request.runs, 1_000_000 * request.runs)

    def timeline(self, _):
        return RowTimeline({}, {})

    def close(self):
        pass


class WatchedInstantRow(InstantRow):
    def __init__(self, name, job, *_):
        super().__init__(name, job)


@pytest.fixture
def instant_rows(monkeypatch):
    """Replace the processes of rows by rows of 1 ms, of which the `number`th turn is special."""

    def set_up(number, then=None):
        monkeypatch.setattr(latency, "RowProcess", InstantRow)
        monkeypatch.setattr(latency, "_WatchedRow", WatchedInstantRow)
        monkeypatch.setattr(latency, "harness_overhead_ns", lambda *_: (1000,))
        monkeypatch.setattr(InstantRow, "last", number)
        if then is not None:
            monkeypatch.setattr(InstantRow, "then", staticmethod(then))

    return set_up


def test_a_bundle_is_measured_and_the_result_printed_and_written(run_cli, forked_bundle, tmp_path):
    output = tmp_path / "result.json"
    done = run_cli(
        "parnet-bench", "latency", forked_bundle.path, *BRIEF, "--json", "--output", output
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert printed == json.loads(output.read_text())
    assert [row["name"] for row in printed["rows"]] == ["forked whole", "forked streams"]
    result = read_result(output)
    for row in printed["rows"]:
        assert row["summary"]["median_ms"] > 0
        assert row["cores"] == sorted(os.sched_getaffinity(0))
        (process,) = row["recording"]["processes"]
        assert len(process["rounds_ns"]) == len(result.orders[0]) == 3
        assert process["pipelined"]["in_flight"] == 2
        assert process["load_ms"] > 0
        assert row["footprint"]["peak_host_bytes"] > 10_000_000
        assert row["timeline"]["recording"]["spans"]
    assert len(printed["activities"]) == 2
    assert len(printed["peaks"]) == 1
    assert np.median(printed["overhead_ns"]) < 1_000_000
    assert printed["environment"]["command"][:2] == ["parnet-bench", "latency"]
    assert result.stopped == "rounds"


def test_people_get_tables_and_no_progress_where_there_is_no_terminal(run_cli, forked_bundle):
    done = run_cli("parnet-bench", "latency", forked_bundle.path, *BRIEF)
    assert (done.returncode, done.stderr) == (0, "")
    assert "forked streams" in done.stdout
    assert "3 rounds in random order in each of 1 process" in done.stdout


def test_tables_and_json_say_that_weights_are_random(run, tiny_catalogue, tmp_path):
    output = tmp_path / "result.json"
    baseline = ("--baseline", "resnet-tiny")
    code, table, _ = run("parnet-tiny", *baseline, *BRIEF, "--output", output)
    assert code == 0
    assert "Random weights: parnet-tiny (seed 0), resnet-tiny (seed 0)." in table
    rows = json.loads(output.read_text())["rows"]
    assert [row["form"] for row in rows] == ["unfused", "whole", "streams", "whole"]
    assert {row["provenance"]["weights"] for row in rows} == {"random"}
    assert rows[0]["label"] == "parnet-tiny (random weights)"
    assert rows[0]["summary"]["speedup"] == 1.0


def test_every_row_runs_with_the_engine_that_is_asked_for(run, tiny_catalogue, tmp_path):
    output = tmp_path / "result.json"
    code, table, _ = run("parnet-tiny", "--engine", "torch", *BRIEF, "--output", output)
    assert code == 0
    assert "All rows: torch." in table
    result = read_result(output)
    assert {(row.engine, row.description.wanted_engine) for row in result.rows} == {
        ("torch", "torch")
    }
    code, table, _ = run("parnet-tiny", *BRIEF, "--output", output)
    assert "All rows" not in table
    other = read_result(output)
    assert {row.engine for row in other.rows} == {"onnxruntime"}
    assert "the runtime" in {difference.what for difference in refusals(result, other)}


def test_threads_are_the_cores_of_every_row(run, forked_bundle):
    _, text, _ = run(forked_bundle.path, "--threads", 1, *BRIEF, "--json")
    assert {len(row["cores"]) for row in json.loads(text)["rows"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet51",), "Did you mean resnet"),
        (("resnet50", "--devices", "cuda:7"), "devices"),
        (("resnet50", "--no-data-transfers"), "there are no transfers"),
        (("resnet50", "--max-time", "0"), "is not a time"),
        (("resnet50", "--target-ci", "1 percent"), "is no share"),
        (("resnet50", "--target-ci", "0%"), "is no share"),
        (("resnet50", "--percentiles", "50,100"), "are no percentiles"),
        (("resnet50", "--percentiles", "p99"), "are no percentiles"),
        (("resnet50", "--batch", "1,x"), "are no batch sizes"),
        (("resnet50", "--arch", "resnet50"), "says how --ckpt is read"),
        (("resnet50", "--use-ema"), "says how --ckpt is read"),
        (("resnet50", "--processes", "0"), "--processes"),
        (("resnet50", "--plan", "absent.json"), "'absent.json' is neither a plan nor a file"),
        (("resnet50", "--engine", "tensorrt"), "engine 'tensorrt'"),
        (("resnet50", "--engine", "torch", "--plan", "auto"), "chooses by what onnxruntime takes"),
        (("resnet50", "--threads", "100000"), "--threads"),
        (("resnet50", "--min-time", "-1"), "is not a time"),
        (("resnet50", "--min-time", "nan"), "is not a time"),
        (("resnet50", "--rounds", "0"), "--rounds"),
        (("resnet50", "--batch", "0"), "--batch"),
        (("resnet50", "--precision", "int3"), "--precision"),
        (("resnet50", "--min-time", "inf"), "is not a time"),
        (("resnet50", "--output", "absent/result.json"), "cannot be written"),
        (("resnet50", "--output", "."), "is a folder"),
    ],
)
def test_bad_usage_ends_with_code_2_and_says_what_is_wrong(run, arguments, message):
    code, printed, error = run(*arguments)
    assert (code, printed) == (2, "")
    assert message in error
    assert "Traceback" not in error


def test_a_failed_command_leaves_the_earlier_result_as_it_was(run, tmp_path):
    output = tmp_path / "result.json"
    output.write_text("earlier")
    code, _, error = run("no-such-network", "--output", output)
    assert code == 2
    assert error.count("\n") == 1
    assert output.read_text() == "earlier"


def test_ctrl_c_keeps_complete_rounds_and_marks_them_as_partial(
    run, instant_rows, forked_bundle, tmp_path
):
    output = tmp_path / "result.json"
    instant_rows(30)
    code, printed, error = run(forked_bundle.path, "--rounds", 500, "--output", output)
    assert code == 130
    assert "Partial: interrupted after" in printed
    assert f"what was measured is in {output}, marked as partial" in error
    assert json.loads(output.read_text())["partial"] is True
    result = read_result(output)
    assert result.partial
    assert 1 <= len(result.orders[0]) < 15


def test_ctrl_c_before_the_first_round_keeps_nothing(run, instant_rows, forked_bundle, tmp_path):
    output = tmp_path / "result.json"
    output.write_text("earlier")
    instant_rows(2)
    code, printed, error = run(forked_bundle.path, "--output", output)
    assert (code, printed) == (130, "")
    assert "nothing was recorded" in error
    assert output.read_text() == "earlier"


def workers_of(bench):
    """The worker processes that are rows; others measure peaks and overhead before."""
    children = bench.children()
    return children if len(children) > 1 else []


def test_a_row_that_fails_in_the_middle_is_named_and_the_others_are_measured(
    run, instant_rows, forked_bundle, tmp_path
):
    def fail():
        raise RowFailedError("forked streams", "the device is lost.", exit_code=1)

    output = tmp_path / "result.json"
    instant_rows(12, fail)
    code, printed, error = run(forked_bundle.path, "--rounds", 20, "--output", output)
    assert code == FAILED_EXIT_CODE
    assert "failed while it ran: the device is lost." in printed
    assert "not measured: forked" in error
    document = json.loads(output.read_text())
    assert len(document["rows"]) == len(document["failed"]) == 1
    assert document["failed"][0]["reason"] == "the device is lost."
    result = read_result(output)
    assert not result.partial
    assert len(result.rows[0].recording.processes) == 5


def test_when_every_row_fails_the_reason_is_the_message(run, monkeypatch, forked_bundle):
    class Absent:
        def __init__(self, name, *_):
            raise RowFailedError(name, "there is no such device.", exit_code=2)

    monkeypatch.setattr(latency, "_WatchedRow", Absent)
    monkeypatch.setattr(latency, "harness_overhead_ns", lambda *_: (1000,))
    code, printed, error = run(forked_bundle.path)
    assert (code, printed) == (2, "")
    assert error.strip() == "error: forked whole: there is no such device."


def test_a_trace_shows_one_inference_of_each_row(run, forked_bundle, tmp_path):
    trace = tmp_path / "trace.json"
    code, _, _ = run(forked_bundle.path, *BRIEF, "--trace", trace)
    assert code == 0
    events = json.loads(trace.read_text())["traceEvents"]
    rows = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.split(":")[0] for name in rows] == ["forked whole", "forked streams"]
    runs = [event for event in events if event["ph"] == "X"]
    assert len({event["pid"] for event in runs}) == 2
    assert len(runs) > 4


def test_figures_are_written_as_csv_and_as_a_page(run, forked_bundle, tmp_path):
    csv, html = tmp_path / "rows.csv", tmp_path / "page.html"
    code, _, _ = run(forked_bundle.path, *BRIEF, "--csv", csv, "--html", html)
    assert code == 0
    assert "forked streams" in csv.read_text()
    assert "forked streams" in html.read_text()


def test_two_batch_sizes_are_measured_side_by_side(run, dynamic_bundle):
    code, text, _ = run(dynamic_bundle.path, *BRIEF, "--batch", "1,4", "--plan", "whole", "--json")
    assert code == 0
    rows = json.loads(text)["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert [row["summary"]["reference"] for row in rows] == [row["name"] for row in rows]


def test_percentiles_are_those_that_were_asked_for(run, forked_bundle):
    _, text, _ = run(forked_bundle.path, *BRIEF, "--percentiles", "10,95", "--json")
    for row in json.loads(text)["rows"]:
        assert [p["percent"] for p in row["summary"]["percentiles"]] == [10, 95]


@pytest.mark.parametrize(
    ("turn", "line"),
    [
        (
            NextTurn("a row", "warming up", 2, 0, 0.3, left_s=61.4),
            "process 2, warming up, a row, 61 s left",
        ),
        (
            NextTurn("a", "measuring", 1, 7, 0.3, 9.0, median_ns=2.5e6, half_width=0.0123),
            "process 1, measuring, round 7, a, 2.50 ms +- 1.2%, 9 s left",
        ),
        (NextTurn("a", "measuring", 1, 1, 0.0), "process 1, measuring, round 1, a"),
    ],
)
def test_progress_tells_row_round_interval_and_time_left(turn, line):
    assert describe(turn) == line


def test_a_real_ctrl_c_ends_the_command_and_all_its_rows(forked_bundle):
    code = "import sys; from parnet_bench.cli import main; main()"
    command = [sys.executable, "-c", code, "latency", str(forked_bundle.path), "--max-time", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    bench = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while len(workers_of(bench)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = workers_of(bench)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not any(worker.is_running() for worker in workers)


def test_help_loads_neither_numpy_nor_torch_nor_a_runtime():
    code = (
        "import sys, parnet_bench.cli;"
        "print(*({'numpy', 'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_documents_every_option(run_cli):
    done = run_cli("parnet-bench", "latency", "--help")
    assert done.returncode == 0
    options = typer.main.get_command(app).commands["latency"].params[1:]
    assert len(options) > 10
    for option in options:
        assert option.opts[0] in done.stdout
        assert option.help.split()[0] in done.stdout
