from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest

from parnet_bench.cli import app
from parnet_bench.machine.environment import read_environment
from parnet_bench.measuring.latency import measure_rows
from parnet_bench.paper import table as paper_table
from parnet_bench.paper.measured import compare_with_paper, plan_paper
from parnet_bench.results.procedure import Procedure
from parnet_bench.results.published import TABLES, Figures, PublishedRow, PublishedTable
from parnet_bench.results.result import FailedRow
from parnet_bench.results.summary import summarise
from parnet_bench.targets.request import Request
from parnet_export import console

TABLE = PublishedTable(
    2,
    "Tiny networks",
    "ResNet",
    (
        PublishedRow("ParNet", Figures(samples_per_s=200, top1=70.5), "parnet-tiny", "authors"),
        PublishedRow("ParNet, unfused", Figures(latency_ms=8.0), "parnet-tiny", "unfused"),
        PublishedRow("ResNet", Figures(latency_ms=10.0, flops=1e9), "resnet-tiny", note="Old."),
        PublishedRow("OtherNet", Figures(latency_ms=20.0), "other-net"),
    ),
    "some GPU",
    ("Nothing is real",),
)


@contextlib.contextmanager
def silently(_: str):
    yield


@pytest.fixture(scope="module")
def planned(tiny_catalogue, tmp_path_factory):
    return plan_paper(TABLE, Request(), tmp_path_factory.mktemp("plan"), silently)


@pytest.fixture(scope="module")
def measured(planned):
    procedure = Procedure(rounds=3, processes=1, turn_s=0.01, in_flight=1)
    return measure_rows(planned.rows, procedure, read_environment())


@pytest.fixture(scope="module")
def comparison(planned, measured):
    return compare_with_paper(TABLE, planned, measured)


def test_only_what_the_table_lists_is_measured_and_its_reference_comes_first(planned):
    forms = [(row.description.target, row.description.form) for row in planned.rows]
    assert forms == [
        ("resnet-tiny", "whole"),
        ("parnet-tiny", "unfused"),
        ("parnet-tiny", "streams"),
    ]
    assert set(planned.names) == {"ParNet", "ParNet, unfused", "ResNet"}
    assert planned.missing == {"OtherNet": "not in the catalogue"}


def test_published_and_measured_figures_stand_side_by_side(comparison, measured):
    rows = {row.label: row for row in comparison.rows}
    summaries = {(s.network, s.form): s for s in summarise(measured)}
    streams, resnet = summaries["parnet-tiny", "streams"], summaries["resnet-tiny", "whole"]
    assert list(rows) == [row.label for row in TABLE.rows]
    assert rows["ParNet"].measured.latency_ms == streams.median_ms
    assert rows["ParNet"].published_speedup == pytest.approx(10.0 / 5.0)
    assert rows["ParNet"].measured.speedup.value == pytest.approx(
        resnet.median_ms / streams.median_ms, rel=0.05
    )
    assert rows["ResNet"].published_speedup == rows["ResNet"].measured.speedup.value == 1.0
    assert rows["ParNet"].origin == "reconstruction"
    assert rows["OtherNet"].measured is None
    assert rows["OtherNet"].published_speedup == 0.5


def test_what_runs_otherwise_than_in_the_paper_is_said(comparison):
    (caveat, recast) = comparison.caveats
    assert caveat == "Nothing is real"
    assert "three devices" in recast
    assert "plan 'streams' on cpu" in recast


def test_images_of_another_size_are_said(tiny_catalogue, tmp_path, measured):
    plan = plan_paper(TABLE, Request(resolution=64), tmp_path, silently)
    found = compare_with_paper(TABLE, plan, measured)
    assert found.caveats[-1] == "Measured with images of 64 x 64, not of 32 pixels"


def test_a_row_that_failed_says_why_and_a_failed_reference_gives_no_speedups(planned, measured):
    reference, *others = measured.rows
    broken = replace(
        measured,
        rows=tuple(others),
        orders=(((0, 1),) * 3,),
        failed=(FailedRow(reference.description, "run", 0, "out of memory"),),
    )
    found = {row.label: row for row in compare_with_paper(TABLE, planned, broken).rows}
    assert found["ResNet"].missing == "failed: out of memory"
    assert found["ParNet"].measured.speedup is None
    assert "Not measured, failed: out of memory: ResNet." in paper_table.remarks_on(
        compare_with_paper(TABLE, planned, broken), broken
    )


def test_tables_say_the_same_in_every_form(comparison, measured, capsys):
    texts = [paper_table.markdown(comparison, measured), paper_table.page(comparison, measured)]
    for text in texts:
        for column in paper_table.columns_of(comparison):
            assert column.heading in text
            assert all(cell in text for cell in column.cells)
        for needed in ("ParNet (reconstruction)", "70.50", "some GPU", "ResNet: Old.", "200"):
            assert needed.replace("(", "").split()[0] in text
    headings = [c.heading for c in paper_table.columns_of(comparison)]
    assert "top-5 %" not in headings  # no row has one
    assert "The paper prints speeds" in texts[0]
    console.stdout.cache_clear()
    console.stdout().print(paper_table.render(comparison, measured))
    printed = capsys.readouterr().out
    assert "Not measured, not in the catalogue: OtherNet." in printed
    for column in paper_table.columns_of(comparison):
        assert all(cell in printed for cell in column.cells)


def test_a_table_for_people_fits_a_terminal_however_many_columns_it_has(
    comparison, measured, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    published = replace(
        comparison.rows[0].published, parameters=85_000_000, flops=41.5e9, depth=12, top1=75.01
    )
    rows = tuple(replace(row, published=published) for row in comparison.rows)
    wide = replace(comparison, rows=rows)
    console.stdout.cache_clear()
    console.stdout().print(paper_table.render(wide, measured))
    printed = capsys.readouterr().out
    console.stdout.cache_clear()
    assert all(len(line) <= 80 for line in printed.splitlines())
    for column in paper_table.columns_of(wide):
        assert all(cell in printed for cell in column.cells)


def test_a_page_shows_names_as_they_are_and_runs_nothing(comparison, measured):
    rows = (replace(comparison.rows[0], label="<script>x</script>"), *comparison.rows[1:])
    text = paper_table.page(replace(comparison, rows=rows), measured)
    assert "<script" not in text
    assert "&lt;script&gt;x" in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_command_writes_every_form(tiny_catalogue, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TABLES, 2, TABLE)
    files = {name: tmp_path / f"t.{name}" for name in ("md", "html", "json")}
    arguments = ["paper", "--table", "2", "--rounds", "1", "--processes", "1", "--json"]
    arguments += ["--markdown", str(files["md"]), "--html", str(files["html"])]
    assert console.run(app, [*arguments, "--output", str(files["json"])]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(files["json"].read_text())
    assert printed["kind"] == "parnet-bench paper"
    assert printed["comparison"]["rows"][0]["label"] == "ParNet"
    assert len(printed["measurement"]["rows"]) == 3
    assert files["md"].read_text().startswith("### Non-deep Networks")
    assert files["html"].read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--table", "7"], "'7' is not one of"),
        (["--table", "2", "--max-time", "0"], "--max-time: 0.0 is not a time"),
        (["--table", "2", "--devices", "moon"], "'moon' is no device"),
        (["--table", "2", "--html", "/no/such/folder/x.html"], "/no/such/folder"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(arguments, problem, capsys):
    assert console.run(app, ["paper", *arguments]) == 2
    assert problem in " ".join(capsys.readouterr().err.split())
