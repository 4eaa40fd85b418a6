"""Recordings: what they refuse, and that nothing is lost on the way to JSON and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_engines.schedule.placement import Lane
from parnet_engines.schedule.program import Buffer, Copy, Program, Record, Run, Wait
from parnet_engines.schedule.recording import Recording, Span, decode, encode, span_of
from parnet_export.errors import InputError
from parnet_export.stream_graph import TensorSpec

LANES = (Lane("lane0", "cpu:0", (0, 1)), Lane("lane1", "cuda:1"))

spans = st.builds(
    lambda lane, begin, length, **rest: Span(lane, begin_ns=begin, end_ns=begin + length, **rest),
    st.sampled_from(["lane0", "lane1"]),
    st.integers(-(10**15), 10**15),
    st.integers(0, 10**12),
    step=st.integers(0, 100),
    kind=st.sampled_from(["run", "copy", "record", "wait"]),
    label=st.text(),
    inference=st.integers(0, 100),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(spans, max_size=10), st.sampled_from(["recorded", "simulated"]))
def test_a_recording_survives_json(some_spans, source):
    recording = Recording(LANES, tuple(some_spans), source)
    content = encode(recording)
    assert decode(content, "a test") == recording
    assert encode(decode(content, "a test")) == content
    assert content.endswith(b"\n")


def test_a_span_knows_its_step():
    image = TensorSpec("image", "float32", (1,))
    buffers = (Buffer("image@cpu:0", image, "cpu:0"), Buffer("image@cuda:1", image, "cuda:1"))
    steps = (
        Record("lane0", "start"),
        Wait("lane1", "start"),
        Copy("lane1", "image@cpu:0", "image@cuda:1"),
        Run("lane1", "stem", ("image@cuda:1",), ()),
    )
    program = Program(LANES, buffers, ("image@cpu:0",), (), steps)
    made = [span_of(program, index, 5, 7, 2) for index in range(4)]
    assert [(span.kind, span.label) for span in made] == [
        ("record", "start"),
        ("wait", "start"),
        ("copy", "image@cuda:1"),
        ("run", "stem"),
    ]
    assert [span.is_busy for span in made] == [False, False, True, True]
    assert made[3] == Span("lane1", 3, "run", "stem", 5, 7, 2)
    assert made[3].duration_ns == 2


def test_busy_spans_are_listed_by_lane_in_the_order_of_time():
    recording = Recording(
        LANES,
        (
            Span("lane0", 4, "run", "late", 20, 30, 0),
            Span("lane0", 0, "run", "early", 0, 10, 0),
            Span("lane0", 1, "wait", "early", 10, 20, 0),
            Span("lane0", 0, "run", "early", 30, 40, 1),
        ),
    )
    names = {lane: [span.label for span in found] for lane, found in recording.busy_by_lane.items()}
    assert names == {"lane0": ["early", "late", "early"], "lane1": []}
    assert recording.inferences == (0, 1)
    assert [span.label for span in recording.only(1).spans] == ["early"]


def test_a_span_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="run 'stem' ends before it begins"):
        Span("lane0", 0, "run", "stem", 2, 1)


def test_a_span_on_an_unknown_lane_is_refused():
    with pytest.raises(ValueError, match="unknown lane 'lane7'"):
        Recording(LANES, (Span("lane7", 0, "run", "stem", 0, 1),))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d | {"source": "guessed"}, "is no valid recording"),
        (lambda d: d | {"lanes": []}, "unknown lane 'lane0'"),
        (lambda _: {}, "is no valid recording"),
        (lambda _: [], "is no valid recording"),
    ],
)
def test_json_that_is_no_recording_is_refused_with_the_file_s_name(change, problem):
    document = json.loads(encode(Recording(LANES, (Span("lane0", 0, "run", "stem", 0, 1),))))
    with pytest.raises(InputError, match=rf"t\.json: .*{problem}.*Record it again"):
        decode(json.dumps(change(document)).encode(), "t.json")


def test_a_recording_of_a_newer_schema_says_to_upgrade():
    newer = json.dumps({"schema_version": 99, "spans": "in another form"}).encode()
    problem = "has schema version 99; this version reads up to 1. Upgrade parnet-export."
    with pytest.raises(InputError, match=problem):
        decode(newer, "t.json")


def test_content_that_is_no_json_is_refused():
    with pytest.raises(InputError, match="is no valid recording"):
        decode(b"\xff{", "t.json")
