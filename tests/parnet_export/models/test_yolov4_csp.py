from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from parnet_export.bundle import Provenance
from parnet_export.checkpoints.checkpoint import write_safetensors
from parnet_export.errors import InputError
from parnet_export.export import export_onnx
from parnet_export.fuse import fuse, fuse_network
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.yolov4_csp import (
    build_fused_yolov4_csp,
    build_yolov4_csp,
    chain_pools,
    fold_yolov4_csp,
)
from parnet_export.models.yolov4_csp_layers import (
    LEVELS,
    OUTPUT_NAMES,
    YOLOv4CSPConfig,
    is_yolov4_csp,
    layout_of,
    list_layers,
)
from parnet_export.network import Header
from parnet_export.pipeline import make_bundle
from parnet_export.source import load_network
from parnet_export.splitting.split import SplitOptions

LAYOUTS = ("scaled-yolov4", "yolor")
NARROW = YOLOv4CSPConfig(width=4, num_classes=3)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def random_network(config=NARROW, layout="scaled-yolov4", seed=0):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = build_yolov4_csp(config, layout)
    randomise_batch_norm(network, torch.Generator().manual_seed(seed))
    return network.requires_grad_(requires_grad=False)


def random_image(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def difference(actual, reference):
    """The largest of the heads' relative differences."""
    pairs = zip(actual, reference, strict=True)
    return max(float((a - r).abs().max() / r.abs().max()) for a, r in pairs)


# ------------------------------------------------------------------ an independent reference


def write_cfg(layout, width=32, channels_out=255):
    """The published layer lists: rows with sources relative to a row, or by its number."""

    def conv(filters, kernel=1, stride=1):
        return ("conv", filters, kernel, stride)

    def csp_block(f):
        plain = [conv(f), conv(f, 3)]
        return [conv(f), conv(f), ("route", -2), *plain, *plain, ("route", -1, -6), conv(f)]

    def head(f):
        return [conv(f, 3), ("linear", channels_out), ("yolo",)]

    rows = [conv(width, 3), conv(2 * width, 3, 2), conv(width), conv(2 * width, 3)]
    rows += [("shortcut", -3)]
    for filters, blocks in ((4, 2), (8, 8), (16, 8), (32, 4)):
        f, half = filters * width, filters * width // 2
        rows += [conv(f, 3, 2), conv(half), ("route", -2), conv(half)]
        rows += [conv(half), conv(half, 3), ("shortcut", -3)] * blocks
        rows += [conv(half), ("route", -1, -(3 * blocks + 4)), conv(f)]
    f = 16 * width
    rows += [conv(f), ("route", -2), conv(f), conv(f, 3), conv(f)]
    rows += [("maxpool", 5), ("route", -2), ("maxpool", 9), ("route", -4), ("maxpool", 13)]
    rows += [("route", -1, -3, -5, -6), conv(f), conv(f, 3), ("route", -1, -13), conv(f)]
    for filters, lateral in ((8, 79), (4, 48)):
        f = filters * width
        rows += [conv(f), ("upsample",), ("route", lateral), conv(f), ("route", -1, -3)]
        rows += csp_block(f)
    if layout == "scaled-yolov4":
        rows += [*head(8 * width), ("route", -4)]
        rows += [conv(8 * width, 3, 2), ("route", -1, -20), *csp_block(8 * width)]
        rows += [*head(16 * width), ("route", -4)]
        rows += [conv(16 * width, 3, 2), ("route", -1, -49), *csp_block(16 * width)]
        return rows + head(32 * width)
    rows += [conv(8 * width, 3, 2), ("route", -1, 127), *csp_block(8 * width)]
    rows += [conv(16 * width, 3, 2), ("route", -1, 113), *csp_block(16 * width)]
    for filters, place in ((8, 141), (16, 152), (32, 163)):
        rows += [("route", place), *head(filters * width)]
    return rows


def layout_of_rows(rows):
    """Names and shapes of the published state dicts."""
    names, channels = {}, []
    for index, (kind, *values) in enumerate(rows):
        before = channels[-1] if channels else 3
        if kind == "conv":
            filters, kernel, _ = values
            names[f"module_list.{index}.Conv2d.weight"] = (filters, before, kernel, kernel)
            for part in ("weight", "bias", "running_mean", "running_var"):
                names[f"module_list.{index}.BatchNorm2d.{part}"] = (filters,)
            names[f"module_list.{index}.BatchNorm2d.num_batches_tracked"] = ()
            before = filters
        elif kind == "linear":
            (before,) = values
            names[f"module_list.{index}.Conv2d.weight"] = (before, channels[-1], 1, 1)
            names[f"module_list.{index}.Conv2d.bias"] = (before,)
        elif kind == "route":
            before = sum(channels[v] for v in values)
        channels.append(before)
    return names


def evaluate_rows(rows, state, image, activation):
    """The network written out with plain functions."""
    maps, heads = [], []
    for index, (kind, *values) in enumerate(rows):
        x = maps[-1] if maps else image
        unit = f"module_list.{index}"
        if kind == "conv":
            weight = state[f"{unit}.Conv2d.weight"]
            x = functional.conv2d(x, weight, stride=values[2], padding=values[1] // 2)
            gamma, beta, mean, variance = (
                state[f"{unit}.BatchNorm2d.{part}"][:, None, None]
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            x = gamma * (x - mean) / (variance + 1e-4).sqrt() + beta
            zero = torch.zeros((), dtype=x.dtype)
            gate = torch.logaddexp(x, zero).tanh() if activation == "mish" else 1 / (1 + (-x).exp())
            x = x * gate
        elif kind == "linear":
            x = functional.conv2d(x, state[f"{unit}.Conv2d.weight"], state[f"{unit}.Conv2d.bias"])
        elif kind == "route":
            x = torch.cat([maps[v] for v in values], 1)
        elif kind == "shortcut":
            x = x + maps[values[0]]
        elif kind == "maxpool":
            border = values[0] // 2
            padded = functional.pad(x, (border,) * 4, value=float("-inf"))
            x = padded.unfold(2, values[0], 1).unfold(3, values[0], 1).amax((-2, -1))
        elif kind == "upsample":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        else:
            heads.append(x)
        maps.append(x)
    return heads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [1, 80])
def test_names_and_shapes_are_the_published_ones(layout, classes):
    rows = write_cfg(layout, channels_out=3 * (5 + classes))
    assert len(rows) == {"scaled-yolov4": 175, "yolor": 176}[layout]
    heads = [index for index, row in enumerate(rows) if row[0] == "linear"]
    assert heads == {"scaled-yolov4": [143, 158, 173], "yolor": [166, 170, 174]}[layout]
    with torch.device("meta"):
        state = build_yolov4_csp(YOLOv4CSPConfig(num_classes=classes), layout).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert found == layout_of_rows(rows)
    assert len(found) == 678
    assert is_yolov4_csp(found)
    assert layout_of(found) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["mish", "silu"])
@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (2, 3, 32, 32)], ids=str)
def test_the_network_computes_what_the_published_list_says(layout, activation, shape):
    config = replace(NARROW, activation=activation)
    network = random_network(config, layout).double()
    image = random_image(*shape)
    rows = write_cfg(layout, NARROW.width, NARROW.head_channels)
    outputs = network(image)
    assert difference(outputs, evaluate_rows(rows, network.state_dict(), image, activation)) < 1e-12
    for output, level in zip(outputs, LEVELS, strict=True):
        size = (shape[2] // level.stride, shape[3] // level.stride)
        assert output.shape == (shape[0], config.head_channels, *size)


def test_sizes_and_operations_are_the_published_ones():
    with torch.device("meta"):
        forms = (
            build_yolov4_csp(YOLOv4CSPConfig()),
            build_fused_yolov4_csp(YOLOv4CSPConfig(activation="silu")),
        )
        images = {pixels: torch.empty(1, 3, pixels, pixels) for pixels in (640, 512)}
    for form, parameters in zip(forms, (52_921_437, 52_889_053), strict=True):
        assert sum(p.numel() for p in form.parameters()) == parameters
        kinds = [type(module) for module in form.modules()]
        assert kinds.count(nn.Conv2d) == 115
        assert kinds.count(nn.BatchNorm2d) == (112 if form is forms[0] else 0)
        for pixels, gflop in ((640, 120.24), (512, 76.95)):
            with FlopCounterMode(display=False) as counter:
                form(images[pixels])
            assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=5e-3)
    norms = [module for module in forms[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-4}


def test_a_head_gives_25200_boxes_at_640_pixels():
    with torch.device("meta"):
        outputs = build_fused_yolov4_csp(YOLOv4CSPConfig())(torch.empty(1, 3, 640, 640))
    assert [tuple(o.shape) for o in outputs] == [(1, 255, s, s) for s in (80, 40, 20)]
    assert sum(o.shape[1] // 85 * o.shape[2] * o.shape[3] for o in outputs) == 25_200


# -------------------------------------------------------------------------------- fusing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["mish", "silu"])
def test_fusing_changes_nothing_but_rounding(layout, activation):
    single = random_network(replace(NARROW, activation=activation), layout, seed=3)
    exact = copy.deepcopy(single).double()
    image = random_image(2, 3, 96, 64)
    reference, reference32 = exact(image), single(image.float())
    for level in ("repvgg", "full"):
        assert difference(fuse(exact, level)(image), reference) < 1e-12
        assert difference(fuse(single, level)(image.float()), reference32) < 1e-5


@settings(max_examples=10, deadline=None)
@given(
    width=st.integers(1, 5),
    classes=st.integers(1, 7),
    activation=st.sampled_from(["mish", "silu"]),
    layout=st.sampled_from(LAYOUTS),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_any_structure_is_read_off_and_fuses_exactly(
    width, classes, activation, layout, size, seed
):
    config = YOLOv4CSPConfig(width, classes, activation)
    network = random_network(config, layout, seed).double()
    folded = fold_yolov4_csp(network)
    for form in (network, folded):
        assert YOLOv4CSPConfig.from_tensors(form.state_dict(), activation) == config
    image = random_image(1, 3, 32 * size[0], 32 * size[1])
    assert difference(chain_pools(folded)(image), network(image)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["mish", "silu"])
def test_fusing_changes_nothing_but_rounding_at_full_width(activation):
    network = random_network(YOLOv4CSPConfig(activation=activation)).double()
    image = random_image(1, 3, 128, 128)
    assert difference(fuse(network, "full")(image), network(image)) < 1e-12


def test_chained_pools_are_equal_to_the_bit():
    folded = fold_yolov4_csp(random_network())
    for size in ((32, 32), (96, 160), (640, 64)):
        image = random_image(1, 3, *size, dtype=torch.float32)
        pairs = zip(chain_pools(folded)(image), folded(image), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    kernels = [layer.kernel for layer in chain_pools(folded).layers if layer.kind == "pool"]
    assert kernels == [5, 5, 5]


def test_fusing_is_pure():
    network = random_network().train()
    before = copy.deepcopy(network.state_dict())
    for level in ("repvgg", "full"):
        fused = fuse(network, level)
        assert not fused.training
        chained = fuse(fused, "full")
        for parameter in (*fused.parameters(), *chained.parameters()):
            parameter.data.zero_()
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_fused_names_say_what_layers_are_for_whatever_the_layout():
    names = [list(fuse(random_network(NARROW, layout), "full").state_dict()) for layout in LAYOUTS]
    assert set(names[0]) == set(names[1])
    assert len(names[0]) == 2 * 115
    expected = {
        "backbone.stem.conv.weight",
        "backbone.p3.blocks.7.expand.conv.bias",
        "neck.pyramid_pool.mix.conv.weight",
        "head.p5.predict.conv.bias",
    }
    assert expected <= set(names[0])


def test_both_layouts_hold_the_same_network():
    """Weights moved from one numbering to the other by what each layer is for."""
    one = random_network(NARROW, "scaled-yolov4")
    places = {layer.name: i for i, layer in enumerate(list_layers(NARROW, "yolor")) if layer.name}
    names = {i: layer.name for i, layer in enumerate(one.layers) if layer.name}
    moved = {}
    for key, tensor in one.state_dict().items():
        _, index, rest = key.split(".", 2)
        moved[f"module_list.{places[names[int(index)]]}.{rest}"] = tensor
    other = build_yolov4_csp(NARROW, "yolor")
    other.load_state_dict(moved, strict=True)
    image = random_image(1, 3, 64, 64, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one(image), other(image), strict=True))


# ------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("layout", "activation"), [("scaled-yolov4", "mish"), ("yolor", "silu")], ids=str
)
def test_a_training_checkpoint_loads_with_the_activation_of_its_layout(
    layout, activation, tmp_path
):
    config = replace(NARROW, activation=activation)
    network = random_network(config, layout)
    path = tmp_path / "yolov4-csp.pt"
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 299, "best_fitness": 0.5, "model": state, "optimizer": None}, path)
    loaded = load_network(path)
    image = random_image(1, 3, 64, 64, dtype=torch.float32)
    assert difference(loaded.module(image), network(image)) == 0
    assert (loaded.family, loaded.config, loaded.level) == ("yolov4-csp", config, "none")
    assert (loaded.resolution, loaded.input_multiple) == (640, 32)
    assert loaded.output_names == ("p3", "p4", "p5")
    assert loaded.provenance.activation.startswith(f"{activation} (detected: ")
    assert layout in loaded.provenance.activation
    other = {"mish": "silu", "silu": "mish"}[activation]
    assert load_network(path, activation=other).config.activation == other


