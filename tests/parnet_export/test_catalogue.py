"""What every network of the catalogue must do, shown on a small member of each kind."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import onnxruntime
import pytest
import torch

from parnet_export.catalogue.census import take_census
from parnet_export.checkpoints.checkpoint import write_safetensors
from parnet_export.errors import InputError
from parnet_export.fuse import fuse, fuse_network
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.catalog import CATALOG, FAMILIES
from parnet_export.models.parnet import ParNetConfig
from parnet_export.models.parnet_detector import ParNetDetectorConfig
from parnet_export.models.parnet_ensemble import EnsembleConfig
from parnet_export.models.resnet import ResNetConfig
from parnet_export.models.seqconv_config import SeqConvConfig
from parnet_export.models.yolov4_csp_layers import YOLOv4CSPConfig
from parnet_export.network import Header
from parnet_export.pipeline import export_graph, fuse_and_prove, make_bundle
from parnet_export.source import load_network

LEVELS = ("repvgg", "full")
CLASSES = 7
ONE_STREAM = ParNetConfig((24,), (2,), 40, CLASSES, stem=(8, 12, 16, 24))

DETECTOR = ParNetDetectorConfig(
    widths=(8, 12, 16),
    blocks=(1, 2, 2),
    last_width=24,
    pyramid_width=20,
    neck_widths=(6, 8, 10),
    neck_blocks=1,
    num_classes=CLASSES,
)

SMALL = {
    # Kind: family, structure, resolution, segments at least.
    "three streams": ("parnet", ParNetConfig((8, 16, 32), (2, 2, 2), 64, CLASSES), 64, 5),
    "one stream": ("parnet", ONE_STREAM, 64, 1),
    "two streams": ("parnet", ParNetConfig((16, 32), (2, 2), 40, CLASSES, stem=(8, 16)), 64, 2),
    "four streams": (
        "parnet",
        ParNetConfig((8, 16, 32, 64), (1, 2, 2, 2), 40, CLASSES, stem=(8,)),
        64,
        5,
    ),
    "cifar": (
        "parnet",
        ParNetConfig((8, 16, 32), (1, 2, 2), 40, CLASSES, variant="cifar"),
        32,
        5,
    ),
    "ensemble of two": (
        "parnet-ensemble",
        EnsembleConfig((24,), (2,), 40, CLASSES, stem=(8, 12, 16, 24), members=2),
        64,
        3,
    ),
    "ensemble of three": (
        "parnet-ensemble",
        EnsembleConfig((16,), (1,), 24, CLASSES, "relu", stem=(8, 16), members=3),
        64,
        4,
    ),
    "resnet basic": ("resnet", ResNetConfig("basic", (2, 1, 1), 8, CLASSES), 64, 1),
    "resnet bottleneck": ("resnet", ResNetConfig("bottleneck", (1, 1, 1), 8, CLASSES), 64, 1),
    "resnet gated": (
        "resnet",
        ResNetConfig("basic", (1, 1, 2), 8, CLASSES, gated=True, activation="silu"),
        64,
        1,
    ),
    "seqconv plain": (
        "seqconv",
        SeqConvConfig("cifar", "plain", (16, 24), (2, 1), (8, 8), (1, 1), CLASSES),
        32,
        1,
    ),
    "seqconv bottleneck": (
        "seqconv",
        SeqConvConfig("imagenet", "bottleneck", (16, 24), (1, 1), (8, 8), (1, 1), CLASSES),
        32,
        1,
    ),
    "seqconv aliased": (
        "seqconv",
        SeqConvConfig(
            "imagenet", "grouped", (16, 32), (1, 1), (8, 16), (2, 4), CLASSES, aliased=True
        ),
        32,
        1,
    ),
    # So small, its heads are not worth a segment of their own; test_yolov4_csp.py has larger ones.
    "yolov4-csp": ("yolov4-csp", YOLOv4CSPConfig(width=4, num_classes=CLASSES), 64, 1),
    "parnet detector": ("parnet-detector", DETECTOR, 64, 5),
}


def _training_form(kind, seed=0):
    key, config, resolution, _ = SMALL[kind]
    torch.manual_seed(seed)
    module = FAMILIES[key].build(config, "none", ()).eval()
    randomise_batch_norm(module, torch.Generator().manual_seed(seed))
    images = torch.randn(2, 3, resolution, resolution, dtype=torch.float64)
    return module.requires_grad_(requires_grad=False), images


def _outputs(result):
    """Return a classifier's output or a detector's heads as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def _difference(found, reference):
    """Return the largest relative difference of any output."""
    pairs = zip(_outputs(found), _outputs(reference), strict=True)
    return max(float((f - r).detach().abs().max() / r.abs().max()) for f, r in pairs)


def _equal(found, reference):
    return all(map(torch.equal, _outputs(found), _outputs(reference)))


def test_every_family_has_a_kind():
    assert {family for family, *_ in SMALL.values()} == set(FAMILIES)


