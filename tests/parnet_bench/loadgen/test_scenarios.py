from __future__ import annotations

import importlib
import json
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

from parnet_bench import latency_command
from parnet_bench.cli import app
from parnet_bench.loadgen import process as loadgen_process
from parnet_bench.loadgen import scenarios as loadgen
from parnet_bench.loadgen.process import ScenarioJob, SystemUnderTest, run_scenario
from parnet_bench.loadgen.scenarios import Load, import_loadgen, make_settings, read_outcome
from parnet_bench.workers.job import Job
from parnet_engines import session
from parnet_export import console
from parnet_export.errors import InputError, MissingBackendError, ParnetError

SCENARIOS = ("single-stream", "multi-stream", "offline", "server")
mlperf = pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")


@pytest.fixture
def run(capfd):
    def run(*arguments, command="loadgen"):
        code = console.run(app, [command, *map(str, arguments)])
        return (code, *capfd.readouterr())

    return run


def settings_for(tmp_path, scenario, **options):
    if scenario == "server":
        options.setdefault("target_qps", 10.0)
    load = Load(scenario, expected_ms=4.0, **options)
    return make_settings(mlperf, load, tmp_path / "rules.conf"), load


@pytest.mark.parametrize(
    ("scenario", "percentile_field", "percentile", "queries"),
    [
        ("single-stream", "single_stream_target_latency_percentile", 0.9, 100),
        ("multi-stream", "multi_stream_target_latency_percentile", 0.99, 662),
        ("offline", None, None, 24576),
        ("server", "server_target_latency_percentile", 0.99, 100),
    ],
)
def test_settings_are_those_of_the_rules(tmp_path, scenario, percentile_field, percentile, queries):
    # The figures are those of the MLPerf inference rules, version 1.0 and later.
    settings, load = settings_for(tmp_path, scenario)
    assert load.broken_rules == ()
    assert settings.min_duration_ms == 600_000
    assert settings.max_duration_ms == 0
    assert settings.min_query_count == queries
    assert settings.performance_sample_count_override == load.samples == 1024
    assert settings.multi_stream_samples_per_query == 8
    assert settings.mode == mlperf.TestMode.PerformanceOnly
    assert 0 not in {settings.qsl_rng_seed, settings.sample_index_rng_seed}
    if percentile_field:
        assert getattr(settings, percentile_field) == percentile


def test_what_breaks_the_rules_is_listed(tmp_path):
    settings, load = settings_for(tmp_path, "single-stream", seconds=0.5)
    assert settings.min_duration_ms == 500
    assert load.broken_rules == (
        "it takes 0.5 s instead of 600 s",
        "it has 16 inputs instead of 1024",
    )
    settings, load = settings_for(tmp_path, "server", target_latency_ms=250.0)
    assert settings.server_target_latency_ns == 250_000_000
    assert load.broken_rules == ("its latency bound is 250 ms",)


