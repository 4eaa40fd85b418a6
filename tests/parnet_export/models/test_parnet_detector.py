from __future__ import annotations

import copy
from dataclasses import replace

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from parnet_engines.proof.bundle_proof import prove_bundle
from parnet_export.catalogue.census import take_census
from parnet_export.checkpoints.safetensors_file import write_safetensors
from parnet_export.errors import InputError
from parnet_export.export import export_onnx
from parnet_export.fuse import fuse, fuse_network
from parnet_export.models.batch_norm import randomise_batch_norm
from parnet_export.models.catalog import CATALOG
from parnet_export.models.detector_neck import Neck
from parnet_export.models.implicit_head import ImplicitHead
from parnet_export.models.parnet_detector import ParNetDetector, ParNetDetectorConfig
from parnet_export.network import Header
from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network
from parnet_export.splitting.split import SplitOptions, split_model
from parnet_export.splitting.work_graph import DeviceModel

NAMES = ("parnet-xl-det", "parnet-xl-csp-det")
SMALL = ParNetDetectorConfig(
    widths=(8, 12, 16),
    blocks=(1, 2, 2),
    last_width=24,
    pyramid_width=20,
    neck_widths=(6, 8, 10),
    neck_blocks=2,
    num_classes=3,
)
CSP = replace(SMALL, partial=True)
CONFIGS = pytest.mark.parametrize("config", [SMALL, CSP], ids=["plain", "csp"])


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def random_detector(config, seed=0):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        detector = ParNetDetector(config)
        for name, parameter in detector.named_parameters():
            if name.endswith("implicit"):  # far from what changes nothing
                parameter.normal_(0.5, 1)
    randomise_batch_norm(detector, torch.Generator().manual_seed(seed))
    return detector.eval().requires_grad_(requires_grad=False)


