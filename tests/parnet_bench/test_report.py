"""Pages, documents and tables of results: what they say, and that they say no more.

Run with the environment variable UPDATE_GOLDEN=1 to rewrite the expected reports of the
old result in tests/golden, and read the difference before you keep it.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

from parnet_bench.cli import app
from parnet_bench.machine.energy import Energy
from parnet_bench.machine.footprint import Footprint
from parnet_bench.machine.peaks import Peaks
from parnet_bench.report.csv_file import csv_text
from parnet_bench.report.html_page import render_page
from parnet_bench.report.markdown_page import render_markdown
from parnet_bench.report.page_view import view_of
from parnet_bench.results.cost_columns import costs_of
from parnet_bench.results.published import TOP1
from parnet_bench.results.published_accuracy import CIFAR10, COCO, IMAGENET, published_accuracy
from parnet_bench.results.result import (
    FailedRow,
    Pipelined,
    ProcessRecording,
    Recording,
    RowTimeline,
    SplitTimes,
)
from parnet_bench.results.result_file import as_dict, read_result
from parnet_bench.results.summary import summarise
from parnet_bench.results.used_runtimes import used_runtimes
from parnet_engines.planning.cost_table import CostTable, SegmentCost
from parnet_engines.planning.links import Link
from parnet_engines.planning.simulate import simulate
from parnet_engines.schedule import program_file, recording
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_export import console
from parnet_export.console import write_json
from parnet_export.models.catalog import CATALOG
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec


def rounds(center_ns, seed, count=12, runs=8):
    samples = center_ns * (1 + 0.02 * np.random.default_rng(seed).standard_normal((count, runs)))
    return samples.astype(int).tolist()


def timeline(lanes=2):
    """Two segments, 4 and 3 ms, side by side where there are two lanes, after 1 ms of stem."""

    def tensor(name):
        return TensorSpec(name, "int8", (1000,))

    def segment(name, reads, writes):
        inputs, outputs = (tuple(map(tensor, names.split())) for names in (reads, writes))
        return Segment(name, inputs, outputs, Cost(0, 0, 0, 0, 0, 0))

    segments = (
        segment("stem", "image", "x"),
        segment("left", "x", "l"),
        segment("right", "x", "r"),
        segment("head", "l r", "y"),
    )
    graph = StreamGraph((tensor("image"),), (tensor("y"),), segments)
    names = ("lane0", "lane1")[:lanes]
    places = {"stem": 0, "left": 0, "right": lanes - 1, "head": 0}
    assigned = tuple(Assignment(name, f"lane{lane}") for name, lane in places.items())
    lowered = lower(graph, Placement(tuple(Lane(name, "cpu") for name in names), assigned))
    latencies_ms = {"stem": 1.0, "left": 4.0, "right": 3.0, "head": 2.0}
    costs = CostTable(
        tuple(
            SegmentCost(name, "cpu", 1, 1, latency_ms, "measured", "a test")
            for name, latency_ms in latencies_ms.items()
        )
    )
    predicted = simulate(lowered, costs, Link("test", 0.0, 1.0), inferences=1).recording
    return RowTimeline(
        msgspec.json.decode(program_file.encode(lowered)),
        msgspec.json.decode(recording.encode(predicted)),
    )


@pytest.fixture(scope="module")
def simple(make_result):
    """Two rows, one process, twelve rounds; the second is twice as fast."""
    return make_result({"net unfused": rounds(10**7, 0), "net whole": rounds(5 * 10**6, 1)})


@pytest.fixture(scope="module")
def full(simple):
    """A result with everything that a result can have."""
    rows = [
        replace(
            row,
            footprint=Footprint(
                weights_bytes=5_000_000,
                activation_bytes=15_000_000,
                graph_bytes=70_000,
                engine_bytes=None,
                load_ms=640.0,
                peak_host_bytes=90_000_000,
            ),
            energy=Energy(0.25, "RAPL package-0"),
            timeline=timeline(),
        )
        for row in simple.rows
    ]
    failed = FailedRow(
        replace(rows[1].description, name="net streams"), "run", 0, "It ran out of memory."
    )
    peaks = Peaks(2, 100e9, 20e9, "fp32", "a test")
    return replace(simple, rows=tuple(rows), failed=(failed,), peaks=(peaks,))


def described(result, **changes):
    rows = (replace(r, description=replace(r.description, **changes)) for r in result.rows)
    return replace(result, rows=tuple(rows))


class Page(HTMLParser):
    """Reads a page: its text, its elements, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.elements = [], [], []
        self.feed(html)
        self.close()

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


