from __future__ import annotations

import argparse
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parnet_export.checkpoints.checkpoint import read_checkpoint, write_safetensors
from parnet_export.errors import InputError

WEIGHTS = {"a.weight": torch.arange(40.0).reshape(4, 10), "b": torch.ones(3, dtype=torch.bfloat16)}


class Command:
    """Pickles into a call of ``os.system``."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def _message(path, **options):
    with pytest.raises(InputError) as caught:
        read_checkpoint(path, **options)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


def _saved(path, content, *, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def test_a_missing_file(tmp_path):
    assert "does not exist" in _message(tmp_path / "no.pth")


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in _message(tmp_path / "file" / "no.pth")


def test_a_directory(tmp_path):
    assert "is a directory" in _message(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in _message(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path):
    path = _saved(tmp_path / "secret.pth", WEIGHTS)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # Root may read everything, so become nobody for a moment.
        os.seteuid(65534)
    try:
        assert "may not be read by you" in _message(path)
    finally:
        os.seteuid(user)


CONTENTS = {
    "empty": (b"", "is empty"),
    "one byte": (b"x", "is a text file"),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>Quota exceeded</body></html>", "web page"),
    "web page with mark": (b"\xef\xbb\xbf<HTML><body>Sign in</body></HTML>", "web page"),
    "xml error": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(64)), "is compressed"),
    "text": ("weights of parnet, trés bien".encode(), "is a text file"),
    "json": (b'{"epoch": 3, "weights": [1, 2, 3]}', "is a text file"),
    "text pickle": (b"cos\nsystem\n(S'true'\ntR.", "is a text file"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "neither a torch file nor safetensors"),
    "zeros": (bytes(4096), "neither a torch file nor safetensors"),
    "zip start": (b"PK\x03\x04", "is truncated or damaged"),
    "pickle start": (b"\x80\x02", "is a pickle without the marks of torch"),
    "no header": ((1 << 20).to_bytes(8, "little") + b"{", "no complete safetensors file"),
    "no tensors": ((8).to_bytes(8, "little") + b"{}      ", "holds no tensors"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_is_no_checkpoint(tmp_path, case):
    content, expected = CONTENTS[case]
    (tmp_path / "weights.pth").write_bytes(content)
    assert expected in _message(tmp_path / "weights.pth")


@given(st.binary(min_size=1, max_size=2000))
@settings(deadline=None, max_examples=200)
def test_random_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("random") / "weights.pth"
    path.write_bytes(content)
    _message(path)


def test_archives_that_hold_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("hello.txt", "hi")
    assert "zip archive that torch.save did not write" in _message(tmp_path / "photos.zip")
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    assert "zip archive that torch.save did not write" in _message(tmp_path / "weights.npz")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{member}", "")
    assert "is a TorchScript archive" in _message(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "weights.pth.tar", "w") as archive:
        archive.add(_saved(tmp_path / "inner.pth", WEIGHTS), "inner.pth")
    assert "is a tar archive" in _message(tmp_path / "weights.pth.tar")


def test_a_checkpoint_packed_again_is_refused_rather_than_read_as_noise(tmp_path):
    path = _saved(tmp_path / "weights.pth", WEIGHTS)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
        for member in source.namelist():
            target.writestr(member, source.read(member), compress_type=zipfile.ZIP_DEFLATED)
    assert "has compressed members" in _message(packed)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_a_truncated_file(tmp_path, form, kept):
    path = tmp_path / "weights"
    if form == "safetensors":
        write_safetensors(path, WEIGHTS, {"made": "by us"})
    else:
        _saved(path, {"state_dict": WEIGHTS}, legacy=form == "legacy")
    content = path.read_bytes()
    path.write_bytes(content[: max(9, int(len(content) * kept))])
    message = _message(path)
    assert any(
        word in message for word in ("truncated", "damaged", "no complete", "without the marks")
    )


@pytest.mark.parametrize(("offset", "new"), [(6, b"\xff"), (46, b"\xff\xfe")])
def test_a_damaged_table_of_contents(tmp_path, offset, new):
    path = _saved(tmp_path / "weights.pth", WEIGHTS)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02") + offset  # the version needed, and the member's name
    content[at : at + len(new)] = new
    path.write_bytes(content)
    assert "is truncated or damaged" in _message(path)


@pytest.mark.parametrize(
    "save",
    [
        _saved,
        lambda path, evil: _saved(path, evil, legacy=True),
        lambda path, evil: _saved(path, {"state_dict": WEIGHTS, "note": evil}),
        lambda path, evil: _saved(path, {"state_dict": WEIGHTS, "note": evil}, legacy=True),
        lambda path, evil: _saved(path, {"state_dict": {**WEIGHTS, "x": evil}}),
        lambda path, evil: _saved(
            path, {"state_dict": WEIGHTS, "args": argparse.Namespace(x=evil)}
        ),
        lambda path, evil: path.write_bytes(pickle.dumps(evil, protocol=0)),
        lambda path, evil: path.write_bytes(pickle.dumps(evil, protocol=2)),
        lambda path, evil: path.write_bytes(pickle.dumps(evil, protocol=5)),
    ],
)
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_command_in_a_pickle_does_not_run(tmp_path, save, use_ema):
    proof = tmp_path / "it ran"
    path = tmp_path / "weights.pth"
    save(path, Command(f"touch '{proof}'"))
    message = _message(path, use_ema=use_ema)
    assert not proof.exists()
    assert any(
        words in message
        for words in ("holds a pickled posix.system", "pickle without the marks", "is a text file")
    )


def test_that_command_would_run_if_it_were_unpickled(tmp_path):
    proof = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Command(f"touch '{proof}'")))  # noqa: S301 (the point of this test)
    assert proof.exists()


REFUSED = {
    "a module": ({"model": nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
    "a path": ({"state_dict": WEIGHTS, "args": argparse.Namespace(out=Path("x"))}, "pathlib."),
    "a numpy number": ({"model": WEIGHTS, "best_fitness": np.float64(0.5)}, "multiarray.scalar"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_objects_that_only_code_can_rebuild_are_named(tmp_path, case, legacy):
    content, name = REFUSED[case]
    message = _message(_saved(tmp_path / "weights.pth", content, legacy=legacy))
    assert "holds a pickled " in message
    assert name in message
    assert "save `model.state_dict()` by itself" in message


NO_STATE_DICT = {
    "a list": ([torch.ones(2)], "holds a list, not a state dict"),
    "a tensor": (torch.ones(2), "holds a Tensor, not a state dict"),
    "nothing": (None, "holds a NoneType, not a state dict"),
    "an empty dict": ({}, "holds no tensors"),
    "an empty entry": ({"state_dict": {}, "epoch": 3}, "holds no tensors"),
    "a list as entry": ({"state_dict": [1, 2]}, "its entry 'state_dict' is a list"),
    "no entry": ({"net": dict(WEIGHTS), "epoch": 3}, "net (dict), epoch (int)"),
    "nested": ({"state_dict": {"a": {"b": [1]}}}, "more than tensors, a (dict)"),
    "numbered": ({"state_dict": {0: torch.ones(1)}}, "more than tensors, 0 (Tensor)"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "its tensor w is sparse"),
    "without values": (
        {"w": torch.empty(3, device="meta")},
        "its tensor w is sparse, quantised or",
    ),
    "twice": ({"w": torch.ones(1), "module.w": torch.ones(1)}, "two tensors that are both named w"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", NO_STATE_DICT)
def test_torch_files_without_a_state_dict(tmp_path, case, legacy):
    content, expected = NO_STATE_DICT[case]
    assert expected in _message(_saved(tmp_path / "weights.pth", content, legacy=legacy))


def test_many_entries_are_counted_and_not_listed(tmp_path):
    path = _saved(tmp_path / "w.pth", {f"entry{i:02}": i for i in range(30)})
    message = _message(path)
    assert message.count("entry") == 10
    assert "and 20 more" in message


@pytest.mark.parametrize(
    "content", [WEIGHTS, {"state_dict": WEIGHTS}, {"state_dict": WEIGHTS, "state_dict_ema": None}]
)
def test_a_moving_average_that_is_not_there(tmp_path, content):
    message = _message(_saved(tmp_path / "weights.pth", content), use_ema=True)
    assert "holds no moving average" in message
    assert "--use-ema" in message


def test_a_safetensors_file_has_no_moving_average(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", WEIGHTS, {})
    assert "no moving average" in _message(tmp_path / "w.safetensors", use_ema=True)


def test_a_type_that_torch_lacks(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.zeros(2, dtype=torch.int8)}, {})
    path.write_bytes(path.read_bytes().replace(b'"I8"', b'"I9"'))
    assert "no complete safetensors file" in _message(path)


@st.composite
def _damage(draw):
    """Return a function that changes a few bytes of a file."""
    changes = draw(
        st.lists(
            st.tuples(
                st.floats(0, 1, exclude_max=True),
                st.sampled_from(["set", "delete", "insert", "cut"]),
                st.binary(min_size=1, max_size=6),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def apply(content):
        for where, kind, new in changes:
            at = int(where * len(content))
            if kind == "cut":
                content = content[:at]
            else:
                before = content[:at]
                rest = content[at:] if kind == "insert" else content[at + len(new) :]
                content = before + (b"" if kind == "delete" else new) + rest
        return content

    return apply


@given(damage=_damage(), form=st.sampled_from(["zip", "legacy", "safetensors"]))
@settings(deadline=None, max_examples=300)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path_factory, damage, form):
    path = tmp_path_factory.mktemp("damaged") / "weights"
    if form == "safetensors":
        write_safetensors(path, WEIGHTS, {"made": "by us"})
    else:
        content = {"state_dict": WEIGHTS, "args": argparse.Namespace(x=[1, None])}
        _saved(path, content, legacy=form == "legacy")
    path.write_bytes(damage(path.read_bytes()))
    try:
        checkpoint = read_checkpoint(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 (either outcome is right)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.tensors.values())