def random_image(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def difference(actual, reference):
    pairs = zip(actual, reference, strict=True)
    return max(float((a - r).abs().max() / r.abs().max()) for a, r in pairs)


# ------------------------------------------------------------------ an independent reference


def run_by_hand(state, image, *, partial, blocks, neck_blocks):
    """The network written with plain functions, from the papers' descriptions."""

    def norm(x, prefix):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (state[f"{prefix}.{key}"] for key in keys)
        return functional.batch_norm(x, mean, var, gamma, beta, eps=1e-3)

    def act(x):
        return x * torch.sigmoid(x)

    # ParNet

    def branches(x, prefix, stride, groups):
        weight = state[f"{prefix}.rbr_dense.conv.weight"]
        total = norm(
            functional.conv2d(x, weight, None, stride, 1, 1, groups), f"{prefix}.rbr_dense.bn"
        )
        inner = f"{prefix}.rbr_1x1" if stride == 1 else f"{prefix}.rbr_1x1.1"
        pooled = x if stride == 1 else functional.avg_pool2d(x, 2, 2)
        one = functional.conv2d(pooled, state[f"{inner}.conv.weight"], groups=groups)
        return total + norm(one, f"{inner}.bn")

    def gate(x, prefix, groups=1):
        weight = state[f"{prefix}.se.cvsig.conv.weight"]
        return torch.sigmoid(functional.conv2d(x.mean((2, 3), True), weight, groups=groups))

    def down(x, name, stride=2, groups=1):
        prefix = f"backbone.{name}.block"
        out = act(branches(x, prefix, stride, groups) * 2 * gate(x, prefix, groups))
        if groups == 1:
            return out
        half = out.shape[1] // 2
        return torch.stack((out[:, :half], out[:, half:]), 2).flatten(1, 2)

    def stream(x, index):
        kept = None
        if partial:
            half = x.shape[1] // 2
            kept, x = x[:, :half], x[:, half:]
        for block in range(blocks[index]):
            prefix = f"backbone.streams.{index}.{block}.block"
            u = norm(x, f"{prefix}.rbr_identity")
            x = act(branches(x, prefix, 1, 1) + u * gate(u, prefix))
        return x if kept is None else torch.cat((kept, x), 1)

    def fusion(first, second, name, stride):
        pair = (norm(first, f"backbone.{name}.0.b1"), norm(second, f"backbone.{name}.0.b2"))
        return down(torch.stack(pair, 2).flatten(1, 2), f"{name}.2", stride, 2)

    a = down(down(image, "inits.0.0"), "inits.0.1")
    b = down(a, "inits.1")
    c = down(b, "inits.2")
    p3 = stream(b, 1)
    path = fusion(p3, down(stream(a, 0), "downsamples_2.0"), "downsamples_2.1", 2)
    p4 = fusion(stream(c, 2), path, "combine", 1)
    last = down(p4, "combine.3")

    # YOLOR-D6's blocks

    def conv(x, prefix, stride=1):
        weight = state[f"{prefix}.conv.weight"]
        y = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return act(norm(y, f"{prefix}.bn"))

    def join(main, x, prefix):
        bypass = functional.conv2d(x, state[f"{prefix}.bypass.weight"])
        return act(norm(torch.cat((main, bypass), 1), f"{prefix}.norm"))

    def csp(x, prefix):
        x = conv(x, f"{prefix}.reduce")
        y = x
        for block in range(neck_blocks):
            y = conv(conv(y, f"{prefix}.blocks.{block}.0"), f"{prefix}.blocks.{block}.1")
        return conv(join(y, x, f"{prefix}.join"), f"{prefix}.merge")

    def pyramid(x):
        y = x
        for index in range(3):
            y = conv(y, f"neck.pyramid_pool.before.{index}")
        pools = [functional.max_pool2d(y, size, 1, size // 2) for size in (5, 9, 13)]
        y = torch.cat([y, *pools], 1)
        for index in range(2):
            y = conv(y, f"neck.pyramid_pool.after.{index}")
        return conv(join(y, x, "neck.pyramid_pool.join"), "neck.pyramid_pool.merge")

    def halve(x, prefix):
        strided = conv(conv(x, f"{prefix}.reduce"), f"{prefix}.down", 2)
        return torch.cat((strided, conv(functional.max_pool2d(x, 2), f"{prefix}.pooled")), 1)

    def upsample(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    n5 = pyramid(conv(last, "backbone.project"))
    both = (conv(p4, "neck.laterals.1"), upsample(conv(n5, "neck.ups.1")))
    n4 = csp(torch.cat(both, 1), "neck.top_down.1")
    both = (conv(p3, "neck.laterals.0"), upsample(conv(n4, "neck.ups.0")))
    m3 = csp(torch.cat(both, 1), "neck.top_down.0")
    m4 = csp(torch.cat((halve(m3, "neck.downs.0"), n4), 1), "neck.bottom_up.0")
    m5 = csp(torch.cat((halve(m4, "neck.downs.1"), n5), 1), "neck.bottom_up.1")
    outputs = []
    for index, x in enumerate((m3, m4, m5)):
        y = conv(x, f"neck.outputs.{index}") + state[f"head.ia.{index}.implicit"]
        y = functional.conv2d(y, state[f"head.m.{index}.weight"], state[f"head.m.{index}.bias"])
        outputs.append(state[f"head.im.{index}.implicit"] * y)
    return outputs


@CONFIGS
@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (2, 3, 32, 32)], ids=str)
def test_the_network_computes_what_its_description_says(config, shape):
    detector = random_detector(config).double()
    image = random_image(*shape)
    outputs = detector(image)
    reference = run_by_hand(
        detector.state_dict(),
        image,
        partial=config.partial,
        blocks=config.blocks,
        neck_blocks=config.neck_blocks,
    )
    assert difference(outputs, reference) < 1e-12
    for output, stride in zip(outputs, (8, 16, 32), strict=True):
        assert output.shape == (shape[0], 24, shape[2] // stride, shape[3] // stride)


# ----------------------------------------------------------------------------- known figures


def test_neck_and_head_are_those_of_yolor_d6():
    """At the four levels of YOLOR-D6, whose parameters and operations are known."""
    with torch.device("meta"):
        neck = Neck((320, 640, 960, 1280), (160, 320, 480, 640), 3, activation="silu", level="none")
        head = ImplicitHead((320, 640, 960, 1280), 255, level="none")
        sizes = ((320, 160), (640, 80), (960, 40), (1280, 20))  # at 1280 pixels
        maps = [torch.empty(1, channels, size, size) for channels, size in sizes]
        counts = []
        for part in (neck.eval(), head):
            with FlopCounterMode(display=False) as counter:
                maps = part(maps)
            counts.append(counter.get_total_flops() / 2e9)
    assert sum(p.numel() for p in neck.parameters()) / 1e6 == pytest.approx(68.45, abs=0.005)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(0.82, abs=0.005)
    assert counts == [pytest.approx(147.5, abs=0.05), pytest.approx(3.7, abs=0.05)]


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_is_parnet_xl_twelve_layers_deep(name):
    family, entry = CATALOG[name]
    assert entry.origin == "reconstruction"
    assert entry.choices
    with torch.device("meta"):
        forms = {
            level: family.build(entry.config, level, ()) for level in ("none", "repvgg", "full")
        }
        assert {take_census(form.backbone, 640).depth for form in forms.values()} == {12}
        heads = forms["full"](torch.empty(1, 3, 640, 640))
        fused = take_census(forms["repvgg"].backbone, 640)
    assert [tuple(head.shape) for head in heads] == [(1, 255, size, size) for size in (80, 40, 20)]
    if name == "parnet-xl-det":
        project = 3200 * 960
        # ParNet-XL without its classifier, and the 1x1 convolution with its bias instead.
        assert fused.parameters == 84_962_784 - (3200 * 1000 + 1000) + project + 960
        # 169.1 GMAC at 640 pixels.
        assert (fused.macs - 400 * project) / 1e9 == pytest.approx(169.1, rel=1e-3)


def parameters_by_formula(config, *, trained):
    """Parameters of a detector, summed up layer by layer."""

    def conv(before, after, kernel, groups=1):
        return before * after * kernel**2 // groups + (2 * after if trained else after)

    def block(before, after, groups=1):
        one = conv(before, after, 1, groups) if trained else 0
        return conv(before, after, 3, groups) + one + before * after // groups

    w0, w1, w2 = config.widths
    total = block(3, min(64, w0)) + block(min(64, w0), w0) + block(w0, w1) + block(w1, w2)
    for width, blocks in zip(config.widths, config.blocks, strict=True):
        inner = width // 2 if config.partial else width
        total += blocks * (block(inner, inner) + 2 * inner)
    total += block(w0, w1) + block(2 * w1, w2, 2) + 4 * w1 + block(2 * w2, w2, 2) + 4 * w2
    total += block(w2, config.last_width) + conv(config.last_width, config.pyramid_width, 1)

    def join(before, width):
        return before * width + 4 * width + conv(2 * width, width, 1)

    def csp(width):
        pair = conv(width, width, 1) + conv(width, width, 3)
        return conv(2 * width, width, 1) + config.neck_blocks * pair + join(width, width)

    n3, n4, n5 = config.neck_widths
    top = config.pyramid_width
    total += conv(top, n5, 1) + 2 * conv(n5, n5, 3) + conv(n5, n5, 1) + conv(4 * n5, n5, 1)
    total += join(top, n5)
    for before, fine, coarse in ((w1, n3, n4), (w2, n4, n5)):
        total += conv(coarse, fine, 1) + conv(before, fine, 1) + csp(fine) + csp(coarse)
        total += conv(fine, fine, 1) + conv(fine, coarse // 2, 3) + conv(fine, coarse // 2, 1)
    out = 3 * (5 + config.num_classes)
    for width in config.neck_widths:
        total += conv(width, 2 * width, 3) + 2 * width * out + out
        total += 2 * width + out if trained else 0
    return total


@pytest.mark.parametrize(
    "config", [SMALL, CSP, *(CATALOG[name][1].config for name in NAMES)], ids=str
)
def test_parameters_are_those_of_the_formula(config):
    for level in ("none", "repvgg"):
        with torch.device("meta"):
            detector = ParNetDetector(config, level=level)
        counted = sum(p.numel() for p in detector.parameters())
        assert counted == parameters_by_formula(config, trained=level == "none")


# ------------------------------------------------------------------------------------ fusing


@CONFIGS
def test_fusing_changes_nothing_but_rounding(config):
    single = random_detector(config, seed=3)
    exact = copy.deepcopy(single).double()
    image = random_image(2, 3, 96, 64)
    reference, reference32 = exact(image), single(image.float())
    for level in ("repvgg", "full"):
        assert difference(fuse(exact, level)(image), reference) < 1e-12
        assert difference(fuse(single, level)(image.float()), reference32) < 1e-5
    twice = fuse(fuse(exact, "repvgg"), "full")
    assert difference(twice(image), reference) < 1e-12
    kinds = {type(module) for module in twice.modules()}
    assert nn.BatchNorm2d not in kinds
    assert not any("implicit" in name for name in fuse(single, "repvgg").state_dict())


def test_normalisations_with_large_shifts_keep_their_affine_step(tmp_path):
    """And a fused file of such a network can be read again."""
    detector = random_detector(SMALL)
    pair = detector.backbone.combine[0]
    pair.b1.weight.data *= 1e-3
    fused = fuse(detector, "full")
    assert "backbone.stream_parts.1.scale" in fused.state_dict()
    image = random_image(1, 3, 64, 64, dtype=torch.float32)
    assert difference(fused(image), detector(image)) < 1e-5
    torch.save(detector.state_dict(), tmp_path / "d.pth")
    network = fuse_network(load_network(tmp_path / "d.pth"), "full")
    path = tmp_path / "d.safetensors"
    write_safetensors(path, network.module.state_dict(), Header.of(network).encode())
    assert difference(load_network(path).module(image), fused(image)) == 0


@CONFIGS
def test_fusing_is_pure(config):
    detector = random_detector(config).train()
    before = copy.deepcopy(detector.state_dict())
    for level in ("repvgg", "full"):
        for parameter in fuse(fuse(detector, "repvgg"), level).parameters():
            parameter.data.zero_()
    assert detector.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())


# ----------------------------------------------------------------------------------- sources


@CONFIGS
@pytest.mark.parametrize("level", ["none", "repvgg", "full"])
def test_files_are_read_again(config, level, tmp_path):
    detector = random_detector(config)
    trained = tmp_path / "detector.pt"
    torch.save({"model": detector.state_dict()}, trained)
    loaded = load_network(trained)
    assert (loaded.family, loaded.config, loaded.level) == ("parnet-detector", config, "none")
    assert (loaded.resolution, loaded.input_multiple) == (640, 32)
    assert loaded.output_names == ("p3", "p4", "p5")
    network = loaded if level == "none" else fuse_network(loaded, level)
    path = tmp_path / "described.safetensors"
    write_safetensors(path, network.module.state_dict(), Header.of(network).encode())
    again = load_network(path)
    assert (again.config, again.level) == (config, level)
    image = random_image(1, 3, 64, 64, dtype=torch.float32)
    assert difference(again.module(image), network.module(image)) == 0
    if level != "full":  # what a file without a description still tells
        torch.save(network.module.state_dict(), tmp_path / "bare.pth")
        bare = load_network(tmp_path / "bare.pth")
        assert (bare.config, bare.level) == (config, level)
        assert difference(bare.module(image), network.module(image)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("neck.downs.1.down.conv.weight"),
            "missing: neck.downs.1.down.conv.weight",
        ),
        (lambda s: s.update({"neck.extra": torch.zeros(1)}), "unexpected: neck.extra"),
        (lambda s: s.pop("backbone.project.conv.weight"), "no tensor backbone.project"),
        (lambda s: s.update({"head.m.1.bias": torch.zeros(5)}), r"head.m.1.bias \(5,\) instead"),
        (lambda s: s.update({"head.m.0.weight": torch.zeros(25, 12, 1, 1)}), "none of 3 anchors"),
        (lambda s: s["head.ia.0.implicit"].fill_(float("nan")), "NaN or infinite"),
    ],
)
def test_incomplete_and_damaged_files_are_refused(change, message, tmp_path):
    state = copy.deepcopy(random_detector(SMALL).state_dict())
    change(state)
    torch.save(state, tmp_path / "d.pth")
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / "d.pth")


