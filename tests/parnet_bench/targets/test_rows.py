from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parnet_bench.targets import graphs, row_engines
from parnet_bench.targets.graphs import Reading, catalogue_name
from parnet_bench.targets.request import Request, with_default_targets
from parnet_bench.targets.rows import plan_rows
from parnet_engines.planning.devices import usable_cores
from parnet_engines.schedule.program_file import decode
from parnet_export.catalogue.census import take_census
from parnet_export.detections.detection_form import AnchorLevel, DetectionOutput
from parnet_export.errors import InputError
from parnet_export.fuse import fuse_network
from parnet_export.models.catalog import CATALOG
from parnet_export.pipeline import make_bundle, read_graph
from parnet_export.source import load_network


@pytest.fixture
def plan(tmp_path):
    """Plan the rows of a request; returns rows, notes and what was announced."""

    def plan(*targets, **options):
        announced = []

        def working(description):
            announced.append(description)
            return contextlib.nullcontext()

        workspace = tmp_path / "workspace"
        workspace.mkdir(exist_ok=True)
        rows, notes = plan_rows(Request(tuple(map(str, targets)), **options), workspace, working)
        return rows, notes, announced

    return plan


def shown(rows):
    return [(row.description.name, row.description.form, row.plan) for row in rows]


def test_a_bundle_runs_whole_and_in_streams(plan, forked_bundle):
    rows, notes, _ = plan(forked_bundle.path)
    assert shown(rows) == [
        ("forked whole", "whole", "whole"),
        ("forked streams", "streams", "streams"),
    ]
    assert notes == ()
    cost = forked_bundle.manifest.whole_cost
    for row in rows:
        assert row.bundle == forked_bundle
        assert row.description.provenance == forked_bundle.manifest.provenance
        assert (row.description.batch, row.description.precision) == (1, "fp32")
        assert row.description.inputs[0].shape == (1, 3, 32, 32)
        assert (row.description.parameters, row.description.flops) == (cost.parameters, cost.flops)


def test_an_onnx_file_runs_whole_and_in_streams_without_a_precision(plan, forked_onnx):
    rows, _, announced = plan(forked_onnx)
    assert [row.description.form for row in rows] == ["whole", "streams"]
    assert {row.description.precision for row in rows} == {None}
    assert announced == [f"splitting {forked_onnx}"]


def test_a_network_of_one_segment_has_no_streams_row_and_says_so(plan, straight_onnx):
    rows, notes, _ = plan(straight_onnx)
    assert [row.description.form for row in rows] == ["whole"]
    assert notes == (f"{straight_onnx} is a single segment, so it has no streams row.",)


def test_a_catalogue_name_runs_unfused_fused_and_in_streams(plan, tiny_catalogue):
    rows, _, _ = plan("parnet-tiny")
    assert [row.description.form for row in rows] == ["unfused", "whole", "streams"]
    assert [row.description.provenance.level for row in rows] == ["none", "full", "full"]
    assert {row.description.provenance.label for row in rows} == {"parnet-tiny (random weights)"}
    network = load_network("parnet-tiny")
    for row, form in zip(
        rows, (network, fuse_network(network), fuse_network(network)), strict=True
    ):
        census = take_census(form.module, 32)
        assert row.description.flops == census.flops
        assert row.description.depth == census.depth
    assert rows[0].description.parameters == take_census(network.module, 32).parameters


def test_graphs_of_the_catalogue_are_exported_once(plan, tiny_catalogue, monkeypatch):
    first, _, _ = plan("parnet-tiny")
    monkeypatch.setattr(
        "parnet_export.source.load_network", lambda *_, **__: pytest.fail("loaded again")
    )
    again, _, _ = plan("parnet-tiny")
    assert again == first
    assert all(row.bundle.path.is_relative_to(tiny_catalogue) for row in first)


@pytest.mark.parametrize(
    "spelling", ["resnet50", "ResNet-50", "resnet_50", "RESNET 50", "res.net.50"]
)
def test_separators_and_case_of_catalogue_names_do_not_matter(spelling):
    assert catalogue_name(spelling) == "resnet50"