# ----------------------------------------------------------------------------- an old file


@pytest.mark.parametrize(
    ("render", "name"),
    [(render_page, "latency-schema-1.html"), (render_markdown, "latency-schema-1.md")],
)
def test_the_report_of_an_old_result_stays_as_it_is(root, render, name):
    old = read_result(root / "tests" / "golden" / "latency-schema-1.json")
    text = render(old)
    golden = root / "tests" / "golden" / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text()


# --------------------------------------------------------------------------------- the page


def test_the_page_is_well_formed_and_needs_nothing_else(full):
    html = render_page(full)
    page = Page(html)
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed"}
    assert "url(" not in html
    assert "@import" not in html
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert name not in attributes, tag
    assert "prefers-color-scheme: dark" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.elements
    )


def test_equal_results_give_equal_pages(full):
    assert render_page(full) == render_page(msgspec.convert(msgspec.to_builtins(full), type(full)))


def test_the_page_shows_every_figure_that_a_table_would(full):
    page = Page(render_page(full))
    first, second = summarise(full)
    assert f"{first.median_ms:.1f} ms" in page.text
    assert f"{second.speedup:.2f}x" in page.text
    interval = second.speedup_interval
    assert f"{interval.low:.2f} to {interval.high:.2f}" in page.text
    for text in ("Some CPU", "onnxruntime 1.22.0", "parnet-bench latency net", "CPython 3.11.7"):
        assert text in page.text


def test_strips_place_medians_to_scale(full):
    view = view_of(full)
    places = [
        float(re.search(r'class="median"[^>]*x1="([\d.]+)%"', row.distribution)[1])
        for row in view.rows
    ]
    assert places[0] > places[1]  # 10 ms is right of 5 ms
    dots = [float(re.search(r'cx="([\d.]+)%"', row.ratio)[1]) for row in view.rows]
    assert dots[0] < dots[1]  # 2x is right of 1x
    assert 'class="chart faster"' in view.rows[1].ratio
    ends = re.findall(
        r'x[12]="([\d.]+)%"', re.search(r'<line class="range".*?>', view.rows[1].ratio)[0]
    )
    assert float(ends[0]) < dots[1] < float(ends[1])


def test_lanes_are_drawn_with_their_overlap_and_critical_path(full):
    html = render_page(full)
    page = Page(html)
    assert html.count('class="timeline"') == 2
    assert "lanes overlap 42.9 % of the time" in page.text  # 3 of 7 ms
    assert "critical path stem > left > head" in page.text


def test_a_single_lane_has_no_overlap_to_speak_of(full):
    alone = replace(full, rows=tuple(replace(r, timeline=timeline(lanes=1)) for r in full.rows))
    page = Page(render_page(alone))
    assert "10.0 ms on one lane" in page.text
    assert "lanes overlap" not in page.text
    assert ("details", {"open": None}) not in page.elements
    assert ("details", {"open": None}) in Page(render_page(full)).elements


def test_a_result_without_timelines_has_no_lanes(simple):
    page = Page(render_page(simple))
    assert "critical path" not in page.text
    assert "Lanes" not in page.texts


def test_shares_of_the_machines_peaks_are_those_of_the_formula(full):
    costs = costs_of(full, summarise(full))
    first = costs[0].achieved
    median_s = summarise(full)[0].median_ms / 1000
    assert first.flops_share == pytest.approx(306_632_000 / median_s / 100e9)
    assert first.bytes_share == pytest.approx(20_000_000 / median_s / 20e9)
    page = Page(render_page(full))
    assert f"{100 * first.flops_share:.1f} %" in page.text
    assert "250 mJ" in page.text
    assert "90.00 MB" in page.text


