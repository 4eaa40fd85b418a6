from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from parnet_bench.report.markdown_table import markdown_table, markdown_text
from parnet_bench.report.row_charts import (
    beyond,
    distribution_strip,
    latency_scale,
    ratio_scale,
    ratio_strip,
    rounds_strip,
    verdict_of,
)
from parnet_bench.report.scatter_chart import Point, scatter
from parnet_bench.stats.statistics import Interval


def parse(svg):
    return ET.fromstring(svg)  # noqa: S314 -- it is our own


def heights(svg):
    """Return the curve's heights, which the path gives from above."""
    path = parse(svg).find("./svg/path").attrib["d"]
    numbers = re.findall(r"L?\d+ ([\d.]+)", path)
    return [100 - float(number) for number in numbers[1:-1]]


def strip(samples):
    samples = np.asarray(samples, dtype=float)
    return distribution_strip(samples, None, latency_scale([samples]), "a", "c1")


def test_two_modes_make_two_peaks_and_one_makes_one():
    rng = np.random.default_rng(0)
    near, far = 10 + 0.1 * rng.standard_normal(100), 12 + 0.1 * rng.standard_normal(100)
    for samples, peaks in ((near, 1), (np.concatenate([near, far]), 2)):
        curve = heights(strip(samples))
        assert max(curve) == 100
        above = [height > 30 for height in curve]
        assert sum(b and not a for a, b in itertools.pairwise([False, *above])) == peaks


def test_equal_samples_make_a_narrow_peak():
    curve = heights(strip([5.0] * 20))
    assert sum(height > 1 for height in curve) < 10
    assert max(curve) == 100


def test_no_more_dashes_than_can_be_seen():
    assert strip(np.linspace(1, 2, 10_000)).count('class="dash"') <= 160
    assert strip([1.0, 1.1, 1.2, 1.21]).count('class="dash"') == 4


def test_the_slowest_percent_is_left_out_and_counted():
    samples = np.concatenate([np.full(990, 10.0), np.full(10, 11.0), [500.0]])
    scale = latency_scale([samples])
    assert scale.high < 500
    assert beyond(samples, scale) == 1


def test_an_interval_is_drawn_from_end_to_end():
    samples = np.linspace(9, 11, 50)
    scale = latency_scale([samples])
    svg = distribution_strip(samples, Interval(9.5, 10.5), scale, "a", "c1")
    box = parse(svg).find("rect")
    left = float(box.attrib["x"].rstrip("%"))
    assert left == pytest.approx(scale.place(9.5), abs=0.01)
    width = float(box.attrib["width"].rstrip("%"))
    assert left + width == pytest.approx(scale.place(10.5), abs=0.02)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(1.1, 1.3), "faster"),
        (Interval(0.7, 0.9), "slower"),
        (Interval(0.9, 1.1), "unclear"),
        (None, "unclear"),
    ],
)
def test_verdicts_are_those_of_the_intervals(interval, verdict):
    assert verdict_of(interval) == verdict
    scale = ratio_scale([0.5, 2.0], [interval])
    assert f'class="chart {verdict}"' in ratio_strip(1.2, interval, scale, "a")
    assert "faster" not in ratio_strip(1.2, interval, scale, "a", is_reference=True)


def test_rounds_lie_on_their_side_of_the_middle():
    svg, limit = rounds_strip([10.0, 10.0, 10.0, 12.0, 8.0], [3], "a")
    assert limit == pytest.approx(0.2)
    ys = [float(circle.attrib["cy"]) for circle in parse(svg).iter("circle")]
    assert ys[:3] == [20, 20, 20]
    assert ys[3] < 20 < ys[4]  # slower is up
    assert [line.attrib["x1"] for line in parse(svg).iter("line")] == ["0%", "60%"]


def test_labels_of_a_scatter_do_not_cover_each_other():
    points = [Point(f"network {i} whole", "c1", 10 + i / 10, None, 12.0) for i in range(5)]
    chart = scatter(points, "depth", "ms")
    places = [
        (float(t.attrib["x"].rstrip("%")), float(t.attrib["y"]))
        for t in parse(chart.plot).iter("text")
    ]
    assert len(places) == 5
    for (x0, y0), (x1, y1) in itertools.combinations(places, 2):
        assert abs(y0 - y1) >= 14 or abs(x0 - x1) > 10


def test_a_scatter_of_one_point_is_drawn():
    chart = scatter([Point("a", "c1", 10.0, Interval(9.0, 11.0), 0.0)], "depth", "ms")
    circle = next(parse(chart.plot).iter("circle"))
    assert 40 < float(circle.attrib["cx"].rstrip("%")) < 60


def test_markdown_shows_names_as_they_are():
    assert markdown_text("a|b_*`<i>\n# c") == r"a\|b\_\*\`\<i\> \# c"
    table = markdown_table(("row", "ms"), [("a|b", "1")])
    assert table.splitlines() == ["| row | ms |", "|---|---:|", r"| a\|b | 1 |"]
