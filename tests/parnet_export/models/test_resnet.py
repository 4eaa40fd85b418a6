from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from parnet_export.checkpoints.checkpoint import load_strictly, read_checkpoint, write_safetensors
from parnet_export.errors import InputError
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.resnet import (
    FusedResNet,
    ResNetConfig,
    build_fused_resnet,
    build_resnet,
    fold_resnet,
    is_fused_resnet,
    is_resnet,
)

STAGES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}


def _config(depth, width=64, num_classes=1000):
    block, blocks = STAGES[depth]
    return ResNetConfig(block, blocks, width, num_classes)


def _random_resnet(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = build_resnet(config).to(dtype)
    randomise_batch_norm(model, torch.Generator().manual_seed(seed))
    return model


def _relative_difference(found, reference):
    return float(((found - reference).abs().max() / reference.abs().max()).detach())


def _torchvision_layout(depth, num_classes):
    """Names and shapes of torchvision's state dicts, from the tables of the paper."""
    kind, blocks = STAGES[depth]
    expansion = 4 if kind == "bottleneck" else 1
    layout = {}

    def conv_and_norm(conv, norm, *shape):
        layout[f"{conv}.weight"] = shape
        for name in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{norm}.{name}"] = shape[:1]
        layout[f"{norm}.num_batches_tracked"] = ()

    conv_and_norm("conv1", "bn1", 64, 3, 7, 7)
    before = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        after = width * expansion
        for block in range(count):
            at = f"layer{stage}.{block}"
            if kind == "basic":
                shapes = [(width, before, 3, 3), (width, width, 3, 3)]
            else:
                shapes = [(width, before, 1, 1), (width, width, 3, 3), (after, width, 1, 1)]
            for number, shape in enumerate(shapes, 1):
                conv_and_norm(f"{at}.conv{number}", f"{at}.bn{number}", *shape)
            if before != after:
                conv_and_norm(f"{at}.downsample.0", f"{at}.downsample.1", after, before, 1, 1)
            before = after
    layout["fc.weight"] = (num_classes, before)
    layout["fc.bias"] = (num_classes,)
    return layout


def _evaluate_by_table(state, kind, blocks, x, act=functional.relu):
    """ResNet written out with plain functions, as an independent reference."""

    def norm(x, name):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        gamma, beta = state[f"{name}.weight"], state[f"{name}.bias"]
        normalised = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return normalised * gamma[:, None, None] + beta[:, None, None]

    def unit(x, conv, norm_name, stride=1):
        weight = state[f"{conv}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)
        return norm(x, norm_name)

    x = functional.max_pool2d(act(unit(x, "conv1", "bn1", 2)), 3, 2, 1)
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            if kind == "basic":
                y = act(unit(x, f"{at}.conv1", f"{at}.bn1", stride))
                y = unit(y, f"{at}.conv2", f"{at}.bn2")
            else:
                y = act(unit(x, f"{at}.conv1", f"{at}.bn1"))
                y = act(unit(y, f"{at}.conv2", f"{at}.bn2", stride))
                y = unit(y, f"{at}.conv3", f"{at}.bn3")
            if f"{at}.downsample.0.weight" in state:
                x = unit(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            if f"{at}.gate.norm.weight" in state:
                x = norm(x, f"{at}.gate.norm")
            if f"{at}.gate.conv.weight" in state:
                pooled = functional.adaptive_avg_pool2d(x, 1)
                x = x * functional.conv2d(pooled, state[f"{at}.gate.conv.weight"]).sigmoid()
            x = act(x + y)
    pooled = functional.adaptive_avg_pool2d(x, 1).flatten(1)
    return functional.linear(pooled, state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("depth", "parameters", "gmac"),
    [
        (18, 11_689_512, 1.814),
        (34, 21_797_672, 3.664),
        (50, 25_557_032, 4.089),
        (101, 44_549_160, 7.801),
    ],
)
def test_parameters_and_operations_are_the_published_ones(depth, parameters, gmac):
    config = _config(depth)
    with torch.device("meta"):
        model, fused = build_resnet(config), build_fused_resnet(config)
        images = torch.empty(1, 3, 224, 224)
    assert config.depth == depth
    assert sum(p.numel() for p in model.parameters()) == parameters
    for form in (model, fused):
        with FlopCounterMode(display=False) as counter:
            form(images)
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=5e-4)


@pytest.mark.parametrize("depth", STAGES)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_names_and_shapes_are_those_of_torchvision(depth, num_classes):
    with torch.device("meta"):
        state = build_resnet(_config(depth, num_classes=num_classes)).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert found == _torchvision_layout(depth, num_classes)
    assert len(found) == {18: 122, 34: 218, 50: 320, 101: 626}[depth]


@pytest.mark.parametrize("depth", STAGES)
def test_the_network_computes_what_the_tables_say(depth):
    model = _random_resnet(_config(depth, width=8))
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    reference = _evaluate_by_table(model.state_dict(), *STAGES[depth], images)
    assert _relative_difference(model(images), reference) < 1e-12


GATED = {
    kind: ResNetConfig(kind, (1, 1, 2), 8, 7, gated=True, activation=activation)
    for kind, activation in (("basic", "silu"), ("bottleneck", "relu"))
}


@pytest.mark.parametrize("config", GATED.values(), ids=GATED)
def test_gated_shortcuts_compute_what_the_paper_says_and_fold_exactly(config):
    model = _random_resnet(config)
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    act = {"silu": functional.silu, "relu": functional.relu}[config.activation]
    reference = _evaluate_by_table(model.state_dict(), config.block, config.blocks, images, act)
    assert _relative_difference(model(images), reference) < 1e-12
    folded = fold_resnet(model)
    assert _relative_difference(folded(images), reference) < 1e-12
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize("config", GATED.values(), ids=GATED)
def test_gates_are_read_off_the_tensors_and_the_activation_is_not(config):
    for form in (build_resnet(config), build_fused_resnet(config)):
        found = ResNetConfig.from_tensors(form.state_dict(), config.activation)
        assert found == config
        assert ResNetConfig.from_tensors(form.state_dict()).activation == "silu"


def test_a_plain_resnet_has_no_other_activation():
    state = build_resnet(_config(18, width=8)).state_dict()
    with pytest.raises(ValueError, match="whose activation is relu, not silu"):
        ResNetConfig.from_tensors(state, "silu")
    with pytest.raises(ValueError, match="whose activation is silu or relu, not mish"):
        ResNetConfig.from_tensors(build_resnet(GATED["basic"]).state_dict(), "mish")


# Every pair of (depth, classes, batch, side) values occurs in one of these rows.
PAIRWISE = [
    (18, 10, 1, 64),
    (18, 1000, 2, 96),
    (18, 10, 7, 65),
    (34, 1000, 1, 96),
    (34, 10, 2, 65),
    (34, 1000, 7, 64),
    (50, 10, 1, 65),
    (50, 1000, 2, 64),
    (50, 10, 7, 96),
    (101, 1000, 1, 65),
    (101, 10, 2, 64),
    (101, 1000, 7, 96),
]
FULL = list(itertools.product(STAGES, (10, 1000), (1, 2, 7), (224, 256, 320)))


def _assert_folding_is_exact(depth, width, num_classes, batch, side):
    model = _random_resnet(_config(depth, width, num_classes))
    images = torch.randn(batch, 3, side, side, dtype=torch.float64)
    with torch.inference_mode():
        folded = fold_resnet(model)
        assert _relative_difference(folded(images), model(images)) < 1e-10
        single = copy.deepcopy(model).float()
        reference = single(images.float())
        assert _relative_difference(fold_resnet(single)(images.float()), reference) < 1e-5


@pytest.mark.parametrize(("depth", "num_classes", "batch", "side"), PAIRWISE)
def test_folding_changes_nothing_but_rounding(depth, num_classes, batch, side):
    _assert_folding_is_exact(depth, 16, num_classes, batch, side)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "num_classes", "batch", "side"), FULL)
