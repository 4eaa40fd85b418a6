from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from parnet_export.checkpoints.checkpoint import load_strictly, read_checkpoint
from parnet_export.checkpoints.darknet_file import looks_like_darknet_file, read_darknet_file
from parnet_export.errors import InputError
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.yolov4_csp import build_yolov4_csp
from parnet_export.models.yolov4_csp_layers import YOLOv4CSPConfig
from parnet_export.source import load_network

LAYOUTS = ("scaled-yolov4", "yolor")
NARROW = YOLOv4CSPConfig(width=2, num_classes=4)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def random_network(layout, config=NARROW, seed=0):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = build_yolov4_csp(config, layout)
    randomise_batch_norm(network, torch.Generator().manual_seed(seed))
    return network


def write_darknet(path, state, version=(0, 2, 5), seen=32_032_000):
    """Write a state dict as Darknet does, the layers in the order of their numbers."""
    numbers = sorted({int(key.split(".")[1]) for key in state})
    with path.open("wb") as stream:
        stream.write(struct.pack("<iii", *version))
        stream.write(struct.pack("<q", seen))
        for number in numbers:
            unit = f"module_list.{number}"
            if f"{unit}.Conv2d.bias" in state:
                names = [f"{unit}.Conv2d.bias"]
            else:
                parts = ("bias", "weight", "running_mean", "running_var")
                names = [f"{unit}.BatchNorm2d.{part}" for part in parts]
            for name in (*names, f"{unit}.Conv2d.weight"):
                stream.write(state[name].numpy().astype("<f4").tobytes())
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, tmp_path_factory):
    """A file in each order, and the network that is in it."""
    network = random_network(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return write_darknet(folder / "yolo.weights", network.state_dict()), request.param, network


def outputs_are_equal(one, other):
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return all(torch.equal(a, b) for a, b in zip(one(image), other(image), strict=True))


def test_a_file_comes_back_in_the_order_it_was_written(written):
    path, layout, network = written
    tensors, metadata = read_darknet_file(path, width=2)
    assert metadata == {"version": "0.2.5", "images_seen": "32032000", "layout": layout}
    loaded = build_yolov4_csp(NARROW, layout)
    load_strictly(loaded, tensors, path)
    assert outputs_are_equal(loaded, network)


def test_the_order_and_the_classes_can_be_given(written):
    path, layout, network = written
    tensors, metadata = read_darknet_file(path, layout=layout, num_classes=4, width=2)
    assert metadata["layout"] == layout
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert len(tensors) == 678 - 112  # no batch counters


def test_the_wrong_order_is_refused(written):
    path, layout, _ = written
    (wrong,) = set(LAYOUTS) - {layout}
    with pytest.raises(
        InputError, match=f"has variances that are negative .* in the order of {wrong}"
    ):
        read_darknet_file(path, layout=wrong, width=2)


@pytest.mark.parametrize("classes", [1, 20, 80])
def test_the_number_of_classes_is_told_by_the_length(classes, tmp_path):
    config = YOLOv4CSPConfig(2, classes)
    path = write_darknet(tmp_path / "a.weights", random_network("yolor", config).state_dict())
    tensors, _ = read_darknet_file(path, width=2)
    assert YOLOv4CSPConfig.from_tensors(tensors) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (-1000, "values missing: 1,000"),
        (-1, "values missing: 1"),
        (7, "values left over: 7"),
    ],
)
def test_a_wrong_length_names_how_many_values_are_missing_or_left(change, message, written):
    path, layout, network = written
    content = path.read_bytes()
    content = content[: 4 * change] if change < 0 else content + bytes(4 * change)
    cut = path.with_name("cut.weights")
    cut.write_bytes(content)
    parameters = sum(p.numel() for p in network.parameters())
    norms = sum(t.numel() for n, t in network.state_dict().items() if "running" in n)
    needed = parameters + norms
    expected = f"a YOLOv4-CSP of 4 classes has {needed:,} ({message})"
    with pytest.raises(InputError, match=re.escape(expected)) as raised:
        read_darknet_file(cut, layout=layout, num_classes=4, width=2)
    assert str(cut) in str(raised.value)


