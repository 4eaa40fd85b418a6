from __future__ import annotations

import json
import subprocess
import sys

import pytest

from parnet_engines.schedule.placement import Lane
from parnet_engines.schedule.program import Buffer, Copy, Program, Record, Run, Wait
from parnet_engines.schedule.program_file import decode, encode
from parnet_export.errors import InputError
from parnet_export.stream_graph import TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, 32, 32))
FEATURE = TensorSpec("x", "float16", (1, 8))


def make_program(**changes) -> Program:
    fields = {
        "lanes": (Lane("lane0", "cpu:0", cores=(0, 1)), Lane("lane1", "cpu:1")),
        "buffers": (
            Buffer("image@cpu:0", IMAGE, "cpu:0"),
            Buffer("x@cpu:0", FEATURE, "cpu:0"),
            Buffer("x@cpu:1", FEATURE, "cpu:1"),
            Buffer("y@cpu:1", FEATURE, "cpu:1", storage="x@cpu:1"),
        ),
        "inputs": ("image@cpu:0",),
        "outputs": ("x@cpu:0",),
        "steps": (
            Run("lane0", "stem", ("image@cpu:0",), ("x@cpu:0",)),
            Record("lane0", "lane0/stem"),
            Wait("lane1", "lane0/stem"),
            Copy("lane1", "x@cpu:0", "x@cpu:1"),
        ),
        "inferences_in_flight": 2,
    }
    return Program(**(fields | changes))


def test_a_program_survives_the_way_through_json():
    program = make_program()
    assert decode(encode(program), "program.json") == program


def test_json_is_the_same_every_time_even_after_a_program_was_used():
    used = make_program()
    assert used.steps_by_lane
    assert used.events
    assert used.buffers_by_name
    assert encode(used) == encode(make_program())


def test_text_shows_lanes_buffers_and_steps_in_columns():
    assert str(make_program()) == (
        "inferences in flight: 2\n"
        "lanes\n"
        "  lane0  cpu:0  cores 0,1  origin\n"
        "  lane1  cpu:1\n"
        "buffers\n"
        "  image@cpu:0  float32[batch, 3, 32, 32]              input\n"
        "  x@cpu:0      float16[1, 8]                          output\n"
        "  x@cpu:1      float16[1, 8]\n"
        "  y@cpu:1      float16[1, 8]              in x@cpu:1\n"
        "steps\n"
        "  0  lane0  run     stem (image@cpu:0) -> (x@cpu:0)\n"
        "  1  lane0  record  lane0/stem\n"
        "  2  lane1  wait    lane0/stem\n"
        "  3  lane1  copy    x@cpu:0 -> x@cpu:1\n"
    )


def test_a_program_answers_what_interpreters_ask():
    program = make_program()
    assert program.origin.name == "lane0"
    assert program.events == ("lane0/stem",)
    assert program.steps_by_lane == {"lane0": (0, 1), "lane1": (2, 3)}
    assert program.buffers_by_name["y@cpu:1"].storage == "x@cpu:1"
    assert program.buffers_by_name["x@cpu:1"].storage == "x@cpu:1"
    assert program.describe(3) == "step 3 (lane1: copy x@cpu:0 -> x@cpu:1)"
    assert [step.reads for step in program.steps] == [("image@cpu:0",), (), (), ("x@cpu:0",)]
    assert [step.writes for step in program.steps] == [("x@cpu:0",), (), (), ("x@cpu:1",)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lanes": ()}, "at least one lane"),
        ({"lanes": (Lane("lane0", "cpu:0"), Lane("lane0", "cpu:1"))}, "lanes need unique names"),
        ({"lanes": (Lane("lane0", "cpu:0"),)}, r"step 2 .* the unknown lane 'lane1'"),
        ({"inferences_in_flight": 0}, "0 inferences in flight"),
        ({"outputs": ("nowhere",)}, "interface names the unknown buffer 'nowhere'"),
        ({"steps": (Copy("lane0", "x@cpu:0", "z"),)}, r"step 0 .* the unknown buffer 'z'"),
        (
            {
                "buffers": (
                    Buffer("image@cpu:0", IMAGE, "cpu:0"),
                    Buffer("x@cpu:0", IMAGE, "cpu:1", storage="image@cpu:0"),
                )
            },
            "storage 'image@cpu:0' is on two devices",
        ),
        ({"buffers": (Buffer("x", IMAGE, "cpu:0"),) * 2}, "buffers need unique names"),
        ({"buffers": (Buffer("", IMAGE, "cpu:0"),)}, "buffers need unique names"),
    ],
)
def test_a_program_that_refers_to_nothing_is_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        make_program(**changes)


def edited(**changes) -> bytes:
    return json.dumps(json.loads(encode(make_program())) | changes).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no valid program"),
        (b"[]", "is no valid program"),
        (b"\xff\xfe", "is no valid program"),
        (edited(lanes=[]), "at least one lane"),
        (edited(steps=[{"kind": "sleep", "lane": "lane0"}]), "'sleep' is no kind of step"),
        (edited(steps=[{"kind": "wait", "lane": "lane0"}]), "missing required field `event`"),
        (edited(outputs=["nowhere"]), "unknown buffer 'nowhere'"),
        (edited(inputs="image@cpu:0"), "Expected `array`"),
    ],
)
def test_a_damaged_file_gives_one_message_that_names_it(content, problem):
    with pytest.raises(InputError, match=problem) as caught:
        decode(content, "plans/program.json")
    assert str(caught.value).startswith("plans/program.json: ")
    assert "Make the program again" in str(caught.value)


def test_a_program_of_a_newer_schema_says_to_upgrade():
    problem = "has schema version 2; this version reads up to 1. Upgrade parnet-export."
    with pytest.raises(InputError, match=problem):
        decode(edited(schema_version=2, lanes="in another form"), "program.json")


def test_programs_and_the_checker_load_no_runtime():
    heavy = "torch onnx onnx_ir onnxruntime tensorrt openvino numpy"
    code = (
        "import sys, parnet_engines.schedule.check, parnet_engines.schedule.lowering\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]", result.stderr
