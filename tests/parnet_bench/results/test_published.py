from __future__ import annotations

from itertools import chain

import pytest

from parnet_bench.results.published import TABLES, TOP1, Figures, PublishedRow, PublishedTable

ROWS = list(chain.from_iterable(table.rows for table in TABLES.values()))


def test_latencies_and_speeds_of_table_3_are_inverse_to_each_other():
    for row in TABLES[3].rows:
        speed = row.figures.samples_per_s
        assert row.figures.latency_ms == pytest.approx(1000 / speed, rel=0.004)


def test_a_speed_stands_for_a_latency():
    assert Figures(samples_per_s=250).latency_or_inverse_ms == 4.0
    assert Figures(samples_per_s=250, latency_ms=5.0).latency_or_inverse_ms == 5.0
    assert Figures(top1=75.0).latency_or_inverse_ms is None


def test_a_network_prints_about_the_same_size_and_accuracy_in_every_table():
    by_network: dict[str, list[Figures]] = {}
    for row in ROWS:
        if row.network:
            by_network.setdefault(row.network, []).append(row.figures)
    for name, figures in by_network.items():
        sizes = [f.parameters for f in figures if f.parameters]
        assert not sizes or max(sizes) <= 1.01 * min(sizes), name
        if name.startswith("parnet"):
            assert len({f.top1 for f in figures if f.top1}) <= 1, name


def test_labels_of_a_table_are_unique():
    for table in TABLES.values():
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)


def test_accuracies_by_name_are_those_of_table_1():
    printed = {(row.network, row.figures.top1) for row in TABLES[1].rows}
    assert set(TOP1.items()) <= printed


def test_a_table_needs_its_reference_row():
    row = PublishedRow("a", Figures())
    with pytest.raises(ValueError, match="table 7 has no row 'b'"):
        PublishedTable(7, "", "b", (row,))
