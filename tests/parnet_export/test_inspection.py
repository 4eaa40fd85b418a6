from __future__ import annotations

import io
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from parnet_export.bundle import Bundle, Manifest, Provenance, StoredFile
from parnet_export.console import encode_json
from parnet_export.inspection import as_dict, inspect, render
from parnet_export.splitting.antichain import heaviest_antichain
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec


def tensor(name, *shape):
    return TensorSpec(name, "float32", shape)


def segment(name, gmacs, inputs, outputs, *, parameters=1000, depth=1):
    macs = round(gmacs * 1e9)
    cost = Cost(parameters, macs, 4 * parameters, activation_bytes=2048, nodes=10, depth=depth)
    return Segment(name, tuple(inputs), tuple(outputs), cost)


def parnet_l():
    """ParNet-L fused, at 224 x 224: multiply-accumulates of each part as counted by hand."""
    image, logits = tensor("input", 1, 3, 224, 224), tensor("logits", 1, 1000)
    stem1, stem2 = tensor("stem1.out", 1, 160, 56, 56), tensor("stem2.out", 1, 320, 28, 28)
    one, two = tensor("stream1.out", 1, 320, 28, 28), tensor("stream2.out", 1, 320, 28, 28)
    three, fused = tensor("stream3.out", 1, 640, 14, 14), tensor("fusion.out", 1, 640, 14, 14)
    segments = (
        segment("stem1", 0.3107, [image], [stem1], depth=2),
        segment("stem2", 0.3613, [stem1], [stem2], depth=1),
        segment("stream1", 2.8902 + 0.3613, [stem1], [one], depth=5),
        segment("stream2", 3.6132, [stem2], [two], depth=5),
        segment("stream3", 0.3615 + 3.6147, [stem2], [three], depth=6),
        segment("fusion", 0.3615, [one, two], [fused], depth=1),
        segment("head", 0.7229 + 0.7242 + 0.0026, [fused, three], [logits], depth=3),
    )
    return StreamGraph((image,), (logits,), segments)


def one_segment(batch="batch"):
    image, logits = tensor("input", batch, 3, 224, 224), tensor("logits", batch, 1000)
    return StreamGraph((image,), (logits,), (segment("whole", 4.1, [image], [logits]),))


def bundle(graph, weights="random", depth=12, network="parnet-l"):
    costs = [s.cost for s in graph.segments]
    whole = Cost(
        parameters=54_914_824,
        macs=sum(cost.macs for cost in costs),
        weight_bytes=219_659_296,
        activation_bytes=sum(cost.activation_bytes for cost in costs),
        nodes=sum(cost.nodes for cost in costs),
        depth=depth,
    )
    manifest = Manifest(
        schema_version=1,
        precision="fp32",
        inputs=graph.inputs,
        outputs=graph.outputs,
        segments=graph.segments,
        whole="whole.onnx",
        whole_cost=whole,
        segment_files={s.name: f"{s.name}.onnx" for s in graph.segments},
        weights="weights.bin",
        files={"weights.bin": StoredFile("0" * 64, 219_660_000), "a.onnx": StoredFile("1", 340)},
        provenance=Provenance(
            network, network, weights=weights, seed=7, activation="silu (default)", level="full"
        ),
    )
    return Bundle(Path("parnet_l.bundle"), manifest, graph)


def rendered(inspection, width=80):
    text = io.StringIO()
    Console(file=text, width=width, markup=False, highlight=False).print(render(inspection))
    return text.getvalue()


def test_parnet_has_three_streams_with_the_work_the_paper_gives_them():
    found = inspect(bundle(parnet_l()))

    assert found.parallel_width == 3
    assert [stream.name for stream in found.streams] == ["stream1", "stream2", "stream3"]
    relative = [stream.relative_work for stream in found.streams]
    assert relative == pytest.approx([3.2515 / 3.9762, 3.6132 / 3.9762, 1])
    assert found.stream_balance == pytest.approx(sum(relative) / 3)


