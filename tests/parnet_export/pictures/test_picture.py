"""The pictures of stream graphs.

Run with the environment variable UPDATE_GOLDEN=1 to draw the expected picture in
tests/golden again, and look at it before committing it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import combinations, pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export.pictures.lettering import shorten, text_width
from parnet_export.pictures.picture import render_svg
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

SVG = "{http://www.w3.org/2000/svg}"


# -------------------------------------------------------------------------------- graphs


def tensor(name, *shape):
    return TensorSpec(name, "float32", shape)


def segment(name, gmacs, inputs, outputs, *, parameters=1_234_567, depth=3):
    cost = Cost(parameters, round(gmacs * 1e9), 4 * parameters, 2048, nodes=10, depth=depth)
    return Segment(name, tuple(inputs), tuple(outputs), cost)


def parnet_l():
    """ParNet-L fused, at 224 x 224: multiply-accumulates of each part as counted by hand."""
    image, logits = tensor("input", 1, 3, 224, 224), tensor("logits", 1, 1000)
    stem1, stem2 = tensor("stem1.out", 1, 160, 56, 56), tensor("stem2.out", 1, 320, 28, 28)
    one, two = tensor("stream1.out", 1, 320, 28, 28), tensor("stream2.out", 1, 320, 28, 28)
    three, fused = tensor("stream3.out", 1, 640, 14, 14), tensor("fusion.out", 1, 640, 14, 14)
    segments = (
        segment("stem1", 0.3107, [image], [stem1], parameters=160_000, depth=2),
        segment("stem2", 0.3613, [stem1], [stem2], parameters=564_000, depth=1),
        segment("stream1", 2.8902 + 0.3613, [stem1], [one], parameters=1_590_000, depth=5),
        segment("stream2", 3.6132, [stem2], [two], parameters=5_120_000, depth=5),
        segment("stream3", 0.3615 + 3.6147, [stem2], [three], parameters=22_430_000, depth=6),
        segment("fusion", 0.3615, [one, two], [fused], parameters=2_050_000, depth=1),
        segment("head", 0.7229 + 0.7242 + 0.0026, [fused, three], [logits], parameters=23_000_000),
    )
    return StreamGraph((image,), (logits,), segments)


def in_one_piece():
    image, logits = tensor("input", "batch", 3, 224, 224), tensor("logits", "batch", 1000)
    return StreamGraph((image,), (logits,), (segment("whole", 4.1, [image], [logits]),))


def hrnet():
    """A stem, three stages of 2, 3 and 4 streams that exchange features, and a last fusion."""
    image, stem = tensor("image", 1, 3, 256, 192), tensor("stem.out", 1, 256, 64, 48)
    segments = [segment("stem", 0.6, [image], [stem])]
    features = [stem]
    for stage in (2, 3, 4):
        branches = []
        for level in range(stage):
            source = features[min(level, len(features) - 1)]
            out = tensor(f"s{stage}.b{level}", 1, 32 << level, 64 >> level, 48 >> level)
            work = (0.5 + 0.037 * level) * (stage - 1)
            segments.append(segment(f"stage{stage}_branch{level}", work, [source], [out]))
            branches.append(out)
        features = []
        for level in range(stage):
            out = tensor(f"s{stage}.f{level}", 1, 32 << level, 64 >> level, 48 >> level)
            work = 0.09 + 0.01 * level
            segments.append(segment(f"stage{stage}_fuse{level}", work, branches, [out]))
            features.append(out)
    heatmaps = tensor("heatmaps", 1, 17, 64, 48)
    segments.append(segment("last", 0.12, features, [heatmaps]))
    assert len(segments) == 20
    return StreamGraph((image,), (heatmaps,), tuple(segments))


def pyramid():
    """A backbone, a feature pyramid, and three heads that are three network outputs."""
    image = tensor("images", 1, 3, 512, 512)
    c3, c4, c5 = (tensor(f"c{i}", 1, 8 << i, 512 >> i, 512 >> i) for i in (3, 4, 5))
    p3, p4, p5 = (tensor(f"p{i}", 1, 256, 512 >> i, 512 >> i) for i in (3, 4, 5))
    small, medium, large = (tensor(f"out{i}", 1, 255, 512 >> i, 512 >> i) for i in (3, 4, 5))
    segments = (
        segment("backbone_low", 9.0, [image], [c3]),
        segment("backbone_mid", 4.0, [c3], [c4]),
        segment("backbone_high", 3.5, [c4], [c5]),
        segment("top5", 0.3, [c5], [p5]),
        segment("top4", 0.8, [c4, p5], [p4]),
        segment("top3", 1.8, [c3, p4], [p3]),
        segment("head_large", 0.6, [p5], [large]),
        segment("head_medium", 2.1, [p4], [medium]),
        segment("head_small", 7.0, [p3], [small]),
    )
    return StreamGraph((image,), (small, medium, large), segments)


def ensemble():
    """Four independent members, one without FLOPs, and two inputs that meet at the end."""
    left, right = tensor("left", 1, 3, 64, 64), tensor("right", 1, 3, 64, 64)
    outs = [tensor(f"out{i}", 1, 10) for i in range(4)]
    extra, mean = tensor("extra", 1, 7), tensor("mean", 1, 10)
    members = [segment(f"member{i}", 0.3 * i, [left], [out]) for i, out in enumerate(outs)]
    return StreamGraph(
        (left, right),
        (mean, outs[0], extra),
        (*members, segment("mean", 0, [*outs, right], [mean, extra])),
    )


GRAPHS = {
    "parnet": parnet_l,
    "in one piece": in_one_piece,
    "hrnet": hrnet,
    "pyramid": pyramid,
    "ensemble": ensemble,
}
every_graph = pytest.mark.parametrize("make_graph", GRAPHS.values(), ids=GRAPHS.keys())


@st.composite
def random_graphs(draw):
    count = draw(st.integers(1, 9))
    image = tensor("x", 1, 3, 32, 32)
    available, segments, used = [], [], set()
    for index in range(count):
        reads = draw(st.sets(st.sampled_from(range(len(available))), max_size=3)) if index else ()
        inputs = [available[i] for i in sorted(reads)] or [image]
        outputs = [tensor(f"t{index}_{i}", 1, 8, 32, 32) for i in range(draw(st.integers(1, 3)))]
        gmacs = draw(st.one_of(st.just(0.0), st.floats(-6, 0).map(lambda power: 10**power)))
        segments.append(segment(f"s{index}", gmacs, inputs, outputs))
        used |= {t.name for t in inputs}
        available += outputs
    results = [t for t in available if t.name not in used or draw(st.booleans())]
    return StreamGraph((image,), tuple(results), tuple(segments))


# ------------------------------------------------------------------------ reading pictures


@dataclass
class Rectangle:
    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, element):
        x, y, width, height = (float(element.get(k)) for k in ("x", "y", "width", "height"))
        return cls(x, y, x + width, y + height)

    def overlaps(self, other):
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def read(svg):
    return ET.fromstring(svg)  # noqa: S314 -- it is our own document


def boxed_groups(root):
    """Return what belongs to each segment, network input and network output."""
    marks = ("data-segment", "data-terminal")
    return [g for g in root.iter(f"{SVG}g") if any(g.get(mark) is not None for mark in marks)]


def boxes_of(root):
    """Return the box of every segment."""
    return {
        group.get("data-segment"): Rectangle.of(group.find(f"{SVG}rect"))
        for group in root.iter(f"{SVG}g")
        if group.get("data-segment") is not None
    }


def edges_of(root):
    """Return (tensor, from, to) and the drawn path of every edge."""
    return [
        (
            (group.get("data-tensor"), group.get("data-from"), group.get("data-to")),
            next(p.get("d") for p in group.iter(f"{SVG}path") if p.get("class") == "line"),
        )
        for group in root.iter(f"{SVG}g")
        if group.get("data-tensor") is not None
    ]


def points_on(path):
    """Return points along an SVG path of the commands M, H and C."""
    tokens = re.findall(r"[MHC]|-?[\d.]+", path)
    points, command = [], ""
    while tokens:
        if tokens[0].isalpha():
            command = tokens.pop(0)
        numbers = [float(tokens.pop(0)) for _ in range({"M": 2, "H": 1, "C": 6}[command])]
        if command == "M":
            points.append(tuple(numbers))
            continue
        p0 = points[-1]
        if command == "H":
            controls = [p0, p0, (numbers[0], p0[1]), (numbers[0], p0[1])]
        else:
            controls = [p0, tuple(numbers[:2]), tuple(numbers[2:4]), tuple(numbers[4:])]
        for step in range(1, 41):
            t = step / 40
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
            points.append(
                tuple(
                    sum(w * c[axis] for w, c in zip(weights, controls, strict=True))
                    for axis in (0, 1)
                )
            )
    return points


def earliest_runs(graph):
    """Return when each segment runs on unlimited lanes, in FLOPs."""
    runs = {}
    for s in graph.segments:
        start = max((runs[before][1] for before in graph.predecessors[s.name]), default=0)
        runs[s.name] = (start, start + s.cost.flops)
    return runs


def overlap(a, b):
    return min(a[1], b[1]) - max(a[0], b[0])


def check_geometry(graph):
    """Assert what must hold of every picture."""
    root = read(render_svg(graph, "a network"))
    boxes = boxes_of(root)
    assert list(boxes) == [s.name for s in graph.segments]
    drawn = [Rectangle.of(group.find(f"{SVG}rect")) for group in boxed_groups(root)]
    assert len(drawn) == len(graph.segments) + len(graph.inputs) + len(graph.outputs)
    assert not any(a.overlaps(b) for a, b in combinations(drawn, 2))

    producers = {t.name: s.name for s in graph.segments for t in s.outputs}
    expected = {(t.name, producers.get(t.name), s.name) for s in graph.segments for t in s.inputs}
    expected |= {(t.name, producers.get(t.name), None) for t in graph.outputs}
    edges = edges_of(root)
    assert sorted(map(str, expected)) == sorted(str(ends) for ends, _ in edges)
    for (_, producer, consumer), path in edges:
        points = points_on(path)
        assert all(a[0] < b[0] + 1e-6 for a, b in pairwise(points)), "an edge runs backwards"
        if producer:
            box = boxes[producer]
            assert points[0][0] == pytest.approx(box.right, abs=0.2)
            assert box.top < points[0][1] < box.bottom
        if consumer:
            box = boxes[consumer]
            assert points[-1][0] == pytest.approx(box.left, abs=10)  # the arrowhead is between
            assert box.top < points[-1][1] < box.bottom
        if producer and consumer:
            assert boxes[producer].right < boxes[consumer].left

    runs = earliest_runs(graph)
    simultaneous = 0.02 * max(end for _, end in runs.values())
    for one, other in combinations(runs, 2):
        if overlap(runs[one], runs[other]) > simultaneous:
            a, b = boxes[one], boxes[other]
            assert overlap((a.left, a.right), (b.left, b.right)) > 5
            assert a.bottom < b.top or b.bottom < a.top
    return root, boxes


# ---------------------------------------------------------------------------------- tests


@every_graph
def test_boxes_never_overlap_and_segments_that_run_together_are_drawn_together(make_graph):
    check_geometry(make_graph())


@settings(deadline=None, max_examples=60)
@given(random_graphs())
def test_the_geometry_holds_for_any_graph(graph):
    check_geometry(graph)


@pytest.mark.parametrize("name", ["parnet", "in one piece", "hrnet", "pyramid"])
def test_no_edge_runs_through_a_box(name):
    root = read(render_svg(GRAPHS[name](), name))
    boxes = boxes_of(root)

    for ends, path in edges_of(root):
        for x, y in points_on(path):
            for box_name, box in boxes.items():
                inside = box.left + 1 < x < box.right - 1 and box.top < y < box.bottom
                assert not inside, f"{ends} runs through {box_name}"


@every_graph
def test_text_stays_in_its_box_and_lines_do_not_touch(make_graph):
    root = read(render_svg(make_graph(), "a network"))

    for group in boxed_groups(root):
        box = Rectangle.of(group.find(f"{SVG}rect"))
        texts = []
        for text in group.findall(f"{SVG}text"):
            style = "name" if text.get("class") == "name" else "text"
            x, y, width = float(text.get("x")), float(text.get("y")), text_width(text.text, style)
            left = x - width if text.get("text-anchor") == "end" else x
            texts.append(Rectangle(left, y - 9, left + width, y + 3))
            assert box.left < left
            assert left + width < box.right
            assert box.top < y - 9
            assert y + 3 < box.bottom
        assert not any(a.overlaps(b) for a, b in combinations(texts, 2))


@every_graph
def test_everything_lies_on_the_paper(make_graph):
    root = read(render_svg(make_graph(), "a network"))
    width, height = float(root.get("width")), float(root.get("height"))
    moved = next(g.get("transform") for g in root.iter(f"{SVG}g") if g.get("transform"))
    dx, dy = map(float, re.fullmatch(r"translate\((\S+) (\S+)\)", moved).groups())

    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    for box in boxes_of(root).values():
        assert box.left + dx > 0
        assert box.right + dx < width
        assert box.top + dy > 0
        assert box.bottom + dy < height
    for text in root.findall(f"{SVG}text"):
        style = "title" if text.get("class") == "title" else "text"
        assert float(text.get("x")) + text_width(text.text, style) <= width


def test_parnet_s_streams_are_parallel_rows_and_the_critical_path_has_its_own():
    _, boxes = check_geometry(parnet_l())

    rows = {name: box.top for name, box in boxes.items()}
    assert len({rows["stream1"], rows["stream2"], rows["stream3"]}) == 3
    assert rows["stem1"] == rows["stem2"] == rows["stream3"] == rows["head"]
    assert rows["fusion"] == rows["stream2"]
    streams = [(boxes[f"stream{i}"].left, boxes[f"stream{i}"].right) for i in (1, 2, 3)]
    assert all(overlap(a, b) > 80 for a, b in combinations(streams, 2))


def test_the_more_work_a_stream_has_the_wider_it_is():
    _, boxes = check_geometry(parnet_l())

    widths = [boxes[f"stream{i}"].right - boxes[f"stream{i}"].left for i in (1, 2, 3)]
    assert widths[0] < widths[1] < widths[2]
    assert widths[1] / widths[0] == pytest.approx(3.6132 / 3.2515, rel=0.01)


@every_graph
def test_the_critical_path_and_nothing_else_is_marked(make_graph):
    graph = make_graph()
    path = graph.critical_path({s.name: s.cost.flops for s in graph.segments})

    root = read(render_svg(graph, "a network"))

    critical = [g for g in root.iter(f"{SVG}g") if "critical" in (g.get("class") or "").split()]
    segments = [g.get("data-segment") for g in critical if g.get("data-segment")]
    steps = {(g.get("data-from"), g.get("data-to")) for g in critical if g.get("data-tensor")}
    assert segments == list(path)
    assert steps == set(pairwise(path))


def test_boxes_and_edges_tell_their_figures():
    text = " ".join(read(render_svg(parnet_l(), "parnet-l (random weights)")).itertext())

    for expected in ("parnet-l (random weights)", "7 segments", "26.65 GFLOPs", "2.19x"):
        assert expected in text
    for expected in ("stream3", "7.95 GFLOPs", "22.43 M params", "depth 6"):
        assert expected in text
    for expected in ("1x160x56x56", "2.01 MB", "stem1.out: 1x160x56x56, 2.01 MB"):
        assert expected in text


def test_the_headline_takes_the_figures_of_the_whole_network():
    whole = Cost(54_914_824, 13_324_100_000, 0, 0, nodes=80, depth=12)

    text = " ".join(read(render_svg(parnet_l(), "parnet-l", whole)).itertext())

    assert "54.91 M parameters" in text
    assert "depth 12" in text


def test_a_network_in_one_piece_says_so_instead_of_promising_a_speedup():
    text = " ".join(read(render_svg(in_one_piece(), "resnet50")).itertext())

    assert "in one piece" in text
    assert "speed-up" not in text
    assert "[batch, 3, 224, 224]" in text


def test_names_are_escaped_and_cut_to_fit():
    image, out = tensor('<x "&\x00', 1, 3, 8, 8), tensor("</svg>", 1, 2)
    graph = StreamGraph((image,), (out,), (segment("<s&>" * 40, 1, [image], [out]),))

    root = read(render_svg(graph, "a <b> & c"))

    (box,) = boxes_of(root).items()
    assert box[0] == "<s&>" * 40
    assert box[1].right - box[1].left < 800
    assert "a <b> & c" in [text.text for text in root.iter(f"{SVG}text")]
    assert any(text.text.endswith("...") for text in root.iter(f"{SVG}text"))
    assert edges_of(root)[0][0] == ('<x "&\\x00', None, "<s&>" * 40)


def test_a_picture_stands_alone_and_follows_the_reader_s_light_or_dark_theme():
    svg = render_svg(parnet_l(), "parnet-l")

    assert "@media (prefers-color-scheme: dark)" in svg
    assert set(re.findall(r"https?://[^\s\"']+", svg)) == {"http://www.w3.org/2000/svg"}
    for outside in ("url(", "@import", "@font-face", "href", "<script", "<image"):
        assert outside not in svg


def test_text_is_cut_only_where_it_does_not_fit():
    assert shorten("stream1", 200, "name") == "stream1"
    cut = shorten("a_rather_long_segment_name", 100, "name")
    assert cut.endswith("...")
    assert text_width(cut, "name") <= 100 < text_width(cut[:-3] + "xx...", "name")


def test_the_picture_of_parnet_is_the_golden_one_every_time(root):
    svg = render_svg(parnet_l(), "parnet-l (random weights)")
    golden = root / "tests" / "golden" / "parnet-l.svg"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(svg)

    assert svg == render_svg(parnet_l(), "parnet-l (random weights)")
    assert svg == golden.read_text()
