from __future__ import annotations

from dataclasses import replace

import pytest

from parnet_engines.schedule.check import CheckedProgram, checked, find_faults
from parnet_engines.schedule.fault import FaultKind
from parnet_engines.schedule.lowering import lower
from parnet_engines.schedule.placement import Assignment, Lane, Placement
from parnet_engines.schedule.program import Buffer, Copy, Program, Record, Run, Step, Wait
from parnet_export.errors import CheckFailedError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

NO_COST = Cost(0, 0, 0, 0, 0, 0)


def tensor(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (1,))


def segment(name: str, reads: str, writes: str) -> Segment:
    inputs, outputs = (tuple(tensor(t) for t in names.split()) for names in (reads, writes))
    return Segment(name, inputs, outputs, NO_COST)


def buffer(name: str, storage: str = "") -> Buffer:
    """A buffer called ``tensor@device``."""
    what, device = name.split("@")
    return Buffer(name, tensor(what), device, storage)


def program_of(*steps: Step, buffers: tuple[Buffer, ...] = (), outputs=("y@a",)) -> Program:
    """A program with two lanes on device a and one on device b; `buffers` replace or add."""
    usual = {name: buffer(name) for name in ("image@a", "x@a", "y@a", "x@b", "y@b")}
    return Program(
        lanes=(Lane("lane0", "a"), Lane("lane1", "a"), Lane("lane2", "b")),
        buffers=tuple((usual | {b.name: b for b in buffers}).values()),
        inputs=("image@a",),
        outputs=outputs,
        steps=steps,
    )


GRAPH = StreamGraph(
    inputs=(tensor("image"),),
    outputs=(tensor("y"),),
    segments=(segment("stem", "image", "x"), segment("head", "x", "y")),
)
STEM = Run("lane0", "stem", ("image@a",), ("x@a",))
HEAD = Run("lane1", "head", ("x@a",), ("y@a",))
SOUND = program_of(
    STEM,
    Record("lane0", "stem done"),
    Wait("lane1", "stem done"),
    HEAD,
    Record("lane1", "head done"),
    Wait("lane0", "head done"),
)
ACROSS = program_of(
    STEM,
    Record("lane0", "stem done"),
    Wait("lane2", "stem done"),
    Copy("lane2", "x@a", "x@b"),
    Run("lane2", "head", ("x@b",), ("y@b",)),
    Copy("lane2", "y@b", "y@a"),
    Record("lane2", "copied"),
    Wait("lane0", "copied"),
)


def without(program: Program, *indices: int) -> Program:
    kept = (step for i, step in enumerate(program.steps) if i not in indices)
    return replace(program, steps=tuple(kept))


def with_step(program: Program, index: int, step: Step) -> Program:
    return replace(program, steps=(*program.steps[:index], step, *program.steps[index + 1 :]))


def kinds_of(program: Program) -> set[FaultKind]:
    return {fault.kind for fault in find_faults(program)}


def message_of(program: Program, kind: FaultKind) -> str:
    """The message of the only fault of this kind, which names the steps it lists."""
    (fault,) = [fault for fault in find_faults(program) if fault.kind == kind]
    assert all(f"step {index}" in fault.message for index in fault.steps)
    assert "\n" not in fault.message
    assert not fault.message.endswith(".")
    return fault.message


@pytest.mark.parametrize("program", [SOUND, ACROSS])
@pytest.mark.parametrize("inferences_in_flight", [1, 3])
def test_sound_programs_have_no_faults(program, inferences_in_flight):
    program = replace(program, inferences_in_flight=inferences_in_flight)
    assert find_faults(program, GRAPH) == ()


def test_a_missing_wait_is_told_with_both_steps_and_the_order_they_lack():
    # Were lane1 only forked, the read of x would still be too early.
    program = program_of(
        Record("lane0", "start"), *SOUND.steps[:2], Wait("lane1", "start"), *SOUND.steps[3:]
    )
    assert kinds_of(program) == {FaultKind.UNORDERED}
    assert message_of(program, FaultKind.UNORDERED) == (
        "step 4 (lane1: run head) reads 'x@a', which step 1 (lane0: run stem) writes, "
        "but nothing orders step 1 before step 4"
    )


def test_a_reader_still_active_when_its_memory_is_reused_is_told():
    program = program_of(
        STEM,
        Record("lane0", "stem done"),
        Wait("lane1", "stem done"),
        HEAD,
        Record("lane1", "head done"),
        Run("lane0", "other", (), ("z@a",)),
        Wait("lane0", "head done"),
        buffers=(buffer("z@a", storage="x@a"),),
    )
    assert kinds_of(program) == {FaultKind.UNORDERED}
    assert message_of(program, FaultKind.UNORDERED) == (
        "step 5 (lane0: run other) writes 'z@a' in the memory of 'x@a', which "
        "step 3 (lane1: run head) reads, but nothing orders step 3 before step 5"
    )