def test_baselines_come_last_fused_at_the_size_batch_and_precision_of_the_first_target(
    plan, tiny_catalogue, dynamic_bundle
):
    rows, _, _ = plan(dynamic_bundle.path, batches=(3,), baselines=("ResNet Tiny",))
    assert [row.description.name for row in rows] == [
        "dynamic whole",
        "dynamic streams",
        "resnet-tiny whole",
    ]
    assert {row.description.batch for row in rows} == {3}
    assert {row.description.inputs[0].shape for row in rows} == {(3, 3, 32, 32)}
    assert rows[-1].description.provenance.level != "none"


def test_flops_are_those_of_one_sample_whether_the_batch_is_fixed_or_open(
    plan, tiny_catalogue, dynamic_bundle, forked_bundle
):
    fixed, _, _ = plan("resnet-tiny", batches=(4,))
    assert {row.description.batch for row in fixed} == {4}
    flops = take_census(load_network("resnet-tiny").module, 32).flops
    assert {row.description.flops for row in fixed} == {flops}
    opened, _, _ = plan(dynamic_bundle.path, batches=(4,))
    assert opened[0].description.flops == forked_bundle.manifest.whole_cost.flops
    assert opened[0].sizes == {"batch": 4}


def test_a_checkpoint_adds_an_unfused_first_row(plan, tiny_catalogue, tmp_path):
    network = load_network("parnet-tiny")
    torch.save({"state_dict": network.module.state_dict()}, tmp_path / "trained.pth.tar")
    bundle_of_fused = plan("parnet-tiny")[0][1].bundle
    rows, _, _ = plan(bundle_of_fused.path, ckpt=str(tmp_path / "trained.pth.tar"))
    assert [row.description.form for row in rows] == ["unfused", "whole", "streams"]
    assert rows[0].description.network == "trained"
    assert rows[0].description.provenance.weights == "trained"


def test_a_checkpoint_of_another_network_is_refused(plan, tiny_catalogue, tmp_path):
    torch.save(load_network("resnet-tiny", seed=4).module.state_dict(), tmp_path / "other.pth")
    bundle = plan("parnet-tiny")[0][1].bundle
    with pytest.raises(InputError, match=r"other\.pth: does not compute what .* computes"):
        plan(bundle.path, ckpt=str(tmp_path / "other.pth"))


def test_a_catalogue_name_as_checkpoint_takes_the_seed_of_the_bundle(plan, tiny_catalogue):
    bundle = plan("resnet-tiny", seed=3)[0][1].bundle
    rows, _, _ = plan(bundle.path, ckpt="resnet-tiny", seed=0)
    assert [row.description.provenance.seed for row in rows] == [3, 3]


def test_the_same_target_twice_gives_rows_of_different_names(plan, forked_bundle):
    rows, _, _ = plan(forked_bundle.path, forked_bundle.path)
    names = [row.description.name for row in rows]
    assert names == ["forked whole", "forked streams", "forked whole (2)", "forked streams (2)"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"batches": (2,)}, "takes 1, not 2, in dimension 0 of image.*Leave out --batch"),
        ({"resolution": 64}, "takes 32, not 64, in dimension 2 of image.*Leave out --resolution"),
        ({"precision": "fp16"}, "is fp32.*split-streams --precision fp16"),
    ],
)
def test_what_a_bundle_fixes_cannot_be_asked_for_otherwise(plan, forked_bundle, options, problem):
    with pytest.raises(InputError, match=problem) as caught:
        plan(forked_bundle.path, **options)
    assert str(forked_bundle.path) in str(caught.value)


def test_asking_for_what_a_bundle_fixes_anyway_is_fine(plan, forked_bundle):
    rows, _, _ = plan(forked_bundle.path, batches=(1,), resolution=32, precision="fp32")
    assert len(rows) == 2


def test_an_onnx_file_runs_in_its_own_precision_only(plan, forked_onnx):
    with pytest.raises(InputError, match="runs as it is"):
        plan(forked_onnx, precision="fp16")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("parnet-tinny", "neither a file nor a network.*Did you mean parnet-tiny"),
        ("zzzzzzzzzz", "neither a file nor a network of the catalogue. `parnet-export models`"),
        ("absent.onnx", "neither a file nor a network"),
        ("empty", "is a folder without bundle.json"),
        ("trained.pth", "neither a bundle nor an .onnx file; a checkpoint is given with --ckpt"),
    ],
)
def test_a_target_that_cannot_be_used_is_named_with_what_to_do(
    plan, tiny_catalogue, tmp_path, monkeypatch, target, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "trained.pth").write_bytes(b"?")
    with pytest.raises(InputError, match=message) as caught:
        plan(target)
    assert str(caught.value).startswith(f"{target}: ")


