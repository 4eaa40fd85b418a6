"""Rules for shapes against what torch computes with values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from parnet_export.catalogue.operator_shapes import result_without_values

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Runs operators, and keeps what each returned beside what the rules say it returns."""

    def __init__(self):
        super().__init__()
        self.covered = []
        self.pairs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        on_meta = tuple(to_meta(argument) for argument in args)
        found = None if kwargs else result_without_values(func, on_meta)
        if found is not None:
            self.covered.append(func)
            results = zip(as_tuple(found), as_tuple(result), strict=True)
            self.pairs += [(a.shape, a.dtype, b.shape, b.dtype) for a, b in results]
        return result


def to_meta(value):
    if isinstance(value, list | tuple):
        return type(value)(to_meta(entry) for entry in value)
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def check(func, *, covered=True):
    with torch.no_grad(), Recorder() as recorder:
        func()
    assert bool(recorder.covered) == covered
    for found_shape, found_dtype, shape, dtype in recorder.pairs:
        assert found_shape == shape
        assert found_dtype == dtype
    return recorder.covered


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(3, 9), st.integers(3, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
)
def test_convolutions(size, kernel, stride, padding, dilation, groups):
    reach = [dilation * (width - 1) + 1 for width in kernel]
    assume(all(side + 2 * padding >= width for side, width in zip(size, reach, strict=True)))
    x, weight = torch.ones(2, 8, *size), torch.ones(4, 8 // groups, *kernel)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    covered = check(lambda: functional.conv2d(x, weight, **options))
    assert aten.convolution.default in covered


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(4, 9), st.integers(4, 9)),
    st.integers(1, 4),
    st.sampled_from([None, 1, 2, 3]),
    st.integers(0, 2),
    st.integers(1, 2),
)
def test_pooling(size, kernel, stride, padding, dilation):
    assume(2 * padding <= kernel)
    x = torch.ones(2, 3, *size)
    check(lambda: functional.avg_pool2d(x, kernel, stride, padding))
    assume(min(size) + 2 * padding > dilation * (kernel - 1))
    check(lambda: functional.max_pool2d(x, kernel, stride, padding, dilation))


@given(
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_what_acts_on_each_element(shape, ones):
    x = torch.ones(shape)
    other = torch.ones([1 if one else side for one, side in zip(ones, shape, strict=True)])
    check(lambda: x + other)
    check(lambda: other * x)
    check(lambda: x / 3)
    check(lambda: functional.mish(x))
    check(lambda: torch.cat((x, x, x), 1))
    check(lambda: torch.cat((x, x), -1))


@pytest.mark.parametrize(("dims", "keep"), [((2, 3), True), ((-1,), False), ((1, -1), True)])
def test_averages(dims, keep):
    x = torch.ones(2, 3, 4, 5)
    check(lambda: x.mean(dims, keepdim=keep))


def test_layers_and_resizing():
    x = torch.ones(2, 6, 4, 5)
    statistics = torch.ones(6)
    check(lambda: functional.linear(torch.ones(2, 3), torch.ones(7, 3), torch.ones(7)))
    check(lambda: functional.interpolate(x, scale_factor=2))
    check(lambda: functional.batch_norm(x, statistics, statistics, statistics, statistics))
    check(lambda: functional.channel_shuffle(x, 2))
    check(lambda: torch.ones(2, 3).softmax(1))


def test_what_no_rule_covers_is_left_to_torch():
    x = torch.ones(1, 4, 5, 5)
    check(lambda: functional.conv_transpose2d(x, torch.ones(4, 2, 2, 2)), covered=False)
    check(lambda: functional.max_pool2d(x, 2, ceil_mode=True), covered=False)
    check(lambda: functional.avg_pool2d(x, 2, ceil_mode=True), covered=False)
    check(lambda: torch.add(x, x, alpha=2), covered=False)
    check(x.mean, covered=False)
    check(lambda: x.cumsum(1), covered=False)
    assert result_without_values(aten.relu.default, (x,)) is None  # it has values