def test_peaks_of_another_number_of_threads_are_not_taken(full):
    other = replace(full, peaks=(replace(full.peaks[0], threads=1),))
    assert costs_of(other, summarise(other))[0].achieved.flops_share is None
    on_gpu = described(full, devices="cuda:0")
    assert costs_of(on_gpu, summarise(on_gpu))[0].achieved.flops_share is None


def test_energy_that_nothing_counts_is_said_to_be_missing(full):
    rows = tuple(replace(row, energy=Energy(None, missing="no counters here")) for row in full.rows)
    page = Page(render_page(replace(full, rows=rows)))
    assert "No energy: no counters here." in page.text
    assert "mJ" not in page.text


def test_failed_rows_are_named_with_their_reason(full):
    text = Page(render_page(full)).text
    assert "net streams failed while it ran" in text
    assert "It ran out of memory." in text


def test_names_of_others_are_text_and_never_markup(full):
    name = "<script>alert(1)</script> & `x` --y"
    one = replace(full, rows=full.rows[:1], notes=(name,))
    html = render_page(described(one, network=name, target=name, name=name))
    assert "<script" not in html
    page = Page(html)
    assert page.open == []
    assert name in page.text
    assert "\n# " not in render_markdown(described(full, name="a\n# b"))[2:]


# ------------------------------------------------------------------- that it does not overstate


def test_random_weights_and_reconstructions_are_labelled(full):
    for render in (render_page, render_markdown):
        assert "random weights" in render(full)
        assert "random weights" not in render(with_weights(full, "trained"))
        assert "reconstruction" not in render(full)
        cifar = described(full, network="parnet-cifar-1.3m")
        assert "reconstruction" in render(cifar)
        unknown = with_weights(cifar, "unknown")
        assert "weights of unknown origin" in render(unknown)
        assert "reconstruction" not in render(unknown)  # a file may have any name


def with_weights(result, weights):
    provenance = replace(result.rows[0].description.provenance, weights=weights)
    return described(result, provenance=provenance)


def test_partial_results_and_rows_that_had_not_settled_are_labelled(full):
    assert "partial: interrupted" not in Page(render_page(full)).text
    cut_off = replace(full, stopped="interrupted")
    for render in (render_page, render_markdown):
        assert "partial: interrupted" in render(cut_off)
    unsettled = replace(
        full.rows[0],
        recording=Recording(
            tuple(replace(p, settled=False) for p in full.rows[0].recording.processes)
        ),
    )
    assert "not settled" not in Page(render_page(full)).text
    assert "not settled" in Page(render_page(replace(full, rows=(unsettled,)))).text


def test_an_interval_that_holds_1_is_no_difference(make_result):
    same = make_result({"a": rounds(10**7, 0), "b": rounds(10**7, 1)})
    assert view_of(same).rows[1].verdict == "unclear"
    assert "no clear difference from a" in Page(render_page(same)).text


def test_too_few_rounds_leave_no_interval_and_say_so(make_result):
    few = make_result({"a": [[10**6]], "b": [[10**6]]})
    page = Page(render_page(few))
    assert "from too few rounds for an interval" in page.text
    assert "too few samples for an interval" in page.text


def test_accuracies_are_marked_as_published(full):
    known = described(full, network="parnet-l", inputs=(image(224),))
    page = Page(render_page(known))
    assert "ImageNet top-1 accuracy against latency" in page.text
    assert (
        "published ones of the authors' weights, not measured here, where weights are random"
        in (page.text)
    )
    assert "77.66 %" in page.text
    assert "accuracy against latency" not in Page(render_page(full)).text


def image(side):
    return TensorSpec("image", "float32", (1, 3, side, side))


def accuracy_of(full, network, side, weights="random"):
    row = with_weights(described(full, network=network, inputs=(image(side),)), weights)
    return published_accuracy(row.rows[0].description)


def test_accuracies_are_those_of_the_papers(full):
    for network, percent in TOP1.items():
        found = accuracy_of(full, network, 224)
        assert (found.metric, found.percent) == (IMAGENET, percent)
        assert "table 1" in found.source
    assert "retrained by its authors" in accuracy_of(full, "resnet50", 224).source
    assert accuracy_of(full, "seqresnet-b22", 224).percent == 76.33
    assert accuracy_of(full, "parnet-cifar-35m", 32).percent == 96.12
    assert accuracy_of(full, "parnet-cifar-35m", 32).metric == CIFAR10
    assert accuracy_of(full, "yolov4-csp", 640).metric == COCO