@pytest.mark.parametrize("level", ["none", "repvgg", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_comes_back_from_its_file(level, layout, tmp_path):
    path = tmp_path / "yolov4-csp.pth"
    torch.save(random_network(NARROW, layout).state_dict(), path)
    network = fuse_network(load_network(path), level)
    written = tmp_path / "again.safetensors"
    write_safetensors(written, network.module.state_dict(), Header.of(network).encode())
    again = load_network(written)
    image = random_image(2, 3, 32, 64, dtype=torch.float32)
    assert difference(again.module(image), network.module(image)) == 0
    assert (again.level, again.config) == (level, network.config)
    assert again.output_names == OUTPUT_NAMES
    pools = [layer.kernel for layer in again.module.layers if layer.kind == "pool"]
    assert pools == ([5, 5, 5] if level == "full" else [5, 9, 13])


def test_a_fused_file_without_a_description_asks_for_the_activation(tmp_path):
    fused = fold_yolov4_csp(random_network())
    path = tmp_path / "fused.pth"
    torch.save(fused.state_dict(), path)
    with pytest.raises(InputError, match=r"fused\.pth: is a fused YOLOv4-CSP .* mish or silu"):
        load_network(path)
    loaded = load_network(path, activation="mish")
    image = random_image(1, 3, 32, 32, dtype=torch.float32)
    assert difference(loaded.module(image), fused(image)) == 0
    assert loaded.level == "repvgg"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen", "nan"])
def test_tensors_that_do_not_fit_are_named(layout, change, tmp_path):
    state = dict(random_network(NARROW, layout).state_dict())
    key = "module_list.50.BatchNorm2d.running_mean"
    if change == "missing":
        del state[key]
    elif change == "extra":
        key = "module_list.51.BatchNorm2d.running_mean"  # a reference to another layer
        state[key] = torch.zeros(3)
    elif change == "misshapen":
        state[key] = state[key][:-1]
    else:
        state[key] = state[key] * float("nan")
    path = tmp_path / "damaged.pt"
    torch.save(state, path)
    with pytest.raises(InputError, match=re.escape(key)) as raised:
        load_network(path)
    assert str(path) in str(raised.value)


def test_a_network_with_other_layers_is_not_taken_for_this_one(tmp_path):
    state = dict(random_network().state_dict())
    for part in ("weight", "bias"):
        state[f"module_list.203.Conv2d.{part}"] = state.pop(f"module_list.173.Conv2d.{part}")
    assert not is_yolov4_csp(state)
    with pytest.raises(ValueError, match=r"no heads at the layers \(143, 158, 173\) or \(166"):
        YOLOv4CSPConfig.from_tensors(state)
    path = tmp_path / "yolov4-csp-x.pt"
    torch.save(state, path)
    with pytest.raises(InputError, match="holds none of the networks this version knows"):
        load_network(path)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("module_list.143.Conv2d.weight", torch.zeros(25, 32, 1, 1), "a head of 25 channels"),
        ("module_list.143.Conv2d.weight", torch.zeros(15, 32, 1, 1), "a head of 15 channels"),
        ("module_list.0.Conv2d.weight", torch.zeros(4), "is no convolution"),
    ],
)
def test_impossible_structures_are_refused(key, tensor, message):
    state = dict(random_network().state_dict()) | {key: tensor}
    with pytest.raises(ValueError, match=message):
        YOLOv4CSPConfig.from_tensors(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 80), "at least one"), ((32, 0), "at least one"), ((32, 80, "relu"), "mish or silu")],
)
def test_a_configuration_validates_itself(arguments, message):
    with pytest.raises(ValueError, match=message):
        YOLOv4CSPConfig(*arguments)


