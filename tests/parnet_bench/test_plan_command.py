"""`parnet-bench plan`: forecasts by hand, from bundles, and of networks that do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest
import torch
import typer

from parnet_bench import plan_command
from parnet_bench.forecasts.forecast import forecast
from parnet_bench.forecasts.hypothetical import Changes, Sketch, changed_widths, sketch
from parnet_bench.forecasts.inputs import Costs, find_costs, parse_numbers
from parnet_bench.forecasts.table import remarks_on
from parnet_engines.planning.bundle_costs import network_of
from parnet_engines.planning.cost_table import COSTS_NAME, WHOLE, CostTable, SegmentCost, save_costs
from parnet_engines.planning.links import FREE_LINK, Link
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program_file import encode
from parnet_export import console
from parnet_export.errors import InputError
from parnet_export.export import export_network
from parnet_export.fuse import fuse_network
from parnet_export.graphs.cost import graph_cost
from parnet_export.source import load_network
from parnet_export.splitting.split import split_model
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

MB_LINK = Link("test", 0.0, 1.0)
"""One millisecond for each million bytes."""


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "int8", (1_000_000,))


def segment(name: str, reads: str, writes: str, gmacs: int = 1) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, Cost(0, gmacs * 10**9, 0, 0, 1, 1))


PARNET = StreamGraph(
    inputs=(tensor("image"),),
    outputs=(tensor("logits"),),
    segments=(
        segment("stem1", "image", "a"),
        segment("stem2", "a", "b"),
        segment("stream1", "a", "s1", 8),
        segment("stream2", "b", "s2", 9),
        segment("stream3", "b", "s3", 10),
        segment("fusion", "s1 s2", "f"),
        segment("head", "f s3", "logits", 2),
    ),
)
LATENCIES_MS = {
    "stem1": 1.0,
    "stem2": 1.0,
    "stream1": 8.0,
    "stream2": 9.0,
    "stream3": 10.0,
    "fusion": 1.0,
    "head": 2.0,
}
NETWORK = Sketch("parnet", "seven segments", PARNET, Cost(0, 32 * 10**9, 0, 0, 7, 5))


def measured(kind="cuda", *, threads=1, whole_ms=None, busy=(1,)) -> CostTable:
    latencies_ms = LATENCIES_MS | ({} if whole_ms is None else {WHOLE: whole_ms})
    return CostTable(
        tuple(
            SegmentCost(name, kind, threads, lanes, latency_ms * lanes, "measured", "a machine")
            for name, latency_ms in latencies_ms.items()
            for lanes in busy
        )
    )


def costs(**options) -> Costs:
    table = measured(**options)
    network = Sketch("parnet", "", PARNET, NETWORK.whole, table)
    return find_costs(network, costs=None, device_model=None, lanes_per_device=1)


def rows_of(link=FREE_LINK, *, found=None, **options):
    result, _ = forecast(NETWORK, found or costs(), link, **options)
    return result.rows


# --- Forecasts by hand --------------------------------------------------------------------


def test_more_devices_make_the_network_faster_until_its_longest_chain_is_all_that_is_left():
    rows = rows_of(num_devices=4)
    assert [row.devices for row in rows] == [1, 2, 3, 4]
    assert rows[0].latency_ms == 32.0
    # stem1, stem2, stream3, then head; the other streams and the fusion fit beside them.
    assert rows[2].latency_ms == rows[3].latency_ms == 1 + 1 + 10 + 2
    assert all(row.is_optimal for row in rows)
    # Two lanes have 16 each at least, but nothing runs beside the first stem and the head.
    assert [row.lower_bound_ms for row in rows] == [32.0, 16.0, 14.0, 14.0]
    assert rows[1].latency_ms == 21.0
    assert rows[2].speedup == pytest.approx(32 / 14)
    # The path through stream2 and the fusion is as long.
    assert rows[2].bottleneck.name in {"stream2", "stream3"}
    assert rows[0].latency_ms > rows[1].latency_ms > rows[2].latency_ms


def test_slow_links_make_the_plan_copy_less_and_gain_less():
    free, fair, hopeless = (
        rows_of(link)[-1] for link in (FREE_LINK, MB_LINK, Link("far", 1e6, 1.0))
    )
    assert free.latency_ms < fair.latency_ms < hopeless.latency_ms
    assert hopeless.latency_ms == 32.0
    assert hopeless.copied_bytes == 0
    assert fair.copied_bytes > 0
    assert fair.copied_bytes % 1_000_000 == 0


def test_the_whole_network_is_taken_where_it_is_faster_than_its_segments():
    rows = rows_of(found=costs(whole_ms=30.0))
    assert rows[0].latency_ms == 30.0
    assert [placed.segment for placed in rows[0].placed] == [WHOLE]
    assert rows[2].latency_ms == 14.0
    assert rows[2].speedup == pytest.approx(30 / 14)
    assert all(row.placed[0].segment == WHOLE for row in rows_of(found=costs(whole_ms=13.0)))


def test_the_whole_network_can_be_asked_for():
    (row,) = rows_of(found=costs(whole_ms=30.0), plan="whole")
    assert (row.devices, row.latency_ms, row.speedup) == (1, 30.0, 1.0)
    assert rows_of(plan="whole")[0].latency_ms == 32.0
    for whole_ms, said in ((30.0, False), (None, True)):
        result, _ = forecast(NETWORK, costs(whole_ms=whole_ms), FREE_LINK)
        assert ("the sum of its segments" in " ".join(remarks_on(result))) is said


def test_the_authors_layout_has_one_stream_on_each_device_and_copies_no_stem():
    (row,) = rows_of(MB_LINK, plan="authors")
    where = {(placed.segment, placed.device) for placed in row.placed}
    assert where == {
        *((name, "cuda:0") for name in ("stem1", "stream1", "fusion", "head")),
        *((name, "cuda:1") for name in ("stem1", "stem2", "stream2")),
        *((name, "cuda:2") for name in ("stem1", "stem2", "stream3")),
    }
    # image 1, stem1 1, stem2 1, stream2 9, its copy 1, fusion 1, s3's copy 1, head 2.
    assert row.latency_ms == 17.0
    assert row.devices == 3
    assert row.lower_bound_ms <= row.latency_ms
    with pytest.raises(InputError, match="is not a plan for 1 to 2 devices"):
        rows_of(plan="authors", num_devices=2)


def test_throughput_comes_down_to_the_busiest_lane():
    rows = rows_of(objective="throughput", num_devices=3)
    assert [row.in_flight for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.lower_bound_ms <= row.interval_ms <= row.latency_ms
        assert row.speedup == pytest.approx(32 / row.interval_ms)
    assert rows[2].interval_ms < rows[2].latency_ms


def test_fewer_lanes_are_taken_where_company_costs_more_than_it_gains():
    found = costs(busy=(1, 2))
    # Two lanes of one device only share it: twice the time for everything.
    one, two = (rows_of(found=found, num_devices=1, lanes_per_device=k)[0] for k in (1, 2))
    assert one.latency_ms == two.latency_ms == 32.0
    assert two.lanes == 1
    (streams,) = rows_of(found=found, num_devices=1, lanes_per_device=2, plan="streams")
    assert (streams.lanes, streams.latency_ms) == (1, 32.0)


def test_lanes_of_a_cpu_share_the_threads_that_were_measured():
    found = costs(kind="cpu", threads=4)
    assert [lane.cores for lane in found.lanes(2, 1)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [lane.device for lane in found.lanes(2, 2)] == ["cpu:0", "cpu:0", "cpu:1", "cpu:1"]
    assert len({core for lane in found.lanes(2, 2) for core in lane.cores}) == 8
    with pytest.raises(InputError, match="Use at most 4"):
        found.lanes(1, 5)
    assert rows_of(found=found)[0].latency_ms == 32.0


# --- Networks that do not exist -----------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_catalogue):
    """The tiny ParNet without weights, and its graph with random ones."""
    network = fuse_network(load_network("parnet-tiny"))
    return sketch("parnet-tiny", Changes()), export_network(network)


def test_a_sketch_counts_what_the_network_with_weights_would(tiny):
    drawn, model = tiny
    split = split_model(model)
    assert drawn.graph == split.stream_graph
    assert drawn.whole == graph_cost(split.whole)
    assert drawn.whole.flops > 0


def test_a_sketch_in_half_precision_counts_half_of_the_bytes(tiny, tiny_catalogue, monkeypatch):
    drawn, model = tiny
    monkeypatch.setattr("parnet_export.export.export_network", lambda *_, **__: model)
    half = sketch("parnet-tiny", Changes(), precision="fp16")
    assert half.whole.macs == drawn.whole.macs
    assert half.whole.weight_bytes < 0.6 * drawn.whole.weight_bytes
    types = {t.dtype for part in half.graph.segments[:-1] for t in part.outputs}
    assert types == {"float16"}


def test_changed_widths_make_another_network(tiny, tiny_catalogue):
    wider = sketch("parnet-tiny", Changes(widths=(96, 192)))
    assert "widths 96/192" in wider.name
    assert "96/192 and 1/1 blocks, 768 channels" in wider.description
    assert 3 < wider.whole.macs / tiny[0].whole.macs < 5


def test_a_sketch_takes_no_memory_for_weights(tiny_catalogue, monkeypatch):
    elements = []
    monkeypatch.setattr(
        "parnet_export.export.export_network",
        lambda network, **_: elements.extend(
            p.untyped_storage().nbytes() for p in network.module.parameters()
        ),
    )
    with pytest.raises(AttributeError):  # there is no graph to split
        sketch("parnet-tiny", Changes())
    assert elements
    assert max(elements) <= torch.tensor(0.5).untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("streams", "expected"),
    [(2, (160, 320)), (3, (160, 320, 640)), (5, (160, 320, 640, 1280, 2560))],
)
def test_further_streams_are_twice_as_wide(streams, expected):
    assert changed_widths((160, 320, 640), streams) == expected


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("resnet-tiny", Changes(streams=3), "is no ParNet"),
        ("parnet-tiny", Changes(widths=(8, 16), blocks=(1, 1, 1)), "do not agree"),
        ("parnet-tiny", Changes(streams=3, widths=(8, 16)), "do not agree"),
        ("parnet-tiny", Changes(widths=(8, 15)), "widths must be even"),
    ],
)
def test_networks_that_cannot_be_are_refused(tiny_catalogue, name, changes, problem):
    with pytest.raises(InputError, match=problem):
        sketch(name, changes)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1,-2", "0", "1.5", "\N{SUPERSCRIPT TWO}"])
def test_lists_that_are_no_numbers_are_refused(text):
    with pytest.raises(InputError, match=r"--widths: .*no list of whole numbers"):
        parse_numbers("--widths", text)


# --- The command --------------------------------------------------------------------------


@pytest.fixture
def plan(capsys, monkeypatch):
    """Run the command in this process and return exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "80")
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    plan_command.register(app)

    def run(*arguments):
        code = console.run(app, ["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    console.stdout.cache_clear()
    console.stderr.cache_clear()


@pytest.fixture
def bundle(unmeasured_bundle):
    """The folder of a bundle of its own, to put costs into."""
    return unmeasured_bundle.path


def put_costs(forked_bundle, folder, latency_ms=1.0, network=None):
    names = [part.name for part in forked_bundle.stream_graph.segments]
    entries = [
        SegmentCost(name, "cuda", 1, 1, latency_ms, "measured", "a machine") for name in names
    ]
    table = CostTable(tuple(entries), network_of(forked_bundle) if network is None else network)
    save_costs(folder / COSTS_NAME, table)
    return len(names)


def test_a_bundle_without_costs_is_estimated_and_said_to_be(plan, bundle):
    code, out, _ = plan(bundle)
    assert code == 0
    assert "ESTIMATED for rtx3090 fp32" in out
    assert "One inference on 3 devices" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_measured_costs_of_the_bundle_are_used(plan, bundle, forked_bundle):
    count = put_costs(forked_bundle, bundle)
    code, out, _ = plan(bundle, "--num-devices", 1, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["basis"] == {"source": "measured", "device": "cuda", "environment": "a machine"}
    assert result["rows"][0]["latency_ms"] == result["one_lane_ms"] == count


def test_costs_of_an_earlier_version_of_the_bundle_are_not_used(plan, bundle, forked_bundle):
    put_costs(forked_bundle, bundle, network="another one")
    result = json.loads(plan(bundle, "--json")[1])
    assert result["basis"]["source"] == "estimated"


def test_a_file_of_costs_and_a_device_model_take_the_place_of_the_bundle_s(
    plan, bundle, forked_bundle, tmp_path
):
    put_costs(forked_bundle, bundle)
    (tmp_path / "other").mkdir()
    count = put_costs(forked_bundle, tmp_path / "other", latency_ms=2.0)
    result = json.loads(plan(bundle, "--costs", tmp_path / "other" / COSTS_NAME, "--json")[1])
    assert result["one_lane_ms"] == 2.0 * count
    result = json.loads(plan(bundle, "--device-model", "h100", "--json")[1])
    assert result["basis"]["environment"] == "h100 fp32"
    both = plan(bundle, "--costs", tmp_path / "other" / COSTS_NAME, "--device-model", "h100")
    assert both[0] == 2
    assert "Give one of them" in both[2]


def test_costs_of_another_network_are_refused(plan, straight_onnx, bundle, forked_bundle):
    put_costs(forked_bundle, bundle)
    code, _, err = plan(straight_onnx, "--costs", bundle / COSTS_NAME)
    assert code == 2
    assert "lacks segments of" in err


def test_a_described_device_is_estimated_by_its_rates(plan, forked_onnx):
    # A device that only launches: every operator takes 1000 us.
    result = json.loads(plan(forked_onnx, "--device-model", "1e9,1e9,1000", "--json")[1])
    nodes = round(result["one_lane_ms"])
    assert result["one_lane_ms"] == pytest.approx(nodes, rel=1e-6)
    assert nodes > 3
    assert "1000 us a launch" in result["basis"]["environment"]


def test_the_table_and_the_json_file_tell_the_same(plan, bundle, tmp_path):
    code, out, _ = plan(bundle, "--link", "5,25", "--output", tmp_path / "f.json")
    assert code == 0
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["link"] == {"name": "5,25", "latency_us": 5.0, "gb_per_s": 25.0}
    for row in result["rows"]:
        assert f"{row['speedup']:.2f}x" in out
    assert result["rows"][-1]["verdict"]["sentence"].split(":")[0] in out.replace("\n", " ")


def test_the_timeline_is_drawn_traced_and_saved(plan, bundle, tmp_path):
    svg, trace, saved = (tmp_path / name for name in ("t.svg", "t.json", "p.json"))
    first = plan(bundle, "--svg", svg, "--trace", trace, "--save-plan", saved, "--json")
    assert first[0] == 0
    picture = ET.parse(svg).getroot()  # noqa: S314 -- it is our own document
    assert picture.get("class") == "timeline"
    assert "3 x rtx3090 fp32" in next(picture.iter("{http://www.w3.org/2000/svg}text")).text
    assert json.loads(trace.read_text())["traceEvents"]
    again = json.loads(plan(bundle, "--plan", saved, "--json")[1])
    (row,) = again["rows"]
    expected = json.loads(first[1])["rows"][-1]
    assert row["latency_ms"] == expected["latency_ms"]
    assert row["placed"] == expected["placed"]


def test_a_plan_of_another_network_is_refused(plan, bundle, tmp_path):
    plan(bundle, "--plan", "streams", "--save-plan", tmp_path / "p.json")
    content = (tmp_path / "p.json").read_text()
    name = json.loads(content)["placement"]["assignments"][-1]["segment"]
    (tmp_path / "p.json").write_text(content.replace(f'"{name}"', '"another"'))
    code, _, err = plan(bundle, "--plan", tmp_path / "p.json")
    assert code == 2
    assert "p.json: does not fit the network: the network has no segment 'another'" in err
    assert "Make the plan again for this network" in err


def test_a_program_is_played_as_it_is(plan, bundle, forked_bundle, tmp_path):
    graph = forked_bundle.stream_graph
    runs = tuple(Assignment(part.name, "only") for part in graph.segments)
    program = lower(graph, Placement((Lane("only", "cuda:0"),), runs), 3)
    (tmp_path / "p.json").write_bytes(encode(program))
    (row,) = json.loads(plan(bundle, "--plan", tmp_path / "p.json", "--json")[1])["rows"]
    assert (row["devices"], row["lanes"], row["in_flight"]) == (1, 1, 1)
    assert [placed["segment"] for placed in row["placed"]] == [run.segment for run in runs]
    code, _, err = plan(bundle, "--plan", tmp_path / "p.json", "--save-plan", tmp_path / "q.json")
    assert code == 2
    assert "is saved already" in err
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--link", "string"), "is not a link that is known by name"),
        (("--plan", "nothing"), "Use one of auto, whole, streams, authors, or the path of a plan"),
        (("--device-model", "abacus"), "Use one of a100, h100, rtx3090"),
        (("--device-model", "1,2"), "is not three numbers"),
        (("--device-model", "1,0,2"), "has a rate that is not above 0"),
        (("--level", "full"), "is a graph already"),
        (("--widths", "8,16"), "is a graph already"),
        (("--svg", "/nowhere/at/all.svg"), "lies in no existing folder"),
        (("--costs", "/nowhere.json"), "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(plan, forked_onnx, arguments, problem):
    code, out, err = plan(forked_onnx, *arguments)
    assert code == 2
    assert out == ""
    assert problem in err
    assert len(err.strip().splitlines()) == 1


def test_a_hypothetical_network_needs_no_file(plan, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "parnet_bench.forecasts.inputs.sketch",
        lambda name, changes, **options: asked.append((name, changes, options)) or NETWORK,
    )
    code, out, _ = plan("--widths", "64, 128", "--blocks", "2,3", "--precision", "fp16")
    options = {"level": "full", "resolution": None, "batch": 1, "precision": "fp16"}
    assert asked == [("parnet-l", Changes(widths=(64, 128), blocks=(2, 3)), options)]
    assert code == 0
    assert "counted in the network's ONNX graph" in " ".join(out.split())
    assert plan("ParNet_S", "--streams", 4)[0] == 0
    assert asked[1][:2] == ("parnet-s", Changes(streams=4))


def test_a_name_that_nobody_knows_is_refused_with_near_ones(plan):
    code, _, err = plan("parnet-ll")
    assert code == 2
    assert "parnet-l" in err


def test_throughput_is_compared_with_whole_networks_side_by_side():
    result, _ = forecast(NETWORK, costs(), FREE_LINK, objective="throughput")
    remarks = " ".join(remarks_on(result))
    assert "A whole network on each of 3 devices would give one every 10.7 ms" in remarks


def test_help_loads_neither_torch_nor_a_runtime():
    code = (
        "import sys, typer; from parnet_bench.plan_command import register;"
        "app = typer.Typer(); register(app);"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