def test_an_accuracy_of_another_resolution_or_of_unknown_weights_is_not_shown(full):
    assert accuracy_of(full, "parnet-l", 256) is None
    assert accuracy_of(full, "parnet-l", 224, "unknown") is None
    assert accuracy_of(full, "net", 224) is None


def test_accuracies_of_other_papers_are_of_networks_in_the_catalogue():
    from parnet_bench.results.published_accuracy import _OF_OTHER_PAPERS

    for network, accuracy in _OF_OTHER_PAPERS.items():
        assert CATALOG[network][1].resolution == accuracy.resolution


def test_only_runtimes_that_rows_can_use_are_named(full):
    libraries = {"onnxruntime": "1.22.0", "openvino": "1", "tensorrt": "10", "numpy": "2"}
    installed = replace(full, environment=replace(full.environment, libraries=libraries))
    assert used_runtimes(installed) == {"onnxruntime": "1.22.0"}
    on_gpu = described(installed, devices="cuda:0")
    assert used_runtimes(on_gpu) == {"onnxruntime": "1.22.0", "tensorrt": "10"}


# ------------------------------------------------------------------------------------- files


def test_csv_has_a_line_for_each_row_with_units_in_the_names(full):
    lines = list(csv.DictReader(io.StringIO(csv_text(full))))
    assert [line["row"] for line in lines] == ["net unfused", "net whole", "net streams"]
    first, second = summarise(full)
    assert float(lines[0]["median_ms"]) == first.median_ms
    assert float(lines[1]["speedup"]) == second.speedup
    assert float(lines[1]["speedup_low"]) == second.speedup_interval.low
    assert lines[0]["speedup_low"] == ""
    assert lines[0]["weights"] == "random"
    assert lines[0]["partial"] == "False"
    assert float(lines[0]["j_per_inference"]) == 0.25
    assert float(lines[0]["peak_host_bytes"]) == 90_000_000
    assert lines[0]["engine_bytes"] == ""
    assert lines[2]["failed"] == "It ran out of memory."
    assert lines[2]["median_ms"] == ""


def test_parts_of_an_inference_are_shown_where_a_backend_tells_them(full):
    process = full.rows[0].recording.processes[0]

    def part(ms):
        return tuple(tuple(round(ms * 1e6) for _ in turn) for turn in process.rounds_ns)

    split = SplitTimes(part(0.25), part(9.0), part(0.125), part(0.5))
    recorded = Recording((replace(process, split=split),))
    on_gpu = replace(full, rows=(replace(full.rows[0], recording=recorded), full.rows[1]))
    table = view_of(on_gpu).parts
    assert table.headings[1:] == ("to device ms", "compute ms", "to host ms", "enqueue ms")
    cells = [[cell.text for cell in row[-4:]] for row in table.rows]
    assert cells == [["0.250", "9.00", "0.125", "0.500"], ["-"] * 4]
    lines = list(csv.DictReader(io.StringIO(csv_text(on_gpu))))
    assert [line["compute_ms"] for line in lines] == ["9.0", "", ""]
    assert "Parts of an inference" in Page(render_page(on_gpu)).text
    assert "| net whole | - | - | - | - |" in render_markdown(on_gpu)
    assert view_of(full).parts is None
    assert "Parts of an inference" not in render_page(full) + render_markdown(full)


def test_what_several_in_flight_reach_is_shown(full):
    process = full.rows[0].recording.processes[0]
    latencies = tuple((20_000_000,) * 4 for _ in process.rounds_ns)
    elapsed = tuple(40_000_000 for _ in process.rounds_ns)  # 4 samples in 40 ms
    recorded = Recording((replace(process, pipelined=Pipelined(2, latencies, elapsed)),))
    in_flight = replace(full, rows=(replace(full.rows[0], recording=recorded), full.rows[1]))
    table = view_of(in_flight).figures
    assert table.headings[-2:] == ("in flight", "samples/s then")
    assert [[cell.text for cell in row[-2:]] for row in table.rows] == [["2", "100.0"], ["-", "-"]]
    lines = list(csv.DictReader(io.StringIO(csv_text(in_flight))))
    assert float(lines[0]["pipelined_samples_per_s"]) == pytest.approx(100)


