from __future__ import annotations

import math

import pytest

from parnet_engines.planning.links import FREE_LINK, LINKS, Link, parse_link
from parnet_export.errors import InputError


def test_a_copy_takes_the_latency_and_its_bytes_at_the_bandwidth():
    link = Link("test", 5.0, 25.0)
    assert link.copy_ms(0) == pytest.approx(0.005)
    assert link.copy_ms(50_000_000) == pytest.approx(0.005 + 2.0)
    assert FREE_LINK.copy_ms(10**12) == 0.0


def test_bandwidths_are_those_of_one_direction():
    # 18 links of 25 GB/s; 16 lanes of 16 and 32 GT/s in 128b/130b coding; 100 Gbit/s.
    assert LINKS["nvlink4"].gb_per_s == 18 * 25
    assert LINKS["pcie4"].gb_per_s == pytest.approx(16 * 16 * 128 / 130 / 8, rel=1e-3)
    assert LINKS["pcie5"].gb_per_s == pytest.approx(16 * 32 * 128 / 130 / 8, rel=1e-3)
    assert LINKS["ethernet100"].gb_per_s == 100 / 8


@pytest.mark.parametrize("name", sorted(LINKS))
def test_links_are_known_by_name(name):
    assert parse_link(name) is LINKS[name]
    assert LINKS[name].name == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5,25", (5.0, 25.0)), ("0, 1e3", (0.0, 1000.0)), ("1.5,inf", (1.5, math.inf))],
)
def test_a_link_may_be_described(text, expected):
    link = parse_link(text)
    assert (link.latency_us, link.gb_per_s) == expected
    assert link.name == text


@pytest.mark.parametrize("text", ["", "5", "nvlink", "PCIE4"])
def test_an_unknown_name_is_refused_with_those_that_are_known(text):
    with pytest.raises(InputError, match="known by name") as caught:
        parse_link(text)
    assert all(name in str(caught.value) for name in LINKS)


@pytest.mark.parametrize(
    "text", ["-1,5", "5,0", "5,-1", "inf,5", "nan,5", "5,nan", "a,b", "1,2,3", ","]
)
def test_numbers_that_are_no_link_are_refused(text):
    with pytest.raises(InputError, match="needs a latency of 0 us or more and a bandwidth above"):
        parse_link(text)
