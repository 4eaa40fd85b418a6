"""Merging calls of torch: the same values by fewer kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from parnet_engines.runtimes.torch_calls import Call, merge, with_releases
from parnet_engines.runtimes.torch_operators import Cast, Mean

HALF_MAP = torch.randn((2, 8, 5, 7), generator=torch.Generator().manual_seed(0)).half()


def evaluate(calls, tensors, kept):
    """Run calls as `TorchGraph` does, forgetting what they release."""
    held = dict(tensors)
    for call in with_releases(calls, (*kept, *tensors)):
        held[call.outputs[0]] = call.compute(*(held[name] for name in call.inputs))
        for name in call.released:
            del held[name]
    return {name: held[name] for name in kept}


@st.composite
def programs(draw):
    """Return calls of x and s, and the tensors that are wanted of them."""
    names = ["x", "s"]
    calls = []
    for index in range(draw(st.integers(1, 12))):
        compute = draw(st.sampled_from([torch.add, torch.mul, torch.sigmoid]))
        count = 1 if compute is torch.sigmoid else 2
        # Late ones are taken more often, which makes chains.
        operands = tuple(names[-draw(st.integers(1, min(3, len(names))))] for _ in range(count))
        calls.append(Call(compute, operands, (f"t{index}",)))
        names.append(f"t{index}")
    others = draw(st.sets(st.sampled_from(names[2:]), max_size=2))
    return calls, tuple(dict.fromkeys((names[-1], *others)))


@given(programs())
@settings(deadline=None, max_examples=300)
def test_merged_calls_compute_the_same(program):
    calls, kept = program
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((2, 3, 4, 4), generator=generator, dtype=torch.float64) / 4
    s = torch.randn((1, 3, 1, 1), generator=generator, dtype=torch.float64) / 4
    expected = evaluate(calls, {"x": x, "s": s}, kept)
    merged = merge(calls, kept)
    assert len(merged) <= len(calls)
    found = evaluate(merged, {"x": x, "s": s}, kept)
    for name in kept:
        torch.testing.assert_close(found[name], expected[name])


def call(compute, inputs, output):
    return Call(compute, tuple(inputs.split()), (output,))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_scaled_map_is_added_in_one_call(swapped):
    operands = "p y" if swapped else "y p"
    calls = [call(torch.mul, "x s", "p"), call(torch.add, operands, "z")]
    (merged,) = merge(calls, ["z"])
    assert merged == Call(torch.addcmul, ("y", "x", "s"), ("z",))
    assert merge(calls, ["z", "p"]) == calls


def test_a_sum_takes_one_of_two_products():
    calls = [
        call(torch.mul, "x s", "p"),
        call(torch.mul, "y s", "q"),
        call(torch.add, "p q", "z"),
    ]
    assert merge(calls, ["z"]) == [calls[1], Call(torch.addcmul, ("q", "x", "s"), ("z",))]


def test_a_map_that_is_cast_for_its_mean_is_not_written_in_float32():
    calls = [call(Cast(torch.float32), "x", "wide"), call(Mean((2, 3), keep=True), "wide", "m")]
    (merged,) = merge(calls, ["m"])
    torch.testing.assert_close(
        evaluate([merged], {"x": HALF_MAP}, ["m"]), evaluate(calls, {"x": HALF_MAP}, ["m"])
    )
    assert merged.inputs == ("x",)
    assert merge(calls, ["m", "wide"]) == calls
    narrow = [call(Cast(torch.float16), "x", "half"), call(Mean((2, 3), keep=True), "half", "m")]
    assert merge(narrow, ["m"]) == narrow


def test_all_three_of_a_gated_block_are_found():
    calls = [
        call(Cast(torch.float32), "x", "wide"),
        call(Mean((2, 3), keep=True), "wide", "mean"),
        call(Cast(torch.float16), "mean", "pooled"),
        call(torch.sigmoid, "pooled", "gate"),
        call(torch.mul, "x gate", "gated"),
        call(torch.add, "y gated", "sum"),
        call(torch.sigmoid, "sum", "open"),
        call(torch.mul, "open sum", "z"),
    ]
    computes = [merged.compute for merged in merge(calls, ["z"])]
    mean = Mean((2, 3), keep=True, dtype=torch.float32)
    assert computes == [mean, Cast(torch.float16), torch.sigmoid, torch.addcmul, functional.silu]