def test_memory_may_be_reused_once_its_reader_has_ended():
    program = program_of(
        *SOUND.steps,
        Run("lane0", "other", (), ("z@a",)),
        buffers=(buffer("z@a", storage="x@a"),),
    )
    assert find_faults(program) == ()


def test_two_unordered_writes_are_told_even_if_nobody_reads():
    program = program_of(
        *SOUND.steps[:4],
        Run("lane1", "extra", (), ("z@a",)),
        *SOUND.steps[4:5],
        Run("lane0", "other", (), ("w@a",)),
        SOUND.steps[5],
        buffers=(buffer("z@a"), buffer("w@a", storage="z@a")),
    )
    assert kinds_of(program) == {FaultKind.UNORDERED}


def test_one_engine_is_not_used_by_two_steps_at_once():
    program = program_of(
        Record("lane0", "start"),
        Run("lane0", "stem", ("image@a",), ("x@a",)),
        Wait("lane1", "start"),
        Run("lane1", "stem", ("image@a",), ("y@a",)),
        Record("lane1", "done"),
        Wait("lane0", "done"),
    )
    assert message_of(program, FaultKind.UNORDERED) == (
        "step 3 (lane1: run stem) uses the engine of 'stem' on a, which "
        "step 1 (lane0: run stem) uses, but nothing orders step 1 before step 3"
    )


def test_a_lane_that_does_not_come_back_collides_with_the_next_inference():
    program = replace(without(SOUND, 5), outputs=("x@a",))
    assert kinds_of(program) == {FaultKind.NOT_JOINED, FaultKind.UNORDERED_NEXT}
    messages = [f.message for f in find_faults(program) if f.kind == FaultKind.UNORDERED_NEXT]
    assert (
        "in the slot's next inference step 0 (lane0: run stem) writes 'x@a', which step 3 "
        "(lane1: run head) reads in this one, but nothing orders step 3 before the end of "
        "its inference"
    ) in messages


def test_a_lane_that_does_not_start_from_the_origin_collides_with_the_inference_before():
    program = program_of(
        STEM,
        Run("lane1", "other", (), ("z@a",)),
        Record("lane1", "done"),
        Wait("lane0", "done"),
        buffers=(buffer("z@a"),),
        outputs=("z@a",),
    )
    assert kinds_of(program) == {FaultKind.NOT_FORKED, FaultKind.UNORDERED_NEXT}
    assert message_of(program, FaultKind.NOT_FORKED) == (
        "step 1 (lane1: run other) starts its lane, but nothing orders it after "
        "the start of the inference on lane0"
    )
    messages = [f.message for f in find_faults(program) if f.kind == FaultKind.UNORDERED_NEXT]
    assert any("step 1 after the start of its inference" in message for message in messages)


def test_a_lane_waiting_only_for_a_lane_that_is_not_forked_is_not_forked():
    program = program_of(
        STEM,
        Record("lane2", "idle"),
        Wait("lane1", "idle"),
        *SOUND.steps[1:],
    )
    faults = [f for f in find_faults(program) if f.kind == FaultKind.NOT_FORKED]
    assert [fault.steps for fault in faults] == [(2,), (1,)]


def test_a_lane_that_never_comes_back_is_told_with_its_last_step():
    program = without(SOUND, 5)
    assert message_of(program, FaultKind.NOT_JOINED) == (
        "step 3 (lane1: run head) ends its lane, but nothing orders it before "
        "the end of the inference on lane0"
    )


def test_a_wait_at_the_end_of_a_lane_has_to_come_back_too():
    program = program_of(*SOUND.steps, Record("lane0", "late"), Wait("lane1", "late"))
    assert kinds_of(program) == {FaultKind.NOT_JOINED}


def test_a_record_that_nothing_waits_for_is_harmless():
    program = program_of(*SOUND.steps[:5], Record("lane1", "unused"), SOUND.steps[5])
    assert find_faults(program) == ()


def test_a_lane_may_come_back_by_way_of_another_lane():
    program = program_of(
        STEM,
        Record("lane0", "stem done"),
        Wait("lane2", "stem done"),
        Copy("lane2", "x@a", "x@b"),
        Record("lane2", "copied"),
        Wait("lane1", "copied"),
        HEAD,
        Record("lane1", "head done"),
        Wait("lane0", "head done"),
    )
    assert find_faults(program) == ()