@pytest.fixture
def run(capfd):
    def run(*arguments):
        code = console.run(app, ["report", *map(str, arguments)])
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def saved(simple, tmp_path):
    write_json(tmp_path / "result.json", as_dict(simple))
    return tmp_path / "result.json"


def test_the_command_writes_what_it_is_asked_for(run, saved, tmp_path, simple):
    html, markdown, table = (tmp_path / name for name in ("r.html", "r.md", "r.csv"))
    code, printed, _ = run(saved, "--html", html, "--markdown", markdown, "--csv", table)
    assert (code, printed) == (0, "")
    assert html.read_text() == render_page(simple)
    assert markdown.read_text() == render_markdown(simple)
    assert table.read_bytes().decode() == csv_text(simple)


def test_the_command_prints_markdown_by_itself(run, saved, simple):
    assert run(saved) == (0, render_markdown(simple), "")
    assert run(saved, "--markdown", "-") == (0, render_markdown(simple), "")
    assert run(saved, "--csv", "-")[1].splitlines() == csv_text(simple).splitlines()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b'{"kind"', "is damaged"), (b"[]", "is no result"), (None, "be read")],
)
def test_bad_results_are_refused_and_earlier_pages_kept(run, tmp_path, content, message):
    bad, page = tmp_path / "bad.json", tmp_path / "page.html"
    if content is not None:
        bad.write_bytes(content)
    page.write_text("earlier")
    code, printed, error = run(bad, "--html", page)
    assert (code, printed) == (2, "")
    assert "bad.json" in error
    assert message in error
    assert page.read_text() == "earlier"


def test_a_damaged_timeline_is_refused_with_the_rows_name(run, full, tmp_path):
    broken = replace(full.rows[0], timeline=RowTimeline({"schema_version": 1}, {}))
    write_json(tmp_path / "result.json", as_dict(replace(full, rows=(broken,))))
    code, _, error = run(tmp_path / "result.json", "--html", tmp_path / "page.html")
    assert code == 2
    assert "net unfused: is no valid program" in error
    assert not (tmp_path / "page.html").exists()


def test_a_place_that_cannot_be_written_is_refused(run, saved, tmp_path):
    assert run(saved, "--html", tmp_path)[0] == 2


def test_processes_are_told_apart_in_the_order_of_time(full):
    process = full.rows[0].recording.processes[0]
    halves = tuple(
        ProcessRecording(settled=True, warm_up_ns=(), rounds_ns=part)
        for part in (process.rounds_ns[:4], process.rounds_ns[4:])
    )
    row = replace(full.rows[0], recording=Recording(halves))
    order = full.orders[0]
    split = replace(full, rows=(row,), orders=(order[:4], order[4:]))
    view = view_of(replace(split, orders=tuple(tuple((0,) for _ in o) for o in split.orders)))
    assert re.findall(r'class="process" x1="([\d.]+)%"', view.rows[0].rounds) == ["33.33"]
    assert view.rows[0].rounds.count("<circle") == 12


# ---------------------------------------------------------------------------------- a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_lays_the_page_out_within_its_width(full, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    probe = (
        "<script>document.title = 'width ' + document.documentElement.scrollWidth</script></body>"
    )
    page = tmp_path / "page.html"
    # A browser's window has a least width; a frame of the page has any.
    (tmp_path / "inner.html").write_text(render_page(full).replace("</body>", probe))
    frame = f'<iframe id="f" src="inner.html" width="{width}" height="900"></iframe>'
    tell = "onload=() => document.body.append(f.contentDocument.title)"
    page.write_text(f"<body>{frame}<script>{tell}</script></body>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    needed = int(re.search(r"width (\d+)", done.stdout)[1])
    assert width - 40 < needed <= width  # a scroll bar takes a little