def test_a_catalogue_name_refuses_an_activation_it_cannot_have():
    with pytest.raises(InputError, match="--activation: 'relu' is no activation that yolov4-csp"):
        load_network("yolov4-csp", activation="relu")


@pytest.mark.parametrize("activation", ["mish", "silu"])
def test_random_weights_stay_far_inside_half_precision(activation):
    network = random_network(replace(NARROW, width=8, activation=activation))
    largest = []
    for module in network.modules():
        module.register_forward_hook(
            lambda _module, _inputs, output: largest.append(
                max(float(tensor.abs().max()) for tensor in output)
            )
        )
    one, other = network(random_image(2, 3, 96, 96, dtype=torch.float32))[0]
    assert max(largest) < 1000
    # The image still matters after a hundred layers.
    assert (one - other).std() > 0.1 * one.std()


# ---------------------------------------------------------------------------- the graph


@pytest.fixture(scope="module")
def graph():
    """A fused network that is small enough to run often, and its ONNX graph."""
    network = fuse(random_network(replace(NARROW, width=8)), "full")
    model = export_onnx(
        network, resolution=320, batch=1, name="yolov4-csp", output_names=OUTPUT_NAMES
    )
    return network, model


def run(path, feeds, names):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_the_longest_path_through_the_backbone_has_64_convolutions(graph):
    _, model = graph
    chains, longest = {}, {}
    for node in model.graph:
        before = max((chains.get(value, 0) for value in node.inputs), default=0)
        chain = before + (node.op_type == "Conv")
        chains.update(dict.fromkeys(node.outputs, chain))
        part = node.name.split(".")[0]
        longest[part] = max(longest.get(part, 0), chain)
    assert longest["backbone"] == 64
    assert longest["neck"] == 98
    assert longest["head"] == 100


