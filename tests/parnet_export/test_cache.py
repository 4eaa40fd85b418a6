from __future__ import annotations

from parnet_export import cache
from parnet_export.cache import cache_directory, toolkit_version


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PARNET_EXPORT_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "chosen"
    monkeypatch.delenv("PARNET_EXPORT_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "parnet-export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / "home" / ".cache" / "parnet-export"


def test_the_toolkit_version_changes_with_the_exporting_code(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.importlib.resources, "files", lambda _: tmp_path)
    (tmp_path / "models").mkdir()
    versions = set()
    for text in ("one", "two"):
        (tmp_path / "models" / "net.py").write_text(text)
        (tmp_path / "notes.txt").write_text(text * 2)
        toolkit_version.cache_clear()
        versions.add(toolkit_version())
    (tmp_path / "notes.txt").write_text("other notes")
    toolkit_version.cache_clear()
    assert toolkit_version() in versions
    assert len(versions) == 2
    toolkit_version.cache_clear()
