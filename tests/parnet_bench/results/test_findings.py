"""Every warning is provoked by one test, and kept quiet by what `quiet` measures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parnet_bench.machine.activity import Activity
from parnet_bench.machine.state import GpuState
from parnet_bench.report.table import warning_lines
from parnet_bench.results.findings import Kind, find
from parnet_bench.results.procedure import Procedure
from parnet_bench.results.result import FailedRow, ProcessRecording, Recording, SplitTimes
from parnet_bench.stats.statistics import MIN_PROCESSES

MS = 1_000_000


def activity(**changes):
    nothing = Activity(0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 1 << 33, throttle_events=0)
    return replace(nothing, **changes)


def gpu(**changes):
    state = GpuState(
        index=0,
        name="Some GPU",
        driver="600",
        persistent=True,
        clock_mhz=1900,
        max_clock_mhz=2000,
        slowed_by=(),
        processes=1,
    )
    return replace(state, **changes)


def draw(seed=0, *, noise=0.002, shape=(60, 14)):
    return 10 * MS * (1 + noise * np.random.default_rng(seed).standard_normal(shape))


@pytest.fixture
def quiet(make_result):
    """A result with nothing wrong: two rows, five processes, 840 samples each."""

    def make(rounds=None, **options):
        rows = {"a": draw(1), "b": draw(2)} if rounds is None else {"a": rounds}
        integers = {name: value.astype(int).tolist() for name, value in rows.items()}
        result = make_result(integers, **{"processes": 5, "stopped": "target"} | options)
        busy = activity(moment_s=10.0, total_s=20.0, idle_s=5.0, own_s=14.9)
        return replace(
            result,
            procedure=Procedure(processes=5),
            activities=(activity(), busy),
            overhead_ns=(8000,) * 100,
        )

    return make


def kinds(result):
    return {finding.kind for finding in find(result)}


def with_split(result, **times_ms):
    """Give every process parts of its runs, each the same all the time."""

    def split(process):
        parts = {
            name: tuple((round(ms * MS),) * len(turn) for turn in process.rounds_ns)
            for name, ms in times_ms.items()
        }
        return replace(process, split=SplitTimes(**parts))

    rows = [
        replace(row, recording=Recording(tuple(map(split, row.recording.processes))))
        for row in result.rows
    ]
    return replace(result, rows=tuple(rows))


PARTS = {
    "host_to_device_ns": 0.5,
    "compute_ns": 8.0,
    "device_to_host_ns": 0.5,
    "enqueue_ns": 1.0,
}


def test_where_nothing_is_wrong_nothing_is_said(quiet):
    assert find(quiet()) == ()
    assert find(with_split(quiet(), **PARTS)) == ()


def first_row_unsettled(result):
    row = result.rows[0]
    processes = [replace(p, settled=False) for p in row.recording.processes]
    return replace(result, rows=(replace(row, recording=Recording(tuple(processes))),))


def with_last_activity(result, **changes):
    return replace(
        result, activities=(result.activities[0], replace(result.activities[1], **changes))
    )


def of_processes(result, count):
    rows = tuple(
        replace(row, recording=Recording(row.recording.processes[:count])) for row in result.rows
    )
    return replace(result, rows=rows, orders=result.orders[:count])


PROVOKED = {
    "failed": lambda quiet: replace(
        quiet(), failed=(FailedRow(quiet().rows[0].description, "run", 1, "it is lost."),)
    ),
    "partial": lambda quiet: quiet(stopped="interrupted"),
    "unsettled": lambda quiet: first_row_unsettled(quiet()),
    "imprecise": lambda quiet: quiet(draw(noise=0.2), stopped="time"),
    "few-processes": lambda quiet: of_processes(quiet(), 1),
    "few-samples": lambda quiet: quiet(draw(shape=(60, 2))),
    "drift": lambda quiet: quiet(draw() * np.linspace(1, 1.05, 60)[:, None]),
    "bimodal": lambda quiet: quiet(
        draw() * np.where(np.random.default_rng(5).random((60, 14)) < 0.3, 1.2, 1)
    ),
    "processes-differ": lambda quiet: quiet(
        draw() * np.repeat([1.0, 1.08, 1.02, 0.94, 1.1], 12)[:, None]
    ),
    "steal": lambda quiet: with_last_activity(quiet(), steal_s=2.0, own_s=12.9),
    "neighbours": lambda quiet: with_last_activity(quiet(), own_s=10.0),
    "load": lambda quiet: replace(
        quiet(), environment=replace(quiet().environment, load_average=(2.5, 0.0, 0.0))
    ),
    "throttled": lambda quiet: with_last_activity(quiet(), throttle_events=3),
    "enqueue-bound": lambda quiet: with_split(quiet(), **PARTS | {"enqueue_ns": 7.0}),
    "transfer-bound": lambda quiet: with_split(
        quiet(), **PARTS | {"host_to_device_ns": 5.0, "device_to_host_ns": 4.0}
    ),
    "overhead": lambda quiet: replace(quiet(), overhead_ns=(200_000,) * 100),
}


JUST_NOT_PROVOKED = {
    "failed": lambda quiet: replace(quiet(), failed=()),
    "partial": lambda quiet: quiet(stopped="time"),
    "unsettled": lambda quiet: quiet(settled=True),
    "imprecise": lambda quiet: quiet(draw(noise=0.03), stopped="time"),
    "few-processes": lambda quiet: of_processes(quiet(), MIN_PROCESSES),
    "few-samples": lambda quiet: quiet(draw(shape=(60, 12))),  # 720, and p99 takes 662
    "drift": lambda quiet: quiet(draw() * np.linspace(1, 1.0005, 60)[:, None]),
    "bimodal": lambda quiet: quiet(
        draw() * np.where(np.random.default_rng(5).random((60, 14)) < 0.3, 1.005, 1)
    ),
    "processes-differ": lambda quiet: quiet(
        draw() * np.repeat([1.0, 1.004, 1.001, 0.997, 1.005], 12)[:, None]
    ),
    "steal": lambda quiet: with_last_activity(quiet(), steal_s=0.19, own_s=14.7),
    "neighbours": lambda quiet: with_last_activity(quiet(), own_s=14.1),
    "load": lambda quiet: replace(
        quiet(), environment=replace(quiet().environment, load_average=(1.9, 9.0, 9.0))
    ),
    "throttled": lambda quiet: replace(
        quiet(),
        activities=tuple(
            replace(one, throttle_events=7, gpus=(gpu(clock_mhz=1501),))
            for one in quiet().activities
        ),
    ),
    "enqueue-bound": lambda quiet: with_split(quiet(), **PARTS | {"enqueue_ns": 6.3}),
    "transfer-bound": lambda quiet: with_split(
        quiet(), **PARTS | {"host_to_device_ns": 4.0, "device_to_host_ns": 3.9}
    ),
    "overhead": lambda quiet: replace(quiet(), overhead_ns=(95_000,) * 100),
}


def test_every_kind_of_warning_is_provoked_and_has_a_result_that_just_does_not():
    assert set(PROVOKED) == set(JUST_NOT_PROVOKED) == set(Kind.__args__)


@pytest.mark.parametrize("kind", JUST_NOT_PROVOKED)
def test_a_warning_is_not_given_where_there_is_just_no_reason(quiet, kind):
    assert kind not in kinds(JUST_NOT_PROVOKED[kind](quiet))


@pytest.mark.parametrize("kind", PROVOKED)
def test_a_warning_is_provoked_alone_and_says_what_helps(quiet, kind):
    result = PROVOKED[kind](quiet)
    found = [finding for finding in find(result) if finding.kind == kind]
    assert found
    # What is wrong with latencies can also widen their intervals, and one process more so.
    also = {"imprecise", "few-samples", "processes-differ", "drift"}
    assert kinds(result) - {kind} <= also
    for finding in found:
        assert finding.sentence.endswith(".")
        assert finding.remedy.endswith(".")
        assert any(mark in finding.remedy for mark in ("--", "`", "Use", "Let", "Measure"))


@pytest.mark.parametrize("kind", ["drift", "bimodal"])
@pytest.mark.parametrize(("devices", "command"), [("cpu", "cpu"), ("0,1", "nvidia-smi --lock")])
def test_clocks_are_fixed_by_the_command_of_the_rows_devices(quiet, kind, devices, command):
    result = PROVOKED[kind](quiet)
    rows = tuple(
        replace(row, description=replace(row.description, devices=devices)) for row in result.rows
    )
    found = [one.remedy for one in find(replace(result, rows=rows)) if one.kind == kind]
    assert found
    assert all(command in remedy for remedy in found)
    assert all(("nvidia" in remedy) is (devices != "cpu") for remedy in found)


def test_a_failed_row_is_named_with_its_reason(quiet):
    (finding,) = find(PROVOKED["failed"](quiet))
    assert finding.sentence == "a failed while it ran in process 2: it is lost."
    assert "parnet-bench latency net" in finding.remedy


def test_too_wide_intervals_ask_for_time_or_for_processes(quiet):
    noisy = quiet(draw(noise=0.2), stopped="time")
    (finding,) = (finding for finding in find(noisy) if finding.kind == "imprecise")
    assert "--max-time 220" in finding.remedy
    differing = PROVOKED["processes-differ"](quiet)
    (finding,) = (finding for finding in find(differing) if finding.kind == "imprecise")
    assert "--processes 10" in finding.remedy


def test_missing_tails_say_how_many_samples_and_how_much_time_they_take(quiet):
    (finding,) = find(PROVOKED["few-samples"](quiet))
    assert "p99 takes 662, and all rows have 120." in finding.sentence
    # 1.1 times 662 runs of 10 ms each; 662 of 120 samples take 5.5 times as long, and a fifth.
    assert finding.remedy == "Use --min-time 8 --max-time 729."


@pytest.mark.parametrize(("devices", "option"), [("cpu", ""), ("0,1", " --devices 0,1")])
def test_a_row_that_failed_is_tried_again_where_it_failed(quiet, devices, option):
    description = replace(quiet().rows[0].description, devices=devices)
    failed = (FailedRow(description, "run", 0, "it is lost."),)
    (finding,) = [f for f in find(replace(quiet(), failed=failed)) if f.kind == "failed"]
    assert finding.remedy == f"Try it alone: `parnet-bench latency {description.target}{option}`."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slowed_by": ("heat",)}, "GPU 0 (Some GPU) was held down by heat."),
        ({"clock_mhz": 1000}, "GPU 0 (Some GPU) ran at 1000 of 2000 MHz under load."),
        (
            {"slowed_by": ("heat",), "temperature_c": 88, "power_w": 699.6},
            "GPU 0 (Some GPU) was held down by heat, at up to 88 °C and 700 W.",
        ),
        (
            {"clock_mhz": 1000, "temperature_c": 60},
            "GPU 0 (Some GPU) ran at 1000 of 2000 MHz under load, at up to 60 °C.",
        ),
        ({"temperature_c": 88, "power_w": 700.0}, None),
        ({"clock_mhz": None}, None),
        ({}, None),
    ],
)
def test_a_board_that_is_held_down_is_named(quiet, changes, said):
    result = with_last_activity(quiet(), gpus=(gpu(**changes),))
    sentences = [finding.sentence for finding in find(result) if finding.kind == "throttled"]
    assert sentences == ([said] if said else [])


def test_machines_that_count_no_throttling_are_not_accused(quiet):
    assert "throttled" not in kinds(with_last_activity(quiet(), throttle_events=None))


def test_rows_of_which_the_same_holds_share_a_line(quiet):
    result = quiet()
    rows = [
        replace(
            row,
            recording=Recording(
                tuple(
                    ProcessRecording(False, p.warm_up_ns, p.rounds_ns)
                    for p in row.recording.processes
                )
            ),
        )
        for row in result.rows
    ]
    (line,) = warning_lines(find(replace(result, rows=tuple(rows))))
    assert line == (
        "a had not become steady when its warm-up ended. The same goes for b. "
        "Give it more time: --max-time 220."
    )
