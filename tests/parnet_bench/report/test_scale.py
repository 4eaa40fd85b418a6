from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parnet_bench.report.scale import Scale, scale_for

positive = st.floats(1e-6, 1e9)


@given(st.lists(positive, min_size=1, max_size=6))
def test_all_values_lie_on_the_scale_in_their_order(values):
    scale = scale_for(values)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)


@given(st.lists(positive, min_size=1, max_size=6))
def test_ticks_lie_on_the_scale_are_few_and_say_where_they_are(values):
    scale = scale_for(values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 16
    places = [place for place, _ in ticks]
    labels = [label for _, label in ticks]
    assert places == sorted(places)
    assert len(set(labels)) == len(labels)
    for place, label in ticks:
        assert 0 <= place <= 100
        value = float(label)
        # A label is at most half of its last digit off, which no reader of a chart can see.
        assert scale.place(value) == pytest.approx(place, abs=0.6)


@given(positive, st.floats(1.01, 1e4), st.booleans())
def test_ends_and_the_middle_of_a_scale(low, ratio, logarithmic):
    scale = Scale(low, low * ratio, logarithmic)
    assert scale.place(low) == 0
    assert scale.place(low * ratio) == pytest.approx(100)
    middle = low * math.sqrt(ratio) if logarithmic else low * (1 + ratio) / 2
    assert scale.place(middle) == pytest.approx(50)


def test_values_beyond_the_ends_lie_on_them():
    assert Scale(1, 2).place(0.5) == 0
    assert Scale(1, 2).place(9) == 100


def test_values_that_span_much_take_a_logarithmic_scale():
    assert scale_for([1, 10]).logarithmic
    assert not scale_for([9, 10]).logarithmic
    assert not scale_for([-1, 10]).logarithmic


def test_what_must_be_on_the_scale_is():
    scale = scale_for([2.0, 2.5], include=[1.0])
    assert scale.low < 1.0
    assert scale.high > 2.5


@given(st.floats(0.0, 1e6))
def test_a_single_value_lies_in_the_middle(value):
    assert scale_for([value]).place(value) == pytest.approx(50)


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"), [(1, 1, False), (0, 1, True), (2, 1, True)]
)
def test_what_is_no_scale_is_refused(low, high, logarithmic):
    with pytest.raises(ValueError, match="no scale"):
        Scale(low, high, logarithmic)


@given(st.floats(1e-3, 1e6), st.floats(1.001, 100))
def test_linear_ticks_are_equally_far_apart(low, ratio):
    assume(low * ratio > low)
    places = [place for place, _ in Scale(low, low * ratio).ticks()]
    gaps = [b - a for a, b in pairwise(places)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-6) for gap in gaps)
