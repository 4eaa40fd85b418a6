from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parnet_engines.planning import devices as devices_module
from parnet_engines.planning.devices import Device, can_pin, divide, parse_devices, usable_cores
from parnet_export.errors import InputError


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(devices_module, "usable_cores", lambda: tuple(range(8)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", [("cpu", range(8))]),
        (" cpu ", [("cpu", range(8))]),
        ("cpu:5", [("cpu:5", [5])]),
        ("cpu:0,cpu:1", [("cpu:0", [0]), ("cpu:1", [1])]),
        ("cpu:0-3, cpu:4-7", [("cpu:0-3", range(4)), ("cpu:4-7", range(4, 8))]),
        ("cpu:6-7,cpu:1", [("cpu:6-7", [6, 7]), ("cpu:1", [1])]),
        ("cpu:3-3", [("cpu:3-3", [3])]),
    ],
)
def test_devices_are_read(eight_cores, text, expected):
    assert parse_devices(text) == tuple(Device(name, tuple(cores)) for name, cores in expected)


GPU = "names a GPU where CPU cores are wanted. Use 'cpu', or cores such as 'cpu:0,cpu:1' or "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", GPU),
        ("0,1,2", GPU),
        ("cuda", GPU),
        ("cuda:0,cuda:1", GPU),
        ("GPU:1", GPU),
        ("cpu:0,1", GPU),
        ("", "it names no device, or one is missing"),
        ("cpu:0,", "it names no device, or one is missing"),
        ("npu", "'npu' is no device"),
        ("cpu:", "'cpu:' is no device"),
        ("cpu:a", "'cpu:a' is no device"),
        ("cpu:-1", "'cpu:-1' is no device"),
        ("cpu:0-1-2", "'cpu:0-1-2' is no device"),
        ("cpu,cpu:1", "'cpu' is no device"),
        ("cpu:3-1", "the cores of 'cpu:3-1' run backwards"),
        ("cpu:8", "this process cannot use core 8, only 0, 1, 2, 3, 4, 5, 6, 7"),
        ("cpu:6-9", "this process cannot use core 9, only 0, 1"),
        ("cpu:0-99999999999999999999", "this process cannot use core 99999999999999999999"),
        ("cpu:1,cpu:1", "core 1 is in 'cpu:1' and again in 'cpu:1'"),
        ("cpu:0-3,cpu:2-5", "core 2 is in 'cpu:0-3' and again in 'cpu:2-5'"),
    ],
)
def test_what_is_no_device_is_one_message_with_exit_code_two(eight_cores, text, message):
    with pytest.raises(InputError) as caught:
        parse_devices(text)
    assert str(caught.value).startswith(f"devices {text!r}: {message}")
    assert caught.value.exit_code == 2


def test_cores_between_those_of_a_range_must_be_usable_too(monkeypatch):
    monkeypatch.setattr(devices_module, "usable_cores", lambda: (0, 3))
    assert parse_devices("cpu") == (Device("cpu", (0, 3)),)
    with pytest.raises(InputError, match="cannot use core 1, only 0, 3"):
        parse_devices("cpu:0-3")


@pytest.mark.parametrize(
    ("text", "threads", "expected"),
    [
        ("cpu", 1, [1]),
        ("cpu", 5, [5]),
        ("cpu", 99, [8]),
        ("cpu:0-3,cpu:4-7", 2, [1, 1]),
        ("cpu:0-3,cpu:4-7", 5, [3, 2]),
        ("cpu:0-3,cpu:4-7", 100, [4, 4]),
    ],
)
def test_threads_limit_the_cores(eight_cores, text, threads, expected):
    whole, limited = parse_devices(text), parse_devices(text, threads=threads)
    assert [len(device.cores) for device in limited] == expected
    for before, after in zip(whole, limited, strict=True):
        assert (before.name, before.cores[: len(after.cores)]) == (after.name, after.cores)


@pytest.mark.parametrize(
    ("text", "threads", "message"),
    [
        ("cpu", 0, "threads 0: is less than one"),
        ("cpu", -3, "threads -3: is less than one"),
        ("cpu:0,cpu:1", 1, "threads 1: 2 devices need a thread each, and there are 1"),
    ],
)
def test_too_few_threads_are_refused(eight_cores, text, threads, message):
    with pytest.raises(InputError, match=message):
        parse_devices(text, threads=threads)


@given(st.data())
def test_lanes_divide_all_cores_evenly(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    first = [sum(sizes[:index]) for index in range(len(sizes))]
    devices = [
        Device(f"cpu:{start}-{start + size - 1}", tuple(range(start, start + size)))
        for start, size in zip(first, sizes, strict=True)
    ]
    count = data.draw(st.integers(len(sizes), sum(sizes)))
    lanes = divide(devices, count)
    assert len(lanes) == len({lane.name for lane in lanes}) == count
    assert lanes[0].device == devices[0].name
    assert [core for lane in lanes for core in lane.cores] == list(range(sum(sizes)))
    for device in devices:
        widths = [len(lane.cores) for lane in lanes if lane.device == device.name]
        assert max(widths) - min(widths) <= 1
        assert set().union(*(lane.cores for lane in lanes if lane.device == device.name)) == set(
            device.cores
        )
    # No device could give its narrowest lane's place to a much wider lane of another one.
    spread = {d.name: len(d.cores) / sum(lane.device == d.name for lane in lanes) for d in devices}
    for device in devices:
        shared = sum(lane.device == device.name for lane in lanes)
        if shared > 1:
            assert max(spread.values()) <= len(device.cores) / (shared - 1)


@pytest.mark.parametrize(
    ("text", "lanes", "message"),
    [
        ("cpu", 9, "lanes 9: every lane needs a core, and there are 8. Use 1 to 8."),
        ("cpu:3", 2, "lanes 2: every lane needs a core, and there is 1. Use 1."),
        ("cpu", 0, "lanes 0: every device has a lane, and there is 1. Use 1 to 8."),
        ("cpu:0,cpu:1", 1, "lanes 1: every device has a lane, and there are 2. Use 2."),
    ],
)
def test_numbers_of_lanes_that_cannot_be_say_what_can(eight_cores, text, lanes, message):
    with pytest.raises(InputError) as caught:
        divide(parse_devices(text), lanes)
    assert str(caught.value) == message


def test_usable_cores_are_those_of_this_process():
    assert can_pin() == hasattr(os, "sched_setaffinity")
    assert usable_cores() == tuple(sorted(os.sched_getaffinity(0)))
