"""The picture of a timeline: well-formed, to scale, with its words inside."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.planning.cost_table import CostTable, SegmentCost
from parnet_engines.planning.links import Link
from parnet_engines.planning.simulate import simulate
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.recording import Recording
from parnet_engines.timeline.analysis import analyse
from parnet_engines.timeline.critical_path import critical_path
from parnet_engines.timeline.picture import render_timeline_svg
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

SVG = "{http://www.w3.org/2000/svg}"
NO_COST = Cost(0, 0, 0, 0, 0, 0)
MB_LINK = Link("test", 0.0, 1.0)


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "int8", (500_000,))


def segment(name: str, reads: str, writes: str) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, NO_COST)


FORK = StreamGraph(
    inputs=(tensor("image"),),
    outputs=(tensor("y"),),
    segments=(
        segment("stem", "image", "x"),
        segment("left", "x", "l"),
        segment("right", "x", "r"),
        segment("head", "l r", "y"),
    ),
)
LATENCIES_MS = {"stem": 1.0, "left": 4.0, "right": 3.0, "head": 2.0}


def played(latencies_ms=LATENCIES_MS, devices="cuda:0 cuda:1", *, lane_names=(), inferences=1):
    names = lane_names or [f"lane{i}" for i in range(len(devices.split()))]
    lanes = tuple(Lane(name, device) for name, device in zip(names, devices.split(), strict=True))
    places = {"stem": 0, "left": 1, "right": 0, "head": 0}
    program = lower(
        FORK, Placement(lanes, tuple(Assignment(n, names[i]) for n, i in places.items()))
    )
    costs = CostTable(
        tuple(
            SegmentCost(name, "cuda", 1, 1, latency_ms, "measured", "a test")
            for name, latency_ms in latencies_ms.items()
        )
    )
    return program, simulate(program, costs, MB_LINK, inferences=inferences).recording


def picture(program, recording, title="a test") -> str:
    return render_timeline_svg(program, recording, analyse(program, recording), title)


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 -- it is our own document


def boxes_of(svg: str) -> dict[int, tuple[str, str, dict[str, float]]]:
    """For each step its classes, its lane and where its box is."""
    found = {}
    for group in parse(svg).iter(f"{SVG}g"):
        if "data-step" in group.attrib:
            box = group.find(f"{SVG}rect").attrib
            place = {key: float(box[key]) for key in ("x", "y", "width", "height")}
            found[int(group.get("data-step"))] = (group.get("class"), group.get("data-lane"), place)
    return found


def words_of(svg: str) -> list[str]:
    return [text.text for text in parse(svg).iter(f"{SVG}text")]


def test_boxes_are_to_scale_on_one_row_for_each_lane():
    program, recording = played()
    boxes = boxes_of(picture(program, recording))
    busy = [span for span in recording.spans if span.is_busy]
    assert set(boxes) == {span.step for span in busy}
    per_ns = boxes[busy[0].step][2]["width"] / busy[0].duration_ns
    left = min(place["x"] for _, _, place in boxes.values())
    rows = {}
    for span in busy:
        _, lane, place = boxes[span.step]
        assert lane == span.lane
        assert rows.setdefault(lane, place["y"]) == place["y"]
        assert place["x"] == pytest.approx(left + span.begin_ns * per_ns, abs=0.2)
        assert place["width"] == pytest.approx(span.duration_ns * per_ns, abs=0.2)
    assert len(set(rows.values())) == 2


def test_the_critical_path_and_copies_are_marked():
    program, recording = played()
    boxes = boxes_of(picture(program, recording))
    critical = {part.span.step for part in critical_path(program, recording)}
    for span in recording.spans:
        if span.is_busy:
            expected = f"{span.kind} critical" if span.step in critical else span.kind
            assert boxes[span.step][0] == expected
    assert {"run", "copy critical", "run critical"} <= {style for style, _, _ in boxes.values()}


def test_the_picture_says_what_it_shows():
    program, recording = played()
    words = words_of(picture(program, recording, "ParNet-L on two devices"))
    assert words[0] == "ParNet-L on two devices"
    assert words[1].startswith("8.00 ms predicted")
    assert "Two or more lanes are at work" in words[2]
    assert {"lane0", "cuda:0", "lane1", "cuda:1", "left", "4.00 ms", "head", "ms"} <= set(words)


def test_a_recorded_timeline_is_not_called_predicted():
    program, recording = played()
    recorded = Recording(recording.lanes, recording.spans)
    assert words_of(picture(program, recorded))[1].startswith("8.00 ms recorded")


def test_several_inferences_are_counted():
    program, recording = played(inferences=3)
    assert words_of(picture(program, recording))[1].startswith("3 inferences in 24.0 ms, predicted")


def test_lanes_of_one_device_share_a_band():
    for devices, bands in (("cuda:0 cuda:1", 2), ("cuda:0 cuda:0", 1)):
        root = parse(picture(*played(devices=devices)))
        assert sum(r.get("class") == "band" for r in root.iter(f"{SVG}rect")) == bands


def test_names_that_could_steer_a_reader_are_made_printable():
    program, recording = played(lane_names=["<&>", "\x1b[2J"])
    svg = picture(program, recording, 'a "title" <b>\n')
    words = words_of(svg)
    assert {"<&>", "\\x1b[2J", 'a "title" <b>'} <= set(words)
    assert "\x1b" not in svg


def test_a_long_title_is_shortened_to_the_picture_s_width():
    title = "a very long title " * 40
    root = parse(picture(*played(), title=title))
    assert next(root.iter(f"{SVG}text")).text.endswith("...")
    assert root.find(f"{SVG}title").text == f"Timeline of {title}".replace("\n", " ")


def test_equal_recordings_give_equal_pictures_for_light_and_dark():
    svg = picture(*played())
    assert svg == picture(*played())
    assert "prefers-color-scheme: dark" in svg
    classes = {c for e in parse(svg).iter() for c in e.get("class", "").split()}
    light, dark = svg.split("@media")
    for style in classes & set(re.findall(r"\.timeline \.(\w+)", light)):
        assert f".{style}" in dark or style in {"path", "wait"}


@settings(deadline=None, max_examples=60)
@given(st.integers(min_value=0))
def test_everything_is_inside_the_picture_whatever_the_times(seed):
    rng = random.Random(seed)
    scale = rng.choice([1e-5, 1e-3, 1.0, 1e4])
    latencies_ms = {name: scale * rng.choice([0.0, rng.random(), 1.0]) for name in LATENCIES_MS}
    devices = rng.choice(["cuda:0 cuda:1", "cuda:0 cuda:0"])
    program, recording = played(latencies_ms, devices, inferences=rng.randint(1, 3))
    root = parse(picture(program, recording))
    width, height = float(root.get("width")), float(root.get("height"))
    for rectangle in root.iter(f"{SVG}rect"):
        x, y = float(rectangle.get("x", 0)), float(rectangle.get("y", 0))
        assert x >= 0
        assert y >= 0
        assert x + float(rectangle.get("width")) <= width
        assert y + float(rectangle.get("height")) <= height
    axis = next(g for g in root.iter(f"{SVG}g") if g.get("class") == "axis")
    numbers = [float(t.text) for t in axis.iter(f"{SVG}text") if t.text != "ms"]
    assert numbers[0] == 0
    assert len(numbers) <= 11
    assert all(later > earlier for earlier, later in pairwise(numbers))