def test_unknown_names_are_found_out_before_anything_is_exported(plan, tiny_catalogue, monkeypatch):
    monkeypatch.setattr(
        "parnet_bench.targets.graphs.network_graph", lambda *_: pytest.fail("exported already")
    )
    with pytest.raises(InputError, match="resnet-tinny"):
        plan("parnet-tiny", baselines=("resnet-tinny",))
    with pytest.raises(InputError, match="parnet-tinny"):
        plan("parnet-tiny", "parnet-tinny")


def test_a_fused_file_is_no_checkpoint_to_compare_with(
    plan, tiny_catalogue, forked_bundle, tmp_path
):
    network = fuse_network(load_network("resnet-tiny"), "full")
    torch.save(network.module.state_dict(), tmp_path / "fused.pth")
    with pytest.raises(InputError, match=r"fused\.pth: is fused already"):
        plan(forked_bundle.path, ckpt=str(tmp_path / "fused.pth"))


def test_a_resolution_the_network_cannot_take_is_refused_before_anything_is_cached(
    plan, tiny_catalogue
):
    before = sorted(tiny_catalogue.rglob("*"))
    with pytest.raises(InputError, match="--resolution"):
        plan("parnet-tiny", resolution=33)
    assert sorted(tiny_catalogue.rglob("*")) == before


def test_a_damaged_bundle_is_refused(plan, forked_onnx, tmp_path):
    bundle = make_bundle(*read_graph(forked_onnx), tmp_path / "damaged")[0]
    content = bytearray(bundle.whole_path.read_bytes())
    content[-1] ^= 1
    bundle.whole_path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        plan(tmp_path / "damaged")


def test_raw_heads_of_a_checkpoint_are_not_compared_with_boxes(plan, forked_onnx, tmp_path):
    model, provenance = read_graph(forked_onnx)
    output = DetectionOutput("decoded", (AnchorLevel(8, ((8, 8),)),), 3)
    bundle, _ = make_bundle(model, replace(provenance, detections=output), tmp_path / "boxes")
    with pytest.raises(InputError, match="--detections raw"):
        plan(bundle.path, ckpt="yolov4-csp")


def test_ensembles_of_classifiers_are_no_detectors():
    found = graphs.detectors()
    assert "yolov4-csp" in found
    assert not {name for name in found if "stream" in name or "resnet" in name}


def test_every_batch_size_has_rows_of_its_own_and_is_split_once(plan, dynamic_onnx):
    rows, _, announced = plan(dynamic_onnx, batches=(1, 8))
    assert [(row.description.name, row.description.batch) for row in rows] == [
        ("dynamic whole batch 1", 1),
        ("dynamic streams batch 1", 1),
        ("dynamic whole batch 8", 8),
        ("dynamic streams batch 8", 8),
    ]
    assert [list(row.sizes.values()) for row in rows] == [[1], [1], [8], [8]]
    assert announced == [f"splitting {dynamic_onnx}"]


def test_with_several_devices_streams_run_on_the_first_and_on_all(plan, forked_bundle):
    if len(usable_cores()) < 2:
        pytest.skip("two devices need two cores")
    first, second = usable_cores()[:2]
    devices = f"cpu:{first},cpu:{second}"
    rows, _, _ = plan(forked_bundle.path, devices=devices)
    assert [(row.description.name, row.description.devices) for row in rows] == [
        ("forked whole", f"cpu:{first}"),
        ("forked streams", f"cpu:{first}"),
        ("forked streams on 2 devices", devices),
    ]
    assert [row.description.cores for row in rows] == [(first,), (first,), (first, second)]