def test_folding_changes_nothing_but_rounding_on_the_full_grid(depth, num_classes, batch, side):
    _assert_folding_is_exact(depth, 16, num_classes, batch, side)


@pytest.mark.slow
@pytest.mark.parametrize("depth", STAGES)
def test_folding_changes_nothing_but_rounding_at_full_width(depth):
    _assert_folding_is_exact(depth, 64, 1000, 1, 224)


def test_the_pairwise_grid_covers_every_pair():
    for one, other in itertools.combinations(range(4), 2):
        values = [{row[column] for row in PAIRWISE} for column in (one, other)]
        assert {(row[one], row[other]) for row in PAIRWISE} == set(itertools.product(*values))


def test_folding_is_pure():
    model = _random_resnet(_config(18, width=8)).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold_resnet(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert model.training
    assert not folded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_folded_network_has_a_bias_in_place_of_every_normalisation():
    model = _random_resnet(_config(50, width=8))
    expected = {
        name.replace(".weight", suffix)
        for name, tensor in model.state_dict().items()
        if tensor.ndim > 1
        for suffix in (".weight", ".bias")
    }
    assert set(fold_resnet(model).state_dict()) == expected


@pytest.mark.parametrize("depth", STAGES)
def test_both_forms_come_back_from_a_file(depth, tmp_path):
    config = _config(depth, width=8, num_classes=7)
    model = _random_resnet(config)
    folded = fold_resnet(model)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for form, build in ((model, build_resnet), (folded, build_fused_resnet)):
        path = tmp_path / "resnet.safetensors"
        write_safetensors(path, form.state_dict(), {})
        tensors = read_checkpoint(path).tensors
        assert is_resnet(tensors)
        assert is_fused_resnet(tensors) == isinstance(form, FusedResNet)
        assert ResNetConfig.from_tensors(tensors) == config
        loaded = build(ResNetConfig.from_tensors(tensors)).double()
        load_strictly(loaded, tensors, path)
        assert torch.equal(loaded(images), form(images))


def test_a_state_dict_without_batch_counters_loads():
    model = _random_resnet(_config(18, width=8))
    old = {n: t for n, t in model.state_dict().items() if "num_batches_tracked" not in n}
    loaded = build_resnet(_config(18, width=8)).double()
    load_strictly(loaded, old, "resnet18-5c106cde.pth")
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(loaded(images), model(images))


def _parnet_like_keys():
    return {
        "inits.0.0.block.rbr_dense.conv.weight": torch.zeros(64, 3, 3, 3),
        "streams.0.0.block.rbr_identity.weight": torch.zeros(64),
        "head.fc.weight": torch.zeros(10, 64),
    }


def test_a_parnet_is_not_taken_for_a_resnet():
    tensors = _parnet_like_keys()
    assert not is_resnet(tensors)
    assert not is_fused_resnet(tensors)
    with pytest.raises(ValueError, match=r"holds no ResNet: conv1\.weight is missing"):
        ResNetConfig.from_tensors(tensors)
    with pytest.raises(InputError) as caught:
        load_strictly(build_resnet(_config(18, width=8)), tensors, "parnet.pth")
    text = str(caught.value)
    assert "parnet.pth: does not fit ResNet" in text
    assert "missing: conv1.weight, bn1.weight" in text
    assert "and 92 more; unexpected: inits.0.0.block.rbr_dense.conv.weight" in text


def test_gates_that_the_network_lacks_are_named():
    tensors = dict(build_resnet(_config(18, width=8)).state_dict())
    tensors["layer1.0.se.fc1.weight"] = torch.zeros(2, 8, 1, 1)
    tensors["layer1.0.se.fc2.weight"] = torch.zeros(8, 2, 1, 1)
    config = ResNetConfig.from_tensors(tensors)
    with pytest.raises(InputError, match=r"unexpected: layer1\.0\.se\.fc1\.weight, layer1\.0\.se"):
        load_strictly(build_resnet(config), tensors, "seresnet18.pth")


def test_a_wider_bottleneck_is_named_by_its_shapes():
    tensors = dict(build_resnet(_config(50, width=8)).state_dict())
    tensors["layer1.0.conv2.weight"] = torch.zeros(16, 16, 3, 3)
    config = ResNetConfig.from_tensors(tensors)
    expected = r"layer1\.0\.conv2\.weight \(16, 16, 3, 3\) instead of \(8, 8, 3, 3\)"
    with pytest.raises(InputError, match=expected):
        load_strictly(build_resnet(config), tensors, "wide_resnet50_2.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight": torch.zeros(8)}, "conv1 is no convolution"),
        ({"fc.weight": torch.zeros(8)}, "fc no linear layer"),
        ({"layer7.0.conv1.weight": torch.zeros(8)}, r"stages are numbered \[1, 2, 3, 4, 7\]"),
    ],
)
def test_impossible_structures_are_refused(change, message):
    tensors = dict(build_resnet(_config(18, width=8)).state_dict()) | change
    with pytest.raises(ValueError, match=message):
        ResNetConfig.from_tensors(tensors)


@pytest.mark.parametrize("arguments", [("basic", ()), ("basic", (2, 0)), ("grouped", (2, 2))])
def test_a_configuration_validates_itself(arguments):
    with pytest.raises(ValueError, match=r"unknown kind|at least one"):
        ResNetConfig(*arguments)


@pytest.mark.parametrize("depth", STAGES)
def test_random_weights_stay_far_inside_half_precision(depth):
    model = _random_resnet(_config(depth, width=16), torch.float32)
    largest = []

    def record(_module, _inputs, output):
        largest.append(float(output.detach().abs().max()))

    for module in model.modules():
        module.register_forward_hook(record)
    model(torch.randn(1, 3, 96, 96))
    assert largest[-1] > 1e-2
    assert max(largest) < 1000
