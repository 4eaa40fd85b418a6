from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parnet_engines.cuda.boundary import choose_layouts
from parnet_engines.cuda.driver import Gpu
from parnet_engines.cuda.tensor_layout import TensorLayout
from parnet_engines.tensorrt.options import (
    SizeRange,
    Target,
    parse_capabilities,
    parse_sizes,
    target_of,
)
from parnet_export.errors import InputError
from parnet_export.stream_graph import TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, "height", 64))
FIXED = TensorSpec("image", "float32", (1, 3, 64, 64))


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted))
def test_a_range_holds_for_every_dimension_that_is_open(sizes):
    expected = SizeRange(*sizes)
    text = "/".join(map(str, sizes))
    assert parse_sizes(text, [IMAGE]) == {"batch": expected, "height": expected}
    by_name = parse_sizes(f"batch={text},height=1/2/3", [IMAGE])
    assert by_name == {"batch": expected, "height": SizeRange(1, 2, 3)}
    assert parse_sizes(f"batch={expected},height={text}", [IMAGE])["height"] == expected


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3))
def test_only_what_ascends_from_one_is_a_range(sizes):
    text = "/".join(map(str, sizes))
    if sizes == sorted(sizes) and sizes[0] >= 1:
        assert parse_sizes(text, [IMAGE])
    else:
        with pytest.raises(InputError, match="does not ascend"):
            parse_sizes(text, [IMAGE])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "leaves batch, height open"),
        ("4", "'4' is not smallest/optimal/largest"),
        ("1/2", "is not smallest/optimal/largest"),
        ("1/2/x", "is not smallest/optimal/largest"),
        ("width=1/2/3", "no dimension 'width'. Name one of batch, height"),
        ("batch=1/2/3", "the range of height is missing"),
    ],
)
def test_anything_else_says_what_to_give(text, problem):
    with pytest.raises(InputError, match=problem):
        parse_sizes(text, [IMAGE])


def test_fixed_shapes_take_no_range():
    assert parse_sizes(None, [FIXED]) == {}
    with pytest.raises(InputError, match="all shapes of the bundle are fixed"):
        parse_sizes("1/2/3", [FIXED])


def test_capabilities_ascend_by_number():
    assert parse_capabilities("12.0, 8.9,8.0,8.9") == ("8.0", "8.9", "12.0")
    for text in ("", "8", "sm_89", "8.9,", "8.10.1"):
        with pytest.raises(InputError, match="is no compute capability"):
            parse_capabilities(text)


@pytest.mark.parametrize(
    ("target", "folder", "text"),
    [
        (Target("tensorrt-rtx"), "tensorrt-rtx-any", "compute capability 8.0 and later"),
        (
            Target("tensorrt-rtx", ("8.0", "12.0")),
            "tensorrt-rtx-sm80-sm120",
            "compute capability 8.0 and 12.0",
        ),
        (
            target_of("tensorrt", Gpu(0, "NVIDIA GeForce RTX 4090", (8, 9), 0)),
            "tensorrt-sm89-nvidia-geforce-rtx-4090",
            "NVIDIA GeForce RTX 4090 (compute capability 8.9)",
        ),
        (
            target_of("tensorrt-rtx", Gpu(0, "NVIDIA GeForce RTX 4090", (8, 9), 0)),
            "tensorrt-rtx-sm89",
            "compute capability 8.9",
        ),
    ],
)
def test_a_target_has_a_folder_and_a_name(target, folder, text):
    assert (target.folder, str(target)) == (folder, text)


def test_feature_maps_of_16_bits_between_engines_lie_in_vectors():
    tensors = [
        TensorSpec("image", "float16", (1, 3, 64, 64)),
        TensorSpec("map", "float16", ("batch", 92, 28, 28)),
        TensorSpec("full", "float32", (1, 92, 28, 28)),
        TensorSpec("gate", "float16", (1, 92, 1, 1)),
        TensorSpec("row", "float16", (1, 1000)),
    ]
    found = choose_layouts(tensors, "vector", ["image"])
    assert [name for name, layout in found.items() if layout is TensorLayout.HWC8] == ["map"]
    assert set(choose_layouts(tensors, "linear", ["image"]).values()) == {TensorLayout.LINEAR}
