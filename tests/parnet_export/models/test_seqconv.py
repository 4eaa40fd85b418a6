from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from parnet_export.catalogue.census import take_census
from parnet_export.checkpoints.checkpoint import load_strictly, read_checkpoint, write_safetensors
from parnet_export.errors import InputError
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.models.seqconv import SeqConvNet, build_seqconv
from parnet_export.models.seqconv_config import SeqConvConfig, is_folded_seqconv, is_seqconv
from parnet_export.models.seqconv_folding import fold_seqconv
from parnet_export.source import load_network

SMALL = {
    "plain": SeqConvConfig("cifar", "plain", (16, 32, 40), (2, 1, 3), (4, 8, 8), (1, 1, 1), 7),
    "bottleneck": SeqConvConfig(
        "imagenet", "bottleneck", (16, 32, 48), (1, 2, 1), (4, 8, 16), (1, 1, 1), 7
    ),
    "grouped": SeqConvConfig(
        "imagenet", "grouped", (16, 32, 40), (2, 1, 2), (4, 8, 8), (2, 4, 2), 7
    ),
    "aliased": SeqConvConfig(
        "imagenet", "grouped", (16, 32, 40), (2, 1, 2), (4, 8, 8), (2, 4, 2), 7, aliased=True
    ),
    "dense": SeqConvConfig("cifar", "plain", (16, 24), (2, 1), (8, 8), (1, 1), 7, windowed=False),
}

# Parameters, convolutions and multiply-accumulates, counted once with the authors' code.
COUNTS = {
    "seqresnet-k8r4": (1_233_370, 124, 0.2821),
    "seqresnet-k16r10": (7_627_354, 154, 1.7242),
    "seqresnet-b-k16r7": (843_834, 214, 0.2044),
    "seqresnet-b-k32r12": (6_029_658, 472, 1.4172),
    "seqresnet-b22": (11_859_656, 175, 2.8827),
    "seqresnet-b42": (25_642_696, 415, 5.6444),
    "seqresnext-24": (26_211_784, 407, 4.5440),
}
WITH_100_CLASSES = {
    "seqresnet-k8r4": 1_250_740,
    "seqresnet-k16r10": 7_670_644,
    "seqresnet-b-k16r7": 874_164,
    "seqresnet-b-k32r12": 6_081_588,
}


