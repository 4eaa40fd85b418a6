from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import typer

from parnet_bench import latency
from parnet_bench.cli import app
from parnet_bench.result_file import read_result
from parnet_export import console

BRIEF = ("--min-time", "0.05")


@pytest.fixture
def run(capfd):
    """Run a command in this process; returns exit code, standard output and error."""

    def run(*arguments):
        code = console.run(app, ["latency", *map(str, arguments)])
        return (code, *capfd.readouterr())

    return run


class InstantRow:
    """A row of 1 ms that is interrupted in its `last`th turn."""

    last = 0

    def __init__(self, name, job):
        self.name, self.job = name, job

    def turn(self, runs):
        InstantRow.last -= 1
        if InstantRow.last == 0:
            raise KeyboardInterrupt
        return [1_000_000] * runs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def interrupted_in_turn(monkeypatch):
    def set_up(number):
        monkeypatch.setattr(latency, "RowProcess", InstantRow)
        monkeypatch.setattr(InstantRow, "last", number)

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
        assert len(row["rounds_ns"]) == len(result.orders) >= 8
    assert printed["environment"]["command"][:2] == ["parnet-bench", "latency"]
    assert result.stopped == "min-time"


def test_people_get_tables_and_no_progress_where_there_is_no_terminal(run_cli, forked_bundle):
    done = run_cli("parnet-bench", "latency", forked_bundle.path, "--rounds", 2, *BRIEF)
    assert (done.returncode, done.stderr) == (0, "")
    assert "forked streams" in done.stdout
    assert "2 rounds in random order" in done.stdout


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


def test_threads_are_the_cores_of_every_row(run, forked_bundle):
    _, text, _ = run(forked_bundle.path, "--threads", 1, *BRIEF, "--json")
    assert {len(row["cores"]) for row in json.loads(text)["rows"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Nothing to measure"),
        (("resnet51",), "Did you mean resnet"),
        (("resnet50", "--devices", "cuda:7"), "'cuda:7' is unknown"),
        (("resnet50", "--threads", "100000"), "may use"),
        (("resnet50", "--min-time", "0"), "is not a time"),
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
    run, interrupted_in_turn, forked_bundle, tmp_path
):
    output = tmp_path / "result.json"
    interrupted_in_turn(30)
    code, printed, error = run(forked_bundle.path, "--rounds", 500, "--output", output)
    assert code == 130
    assert "Partial: interrupted after" in printed
    assert f"what was measured is in {output}, marked as partial" in error
    assert json.loads(output.read_text())["partial"] is True
    result = read_result(output)
    assert result.partial
    assert 1 <= len(result.orders) < 15


def test_ctrl_c_before_the_first_round_keeps_nothing(
    run, interrupted_in_turn, forked_bundle, tmp_path
):
    output = tmp_path / "result.json"
    output.write_text("earlier")
    interrupted_in_turn(2)
    code, printed, error = run(forked_bundle.path, "--output", output)
    assert (code, printed) == (130, "")
    assert "nothing was recorded" in error
    assert output.read_text() == "earlier"


def test_a_real_ctrl_c_ends_the_command_and_all_its_rows(forked_bundle):
    code = "import sys; from parnet_bench.cli import main; main()"
    command = [sys.executable, "-c", code, "latency", str(forked_bundle.path), "--min-time", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    bench = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while len(bench.children()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = bench.children()
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