def test_a_wait_for_an_event_nobody_records_never_ends():
    program = without(SOUND, 1)
    assert FaultKind.DEADLOCK not in kinds_of(program)
    assert message_of(program, FaultKind.NEVER_RECORDED) == (
        "step 1 (lane1: wait stem done) never ends, because no step records its event"
    )


def test_a_wait_before_its_record_in_issue_order_is_told_although_no_lane_gets_stuck():
    steps = SOUND.steps
    program = replace(SOUND, steps=(steps[2], steps[0], steps[1], *steps[3:]))
    assert FaultKind.DEADLOCK not in kinds_of(program)
    assert message_of(program, FaultKind.RECORDED_LATER) == (
        "step 0 (lane1: wait stem done) comes before step 2 (lane0: record stem done) "
        "in issue order, so that a CUDA stream would not wait"
    )


def test_an_event_recorded_twice_is_told():
    program = program_of(*SOUND.steps[:2], Record("lane0", "stem done"), *SOUND.steps[2:])
    assert message_of(program, FaultKind.RECORDED_TWICE) == (
        "step 1 (lane0: record stem done) and step 2 (lane0: record stem done) "
        "record the same event"
    )


def test_a_wait_for_an_event_of_the_same_lane_is_told():
    program = program_of(*SOUND.steps[:2], Wait("lane0", "stem done"), *SOUND.steps[2:])
    assert kinds_of(program) == {FaultKind.OWN_EVENT}
    assert message_of(program, FaultKind.OWN_EVENT) == (
        "step 2 (lane0: wait stem done) waits for step 1 (lane0: record stem done), "
        "which its own lane has passed anyway"
    )


def test_lanes_that_wait_for_each_other_are_told_as_a_deadlock():
    program = program_of(
        Wait("lane0", "b"),
        Record("lane0", "a"),
        Wait("lane1", "a"),
        Record("lane1", "b"),
        outputs=("image@a",),
    )
    assert message_of(program, FaultKind.DEADLOCK) == (
        "step 0 (lane0: wait b) and step 2 (lane1: wait a) wait for each other, "
        "so that none of them ever ends"
    )
    assert FaultKind.RECORDED_LATER in kinds_of(program)


def test_a_lane_that_waits_for_its_own_future_is_told_as_a_deadlock():
    program = program_of(Wait("lane0", "a"), Record("lane0", "a"), outputs=("image@a",))
    assert message_of(program, FaultKind.DEADLOCK) == (
        "step 0 (lane0: wait a) waits for an event that its own lane records only afterwards"
    )


def test_a_run_with_a_buffer_on_another_device_is_told():
    program = with_step(SOUND, 3, Run("lane1", "head", ("x@b",), ("y@a",)))
    assert message_of(program, FaultKind.WRONG_DEVICE) == (
        "step 3 (lane1: run head) runs on a, where 'x@b' is not"
    )


def test_a_copy_on_a_lane_of_neither_device_is_told():
    program = program_of(
        *ACROSS.steps[:4],
        Copy("lane2", "x@b", "x@c"),
        *ACROSS.steps[4:6],
        Copy("lane2", "x@a", "x@c"),
        *ACROSS.steps[6:],
        buffers=(buffer("x@c"),),
    )
    assert kinds_of(program) == {FaultKind.WRONG_DEVICE}
    assert message_of(program, FaultKind.WRONG_DEVICE) == (
        "step 7 (lane2: copy x@a -> x@c) is on a lane of b, but copies from a to c"
    )


@pytest.mark.parametrize(
    "copy", [Copy("lane2", "x@a", "y@b"), Copy("lane0", "x@a", "z@a")], ids=["tensor", "device"]
)
def test_a_copy_that_does_not_bring_one_tensor_to_another_device_is_told(copy):
    spare = Buffer("z@a", tensor("x"), "a")
    program = program_of(
        *ACROSS.steps[:3], replace(copy, lane="lane2"), *ACROSS.steps[3:], buffers=(spare,)
    )
    assert "step 3" in message_of(program, FaultKind.WRONG_COPY)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_what_the_caller_touches_lies_on_the_device_of_the_origin(side):
    program = replace(ACROSS, **{side: ("y@b",)})
    assert message_of(program, FaultKind.WRONG_DEVICE) == (
        "the caller's buffer 'y@b' is not on a, the origin's device"
    )