def test_whole_and_split_graph_agree_with_torch_and_have_parallel_heads(graph, tmp_path):
    network, model = graph
    bundle, _ = make_bundle(
        model,
        Provenance(network="yolov4-csp", source="test"),
        tmp_path / "yolo.bundle",
        options=SplitOptions(min_gain=0.01),
    )
    image = random_image(1, 3, 320, 320, dtype=torch.float32)
    reference = network(image)
    whole = run(bundle.whole_path, {"image": image.numpy()}, OUTPUT_NAMES)
    known = {"image": image.numpy()}
    for segment in bundle.stream_graph.segments:
        feeds = {tensor.name: known[tensor.name] for tensor in segment.inputs}
        names = [tensor.name for tensor in segment.outputs]
        known |= run(bundle.segment_path(segment.name), feeds, names)
    for name, expected in zip(OUTPUT_NAMES, reference, strict=True):
        scale = float(expected.abs().max())
        assert np.abs(whole[name] - expected.numpy()).max() <= 1e-5 * scale
        assert np.abs(known[name] - whole[name]).max() <= 1e-6 * scale

    heads = {
        output.name: segment.name
        for segment in bundle.stream_graph.segments
        for output in segment.outputs
        if output.name in OUTPUT_NAMES
    }
    predecessors = bundle.stream_graph.predecessors

    def before(segment):
        return set(predecessors[segment]).union(*map(before, predecessors[segment]))

    # No head waits for another, and the first one waits for less of the neck than the last.
    assert len(set(heads.values())) == 3
    assert not set(heads.values()) & set().union(*map(before, heads.values()))
    assert before(heads["p3"]) < before(heads["p5"])