def test_parnet_s_ideal_speedup_is_its_work_over_the_chain_through_the_third_stream():
    found = inspect(bundle(parnet_l()))

    chain_gmacs = 0.3107 + 0.3613 + 3.9762 + 1.4497
    assert found.critical_path == ("stem1", "stem2", "stream3", "head")
    assert found.critical_flops == pytest.approx(2e9 * chain_gmacs)
    assert found.flops == pytest.approx(26.648e9, rel=1e-3)
    assert found.ideal_speedup == pytest.approx(13.3241 / chain_gmacs, rel=1e-3)
    assert [s.name for s in found.segments if s.critical] == list(found.critical_path)


def test_shares_of_the_work_add_up_to_all_of_it():
    found = inspect(bundle(parnet_l()))

    assert sum(s.work_share for s in found.segments) == pytest.approx(1)
    assert found.segments[2].work_share == pytest.approx(3.2515 / 13.3241, rel=1e-3)


def test_transfers_name_both_ends_with_shape_and_bytes():
    found = inspect(bundle(parnet_l()))

    ends = {(t.tensor, t.producer, t.consumer): t for t in found.transfers}
    assert len(ends) == len(found.transfers) == 10
    assert ends["input", None, "stem1"].shape == (1, 3, 224, 224)
    assert ends["logits", "head", None].size_bytes == 4000
    assert ends["stem1.out", "stem1", "stream1"].size_bytes == 4 * 160 * 56 * 56
    assert ends["fusion.out", "fusion", "head"].dtype == "float32"


def test_totals_come_from_the_whole_graph_and_the_files():
    found = inspect(bundle(parnet_l()))

    assert (found.parameters, found.depth, found.weight_bytes) == (54_914_824, 12, 219_659_296)
    assert found.stored_bytes == 219_660_340
    assert (found.batch, found.resolution) == (1, (224, 224))


def test_a_network_without_images_has_no_resolution():
    tokens, out = tensor("tokens", 1, 16), tensor("out", 1, 2)
    graph = StreamGraph((tokens,), (out,), (segment("all", 1, [tokens], [out]),))

    found = inspect(bundle(graph))

    assert (found.batch, found.resolution) == (None, None)


def test_the_dictionary_is_plain_json_with_every_field():
    found = inspect(bundle(parnet_l()))

    plain = as_dict(found)

    assert json.loads(encode_json(plain)) == plain
    assert plain["label"] == "parnet-l (random weights)"
    assert plain["provenance"]["weights"] == "random"
    assert plain["segments"][0] == {
        "name": "stem1",
        "nodes": 10,
        "parameters": 1000,
        "flops": 621_400_000,
        "work_share": found.segments[0].work_share,
        "depth": 2,
        "weight_bytes": 4000,
        "activation_bytes": 2048,
        "critical": True,
        "inputs": ["input"],
        "outputs": ["stem1.out"],
    }
    assert plain["transfers"][0]["producer"] is None


def test_a_network_in_one_piece_says_so():
    found = inspect(bundle(one_segment()))

    assert found.in_one_piece
    assert (found.parallel_width, found.ideal_speedup, found.stream_balance) == (1, 1.0, 1.0)
    assert "in one piece" in rendered(found)
    assert "speed-up" not in rendered(found)


def test_a_chain_of_segments_says_that_each_waits_for_the_one_before():
    image, middle, out = tensor("x", 1, 3, 8, 8), tensor("m", 1, 3, 8, 8), tensor("y", 1, 2)
    segments = (segment("front", 1, [image], [middle]), segment("back", 2, [middle], [out]))

    found = inspect(bundle(StreamGraph((image,), (out,), segments)))

    assert found.parallel_width == 1
    assert "each one waits for the one before" in rendered(found)
    assert "1.00x" in rendered(found)


