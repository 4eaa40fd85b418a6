from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from parnet_export.checkpoints.checkpoint import load_strictly, read_checkpoint, write_safetensors
from parnet_export.errors import InputError
from parnet_export.files import TEMPORARY_SUFFIX

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "inits.0.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "head.fc.weight": torch.randn(5, 4, generator=generator),
        "head.fc.bias": torch.randn(5, generator=generator),
        "counter": torch.tensor(seed),
    }


def _training_checkpoint(**changes):
    """Return what timm's saver writes, as the published ParNet files have it."""
    return {
        "epoch": 119,
        "arch": "simplenet_repvgg",
        "state_dict": _weights(0),
        "state_dict_ema": _weights(1),
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": 0.1}],
        },
        "version": 2,
        "args": argparse.Namespace(
            lr=0.1, mean=None, sched="cosine", planes=[[64, 128], ["swish"]]
        ),
        "amp_scaler": {"scale": 65536.0},
        "metric": 77.66,
    } | changes


def _assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("use_ema", [False, True])
def test_an_official_training_checkpoint_gives_its_weights(tmp_path, legacy, use_ema):
    path = tmp_path / "parnet_l.pth.tar"
    torch.save(_training_checkpoint(), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path, use_ema=use_ema)
    _assert_same(checkpoint.tensors, _weights(1 if use_ema else 0))
    assert checkpoint.path == path
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.metadata == {
        "weights_entry": "state_dict_ema" if use_ema else "state_dict",
        "arch": "simplenet_repvgg",
        "epoch": "119",
        "metric": "77.66",
        "version": "2",
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bare_state_dict_is_taken_as_it_is(tmp_path, legacy):
    path = tmp_path / "bare.pth"
    torch.save(_weights(), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    _assert_same(checkpoint.tensors, _weights())
    assert checkpoint.metadata == {"weights_entry": ""}


def test_a_module_s_own_state_dict_is_taken(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "module.pth")
    _assert_same(read_checkpoint(tmp_path / "module.pth").tensors, module.state_dict())


def test_parameters_in_a_dict_come_back_as_plain_tensors(tmp_path):
    torch.save({"weight": nn.Parameter(torch.ones(3))}, tmp_path / "parameter.pth")
    tensor = read_checkpoint(tmp_path / "parameter.pth").tensors["weight"]
    assert not tensor.requires_grad
    assert torch.equal(tensor, torch.ones(3))


def test_a_yolo_checkpoint_keeps_its_weights_under_model(tmp_path):
    content = {"epoch": 3, "best_fitness": 0.5, "model": _weights(), "optimizer": None}
    torch.save(content, tmp_path / "yolo.pt")
    checkpoint = read_checkpoint(tmp_path / "yolo.pt")
    _assert_same(checkpoint.tensors, _weights())
    assert checkpoint.metadata == {"weights_entry": "model", "epoch": "3"}


def test_a_bare_state_dict_may_name_a_tensor_model(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "bare.pth")
    _assert_same(read_checkpoint(tmp_path / "bare.pth").tensors, {"model": torch.ones(2)})


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_wrapper_prefixes_are_removed(tmp_path, prefix, entry):
    wrapped = {prefix + name: tensor for name, tensor in _weights().items()}
    torch.save({entry: wrapped} if entry else wrapped, tmp_path / "parallel.pth")
    _assert_same(read_checkpoint(tmp_path / "parallel.pth").tensors, _weights())


def test_names_that_only_begin_like_a_prefix_stay(tmp_path):
    weights = {"module_list.0.weight": torch.ones(1), "modules.weight": torch.ones(1)}
    torch.save(weights, tmp_path / "yolo.pt")
    assert set(read_checkpoint(tmp_path / "yolo.pt").tensors) == set(weights)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w", "w.pth.tar", "w.jpg"])
def test_the_type_is_told_by_the_content_and_not_by_the_name(tmp_path, name):
    torch.save(_weights(), tmp_path / name)
    _assert_same(read_checkpoint(tmp_path / name).tensors, _weights())
    write_safetensors(tmp_path / name, _weights(), {"a": "b"})
    checkpoint = read_checkpoint(tmp_path / name)
    _assert_same(checkpoint.tensors, _weights())
    assert checkpoint.metadata == {"a": "b"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_every_type_comes_back_as_it_was_stored(tmp_path, dtype, form):
    weights = {
        "t": torch.arange(-4, 8).reshape(3, 4).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    path = tmp_path / "typed"
    if form == "safetensors":
        write_safetensors(path, weights, {})
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    _assert_same(read_checkpoint(path).tensors, weights)


@st.composite
def _tensor_dicts(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=12), max_size=6, unique=True))
    names = [name for name in names if name != "__metadata__"]
    shapes = st.lists(st.integers(0, 4), max_size=3)
    found = {}
    for name in names:
        shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
        tensor = torch.randint(-100, 100, shape).to(dtype)
        found[name] = tensor.transpose(0, -1) if tensor.ndim and draw(st.booleans()) else tensor
    return found


@given(
    _tensor_dicts(),
    st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=20), max_size=4),
)
@settings(deadline=None, max_examples=100)
def test_the_library_reads_what_is_written(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("written") / "w.safetensors"
    write_safetensors(path, tensors, metadata)
    with safe_open(path, framework="pt") as stored:
        assert (stored.metadata() or {}) == metadata
        _assert_same({name: stored.get_tensor(name) for name in stored.keys()}, tensors)  # noqa: SIM118 (no mapping)


def test_the_same_weights_give_the_same_bytes_in_any_order(tmp_path):
    weights, metadata = _weights(), {f"key{i}": str(i) for i in range(9)}
    write_safetensors(tmp_path / "a", weights, metadata)
    write_safetensors(
        tmp_path / "b", dict(reversed(weights.items())), dict(reversed(metadata.items()))
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    tensors = {
        f"{i}{dtype}": torch.ones(3, dtype=dtype) for i, dtype in enumerate(reversed(DTYPES))
    }
    write_safetensors(tmp_path / "w", tensors, {"odd": "x"})
    content = (tmp_path / "w").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        start = 8 + length + header[name]["data_offsets"][0]
        assert start % tensor.element_size() == 0


def test_tensors_may_share_memory_and_lie_in_any_order(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "part": base[1:3, ::2],
        "turned": base.t(),
        "wide": base[0].expand(3, 6),
    }
    write_safetensors(tmp_path / "w", tensors, {})
    _assert_same(read_checkpoint(tmp_path / "w").tensors, tensors)


def test_a_type_that_the_format_lacks_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"z cannot be stored as torch\.complex64"):
        write_safetensors(tmp_path / "w", {"z": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


def test_a_written_file_has_the_permissions_that_the_user_s_mask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "w", _weights(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, _weights(), {})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(InputError, match=r"w\.safetensors: cannot be written") as caught:
            write_safetensors(path, {"large": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 2
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_place_that_takes_no_file_gives_one_message(tmp_path, folder):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(InputError, match="cannot be written"):
        write_safetensors(tmp_path / folder / "w.safetensors", _weights(), {})


def test_a_process_killed_in_the_middle_of_writing_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, _weights(), {})
    before = path.read_bytes()
    script = """
        import os, signal, sys
        from pathlib import Path
        import torch
        from parnet_export.checkpoints.checkpoint import write_safetensors

        path = Path(sys.argv[1])

        class KilledHalfway(dict):
            def __getitem__(self, name):
                if any(p.stat().st_size > 1 << 20 for p in path.parent.glob(".*")):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitem__(name)

        tensors = KilledHalfway({f"t{i}": torch.ones(1 << 20) for i in range(4)})
        write_safetensors(path, tensors, {})
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    root = Path(__file__).parents[3]
    killed = subprocess.run(command, check=False, cwd=root, timeout=120)
    assert killed.returncode == -9
    assert path.read_bytes() == before
    leftovers = [p.name for p in tmp_path.iterdir() if p != path]
    assert len(leftovers) == 1
    assert leftovers[0].endswith(TEMPORARY_SUFFIX)


def _own_memory_mb():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_reading_and_rewriting_hold_no_copy_of_the_weights(tmp_path, form):
    path = tmp_path / "large"
    weights = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(16)}
    if form == "zip":
        torch.save({"state_dict": weights, "state_dict_ema": weights}, path)
    else:
        write_safetensors(path, weights, {})
    del weights
    before = _own_memory_mb()
    checkpoint = read_checkpoint(path)
    write_safetensors(tmp_path / "again", checkpoint.tensors, {})
    assert _own_memory_mb() - before < 16
    assert float(checkpoint.tensors["t7"].sum()) == 7 << 20


def _small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.float16])
def test_loading_casts_to_the_type_of_the_module(stored, wanted):
    source = _small_network().to(stored).state_dict()
    module = _small_network().to(wanted)
    load_strictly(module, source, "weights")
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == (wanted if tensor.is_floating_point() else torch.int64)
        assert torch.equal(tensor, source[name].to(tensor.dtype))


def test_loading_copies_the_values():
    source = _small_network().state_dict()
    module = _small_network()
    load_strictly(module, source, "weights")
    kept = source["0.weight"].clone()
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(source["0.weight"], kept)


def test_batch_counters_may_be_missing():
    module = _small_network()
    module[1].num_batches_tracked.fill_(9)
    source = {n: t for n, t in _small_network().state_dict().items() if "num_batches" not in n}
    load_strictly(module, source, "weights")
    assert int(module[1].num_batches_tracked) == 0


def _load_changed(change):
    module = _small_network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    source = _small_network().state_dict()
    change(source)
    with pytest.raises(InputError) as caught:
        load_strictly(module, source, "weights.pth")
    _assert_same(module.state_dict(), before)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_names_are_all_told():
    def change(source):
        del source["0.weight"]
        source["3.weight"] = torch.zeros(1)
        source["1.bias"] = torch.zeros(7)
        source["2.bias"] = torch.zeros(2, dtype=torch.int8)

    assert _load_changed(change) == (
        "weights.pth: does not fit Sequential (missing: 0.weight; unexpected: 3.weight; "
        "misshapen: 1.bias (7,) instead of (4,), 2.bias int8 instead of float32). "
        "Check that the file holds the network that was asked for."
    )


def test_at_most_ten_names_of_a_kind_are_told():
    def change(source):
        source.update({f"extra{i:02}": torch.zeros(1) for i in range(25)})

    message = _load_changed(change)
    assert message.count("extra") == 10
    assert "extra09 and 15 more" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(value):
    def change(source):
        source["1.running_var"][2] = value
        source["2.weight"][0, 0] = value

    message = _load_changed(change)
    assert "holds NaN or infinite values in 1.running_var, 2.weight" in message


def test_values_too_large_for_the_type_of_the_module_are_named():
    def change(source):
        source["2.bias"] = torch.tensor([1e300, 0.0], dtype=torch.float64)

    assert "infinite values in 2.bias" in _load_changed(change)


def test_complex_weights_are_refused():
    def change(source):
        source["2.bias"] = source["2.bias"].to(torch.complex64)

    assert "2.bias complex64 instead of float32" in _load_changed(change)