def test_structures_that_cannot_be_are_refused():
    for change in (
        {"widths": (8, 12)},
        {"neck_blocks": 0},
        {"neck_widths": (6, 7, 10)},
        {"partial": True, "widths": (9, 12, 16)},
    ):
        with pytest.raises(ValueError, match=r"streams|positive|even"):
            replace(SMALL, **change)


# --------------------------------------------------------------------------- graphs, segments


@pytest.mark.parametrize(
    ("config", "level"), [(SMALL, "repvgg"), (CSP, "full")], ids=["plain", "csp"]
)
def test_onnx_runtime_computes_the_same(config, level):
    detector = random_detector(config)
    model = export_onnx(
        fuse(detector, level), resolution=64, batch=1, name="d", output_names=("p3", "p4", "p5")
    )
    if level == "full":
        kinds = {node.op_type for node in model.graph}
        assert not kinds & {"BatchNormalization", "Transpose", "Reshape"}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    image = random_image(1, 3, 64, 64, dtype=torch.float32)
    found = map(torch.from_numpy, session.run(["p3", "p4", "p5"], {"image": image.numpy()}))
    assert difference(found, detector(image)) < 1e-5


def closure(relation, name):
    found, left = set(), [name]
    while left:
        for other in relation[left.pop()]:
            if other not in found:
                found.add(other)
                left.append(other)
    return found


