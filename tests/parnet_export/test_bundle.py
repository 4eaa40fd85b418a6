from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parnet_export import bundle as bundle_module
from parnet_export.bundle import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Bundle,
    BundleWriter,
    Manifest,
    Provenance,
    open_bundle,
)
from parnet_export.errors import InputError
from parnet_export.stream_graph import Cost, Segment, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

COST = Cost(parameters=7, macs=11, weight_bytes=28, activation_bytes=64, nodes=3, depth=2)
X, Y, Z = (TensorSpec(name, "float32", ("batch", 4)) for name in "xyz")


def write(path: Path, *, version: str = "one", commit: bool = True) -> Bundle | None:
    """Write a bundle of files that stand for graphs; their content follows `version`."""
    with BundleWriter(path) as writer:
        weights = writer.add_bytes("weights", ".bin", b"weights, the same in all versions")
        whole = writer.add_bytes("whole", ".onnx", f"whole {version}".encode())
        segment_files = {
            name: writer.add_bytes(name, ".onnx", f"{name} {version}".encode())
            for name in ("stem", "head")
        }
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            precision="fp32",
            inputs=(X,),
            outputs=(Z,),
            segments=(Segment("stem", (X,), (Y,), COST), Segment("head", (Y,), (Z,), COST)),
            whole=whole,
            whole_cost=COST,
            segment_files=segment_files,
            weights=weights,
            files={},
            provenance=Provenance("tiny", "tiny.pth", weights="random", seed=3),
            split_error=1e-8,
        )
        return writer.commit(manifest) if commit else None


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def rewrite_manifest(path: Path, **changes: object) -> None:
    """Change the manifest as somebody would who also corrects its digest."""
    manifest = open_bundle(path).manifest
    content = bundle_module._encode(replace(manifest, **changes))
    (path / MANIFEST_NAME).write_bytes(content)


def test_a_bundle_reads_back_as_it_was_written(tmp_path):
    written = write(tmp_path / "b")
    read = open_bundle(tmp_path / "b")
    assert read.manifest == written.manifest
    assert read.whole_path.read_bytes() == b"whole one"
    assert read.segment_path("head").read_bytes() == b"head one"
    assert read.stream_graph.predecessors == {"stem": (), "head": ("stem",)}
    assert read.label == "tiny (random weights)"
    assert set(read.manifest.files) | {MANIFEST_NAME} == names_in(tmp_path / "b")


def test_class_names_are_a_file_of_the_bundle(tmp_path):
    assert write(tmp_path / "b").class_names == ()
    with BundleWriter(tmp_path / "b") as writer:
        earlier = open_bundle(tmp_path / "b").manifest
        for name in earlier.files:
            stem, _, suffix = name.rpartition("-")[0], "", name[name.rindex(".") :]
            writer.add_bytes(stem, suffix, (tmp_path / "b" / name).read_bytes())
        labels = writer.add_bytes("labels", ".txt", "tench\nKaffeekanne ä, groß\n".encode())
        writer.commit(replace(earlier, labels=labels))
    read = open_bundle(tmp_path / "b")
    assert read.class_names == ("tench", "Kaffeekanne ä, groß")
    (tmp_path / "b" / labels).write_text("goldfish\nKaffeekanne ä, groß\n")
    with pytest.raises(InputError, match="its digest differs"):
        open_bundle(tmp_path / "b")
    (tmp_path / "b" / labels).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_bundle(tmp_path / "b")


def test_a_manifest_of_before_preprocessing_and_names_is_read(tmp_path):
    write(tmp_path / "b")
    content = json.loads((tmp_path / "b" / MANIFEST_NAME).read_text())
    del content["labels"]
    del content["provenance"]["input_form"]
    content["manifest_sha256"] = "0" * 64
    text = json.dumps(content, indent=2).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (tmp_path / "b" / MANIFEST_NAME).write_bytes(text.replace(b"0" * 64, digest))
    read = open_bundle(tmp_path / "b")
    assert read.manifest.provenance.input_form is None
    assert read.class_names == ()


def test_the_same_content_gives_the_same_files(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_one_changed_byte_in_any_file_is_found(tmp_path):
    write(tmp_path / "b")
    for name, content in contents(tmp_path / "b").items():
        for position in {0, len(content) // 2, len(content) - 1}:
            changed = bytearray(content)
            changed[position] ^= 1
            (tmp_path / "b" / name).write_bytes(changed)
            with pytest.raises(InputError) as caught:
                open_bundle(tmp_path / "b")
            assert name in str(caught.value)
        (tmp_path / "b" / name).write_bytes(content)
    open_bundle(tmp_path / "b")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_damage_to_the_manifest_is_one_message(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "b"
    write(path)
    content = (path / MANIFEST_NAME).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["flip", "truncate", "insert", "delete"]))
    damaged = {
        "flip": content[:position]
        + bytes([content[position] ^ data.draw(st.integers(1, 255))])
        + content[position + 1 :],
        "truncate": content[:position],
        "insert": content[:position] + b" " + content[position:],
        "delete": content[:position] + content[position + 1 :],
    }[damage]
    (path / MANIFEST_NAME).write_bytes(damaged)
    with pytest.raises(InputError, match=MANIFEST_NAME):
        open_bundle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"\x80\x02}q\x00.", "is damaged"),
        (b"[]", "is damaged"),
        (b"{}", "is damaged"),
        (b'{"a":' + b"[" * 100_000, "is damaged"),
        (b'{"schema_version": 99, "anything": "else"}', "has schema version 99"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path, content, message):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_bundle(tmp_path)