def test_a_network_without_convolutions_has_no_work_to_share():
    image, a, b = tensor("x", 1, 3, 8, 8), tensor("a", 1, 2), tensor("b", 1, 2)
    segments = (segment("one", 0, [image], [a]), segment("two", 0, [image], [b]))

    found = inspect(bundle(StreamGraph((image,), (a, b), segments)))

    assert found.streams == ()
    assert (found.ideal_speedup, found.parallel_width) == (1.0, 2)
    assert [s.work_share for s in found.segments] == [0, 0]
    assert "0.0 %" in rendered(found)


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_of_parnet_fit_a_terminal_with_every_name_on_one_line(width):
    found = inspect(bundle(parnet_l()))

    lines = rendered(found, width).splitlines()

    assert max(map(len, lines)) <= width
    words = {word.strip(",") for line in lines for word in line.split()}
    assert {s.name for s in found.segments} | {t.tensor for t in found.transfers} <= words
    assert "parnet-l (random weights)" in lines
    text = "\n".join(lines)
    for expected in ("26.65 G", "54.91 M", "219.66 MB", "random, from seed 7", "silu (default)"):
        assert expected in text
    for expected in ("full", "fp32", "224x224", "2.19x", "stem1 > stem2 > stream3 > head"):
        assert expected in text


def test_the_tables_name_the_source_of_trained_weights():
    text = rendered(inspect(bundle(parnet_l(), weights="trained")))

    assert "random" not in text
    assert "trained, from parnet-l" in text


def test_long_names_fold_instead_of_widening_the_tables():
    image, out = tensor("x" * 200, 1, 3, 8, 8), tensor("y" * 90, 1, 2)
    graph = StreamGraph((image,), (out,), (segment("s" * 60, 1, [image], [out]),))

    text = rendered(inspect(bundle(graph)))

    assert max(map(len, text.splitlines())) <= 80
    assert text.count("x") >= 200
    assert text.count("y") >= 90


def test_names_are_neither_markup_nor_terminal_commands():
    image, out = tensor("[red]x", 1, 3, 8, 8), tensor("y\x1b[2J", 1, 2)
    graph = StreamGraph((image,), (out,), (segment("[bold]s", 1, [image], [out]),))

    text = rendered(inspect(bundle(graph, network="net[/]")))

    assert "\x1b" not in text
    for name in ("[red]x", "y\\x1b[2J", "[bold]s", "net[/]"):
        assert name in text


def test_types_stand_beside_tensors_only_where_they_differ():
    image, out = tensor("x", 1, 3, 8, 8), TensorSpec("y", "int64", (1,))
    graph = StreamGraph((image,), (out,), (segment("s", 1, [image], [out]),))

    assert "Tensors between segments (float32)\n" in rendered(inspect(bundle(one_segment())))
    assert "int64" in rendered(inspect(bundle(graph)))


@st.composite
def weighted_graphs(draw):
    count = draw(st.integers(1, 8))
    tensors = [tensor(f"t{index}", 1) for index in range(count)]
    image = tensor("x", 1)
    segments, weights = [], {}
    for index in range(count):
        reads = draw(st.sets(st.integers(0, index - 1))) if index else set()
        inputs = [tensors[i] for i in sorted(reads)] or [image]
        segments.append(segment(f"s{index}", 0, inputs, [tensors[index]]))
        weights[f"s{index}"] = draw(st.integers(0, 9))
    return StreamGraph((image,), tuple(tensors), tuple(segments)), weights


def reachable_pairs(graph):
    pairs = {(edge.producer, edge.consumer) for edge in graph.edges}
    while True:
        more = {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs
        if not more:
            return pairs
        pairs |= more


@settings(deadline=None, max_examples=150)
@given(weighted_graphs())
def test_the_heaviest_antichain_is_what_trying_every_set_of_segments_finds(case):
    graph, weights = case
    dependent = reachable_pairs(graph)

    def independent(names):
        return not any(pair in dependent for pair in combinations(names, 2))

    names = [s.name for s in graph.segments]
    every_set = (chosen for n in range(len(names) + 1) for chosen in combinations(names, n))
    best = max(sum(weights[n] for n in chosen) for chosen in every_set if independent(chosen))

    found = heaviest_antichain(graph, weights)

    assert independent(found)
    assert sum(weights[name] for name in found) == best
    assert list(found) == [name for name in names if name in set(found)]


def test_inspecting_loads_neither_torch_nor_onnx_nor_rich():
    code = (
        "import sys, parnet_export.inspection, parnet_export.pictures.picture; "
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'rich', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert found.stdout == "[]\n"