def test_an_output_that_nobody_writes_is_missing():
    program = program_of(STEM)
    assert kinds_of(program) == {FaultKind.MISSING_OUTPUT}
    assert message_of(program, FaultKind.MISSING_OUTPUT) == (
        "the end of the inference reads 'y@a', which nothing earlier in issue order writes"
    )


def test_an_output_that_is_overwritten_before_the_end_is_missing():
    program = program_of(
        *SOUND.steps,
        Run("lane0", "other", (), ("z@a",)),
        buffers=(buffer("z@a", storage="y@a"),),
    )
    assert message_of(program, FaultKind.MISSING_OUTPUT) == (
        "the end of the inference reads 'y@a', but step 6 (lane0: run other) has put 'z@a' there"
    )


def test_a_read_before_the_write_finds_nothing():
    program = program_of(replace(HEAD, lane="lane0"), STEM)
    assert kinds_of(program) == {FaultKind.WRONG_CONTENT}
    assert message_of(program, FaultKind.WRONG_CONTENT) == (
        "step 0 (lane0: run head) reads 'x@a', which nothing earlier in issue order writes"
    )


def test_a_read_of_memory_that_was_reused_finds_another_tensor():
    program = program_of(
        STEM,
        Run("lane0", "other", (), ("z@a",)),
        replace(HEAD, lane="lane0"),
        buffers=(buffer("z@a", storage="x@a"),),
    )
    assert message_of(program, FaultKind.WRONG_CONTENT) == (
        "step 2 (lane0: run head) reads 'x@a', but step 1 (lane0: run other) has put 'z@a' there"
    )


def test_a_step_cannot_read_and_write_the_same_memory():
    program = program_of(STEM, replace(HEAD, lane="lane0"), buffers=(buffer("y@a", storage="x@a"),))
    assert kinds_of(program) == {FaultKind.ONE_STEP}
    assert message_of(program, FaultKind.ONE_STEP) == (
        "step 1 (lane0: run head) reads 'x@a' and writes 'y@a' in the same memory"
    )


def test_a_network_input_is_left_as_the_caller_wrote_it():
    program = program_of(
        STEM,
        Run("lane0", "other", ("x@a",), ("z@a",)),
        replace(HEAD, lane="lane0"),
        buffers=(buffer("z@a", storage="image@a"),),
    )
    assert kinds_of(program) == {FaultKind.INPUT_OVERWRITTEN}
    assert message_of(program, FaultKind.INPUT_OVERWRITTEN) == (
        "step 1 (lane0: run other) overwrites a network input by writing 'z@a'"
    )


def test_a_program_of_another_stream_graph_is_told():
    other = StreamGraph(
        inputs=(tensor("image"),),
        outputs=(tensor("x"),),
        segments=(segment("stem", "image", "x"), segment("tail", "x", "y")),
    )
    assert [fault.message for fault in find_faults(SOUND, other)] == [
        "step 3 (lane1: run head) runs a segment that the stream graph does not have",
        "the program's inputs or outputs are not those of the stream graph",
    ]


def test_a_segment_that_is_given_other_tensors_is_told():
    program = with_step(SOUND, 3, Run("lane1", "head", ("image@a",), ("y@a",)))
    assert [fault.message for fault in find_faults(program, GRAPH)] == [
        "step 3 (lane1: run head) uses other tensors than its segment"
    ]
    assert find_faults(program) == ()


def test_only_programs_without_faults_become_checked_programs():
    assert checked(SOUND, GRAPH).program is SOUND
    with pytest.raises(CheckFailedError, match=r"^The program must not run: .* never ends") as told:
        checked(without(SOUND, 1))
    assert str(told.value).endswith(".")
    with pytest.raises(CheckFailedError):
        CheckedProgram(without(SOUND, 2))


def test_a_refusal_names_the_first_faults_and_counts_the_rest():
    tensors = " ".join(f"t{i}" for i in range(9))
    graph = StreamGraph(
        inputs=(tensor("image"),),
        outputs=tuple(tensor(name) for name in tensors.split()),
        segments=(segment("wide", "image", tensors),),
    )
    placed = Placement((Lane("lane0", "a"),), (Assignment("wide", "lane0"),))
    program = replace(lower(graph, placed), steps=())
    with pytest.raises(CheckFailedError, match=r"'t4@a', .*; and 4 more\.$"):
        checked(program)


def test_faults_of_structure_come_before_faults_of_memory():
    kinds = [fault.kind for fault in find_faults(without(SOUND, 5))]
    assert kinds[0] == FaultKind.NOT_JOINED
    assert set(kinds[1:]) == {FaultKind.UNORDERED, FaultKind.UNORDERED_NEXT}
