from __future__ import annotations

import json

import pytest

from parnet_export.catalogue import census
from parnet_export.catalogue import listing as catalogue_listing
from parnet_export.catalogue.listing import list_catalogue
from parnet_export.catalogue.row import CatalogueRow

ROW = CatalogueRow(
    name="net",
    title="Net",
    family="nets",
    origin="official",
    source="a paper",
    choices="",
    resolution=32,
    parameters=3,
    parameters_repvgg=2,
    parameters_full=1,
    flops_unfused=6,
    flops=4,
    depth=1,
)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Count one network instead of all, and note how often."""
    monkeypatch.setenv("PARNET_EXPORT_CACHE", str(tmp_path / "cache"))
    calls = []

    def count():
        calls.append(1)
        return (ROW,)

    monkeypatch.setattr(census, "count_catalogue", count)
    return calls


def test_the_catalogue_is_counted_once(counted, tmp_path):
    assert list_catalogue() == list_catalogue() == (ROW,)
    assert len(counted) == 1
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["catalogue.json"]


def test_other_code_counts_anew(counted, monkeypatch):
    list_catalogue()
    monkeypatch.setattr(catalogue_listing, "toolkit_version", lambda: "0+other")
    list_catalogue()
    list_catalogue()
    assert len(counted) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b'{"toolkit": 3}', b"\xff\x00", b"[1"])
def test_a_damaged_listing_is_made_anew(counted, tmp_path, content):
    list_catalogue()
    place = tmp_path / "cache" / "catalogue.json"
    intact = place.read_bytes()
    place.write_bytes(content)
    assert list_catalogue() == (ROW,)
    assert place.read_bytes() == intact


def test_a_row_that_lacks_a_field_is_counted_again(counted, tmp_path):
    list_catalogue()
    place = tmp_path / "cache" / "catalogue.json"
    content = json.loads(place.read_bytes())
    del content["rows"][0]["depth"]
    place.write_text(json.dumps(content))
    assert list_catalogue() == (ROW,)
    assert len(counted) == 2


def test_without_a_place_for_the_cache_only_time_is_lost(counted, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert list_catalogue() == list_catalogue() == (ROW,)
    assert len(counted) == 2


def test_a_second_listing_loads_no_torch(counted, tmp_path, run_cli, monkeypatch):
    list_catalogue()
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise AssertionError('torch was loaded')")
    path = catalogue_listing.__file__.rsplit("/parnet_export/", 1)[0]
    roots = (blocked, path, f"{path}/engines", f"{path}/bench")
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, roots)))
    done = run_cli("parnet-export", "models", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["net"]