def test_a_plan_names_the_rows_that_it_places(plan, forked_bundle):
    rows, _, _ = plan(forked_bundle.path, plan="whole")
    assert [row.description.form for row in rows] == ["whole"]
    rows, _, announced = plan(forked_bundle.path, plan="auto")
    assert [row.description.name for row in rows] == ["forked whole", "forked streams (auto)"]
    assert announced[-1] == "choosing a plan for forked streams (auto)"
    program = decode(Path(rows[1].plan).read_bytes(), rows[1].plan)
    assert program.steps


def test_lanes_are_those_of_streams_alone(plan, forked_bundle):
    rows, _, _ = plan(forked_bundle.path, lanes=1)
    assert [row.description.lanes for row in rows] == [None, 1]


def test_without_targets_the_papers_networks_are_measured():
    request = with_default_targets(Request(baselines=("resnet18",)))
    assert request.targets == ("parnet-l",)
    assert request.baselines == ("resnet18", "resnet34", "resnet50")
    request = with_default_targets(Request(task="detection"))
    assert request.baselines == ("yolov4-csp",)
    assert request.targets
    for name in request.targets:
        assert name.startswith("parnet")
        assert CATALOG[name][0].output_names != ("logits",)


def test_how_a_checkpoint_is_read_is_part_of_what_is_kept(plan, tiny_catalogue, tmp_path):
    network = load_network("parnet-tiny")
    weights = network.module.state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "trained.pth")
    bundle = plan("parnet-tiny")[0][1].bundle
    ckpt = str(tmp_path / "trained.pth")
    plain, _, _ = plan(bundle.path, ckpt=ckpt)
    averaged, _, _ = plan(bundle.path, ckpt=ckpt, reading=Reading(use_ema=True))
    assert averaged[0].bundle.path != plain[0].bundle.path
    with pytest.raises(InputError, match=r"not the resnet-tiny that --arch asks for"):
        plan(bundle.path, ckpt=ckpt, reading=Reading(arch="resnet-tiny"))


# ------------------------------------------------------------------------ TensorRT engines


@pytest.fixture
def builds(monkeypatch):
    """Notes what would be built, on a machine where a bundle called forked has engines."""
    asked = []

    def note(bundle, places, options, *, whole, segments):
        asked.append((bundle.manifest.provenance.network, options.boundary, whole, segments))
        assert places == ("places of", "tensorrt-rtx", "0")
        return iter(())

    def built(bundle):
        return "tensorrt-rtx" if bundle.manifest.provenance.network == "forked" else None

    monkeypatch.setattr(row_engines, "build_engines", note)
    monkeypatch.setattr(row_engines, "choose_places", lambda *what: ("places of", *what[:2]))
    monkeypatch.setattr(row_engines, "built_backend", built)
    return asked


def engines_of(rows):
    return {row.description.wanted_engine for row in rows}


def test_networks_beside_a_bundle_with_engines_get_engines(
    plan, builds, forked_bundle, tiny_catalogue
):
    rows, _, announced = plan(forked_bundle.path, devices="0", baselines=("resnet-tiny",))
    assert builds == [("resnet-tiny", "linear", True, False)]
    assert engines_of(rows) == {"tensorrt"}
    assert announced[-1] == "building TensorRT engines for resnet-tiny whole"


def test_each_form_that_is_made_here_gets_its_engines_once(
    plan, builds, tiny_catalogue, forked_bundle
):
    plan("parnet-tiny", forked_bundle.path, devices="0", engine="tensorrt")
    assert builds == [
        ("parnet-tiny", "linear", True, False),
        ("parnet-tiny", "linear", True, False),
        ("parnet-tiny", "linear", False, True),
    ]


@pytest.mark.parametrize(
    ("devices", "engine"), [("cpu", "auto"), ("0", "torch"), ("0", "onnxruntime")]
)
def test_nothing_is_built_for_other_runtimes(plan, builds, forked_bundle, devices, engine):
    rows, _, _ = plan(forked_bundle.path, devices=devices, engine=engine)
    assert builds == []
    assert engines_of(rows) == {engine}


def test_without_engines_of_ones_own_the_runtime_stays_open(plan, builds, tiny_catalogue):
    rows, _, _ = plan("parnet-tiny", devices="0")
    assert builds == []
    assert engines_of(rows) == {"auto"}
