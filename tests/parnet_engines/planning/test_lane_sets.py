from __future__ import annotations

import pytest

from parnet_engines.planning.devices import Device, divide
from parnet_engines.planning.lane_sets import default_lanes, lane_sets
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, StreamGraph, TensorSpec

FORK = {"a": "image", "b": "x", "c": "x", "d": "x", "e": "y"}


def fork() -> StreamGraph:
    """A stem, three branches, and what follows one of them."""

    def tensor(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", (1,))

    writes = {"a": "x", "b": "y", "c": "z", "d": "w", "e": "v"}
    segments = tuple(
        Segment(name, (tensor(reads),), (tensor(writes[name]),), Cost(0, 1, 0, 0, 1, 1))
        for name, reads in FORK.items()
    )
    return StreamGraph((tensor("image"),), tuple(map(tensor, "zwv")), segments)


def cpu(*cores: int) -> Device:
    return Device(f"cpu:{cores[0]}-{cores[-1]}", cores)


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        ([(0,)], 1),
        ([(0, 1)], 2),
        ([(0, 1, 2)], 3),
        ([tuple(range(64))], 3),
        ([(0,), (1,)], 2),
        ([(0,), (1,), (2,), (3,)], 4),
    ],
)
def test_by_default_there_are_as_many_lanes_as_can_be_busy(available, expected):
    assert default_lanes(fork(), [cpu(*cores) for cores in available]) == expected


def widths(devices, lanes) -> list[tuple[int, ...]]:
    return [tuple(len(lane.cores) for lane in found) for found in lane_sets(devices, lanes)]


@pytest.mark.parametrize(
    ("cores", "lanes", "expected"),
    [
        (2, 1, [(2,)]),
        (2, 2, [(1, 1)]),
        (3, 2, [(2, 1)]),
        (4, 2, [(2, 2), (3, 1)]),
        (5, 3, [(2, 2, 1), (3, 1, 1)]),
        (6, 3, [(2, 2, 2), (4, 1, 1), (3, 2, 1)]),
    ],
)
def test_cores_are_divided_in_every_way_the_even_one_first(cores, lanes, expected):
    assert widths([cpu(*range(cores))], lanes) == expected


@pytest.mark.parametrize("cores", [1, 2, 7, 8, 9, 12, 24, 64])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5, 7])
def test_every_set_uses_each_core_once_and_no_set_comes_twice(cores, lanes):
    if lanes > cores:
        with pytest.raises(InputError, match="every lane needs a core"):
            next(lane_sets([cpu(*range(cores))], lanes))
        return
    found = list(lane_sets([cpu(*range(10, 10 + cores))], lanes))
    assert found[0] == divide([cpu(*range(10, 10 + cores))], lanes)
    for lanes_found in found:
        assert [lane.name for lane in lanes_found] == [f"lane{n}" for n in range(lanes)]
        used = [core for lane in lanes_found for core in lane.cores]
        assert sorted(used) == list(range(10, 10 + cores))
    assert len(set(found)) == len(found) <= 100
    if 1 < lanes <= 4 and cores > lanes + 1:
        assert len(found) > 1


def test_devices_alike_are_divided_alike():
    devices = [cpu(0, 1, 2, 3), cpu(4, 5, 6, 7), cpu(8, 9)]
    assert widths(devices, 5) == [(2, 2, 2, 2, 2), (3, 1, 3, 1, 2)]
    for found in lane_sets(devices, 5):
        assert [lane.device for lane in found] == [
            devices[0].name,
            devices[0].name,
            devices[1].name,
            devices[1].name,
            devices[2].name,
        ]


def test_every_device_has_a_lane():
    with pytest.raises(InputError, match="every device has a lane"):
        next(lane_sets([cpu(0), cpu(1)], 1))