def test_streams_and_heads_become_parallel_segments():
    """The widths decide what is worth a segment; the weights do not matter."""
    family, entry = CATALOG["parnet-xl-det"]
    with torch.device("meta"):
        module = family.build(entry.config, "full", ())
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.zero_()
    model = export_onnx(module, resolution=640, batch=1, name="d", output_names=family.output_names)
    split = split_model(model, SplitOptions())
    graph = split.stream_graph
    assert [segment.name for segment in graph.segments] == [
        *("stem1", "stem2", "stream1", "stream2", "stream3", "fusion1", "fusion2"),
        *("stream4", "head1", "head3", "head2"),
    ]
    # The whole of each stream lies in a segment of its own, with what it adds to a fusion.
    for index, part in enumerate(("downsample", "stream_parts.0", "stream_parts.1")):
        nodes = [node.name for node in split.segments[f"stream{index + 1}"].graph]
        assert any(f"backbone.streams.{index}.0." in name for name in nodes)
        assert any(f"backbone.{part}." in name for name in nodes)
        others = {place for place in range(3) if place != index}
        assert not any(f"backbone.streams.{place}." in name for name in nodes for place in others)
    made_by = {spec.name: segment.name for segment in graph.segments for spec in segment.outputs}
    heads = [made_by[name] for name in ("p3", "p4", "p5")]
    assert heads == ["head1", "head2", "head3"]
    for together in (("stream1", "stream2", "stream3"), heads):
        for name in together:
            assert closure(graph.predecessors, name).isdisjoint(together)


@pytest.mark.parametrize(
    "config", [SMALL, pytest.param(CSP, marks=pytest.mark.slow)], ids=["plain", "csp"]
)
def test_the_segments_compute_what_the_network_computes(config, tmp_path):
    torch.save(random_detector(config).state_dict(), tmp_path / "d.pth")
    network = load_network(tmp_path / "d.pth")
    model, provenance = export_graph(network, level="full", resolution=64, batch=1, form="decoded")
    every_branch = SplitOptions(
        min_gain=0, device=DeviceModel(flops_per_us=1e3, launch_us=0, crossing_us=0)
    )
    bundle, _ = make_bundle(model, provenance, tmp_path / "b", options=every_branch)
    assert len(bundle.stream_graph.segments) > 5
    assert bundle.manifest.split_error <= 1e-6
    proof = prove_bundle(bundle, source=network, random_samples=1)
    assert proof.passed
    assert {check.name for check in proof.checks} >= {"split against source"}