@pytest.fixture
def checkpoint(tmp_path):
    """Write a kind's training form as a bare state dict; return the file and the module."""

    def write(kind, change=None):
        module, _ = _training_form(kind)
        state = module.state_dict()
        path = tmp_path / "network.pth"
        torch.save(change(dict(state)) if change else state, path)
        return path, module

    return write


def _activation(kind):
    return getattr(SMALL[kind][1], "activation", "auto")


@pytest.mark.parametrize("kind", SMALL)
def test_both_fuse_levels_compute_the_same(kind):
    module, images = _training_form(kind)
    exact = copy.deepcopy(module).double()
    reference = exact(images)
    for level in LEVELS:
        fused = fuse(exact, level)
        assert _difference(fused(images), reference) <= 1e-9
        assert _difference(fuse(module, level)(images.float()), module(images.float())) <= 1e-5
        if level == "full":
            assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.parametrize("kind", SMALL)
def test_runtime_and_split_compute_what_the_training_form_does(kind, checkpoint, tmp_path):
    path, module = checkpoint(kind)
    _, _, resolution, segments = SMALL[kind]
    network = load_network(path, activation=_activation(kind))
    model, provenance = export_graph(network, resolution=resolution, batch=2)
    bundle, _ = make_bundle(model, provenance, tmp_path / "a.bundle")
    assert len(bundle.stream_graph.segments) >= segments
    assert bundle.manifest.split_error is not None
    assert bundle.manifest.split_error <= 1e-6
    images = torch.randn(2, 3, resolution, resolution)
    session = onnxruntime.InferenceSession(bundle.whole_path, providers=["CPUExecutionProvider"])
    found = tuple(map(torch.from_numpy, session.run(None, {"image": images.numpy()})))
    assert _difference(found, module(images)) <= 1e-4


@pytest.mark.parametrize("kind", SMALL)
def test_a_state_dict_gives_back_structure_and_outputs_at_every_level(kind, checkpoint, tmp_path):
    path, module = checkpoint(kind)
    key, config, _, _ = SMALL[kind]
    network = load_network(path, activation=_activation(kind))
    images = _training_form(kind)[1].float()
    assert (network.family, network.level, network.config) == (key, "none", config)
    assert _equal(network.module(images), module(images))
    recognised = [f.key for f in FAMILIES.values() if f.recognises(module.state_dict())]
    assert recognised == [key]
    for level in LEVELS:
        fused = fuse_network(network, level)
        file = tmp_path / f"{level}.safetensors"
        write_safetensors(file, fused.module.state_dict(), Header.of(fused).encode())
        again = load_network(file)
        assert (again.level, again.config) == (level, config)
        assert _equal(again.module(images), fused.module(images))


