from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parnet_export.models.batch_norm import fold_into_conv, randomise_batch_norm, scale_and_shift


def _relative_difference(found, reference):
    return float(((found - reference).abs().max() / reference.abs().max()).detach())


def _random_bn(channels, *, affine=True, seed=0):
    bn = nn.BatchNorm2d(channels, affine=affine)
    randomise_batch_norm(bn, torch.Generator().manual_seed(seed))
    return bn.eval()


@pytest.mark.parametrize("affine", [True, False])
def test_scale_and_shift_are_the_map_that_torch_applies(affine):
    bn = _random_bn(5, affine=affine).double()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    scale, shift = scale_and_shift(bn)
    by_hand = x * scale[:, None, None] + shift[:, None, None]
    assert _relative_difference(by_hand, bn(x)) < 1e-14


def test_scale_and_shift_are_double_even_for_a_half_precision_module():
    scale, shift = scale_and_shift(_random_bn(4).half())
    assert scale.dtype == shift.dtype == torch.float64
    assert not scale.requires_grad
    assert not shift.requires_grad


def test_a_normalisation_without_running_statistics_is_refused():
    with pytest.raises(ValueError, match="without running statistics"):
        scale_and_shift(nn.BatchNorm2d(3, track_running_stats=False))


def test_a_normalisation_of_another_width_is_refused():
    with pytest.raises(ValueError, match="4 channels feeds no BatchNorm2d of 3"):
        fold_into_conv(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(3))


@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    padding=st.sampled_from([(0, 0), (1, 1), (2, 1), "valid"]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    bias=st.booleans(),
    affine=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular"]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_folding_is_exact_in_every_geometry(
    *, groups, kernel, stride, padding, dilation, bias, affine, padding_mode, seed
):
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        8,
        12,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=padding_mode,
    ).double()
    bn = _random_bn(12, affine=affine, seed=seed).double()
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    assert _relative_difference(fold_into_conv(conv, bn)(x), bn(conv(x))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_type_of_the_convolution(dtype):
    folded = fold_into_conv(nn.Conv2d(2, 3, 3, dtype=dtype), _random_bn(3))
    assert folded.weight.dtype == dtype
    assert folded.bias is not None
    assert folded.bias.dtype == dtype


def test_half_precision_rounds_once_only():
    conv = nn.Conv2d(2, 3, 3, dtype=torch.float16)
    bn = _random_bn(3).half()
    exact = fold_into_conv(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    folded = fold_into_conv(conv, bn)
    assert torch.equal(folded.weight, exact.weight.half())
    assert torch.equal(folded.bias, exact.bias.half())


def test_folding_leaves_its_arguments_alone():
    conv, bn = nn.Conv2d(2, 3, 3), _random_bn(3).train()
    before = copy.deepcopy((conv.state_dict(), bn.state_dict()))
    folded = fold_into_conv(conv, bn)
    with torch.no_grad():
        folded.weight.zero_()
    for was, now in zip(before, (conv.state_dict(), bn.state_dict()), strict=True):
        assert all(torch.equal(was[name], now[name]) for name in was)
    assert bn.training
    assert conv.bias is not None
    assert not folded.training


def test_randomising_reaches_every_normalisation_and_nothing_else():
    network = nn.Sequential(
        nn.Conv2d(3, 200, 3),
        nn.BatchNorm2d(200),
        nn.Sequential(nn.BatchNorm2d(200, affine=False), nn.Linear(2, 2)),
        nn.BatchNorm2d(200, track_running_stats=False),
    )
    before = copy.deepcopy(network.state_dict())
    randomise_batch_norm(network, torch.Generator().manual_seed(0))
    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "2.0.running_mean",
        "2.0.running_var",
        "3.weight",
        "3.bias",
    }
    for bn in (network[1], network[2][0]):
        assert 0.5 <= float(bn.running_var.min()) < 0.6
        assert 1.9 < float(bn.running_var.max()) <= 2.0
        assert 0.2 < float(bn.running_mean.std()) < 0.4
    gamma = network[1].weight.detach()
    assert 0.5 <= float(gamma.min()) < 0.6
    assert 1.4 < float(gamma.max()) <= 1.5


def test_one_seed_gives_one_network_in_every_precision():
    single, double = nn.BatchNorm2d(50), nn.BatchNorm2d(50).double()
    for bn in (single, double):
        randomise_batch_norm(bn, torch.Generator().manual_seed(3))
    assert torch.equal(single.running_var, double.running_var.float())
    other = nn.BatchNorm2d(50)
    randomise_batch_norm(other, torch.Generator().manual_seed(4))
    assert not torch.equal(single.running_var, other.running_var)


def test_the_mean_square_of_the_random_scale_is_one():
    scale, _ = scale_and_shift(_random_bn(100_000))
    assert float(scale.square().mean()) == pytest.approx(1.0, abs=0.02)


def test_padding_by_name_is_kept():
    conv, bn = nn.Conv2d(3, 4, 3, padding="same", dtype=torch.float64), _random_bn(4).double()
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    assert fold_into_conv(conv, bn).padding == "same"
    assert _relative_difference(fold_into_conv(conv, bn)(x), bn(conv(x))) < 1e-12
