from __future__ import annotations

import pytest

from parnet_bench.targets import row_devices
from parnet_bench.targets.row_devices import check_devices, cores_of, first_device, gpu_ordinals
from parnet_engines.planning.devices import usable_cores
from parnet_export.errors import InputError, ParnetError


def test_cores_are_those_of_the_devices_or_all_for_gpus():
    cores = usable_cores()
    assert cores_of("cpu", None) == cores
    assert cores_of("cpu", 1) == cores[:1]
    assert cores_of(f"cpu:{cores[0]}", 2) == cores[:1]
    assert cores_of("0,1", None) == cores
    assert first_device("cpu:0 , cpu:1") == "cpu:0"


def test_gpus_are_counted_once_however_they_are_named():
    assert gpu_ordinals(["2,0", "cuda:0,0", "cpu"]) == (0, 2)
    assert gpu_ordinals(["cpu:0,cpu:1"]) == ()


def test_transfers_are_those_of_gpus(monkeypatch):
    monkeypatch.setattr(row_devices, "open_driver", lambda _: None)
    check_devices("0", threads=None, data_transfers=False)
    check_devices("cpu", threads=None, data_transfers=True)
    with pytest.raises(InputError, match=r"--no-data-transfers: .*there are no transfers"):
        check_devices("cpu", threads=None, data_transfers=False)


def test_gpus_that_are_not_there_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ParnetError) as caught:
        check_devices("0,1,2", threads=None)
    assert str(caught.value).count("\n") == 0


def test_more_threads_than_cores_are_refused():
    check_devices("cpu", threads=1)
    with pytest.raises(InputError, match="--threads"):
        check_devices("cpu", threads=100_000)


def test_a_boundary_is_for_gpus(monkeypatch):
    with pytest.raises(InputError, match="--boundary: is between engines on GPUs"):
        check_devices("cpu", threads=None, boundary="linear")
    monkeypatch.setattr(row_devices, "open_driver", lambda _: None)
    check_devices("0", threads=None, boundary="vector")


def test_an_engine_is_one_for_the_devices(monkeypatch):
    check_devices("cpu", threads=None, engine="openvino")
    monkeypatch.setattr(row_devices, "open_driver", lambda _: None)
    check_devices("0", threads=None, engine="tensorrt", plan="auto")
    with pytest.raises(InputError, match="engine 'openvino': is none for GPUs"):
        check_devices("0", threads=None, engine="openvino")