@pytest.mark.parametrize("kind", SMALL)
def test_every_fault_of_a_state_dict_is_named(kind, checkpoint):
    # A BatchNorm's: no structure is read off it.
    state = _training_form(kind)[0].state_dict()
    names = [name for name in state if name.replace(".weight", ".running_var") in state]
    names = [name for name in names if name.endswith(".weight")]
    chosen = names[len(names) // 2]

    def without(state):
        del state[chosen]
        return state

    def with_another(state):
        return state | {"surplus.weight": torch.zeros(3)}

    def misshapen(state):
        return state | {chosen: state[chosen].repeat(2)}

    def broken(state):
        return state | {chosen: state[chosen] * float("nan")}

    for change, named in (
        (without, chosen),
        (with_another, "surplus.weight"),
        (misshapen, chosen),
        (broken, chosen),
    ):
        path, _ = checkpoint(kind, change)
        with pytest.raises(InputError) as caught:
            load_network(path, activation=_activation(kind))
        assert str(path) in str(caught.value)
        assert named in str(caught.value)


@pytest.mark.parametrize("kind", SMALL)
def test_counting_without_values_counts_what_a_computation_does(kind):
    key, config, resolution, _ = SMALL[kind]
    for level in ("none", *LEVELS):
        with torch.device("meta"):
            without_values = FAMILIES[key].build(config, level, ())
        module = FAMILIES[key].build(config, level, ())
        assert take_census(without_values, resolution) == take_census(module, resolution)


def test_an_ensemble_averages_the_probabilities_of_its_members():
    module, images = _training_form("ensemble of three")
    exact = module.double()
    expected = torch.stack([member(images).softmax(1) for member in exact.members]).mean(0)
    assert _difference(exact(images), expected) < 1e-14
    assert not torch.allclose(exact.members[0](images), exact.members[1](images))
    assert torch.allclose(exact(images).sum(1), torch.ones(2, dtype=torch.float64))


def test_an_ensemble_of_two_structures_or_with_a_gap_is_refused(checkpoint):
    def other_structure(state):
        other = FAMILIES["parnet"].build(replace(ONE_STREAM, blocks=(3,)), "none", ())
        kept = {key: t for key, t in state.items() if key.startswith("members.0.")}
        return kept | {f"members.1.{key}": t for key, t in other.state_dict().items()}

    def gap(state):
        return {key.replace("members.1.", "members.2."): t for key, t in state.items()}

    for change, problem in ((other_structure, "differ in structure"), (gap, "numbered 0, 2")):
        path, _ = checkpoint("ensemble of two", change)
        with pytest.raises(InputError, match=problem):
            load_network(path)


def test_the_members_of_an_ensemble_run_side_by_side(checkpoint, tmp_path):
    path, _ = checkpoint("ensemble of three")
    network = load_network(path, activation="relu")
    model, provenance = export_graph(network, resolution=64, batch=1)
    graph = make_bundle(model, provenance, tmp_path / "a.bundle", prove=False)[0].stream_graph
    # A mean of the image's colours, which all their first gates read, may be shared.
    readers = [
        segment
        for segment in graph.segments
        if segment.cost.macs and "image" in [tensor.name for tensor in segment.inputs]
    ]
    assert len(readers) == 3
    assert sum(s.cost.macs for s in readers) == sum(s.cost.macs for s in graph.segments)
    assert [t.name for t in graph.outputs] == ["probabilities"]


@pytest.mark.parametrize("name", CATALOG)
def test_every_name_is_recognised_and_its_structure_read_off(name):
    family, entry = CATALOG[name]
    with torch.device("meta"):
        state = family.build(entry.config, "none", ()).state_dict()
    assert [f.key for f in FAMILIES.values() if f.recognises(state)] == [family.key]
    restored = family.restore(state, getattr(entry.config, "activation", "auto"))
    told = {field: getattr(entry.config, field) for field in family.untold}
    assert (replace(restored.config, **told), restored.level) == (entry.config, "none")
    assert entry.resolution % family.input_multiple(entry.config) == 0
    assert (entry.origin == "reconstruction") == bool(entry.choices)


def test_a_name_gives_a_checkpoint_its_resolution(tmp_path, monkeypatch):
    family, entry = CATALOG["parnet-xl-320"]
    small = replace(entry, config=SMALL["three streams"][1])
    monkeypatch.setitem(CATALOG, "parnet-xl-320", (family, small))
    path = tmp_path / "ft.pth"
    torch.save(_training_form("three streams")[0].state_dict(), path)
    assert load_network(path, arch="parnet-xl-320").resolution == 320
    assert load_network(path).resolution == 224


# Multiply-accumulates counted with the authors' blocks, fused, at 32 pixels.
@pytest.mark.parametrize(
    ("width", "last_width", "gmac"), [(32, 256, 0.154), (112, 640, 1.873), (168, 640, 4.197)]
)
def test_cifar_networks_have_the_work_of_the_authors_blocks(width, last_width, gmac):
    config = ParNetConfig(
        (width, 2 * width, 4 * width), (3, 4, 4), last_width, num_classes=10, variant="cifar"
    )
    with torch.device("meta"):
        module = FAMILIES["parnet"].build(config, "repvgg", ())
    assert take_census(module, 32).macs / 1e9 == pytest.approx(gmac, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_every_network_in_its_real_size_fuses_runs_and_splits_exactly(name, tmp_path):
    network = load_network(name)
    for level in LEVELS:
        fused, proof = fuse_and_prove(network, level)
        assert proof.float64_error <= 1e-9
        model, provenance = export_graph(fused, resolution=None, batch=1)
        bundle, _ = make_bundle(model, provenance, tmp_path / f"{level}.bundle")
        assert bundle.manifest.split_error <= 1e-6
        images = torch.randn(1, 3, network.resolution, network.resolution)
        session = onnxruntime.InferenceSession(
            bundle.whole_path, providers=["CPUExecutionProvider"]
        )
        found = tuple(map(torch.from_numpy, session.run(None, {"image": images.numpy()})))
        assert _difference(found, network.module(images)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_every_network_in_its_real_size_comes_back_from_its_files(name, tmp_path):
    network = load_network(name)
    images = torch.randn(1, 3, network.resolution, network.resolution)
    file = tmp_path / "trained.pth"
    torch.save(network.module.state_dict(), file)
    activation = getattr(network.config, "activation", "auto")
    again = load_network(file, arch=name, activation=activation)
    assert (again.config, again.level) == (network.config, "none")
    assert _equal(again.module(images), network.module(images))
    for level in LEVELS:
        fused = fuse_network(network, level)
        file = tmp_path / "fused.safetensors"
        write_safetensors(file, fused.module.state_dict(), Header.of(fused).encode())
        again = load_network(file)
        assert (again.config, again.level) == (network.config, level)
        assert _equal(again.module(images), fused.module(images))
    state = network.module.state_dict()
    statistics = [key for key in state if key.endswith(".running_var")]  # no structure is in them
    lost = statistics[len(statistics) // 2]
    del state[lost]
    torch.save(state, tmp_path / "lost.pth")
    with pytest.raises(InputError, match=re.escape(lost)):
        load_network(tmp_path / "lost.pth", arch=name, activation=activation)
