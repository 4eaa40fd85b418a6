from __future__ import annotations

import pytest
import torch
from torch import nn

from parnet_export.catalogue.census import count_catalogue, take_census


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in count_catalogue()}


# Counted once with the authors' code; FLOPs are two per multiply-accumulate, at 224 pixels.
@pytest.mark.parametrize(
    ("name", "unfused", "repvgg", "gmac_unfused", "gmac"),
    [
        ("parnet-s", 20_983_848, 19_177_032, 5.3739, 4.8368),
        ("parnet-s-92", 20_930_936, 19_128_980, 5.2595, 4.7339),
        ("parnet-m", 38_953_256, 35_576_616, 9.5348, 8.5819),
        ("parnet-l", 60_180_008, 54_914_824, 14.8037, 13.3241),
        ("parnet-xl", 93_176_168, 84_962_784, 23.0161, 20.7156),
    ],
)
def test_parnet_has_the_parameters_and_flops_of_the_authors_code(
    rows, name, unfused, repvgg, gmac_unfused, gmac
):
    row = rows[name]
    assert (row.parameters, row.parameters_repvgg) == (unfused, repvgg)
    assert row.flops_unfused / 2e9 == pytest.approx(gmac_unfused, abs=5e-5)
    assert row.flops / 2e9 == pytest.approx(gmac, abs=5e-5)
    assert row.depth == 12


@pytest.mark.parametrize(
    ("name", "parameters", "gmac", "depth"),
    [
        ("resnet18", 11_689_512, 1.814, 18),
        ("resnet34", 21_797_672, 3.664, 34),
        ("resnet50", 25_557_032, 4.089, 50),
        ("resnet101", 44_549_160, 7.801, 101),
    ],
)
def test_resnet_has_the_published_parameters_flops_and_depth(rows, name, parameters, gmac, depth):
    row = rows[name]
    assert row.parameters == parameters
    assert row.flops / 2e9 == pytest.approx(gmac, abs=5e-4)
    assert row.depth == depth


@pytest.mark.parametrize(
    ("name", "millions"), [("1.3m", 1.3), ("15.5m", 15.5), ("35m", 35)], ids=str
)
def test_cifar_reconstructions_round_to_the_published_sizes(rows, name, millions):
    row = rows[f"parnet-cifar-{name}"]
    digits = 1 if millions % 1 else 0
    assert round(row.parameters_repvgg / 1e6, digits) == millions
    assert row.origin == "reconstruction"
    assert row.choices
    assert row.depth == 12


def test_a_small_network_is_counted_like_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    census = take_census(network, 10)
    assert census.parameters == 8 * 3 * 9 + 16 + 12 * 2 * 9 + 12 + 12 * 5 + 5
    assert census.macs == 25 * 8 * 27 + 25 * 12 * 18 + 60
    assert census.flops == 2 * census.macs
    assert census.depth == 3


def test_depth_is_the_longest_of_parallel_chains():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.long = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))
            self.short = nn.Conv2d(3, 3, 1)
            self.last = nn.Conv2d(6, 1, 1)

        def forward(self, x):
            return self.last(torch.cat((self.short(x), self.long(x)), 1))

    assert take_census(Parallel(), 4).depth == 5