def test_a_server_needs_a_rate():
    with pytest.raises(ValueError, match="queries per second"):
        Load("server", expected_ms=1.0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_short_run_reports_what_was_answered_and_keeps_its_log(
    run, forked_bundle, tmp_path, scenario
):
    output = tmp_path / "result.json"
    rate = ("--target-qps", 20) if scenario == "server" else ()
    code, printed, _ = run(
        forked_bundle.path,
        *("--scenario", scenario, *rate, "--form", "whole", "--break-rules-seconds", 0.3),
        *("--json", "--output", output),
    )
    assert code == 0
    result = json.loads(printed)
    assert result == json.loads(output.read_text())
    assert result["is_mlperf_result"] is False
    (row,) = result["rows"]
    assert row["form"] == "whole"
    assert any("instead of 600 s" in broken for broken in row["broken_rules"])
    outcome = row["outcome"]
    logs = tmp_path / "result.loadgen" / "forked-whole"
    assert outcome["queries"] >= 1
    assert (logs / "mlperf_log_summary.txt").read_text().count("Scenario :") == 1
    if scenario == "offline":
        assert outcome["latency_ms"] is None
        assert outcome["samples_per_s"] > 0
    else:
        assert 0 < outcome["latency_ms"] < 60_000
        assert outcome["percentile"] == (90 if scenario == "single-stream" else 99)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_latency_runs_its_rows_under_the_load_generator(run, forked_bundle, tmp_path, scenario):
    output = tmp_path / "result.json"
    rate = ("--target-qps", 20) if scenario == "server" else ()
    code, printed, error = run(
        *(forked_bundle.path, "--scenario", scenario, *rate, "--break-rules-seconds", 0.1),
        *("--plan", "whole", "--json", "--output", output),
        command="latency",
    )
    assert code == 0
    result = json.loads(printed)
    assert result == json.loads(output.read_text())
    (row,) = result["rows"]
    assert (row["name"], row["scenario"]) == ("forked whole", scenario)
    assert row["outcome"]["queries"] >= 1
    logs = tmp_path / "result.loadgen"
    assert error.strip() == f"logs are in {logs}"
    summary = (logs / "forked-whole" / "mlperf_log_summary.txt").read_text()
    assert summary.count("Scenario :") == 1


def test_a_scenario_of_latency_has_the_rows_of_latency(run, dynamic_bundle, tmp_path):
    arguments = ("--scenario", "single-stream", "--break-rules-seconds", 0.05, "--batch", "1,2")
    output = ("--output", tmp_path / "result.json")
    code, table, _ = run(dynamic_bundle.path, *arguments, *output, command="latency")
    assert code == 0
    rows = json.loads(output[1].read_text())["rows"]
    assert [(row["form"], row["batch"]) for row in rows] == [
        ("whole", 1),
        ("streams", 1),
        ("whole", 2),
        ("streams", 2),
    ]
    assert len(list((tmp_path / "result.loadgen").iterdir())) == 4
    assert "single-stream, LoadGen" in table


def test_rows_that_are_not_there_are_remarked_on(run, straight_onnx, tmp_path):
    output = tmp_path / "result.json"
    arguments = ("--scenario", "offline", "--break-rules-seconds", 0.05, "--output", output)
    code, table, _ = run(straight_onnx, *arguments, command="latency")
    assert code == 0
    (note,) = json.loads(output.read_text())["notes"]
    assert note.endswith("is a single segment, so it has no streams row.")
    assert "single segment" in " ".join(table.split())


OF_ROUNDS = {
    "in_flight": ("--in-flight", 2),
    "target_ci": ("--target-ci", "1%"),
    "max_time": ("--max-time", 110),
    "min_time": ("--min-time", 1),
    "processes": ("--processes", 5),
    "rounds": ("--rounds", 3),
    "percentiles": ("--percentiles", "50"),
    "interleave": ("--no-interleave",),
    "l2_flush": ("--l2-flush",),
    "data_transfers": ("--no-data-transfers",),
    "csv": ("--csv", "rows.csv"),
    "html": ("--html", "page.html"),
    "trace": ("--trace", "trace.json"),
}


@pytest.mark.parametrize("name", OF_ROUNDS)
def test_options_of_rounds_are_refused_with_a_scenario(run, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ("resnet18", "--scenario", "offline", *OF_ROUNDS[name])
    code, printed, error = run(*arguments, command="latency")
    assert (code, printed) == (2, "")
    option = OF_ROUNDS[name][0]
    assert error.startswith(f"error: {option}: is of measuring in rounds, and --scenario offline")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [("--target-qps", 1), ("--target-latency", 1), ("--break-rules-seconds", 1)]
)
def test_options_of_scenarios_are_refused_without_one(run, option):
    code, _, error = run("resnet18", *option, command="latency")
    assert code == 2
    assert f"{option[0]}: is of a --scenario, which is not there" in error


def test_every_option_of_latency_applies_in_rounds_in_scenarios_or_in_both():
    known = {parameter.name for parameter in get_command(app).commands["latency"].params}
    rows = {"targets", "devices", "task", "ckpt", "arch", "activation", "use_ema", "baseline"}
    rows |= {"batch", "resolution", "precision", "plan", "lanes", "threads", "seed", "boundary"}
    rows |= {"engine"}
    shown = {"as_json", "output", "help"}
    assert set(OF_ROUNDS) == set(latency_command._OF_ROUNDS)
    of_scenarios = {"scenario", *latency_command._OF_SCENARIOS}
    assert known <= rows | shown | of_scenarios | set(OF_ROUNDS)


def test_a_row_runs_on_the_cores_that_it_is_given(run, forked_bundle, tmp_path):
    arguments = ("--form", "whole", "--threads", 1, "--break-rules-seconds", 0.1)
    code, printed, _ = run(forked_bundle.path, *arguments, "--logs", tmp_path / "logs", "--json")
    assert code == 0
    assert len(json.loads(printed)["rows"][0]["cores"]) == 1


def test_people_are_told_what_the_run_is_not(run, tiny_catalogue, tmp_path):
    arguments = ("resnet-tiny", "--form", "whole", "--break-rules-seconds", 0.2)
    code, table, _ = run(*arguments, "--logs", tmp_path / "logs")
    assert code == 0
    assert "Not an MLPerf result" in table
    assert "This run breaks the rules: it takes 0.2 s" in table
    assert "Random weights: resnet-tiny." in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "server"), "Give --target-qps"),
        (("--target-qps", 3), "--target-qps: is of the server scenario"),
        (("--scenario", "offline", "--target-latency", 3), "--target-latency: is of the server"),
        (("--form", "unfused", "--break-rules-seconds", 0.1), "no target has the form unfused"),
        (("--scenario", "offlime"), "--scenario"),
        (("--devices", "cpu:banana"), "cpu:banana"),
        (("--threads", 10_000), "cores"),
        (("--output", "."), "is a folder"),
    ],
)
def test_bad_usage_is_refused(run, forked_bundle, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, printed, error = run(forked_bundle.path, *arguments)
    assert (code, printed) == (2, "")
    assert message in error
    assert "Traceback" not in error


def test_an_absent_load_generator_is_named_and_a_broken_one_propagates(monkeypatch, run):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(_):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(loadgen.importlib, "import_module", absent)
    with pytest.raises(MissingBackendError, match=r"pip install 'parnet-export\[loadgen\]'"):
        import_loadgen()
    monkeypatch.setattr(loadgen.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="other"):
        import_loadgen()
    monkeypatch.undo()
    assert import_loadgen() is importlib.import_module("mlperf_loadgen")


class Answers:
    """Stands for the load generator: notes which queries were answered."""

    QuerySampleResponse = staticmethod(lambda identity, *_: identity)

    def __init__(self):
        self.answered = []
        self.all_there = threading.Event()

    def QuerySamplesComplete(self, responses):  # noqa: N802 -- the load generator's name
        self.answered += responses
        if len(self.answered) == 5:
            self.all_there.set()


class Session:
    inputs = ()

    def __init__(self, fail_at=None):
        self.runs = 0
        self.fail_at = fail_at

    def run(self, _):
        self.runs += 1
        if self.runs == self.fail_at:
            raise InputError("segment", "has failed", "Do something")


def queries(count):
    return [SimpleNamespace(id=100 + i, index=i % 2) for i in range(count)]


@pytest.mark.parametrize(("batch", "runs"), [(1, 5), (2, 3), (8, 1)])
@pytest.mark.parametrize("scenario", ["single-stream", "offline"])
def test_every_sample_is_answered_once_by_as_few_runs_as_its_batch_allows(scenario, batch, runs):
    answers, session = Answers(), Session()
    system = SystemUnderTest(session, answers, Load(scenario, 1.0, batch=batch), {})
    system.load_samples([0, 1])
    system.issue(queries(5))
    assert answers.all_there.wait(10)
    system.stop()
    assert answers.answered == [100, 101, 102, 103, 104]
    assert session.runs == runs


def test_a_row_that_fails_ends_the_test_and_leaves_no_query_open():
    answers = Answers()
    system = SystemUnderTest(Session(fail_at=1), answers, Load("offline", 1.0), {})
    system.load_samples([0, 1])
    system.issue(queries(5))
    assert answers.all_there.wait(10)
    with pytest.raises(InputError, match="has failed"):
        system.issue(queries(1))
    system.stop()
    alone = SystemUnderTest(Session(fail_at=1), Answers(), Load("single-stream", 1.0), {})
    alone.load_samples([0, 1])
    with pytest.raises(InputError, match="has failed"):
        alone.issue(queries(1))


@pytest.mark.parametrize(
    ("returncode", "error", "message"),
    [
        (130, KeyboardInterrupt, None),
        (-signal.SIGINT, KeyboardInterrupt, None),
        (-signal.SIGKILL, ParnetError, "ended by SIGKILL. Memory may have run out"),
        (1, RuntimeError, "exit code 1"),
    ],
)
def test_a_process_that_ends_without_an_answer(monkeypatch, returncode, error, message):
    ended = subprocess.CompletedProcess((), returncode, stdout=b"")
    monkeypatch.setattr(loadgen_process.subprocess, "run", lambda *_, **__: ended)
    work = ScenarioJob(Job("", "whole", "cpu", (0,), {}), Load("offline", 1.0), "")
    with pytest.raises(error, match=message):
        run_scenario(work)


def test_a_row_that_cannot_be_loaded_says_why(forked_bundle, tmp_path):
    job = Job(str(tmp_path / "absent.bundle"), "whole", "cpu", (0,), {})
    with pytest.raises(ParnetError, match="does not exist") as caught:
        run_scenario(ScenarioJob(job, Load("offline", 1.0, seconds=0.1), str(tmp_path)))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("devices", "threads"), [("0,1", None), ("cpu", 1)])
