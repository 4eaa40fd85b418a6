"""The code that docs/gpus.md shows, run as it stands there."""

from __future__ import annotations

import re

import pytest

from parnet_export.pipeline import export_graph, make_bundle
from parnet_export.source import load_network

pytestmark = pytest.mark.gpu


def test_the_code_of_the_document_runs(root, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "gpus.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "Session.open" in block]
    model, provenance = export_graph(load_network("resnet18"), resolution=224, batch=1)
    make_bundle(model, provenance, tmp_path / "l.bundle", prove=False)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/gpus.md", "exec"), {})  # noqa: S102 - our own document
    assert capsys.readouterr().out.startswith("tensor(")
