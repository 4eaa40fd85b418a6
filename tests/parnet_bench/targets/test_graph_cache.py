from __future__ import annotations

import dataclasses
import os
import shutil
import time
from dataclasses import replace

import pytest

from parnet_bench.targets import graph_cache
from parnet_bench.targets.graph_cache import (
    GraphKey,
    NetworkSize,
    cached_graph,
)
from parnet_export.errors import InputError

SIZE = NetworkSize(parameters=3, flops=2, depth=1)
KEY = GraphKey(
    network="net",
    weights="seed 0",
    level="full",
    resolution=32,
    batch=1,
    precision="fp32",
    toolkit="1",
)


@pytest.fixture
def make(forked_bundle):
    """Makes a bundle by copying one, and counts how often it did."""

    def make(path):
        make.calls += 1
        shutil.copytree(forked_bundle.path, path)
        return SIZE

    make.calls = 0
    return make


def test_a_graph_is_made_once_and_found_afterwards(tmp_path, make, forked_bundle):
    made = cached_graph(tmp_path, KEY, make)
    assert cached_graph(tmp_path, KEY, make) == made
    assert make.calls == 1
    assert made.bundle.manifest == forked_bundle.manifest
    assert made.size == SIZE


def test_whatever_a_graph_depends_on_makes_another_entry(tmp_path, make):
    other = {
        "network": "net2",
        "weights": "seed 1",
        "level": "none",
        "resolution": 64,
        "batch": 2,
        "precision": "fp16",
        "toolkit": "2",
    }
    assert set(other) == {field.name for field in dataclasses.fields(GraphKey)}
    keys = [KEY, *(replace(KEY, **{name: value}) for name, value in other.items())]
    paths = {cached_graph(tmp_path, key, make).bundle.path for key in keys}
    assert len(paths) == make.calls == len(keys)


@pytest.mark.parametrize(
    "damage", ["one byte", "a missing graph", "no size", "half a size", "an empty folder", "a file"]
)
def test_a_damaged_entry_is_made_anew(tmp_path, make, damage):
    made = cached_graph(tmp_path, KEY, make)
    graph, entry = made.bundle.whole_path, made.bundle.path.parent
    size = entry / "size.json"
    if damage == "one byte":
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
    elif damage == "a missing graph":
        graph.unlink()
    elif damage == "no size":
        size.unlink()
    elif damage == "half a size":
        size.write_bytes(size.read_bytes()[:5])
    else:
        shutil.rmtree(entry)
        entry.mkdir() if damage == "an empty folder" else entry.write_text("?")
    again = cached_graph(tmp_path, KEY, make)
    assert make.calls == 2
    assert again == made
    assert cached_graph(tmp_path, KEY, make) == made
    assert make.calls == 2


def test_an_entry_that_cannot_be_made_leaves_nothing_behind(tmp_path):
    def fail(path):
        path.mkdir()
        (path / "half").write_text("a graph")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_graph(tmp_path, KEY, fail)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list((tmp_path / "graphs" / KEY.toolkit).iterdir()) == []


def test_an_entry_that_another_process_made_meanwhile_is_taken(tmp_path, make):
    def make_late(path):
        cached_graph(tmp_path, KEY, make)
        return make(path)

    assert cached_graph(tmp_path, KEY, make_late) == cached_graph(tmp_path, KEY, make)
    assert make.calls == 2
    assert len(list((tmp_path / "graphs" / KEY.toolkit).iterdir())) == 1


def test_entries_of_other_versions_go_when_they_have_not_been_used_for_a_while(tmp_path, make):
    old, recent, current = (replace(KEY, toolkit=name) for name in ("old", "recent", "current"))
    for key in (old, recent):
        cached_graph(tmp_path, key, make)
    long_ago = time.time() - graph_cache.KEEP_UNUSED_S - 60
    for key in (old, recent):
        os.utime(tmp_path / "graphs" / key.toolkit, (long_ago, long_ago))
    cached_graph(tmp_path, recent, make)  # which counts as a use
    cached_graph(tmp_path, current, make)
    assert {path.name for path in (tmp_path / "graphs").iterdir()} == {"recent", "current"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path, make):
    (tmp_path / "graphs").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        cached_graph(tmp_path, KEY, make)