@pytest.mark.parametrize(("plan", "opened"), [("auto", "auto"), ("a.json", Path("a.json"))])
def test_gpus_take_no_number_of_threads_and_plans_keep_their_names(
    monkeypatch, devices, threads, plan, opened
):
    asked = {}

    def open_session(bundle, devices, **options):
        asked.update(options, devices=devices)
        raise InputError("bundle", "is none", "Make one")

    monkeypatch.setattr(session.Session, "open", open_session)
    monkeypatch.setattr(loadgen_process, "use_cores", lambda _: None)
    job = Job("b", plan, devices, (0,), {}, boundary="vector", engine="torch")
    with pytest.raises(InputError, match="is none"):
        loadgen_process.serve(ScenarioJob(job, Load("offline", 1.0), ""))
    assert (asked["devices"], asked["threads"], asked["plan"]) == (devices, threads, opened)
    assert (asked["boundary"], asked["engine"]) == ("vector", "torch")


def test_samples_may_be_unloaded_twice():
    system = SystemUnderTest(Session(), Answers(), Load("multi-stream", 1.0), {})
    system.load_samples([0, 1, 2])
    system.unload_samples([0, 1, 1])
    assert list(system._inputs) == [2]


def write_log(folder, **entries):
    lines = [f":::MLLOG {json.dumps({'key': k, 'value': v})}\n" for k, v in entries.items()]
    (folder / "mlperf_log_detail.txt").write_text("".join(lines))


