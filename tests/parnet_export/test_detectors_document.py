from __future__ import annotations

import re

import pytest
import torch

from parnet_export.catalogue.census import take_census
from parnet_export.models.catalog import CATALOG


@pytest.mark.parametrize("name", ["yolov4-csp", "parnet-xl-det", "parnet-xl-csp-det"])
def test_the_document_has_the_figures_that_are_counted(name, root):
    """Those of YOLOv4-CSP are published, and counted in the tests of it."""
    text = (root / "docs" / "detectors.md").read_text()
    (row,) = re.findall(rf"^\| `{name}`.*$", text, re.MULTILINE)
    _, structure, unfused, fused, gflop, depth = (cell.strip() for cell in row.split("|")[1:-1])
    family, entry = CATALOG[name]
    with torch.device("meta"):
        forms = [
            take_census(family.build(entry.config, level, ()), 640) for level in ("none", "repvgg")
        ]
    assert structure == entry.origin
    assert [float(unfused), float(fused)] == [round(form.parameters / 1e6, 2) for form in forms]
    assert float(gflop) == round(forms[1].flops / 1e9, 2)
    assert int(depth) == (64 if name == "yolov4-csp" else 12)