def _random_network(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    net = build_seqconv(config).to(dtype)
    randomise_batch_norm(net, torch.Generator().manual_seed(seed))
    return net.requires_grad_(requires_grad=False)


def _on_meta(config, *, folded=False):
    with torch.device("meta"):
        return SeqConvNet(config, folded=folded)


def _parameters(config):
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def _difference(found, reference):
    return float((found - reference).abs().max() / reference.abs().max())


def _evaluate_by_text(state, config, images):
    """The network written out with plain functions and lists, as an independent reference."""

    def unit(x, name, shortcut=None, stride=1):
        weight = state[f"{name}.LinearLayer.weight"]
        groups = x.shape[1] // weight.shape[1]
        raw = functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        raw = raw if shortcut is None else raw + shortcut
        norm = f"{name}.BatchNormalizationLayer"
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        gamma, beta = state[f"{norm}.weight"], state[f"{norm}.bias"]
        normalised = (raw - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return raw, (normalised * gamma[:, None, None] + beta[:, None, None]).relu()

    def layer(x, name, windowed, shortcut=None):
        """Return raw and activated groups, and the view after the last filter."""
        view, raws, activations = x, [], []
        while True:
            number = len(raws)
            if config.filters == "plain":
                reader, closer = None, f"{name}.Filters.{number}"
            elif config.filters == "bottleneck":
                reader = f"{name}.Filters.{number}.BottleneckLayer"
                closer = f"{name}.Filters.{number}.TransformationLayer"
            else:
                reader = f"{name}.BottleneckLayers.{number}"
                closer = f"{name}.TransformationLayers.{number}"
            if f"{closer}.LinearLayer.weight" not in state:
                return torch.cat(raws, 1), torch.cat(activations, 1), view
            k = len(state[f"{closer}.LinearLayer.weight"])
            part = None if shortcut is None else shortcut[:, number * k :][:, :k]
            y = view if reader is None else unit(view, reader)[1]
            raw, activated = unit(y, closer, part)
            raws.append(raw)
            activations.append(activated)
            view = torch.cat((view[:, k:] if windowed else view, activated), 1)

    if config.stem == "cifar":
        raw, x, _ = layer(unit(images, "Init")[1], "Head", windowed=False)
    else:
        x = unit(unit(images, "Head0", stride=2)[1], "Head1")[1]
        x = layer(x, "Head2", windowed=False)[1]
        raw, x = unit(x, "ShrinkingLayer", stride=2)
    for stage, count in enumerate(config.blocks):
        if stage:
            down = f"Downsample{stage}"
            _, extension, view = layer(x, f"{down}.ExtensionLayer", config.windowed)
            kept = view if config.aliased else x
            joined = torch.cat((kept, extension), 1)
            raw, x = unit(joined, f"{down}.ShrinkingLayer", stride=2)
        for block in range(count):
            at = f"Stage{stage + 1}.{block}"
            inner = layer(x, f"{at}.LayerA", config.windowed)[1]
            raw, x, _ = layer(inner, f"{at}.LayerB", config.windowed, raw)
    x = unit(x, "Blender")[1]
    pooled = functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return functional.linear(pooled, state["Classifier.weight"], state["Classifier.bias"])


def _authors_layout(config):
    """Names and shapes of the authors' state dicts, from the structure of the network."""
    layout = {}

    def unit(name, *shape):
        layout[f"{name}.LinearLayer.weight"] = shape
        norm = f"{name}.BatchNormalizationLayer"
        for suffix in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{norm}.{suffix}"] = shape[:1]
        layout[f"{norm}.num_batches_tracked"] = ()

    def layer(name, before, after, stage, windowed=config.windowed):
        k, groups = config.filter_widths[stage], config.cardinality[stage]
        for number in range(after // k):
            view = before if windowed else before + number * k
            if config.filters == "plain":
                unit(f"{name}.Filters.{number}", k, view, 3, 3)
            elif config.filters == "bottleneck":
                unit(f"{name}.Filters.{number}.BottleneckLayer", k, view, 1, 1)
                unit(f"{name}.Filters.{number}.TransformationLayer", k, k, 3, 3)
            else:
                unit(f"{name}.BottleneckLayers.{number}", k, view, 1, 1)
                unit(f"{name}.TransformationLayers.{number}", k, k // groups, 3, 3)

    def shrinking(name, stage):
        k, groups = config.filter_widths[stage], config.cardinality[stage]
        unit(name, config.widths[stage], k // groups, 3, 3)

    if config.stem == "cifar":
        unit("Init", 16, 3, 3, 3)
        layer("Head", 16, config.widths[0], 0, windowed=False)
    else:
        unit("Head0", 32, 3, 3, 3)
        unit("Head1", 32, 32, 3, 3)
        layer("Head2", 32, config.widths[0], 0, windowed=False)
        shrinking("ShrinkingLayer", 0)
    for stage, width in enumerate(config.widths):
        for block in range(config.blocks[stage]):
            layer(f"Stage{stage + 1}.{block}.LayerA", width, width, stage)
            layer(f"Stage{stage + 1}.{block}.LayerB", width, width, stage)
    for stage, (before, after) in enumerate(pairwise(config.widths), 1):
        layer(f"Downsample{stage}.ExtensionLayer", before, after - before, stage - 1)
        shrinking(f"Downsample{stage}.ShrinkingLayer", stage)
    unit("Blender", config.widths[-1], config.widths[-1], 1, 1)
    layout["Classifier.weight"] = (config.num_classes, config.widths[-1])
    layout["Classifier.bias"] = (config.num_classes,)
    return layout


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_convolutions_and_operations_are_those_of_the_authors_code(name):
    entry = CATALOG[name][1]
    parameters, convolutions, gmac = COUNTS[name]
    census = take_census(_on_meta(entry.config), entry.resolution)
    assert census.parameters == parameters
    assert census.depth == convolutions + 1  # every convolution, and the classifier, in one chain
    assert census.macs / 1e9 == pytest.approx(gmac, rel=1e-3)
    assert entry.origin == "official"


@pytest.mark.parametrize("name", WITH_100_CLASSES)
def test_a_hundred_classes_have_the_parameters_of_the_authors_code(name):
    config = replace(CATALOG[name][1].config, num_classes=100)
    assert _parameters(config) == WITH_100_CLASSES[name]


def test_dense_and_windowed_layers_have_the_sizes_of_the_papers_comparison():
    dense = SeqConvConfig(
        "cifar", "plain", (48, 96, 144), (1, 2, 1), (8,) * 3, (1,) * 3, windowed=False
    )
    windowed = SeqConvConfig("cifar", "plain", (48, 96, 144), (1, 2, 2), (16,) * 3, (1,) * 3)
    assert round(_parameters(dense) / 1e6, 2) == 1.23
    assert round(_parameters(windowed) / 1e6, 2) == 1.26


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_the_network_computes_what_the_text_says(config):
    net = _random_network(config)
    images = torch.randn(2, 3, 26, 18, dtype=torch.float64)
    reference = _evaluate_by_text(net.state_dict(), config, images)
    assert _difference(net(images), reference) < 1e-12


@pytest.mark.parametrize("name", [*SMALL, *COUNTS])
def test_names_and_shapes_are_those_of_the_authors_code(name):
    config = SMALL[name] if name in SMALL else CATALOG[name][1].config
    state = _on_meta(config).state_dict()
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert found == _authors_layout(config)


def test_a_state_dict_holds_the_published_names():
    names = set(_on_meta(SMALL["plain"]).state_dict())
    assert {"Init.LinearLayer.weight", "Head.Filters.0.LinearLayer.weight"} <= names
    names = set(_on_meta(SMALL["bottleneck"]).state_dict())
    assert {
        "Head2.Filters.3.BottleneckLayer.LinearLayer.weight",
        "Stage2.1.LayerB.Filters.2.TransformationLayer.BatchNormalizationLayer.running_var",
        "Downsample1.ExtensionLayer.Filters.0.TransformationLayer.LinearLayer.weight",
        "Downsample2.ShrinkingLayer.BatchNormalizationLayer.weight",
        "Classifier.bias",
    } <= names
    names = set(_on_meta(SMALL["grouped"]).state_dict())
    assert "Stage3.1.LayerA.BottleneckLayers.4.LinearLayer.weight" in names
    assert "Stage3.1.LayerA.TransformationLayers.4.BatchNormalizationLayer.bias" in names


@pytest.mark.parametrize("name", [*SMALL, *COUNTS])
@pytest.mark.parametrize("folded", [False, True])
def test_the_structure_is_read_off_the_tensors(name, folded):
    config = SMALL[name] if name in SMALL else CATALOG[name][1].config
    state = _on_meta(replace(config, num_classes=23), folded=folded).state_dict()
    assert is_seqconv(state)
    assert is_folded_seqconv(state) == folded
    # Tensors do not tell `aliased`; where filters are grouped, the authors' code has it.
    expected = replace(config, num_classes=23, aliased=config.filters == "grouped")
    assert SeqConvConfig.from_tensors(state) == expected


def test_aliased_groups_change_what_the_same_weights_compute():
    net = _random_network(SMALL["aliased"])
    paper = SeqConvNet(SMALL["grouped"]).double().eval().requires_grad_(requires_grad=False)
    load_strictly(paper, net.state_dict(), "model_best.pth.tar")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert _difference(net(images), paper(images)) > 1e-2


def test_aliasing_shows_the_transition_its_extension_twice_where_the_width_doubles():
    net = _random_network(SMALL["aliased"])
    seen = {}
    net.Downsample1.ExtensionLayer.register_forward_hook(
        lambda _module, _inputs, output: seen.update(extension=output[1])
    )
    net.Downsample1.ShrinkingLayer.register_forward_hook(
        lambda _module, inputs, _output: seen.update(joined=inputs[0])
    )
    net(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert torch.equal(seen["joined"], torch.cat((seen["extension"], seen["extension"]), 1))


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_both_forms_come_back_from_a_file(config, tmp_path):
    net = _random_network(config, torch.float32)
    images = torch.randn(1, 3, 24, 24)
    for form in (net, fold_seqconv(net)):
        path = tmp_path / "model.safetensors"
        write_safetensors(path, form.state_dict(), {})
        tensors = read_checkpoint(path).tensors
        loaded = SeqConvNet(config, folded=is_folded_seqconv(tensors)).eval()
        load_strictly(loaded, tensors, path)
        assert torch.equal(loaded(images), form(images))


def test_a_training_checkpoint_of_the_authors_script_loads(tmp_path):
    net = _random_network(SMALL["aliased"], torch.float32)
    path = tmp_path / "checkpoint.pth.tar"
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"epoch": 90, "state_dict": state, "best_acc1": 78.1, "best_acc5": 94.2}, path)
    network = load_network(path)
    assert (network.family, network.level, network.resolution) == ("seqconv", "none", 224)
    assert network.config == SMALL["aliased"]
    assert "groups aliased" in network.provenance.architecture
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(network.module(images), net(images))


def test_a_name_says_whether_groups_are_aliased_which_tensors_do_not(tmp_path, monkeypatch):
    for name, kind in (("seqresnext-24", "aliased"), ("seqresnext-24-text", "grouped")):
        family, entry = CATALOG[name]
        assert entry.config.aliased == (kind == "aliased")
        monkeypatch.setitem(CATALOG, name, (family, replace(entry, config=SMALL[kind])))
    path = tmp_path / "model_best.pth.tar"
    net = _random_network(SMALL["aliased"], torch.float32)
    torch.save({"state_dict": net.state_dict()}, path)
    images = torch.randn(1, 3, 32, 32)
    official = load_network(path, arch="seqresnext-24")
    printed = load_network(path, arch="seqresnext-24-text")
    assert torch.equal(official.module(images), net(images))
    assert (official.config, printed.config) == (SMALL["aliased"], SMALL["grouped"])
    assert "aliased" not in printed.provenance.architecture
    assert _difference(printed.module(images), net(images)) > 1e-2


def test_a_bare_state_dict_of_any_number_of_classes_is_the_network_it_is_said_to_be(tmp_path):
    config = replace(CATALOG["seqresnet-k8r4"][1].config, num_classes=100)
    path = tmp_path / "model.dat"
    torch.save(_random_network(config, torch.float32).state_dict(), path)
    network = load_network(path, arch="seqresnet-k8r4")
    assert network.config == config
    assert network.module(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    with pytest.raises(InputError, match=r"SeqResNet of widths 64/128/192.*not the SeqResNet-B22"):
        load_network(path, arch="seqresnet-b22")
    with pytest.raises(InputError, match="whose activation is relu, not silu"):
        load_network(path, activation="silu")


@pytest.mark.parametrize("name", ["parnet-cifar-1.3m", "resnet18", "seqresnet-k8r4"])
def test_a_state_dict_is_recognised_by_one_family(name):
    family, entry = CATALOG[name]
    with torch.device("meta"):
        keys = family.build(entry.config, "none", ()).state_dict()
    assert [f.key for f in FAMILIES.values() if f.recognises(keys)] == [family.key]


def test_missing_unexpected_and_misshapen_tensors_are_named():
    net = _random_network(SMALL["bottleneck"])
    tensors = dict(net.state_dict())
    del tensors["Stage2.1.LayerB.Filters.0.BottleneckLayer.LinearLayer.weight"]
    tensors["Stage2.1.LayerC.weight"] = torch.zeros(1)
    tensors["Head1.LinearLayer.weight"] = torch.zeros(32, 32, 1, 1)
    with pytest.raises(InputError) as caught:
        load_strictly(net, tensors, "current.dat")
    text = str(caught.value)
    assert "missing: Stage2.1.LayerB.Filters.0.BottleneckLayer.LinearLayer.weight" in text
    assert "unexpected: Stage2.1.LayerC.weight" in text
    assert "Head1.LinearLayer.weight (32, 32, 1, 1) instead of (32, 32, 3, 3)" in text


def _without(tensors, prefix):
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}


def _renamed(tensors, old, new):
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


FIRST = "Stage1.0.LayerA.Filters.0.LinearLayer.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _without(t, "Blender"), r"Blender\.LinearLayer\.weight is missing"),
        (lambda t: _without(t, "Init"), "neither Init nor Head0 is there"),
        (lambda t: _without(t, "Stage"), "it has no stages"),
        (lambda t: _without(t, "Stage2"), r"stages are numbered \[1, 3\]"),
        (lambda t: _renamed(t, "Stage3.1", "Stage3.7"), r"Stage3 are numbered \[0, 2, 7\]"),
        (lambda t: _without(t, "Stage1.0.LayerA.Filters.0"), "a stage has no first filter"),
        (lambda t: _renamed(t, "Filters.3", "Filters.9"), r"Filters\.3 of a stage is no conv"),
        (lambda t: t | {FIRST: torch.zeros(4)}, r"Filters\.0 of a stage is no convolution"),
        (lambda t: t | {FIRST: torch.zeros(5, 16, 3, 3)}, "cannot widen 20 to 32 channels by 5"),
        (lambda t: t | {FIRST: torch.zeros(0, 16, 3, 3)}, "no convolution"),
        (lambda t: t | {"Classifier.weight": torch.zeros(7)}, "Classifier is no linear layer"),
    ],
)
def test_impossible_structures_are_refused(change, message):
    tensors = dict(_on_meta(SMALL["plain"]).state_dict())
    with pytest.raises(ValueError, match=message):
        SeqConvConfig.from_tensors(change(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": "mnist"}, "unknown stem 'mnist'"),
        ({"filters": "pointwise"}, "or filters 'pointwise'"),
        ({"blocks": (1, 1)}, "one width, block count, k and cardinality per stage"),
        ({"widths": (), "blocks": (), "filter_widths": (), "cardinality": ()}, "per stage"),
        ({"blocks": (1, 0, 1)}, "at least one channel, block, group and class"),
        ({"num_classes": 0}, "at least one channel, block, group and class"),
        ({"filter_widths": (4, 5, 8)}, "cannot make 32 channels of 5 in 1 groups each"),
        ({"filters": "grouped", "cardinality": (3, 1, 1)}, "of 4 in 3 groups each"),
        ({"cardinality": (2, 1, 1)}, "has 2 groups in plain filters"),
        ({"widths": (16, 16, 40)}, "cannot widen 16 to 16"),
        ({"filter_widths": (16, 16, 8), "widths": (16, 32, 40)}, "cannot widen 32 to 40"),
        ({"aliased": True, "windowed": False}, "aliased without a window"),
    ],
)
def test_a_configuration_validates_itself(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL["plain"], **change)


@pytest.mark.parametrize(
    "config",
    [
        CATALOG["seqresnet-k8r4"][1].config,
        replace(CATALOG["seqresnet-b-k32r12"][1].config, widths=(64, 128, 192)),
        replace(
            CATALOG["seqresnext-24"][1].config,
            widths=(32, 64, 128, 256),
            filter_widths=(8, 16, 16, 32),
        ),
    ],
    ids=["plain", "bottleneck", "grouped"],
)
def test_random_weights_stay_far_inside_half_precision(config):
    net = _random_network(config, torch.float32)
    largest = []

    def record(_module, _inputs, output):
        tensors = output if isinstance(output, tuple) else (output,)
        largest.append(max(float(tensor.abs().max()) for tensor in tensors))

    for module in net.modules():
        module.register_forward_hook(record)
    net(torch.randn(1, 3, 32, 32))
    assert largest[-1] > 1e-2
    assert max(largest) < 1000