def test_the_early_stopping_estimate_counts_where_there_is_one(tmp_path):
    entries = {
        "loadgen_version": "6",
        "result_validity": "VALID",
        "result_query_count": 241,
        "result_90.00_percentile_latency_ns": 7_936_232,
        "early_stopping_latency_ss": 7_998_430,
        "result_qps_without_loadgen_overhead": 239.8,
    }
    write_log(tmp_path, **entries)
    outcome = read_outcome(tmp_path, "single-stream")
    assert outcome.valid
    assert outcome.is_estimate
    assert (outcome.latency_ms, outcome.percentile) == (7.99843, 90.0)
    assert (outcome.samples_per_s, outcome.queries) == (239.8, 241)
    write_log(tmp_path, **entries | {"early_stopping_latency_ss": 0, "result_validity": "INVALID"})
    outcome = read_outcome(tmp_path, "single-stream")
    assert not outcome.valid
    assert not outcome.is_estimate
    assert outcome.latency_ms == 7.936232


def test_queries_of_several_streams_count_not_their_samples(tmp_path):
    write_log(
        tmp_path,
        **{
            "result_validity": "INVALID",
            "result_99.00_percentile_per_query_latency_ns": 83_000_000,
            "result_99.00_percentile_latency_ns": 80_000_000,
        },
    )
    assert read_outcome(tmp_path, "multi-stream").latency_ms == 83.0


def test_a_log_that_is_missing_or_cut_off_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_outcome(tmp_path, "offline")
    write_log(tmp_path, loadgen_version="6")
    with (tmp_path / "mlperf_log_detail.txt").open("a") as log:
        log.write(':::MLLOG {"key": "result_val')
    with pytest.raises(InputError, match="holds no completed run"):
        read_outcome(tmp_path, "offline")