def test_a_value_cut_in_two_is_missing_and_bytes_after_the_end_are_left(written):
    path, _, _ = written
    content = path.read_bytes()
    cut = path.with_name("cut.weights")
    cut.write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"\(values missing: 1\)"):
        read_darknet_file(cut, num_classes=4, width=2)
    cut.write_bytes(content + b"\0")
    with pytest.raises(InputError, match=r"\(bytes left over: 1\)"):
        read_darknet_file(cut, num_classes=4, width=2)


def test_a_cut_file_is_compared_with_the_classes_of_coco(written):
    path, _, _ = written
    cut = path.with_name("cut.weights")
    cut.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(InputError, match=r"holds 9,995 values, but .* of 80 classes has"):
        read_darknet_file(cut, width=2)


def test_a_cut_that_leaves_another_number_of_classes_is_noticed(tmp_path):
    """Three classes' worth of values are missing, so the length fits a smaller network."""
    path = write_darknet(tmp_path / "a.weights", random_network("yolor").state_dict())
    per_class = 3 * (16 + 1 + 32 + 1 + 64 + 1)
    path.write_bytes(path.read_bytes()[: -4 * 3 * per_class])
    with pytest.raises(InputError, match=r"that are negative .* of scaled-yolov4 or yolor"):
        read_darknet_file(path, width=2)


def test_an_order_that_nothing_tells_has_to_be_named(tmp_path):
    state = {name: tensor.abs() for name, tensor in random_network("yolor").state_dict().items()}
    path = write_darknet(tmp_path / "positive.weights", state)
    with pytest.raises(InputError, match=r"order of scaled-yolov4 or yolor\. .* name the layout"):
        read_darknet_file(path, width=2)
    tensors, _ = read_darknet_file(path, layout="yolor", width=2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def test_variances_that_are_not_numbers_are_refused(tmp_path):
    state = random_network("yolor").state_dict()
    state["module_list.3.BatchNorm2d.running_var"][1] = float("nan")
    path = write_darknet(tmp_path / "nan.weights", state)
    with pytest.raises(InputError, match="has variances that are negative or no numbers"):
        read_darknet_file(path, width=2)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (struct.pack("<3iq", 0, 2, 0, 0), True),
        (struct.pack("<3iq", 0, 2, 5, 12_800_000), True),
        (struct.pack("<3iq", 0, 1, 0, 0), False),
        (struct.pack("<3iq", 0, 2, 5, -1), False),
        (struct.pack("<3i", 0, 2, 5), False),
        (b"PK\x03\x04" + bytes(60), False),
        (bytes(64), False),
        (b"", False),
    ],
)
def test_a_darknet_file_is_told_by_its_version(head, expected):
    assert looks_like_darknet_file(head) == expected


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "text.weights"
    path.write_text("[net]\nwidth=640\n")
    with pytest.raises(InputError, match="does not start as a Darknet file"):
        read_darknet_file(path)


def test_a_darknet_file_has_no_moving_average(written):
    path, _, _ = written
    with pytest.raises(InputError, match="is a Darknet file, which holds one set of weights"):
        read_checkpoint(path, use_ema=True)


def test_a_file_of_another_network_is_refused_as_a_source(tmp_path):
    path = tmp_path / "yolov4-tiny.weights"
    values = np.zeros(6_056_606, "<f4")
    path.write_bytes(struct.pack("<3iq", 0, 2, 5, 0) + values.tobytes())
    with pytest.raises(InputError, match=r"yolov4-tiny\.weights: holds 6,056,606 values, but"):
        load_network(path)


def test_a_file_of_the_real_width_is_a_source(tmp_path):
    network = random_network("yolor", YOLOv4CSPConfig(activation="silu"))
    path = write_darknet(tmp_path / "yolov4-csp.weights", network.state_dict())
    # The published size, 202 MiB: all parameters, and two statistics for each normalised channel.
    assert path.stat().st_size == 20 + 4 * (52_921_437 + 2 * 32_384)
    loaded = load_network(path)
    assert outputs_are_equal(loaded.module, network)
    assert loaded.name == "yolov4-csp"
    assert loaded.config == YOLOv4CSPConfig(activation="silu")
    assert loaded.provenance.activation.startswith("silu (detected: ")