def test_what_is_no_bundle_is_named_as_such(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_bundle(tmp_path / "missing")
    with pytest.raises(InputError, match=r"without bundle\.json, so it is not a bundle"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder, so it is not a bundle"):
        open_bundle(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path):
    bundle = write(tmp_path / "b")
    bundle.whole_path.unlink()
    with pytest.raises(InputError, match=rf"{bundle.manifest.whole}: cannot be read"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a\\b", "a\0b", "c:d"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, name):
    bundle = write(tmp_path / "b")
    (tmp_path / "secret").write_text("secret")
    stored = bundle.manifest.files[bundle.manifest.whole]
    rewrite_manifest(tmp_path / "b", files={**bundle.manifest.files, name: stored})
    with pytest.raises(InputError, match="names a file outside the bundle"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whole": "other.onnx"}, r"lists no digest of other\.onnx"),
        ({"segment_files": {}}, "one file for each segment"),
        ({"outputs": (replace(Z, name="q"),)}, "nothing produces the network output 'q'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, changes, message):
    write(tmp_path / "b")
    rewrite_manifest(tmp_path / "b", **changes)
    with pytest.raises(InputError, match=message):
        open_bundle(tmp_path / "b")


def test_writing_again_clears_the_files_of_the_old_version_only(tmp_path):
    path = tmp_path / "b"
    old = write(path, version="one")
    (path / "engines").mkdir()
    foreign = {"notes.txt": b"mine", "film.partial": b"mine", "own-0123456789abcdef.onnx": b"mine"}
    for name, content in foreign.items():
        (path / name).write_bytes(content)
    new = write(path, version="two")
    stale = set(old.manifest.files) - set(new.manifest.files)
    assert stale
    assert old.manifest.weights == new.manifest.weights
    found = contents(path)
    assert set(found) == set(new.manifest.files) | set(foreign) | {MANIFEST_NAME}
    assert {name: found[name] for name in foreign} == foreign
    assert (path / "engines").is_dir()


def test_until_the_commit_a_reader_sees_the_old_bundle(tmp_path):
    path = tmp_path / "b"
    old = write(path, version="one")
    before = contents(path)
    write(path, version="two", commit=False)
    assert contents(path) == before
    assert open_bundle(path).manifest.whole == old.manifest.whole


def test_a_new_folder_is_gone_when_nothing_was_committed(tmp_path):
    write(tmp_path / "b", commit=False)
    assert not (tmp_path / "b").exists()
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", commit=False)
    assert names_in(tmp_path / "b") == set()


def test_a_file_that_changed_before_the_commit_stops_it(tmp_path):
    path = tmp_path / "b"
    write(path, version="one")
    before = contents(path)
    manifest = open_bundle(path).manifest
    with BundleWriter(path) as writer:
        whole = writer.add_bytes("whole", ".onnx", b"whole two")
        (path / whole).write_bytes(b"whole too")
        with pytest.raises(InputError, match="its digest differs"):
            writer.commit(replace(manifest, whole=whole, weights="", segment_files={}, segments=()))
    assert contents(path) == before


def test_a_damaged_bundle_can_be_written_again(tmp_path):
    path = tmp_path / "b"
    bundle = write(path)
    (path / MANIFEST_NAME).write_bytes(b"{")
    bundle.whole_path.write_bytes(b"damaged")
    assert write(path).whole_path.read_bytes() == b"whole one"
    open_bundle(path)


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="folder with other files"):
        BundleWriter(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        BundleWriter(tmp_path / "thesis.tex")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "thesis.tex" / "b")


def test_a_symbolic_link_is_never_taken_for_a_leftover(tmp_path):
    path = tmp_path / "b"
    old = write(path)
    target = tmp_path / "kept.onnx"
    target.write_bytes(b"whole one")
    (path / f"link{old.manifest.whole}").symlink_to(target)
    write(path, version="two")
    assert (path / f"link{old.manifest.whole}").is_symlink()


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from parnet_export import files
from parnet_export.bundle import BundleWriter

writer = BundleWriter(Path(sys.argv[1]))
writer.add_bytes("whole", ".onnx", b"whole two")
with files.temporary_sibling(writer.path / "weights") as temporary:
    temporary.write_bytes(bytes(1 << 20))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_killed_in_the_middle_leaves_the_old_bundle_and_later_no_litter(tmp_path):
    path = tmp_path / "b"
    old = write(path, version="one")
    result = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(path)],
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == -signal.SIGKILL
    assert open_bundle(path).manifest == old.manifest
    litter = set(contents(path)) - set(old.manifest.files) - {MANIFEST_NAME}
    assert len(litter) == 2
    new = write(path, version="three")
    assert set(contents(path)) == set(new.manifest.files) | {MANIFEST_NAME}


def test_readers_see_a_whole_bundle_while_another_one_replaces_it(tmp_path):
    path = tmp_path / "b"
    write(path, version="0")
    stop = threading.Event()

    def keep_writing() -> None:
        for version in range(1, 40):
            write(path, version=str(version))
        stop.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    read = 0
    while not stop.is_set():
        open_bundle(path)
        read += 1
    writer.join()
    assert read > 0


def test_the_manifest_is_plain_json_with_its_own_digest(tmp_path):
    write(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / MANIFEST_NAME).read_text())
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert manifest["segments"][0]["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["batch", 4]}
    ]
    assert manifest["provenance"]["seed"] == 3
    assert len(manifest["manifest_sha256"]) == 64
