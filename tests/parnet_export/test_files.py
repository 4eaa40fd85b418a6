from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from parnet_export import files
from parnet_export.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def run_python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_written_content_replaces_the_old_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    files.write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    assert names_in(tmp_path) == {"result.json"}


def test_an_error_while_writing_leaves_the_old_content_and_no_leftover(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError), files.open_replacing(path) as stream:
        stream.writelines([b"half of the new con", None])
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"result.json"}


def test_a_place_below_a_file_is_named_as_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "result.json"
    with pytest.raises(InputError, match=r"result\.json: cannot be written \(Not a directory\)"):
        files.write_text(place, "content")
    with pytest.raises(InputError, match="cannot be written"):
        files.make_directory(place)


def test_a_missing_folder_and_a_name_too_long_are_named_as_unwritable(tmp_path):
    with pytest.raises(InputError, match="No such file or directory"):
        files.write_text(tmp_path / "missing" / "result.json", "content")
    with pytest.raises(InputError, match="File name too long"):
        files.write_text(tmp_path / ("x" * 250), "content")


def test_a_folder_in_the_way_is_named_as_unwritable(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        files.write_text(tmp_path / "taken", "content")
    assert names_in(tmp_path) == {"taken"}


def test_errors_about_other_files_are_not_blamed_on_the_place_written_to(tmp_path):
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "copy"):
        (tmp_path / "source").read_bytes()
    assert names_in(tmp_path) == set()


def test_a_full_disk_is_one_message_and_leaves_the_old_content(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    code = """
import resource, sys
from pathlib import Path
from parnet_export import files
from parnet_export.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.write_bytes(Path(sys.argv[1]), bytes(1 << 20))
except InputError as error:
    print(error)
"""
    result = run_python(code, path)
    assert result.stdout.startswith(f"{path}: cannot be written (File too large).")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"weights.bin"}


def test_a_process_killed_while_writing_leaves_the_old_content(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    code = """
import os, signal, sys
from pathlib import Path
from parnet_export import files
with files.open_replacing(Path(sys.argv[1])) as stream:
    stream.write(bytes(1 << 20))
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = run_python(code, path)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (leftover,) = names_in(tmp_path) - {"weights.bin"}
    assert files.is_temporary(leftover)


def test_only_names_of_our_temporaries_count_as_temporary():
    assert files.is_temporary(".weights-0a1b2c3d.partial")
    assert not files.is_temporary("film.partial")
    assert not files.is_temporary(".film.partial")
    assert not files.is_temporary(".weights-0a1b2c3d.partial.txt")


def test_the_digest_is_that_of_the_whole_content(tmp_path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_named_by_content_only_with_its_own_digest(tmp_path):
    name = files.content_name("weights", hashlib.sha256(b"content").hexdigest(), ".bin")
    (tmp_path / name).write_bytes(b"content")
    assert files.is_named_by_content(tmp_path / name)
    (tmp_path / name).write_bytes(b"changed")
    assert not files.is_named_by_content(tmp_path / name)
    (tmp_path / "weights.bin").write_bytes(b"content")
    assert not files.is_named_by_content(tmp_path / "weights.bin")
    assert not files.is_named_by_content(tmp_path / "missing-0123456789abcdef.bin")


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target = tmp_path / "target.json"
    target.write_text("earlier")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    files.write_text(link, "later")
    assert link.is_symlink()
    assert target.read_text() == "later"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Opened for both ends, so that neither side waits for the other.
    reader = os.open(pipe, os.O_RDWR)
    try:
        files.write_text(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
