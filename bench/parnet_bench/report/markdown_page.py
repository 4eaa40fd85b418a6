"""A result as a Markdown document, for places that show no HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parnet_bench.report.markdown_table import markdown_table, markdown_text
from parnet_bench.report.page_view import view_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parnet_bench.report.page_tables import TableView
    from parnet_bench.report.page_view import PageView, RowView
    from parnet_bench.results.result import Result


def render_markdown(result: Result) -> str:
    """Return a result as Markdown, ending in a newline; equal results give equal documents."""
    return "\n".join(_lines(view_of(result))) + "\n"


def _lines(page: PageView) -> Iterator[str]:
    yield f"# {markdown_text(page.title)}"
    yield from ("", markdown_text(page.lead))
    if page.tags:
        yield from ("", f"**{markdown_text(', '.join(tag.text for tag in page.tags))}**")
    headings = ("row", "median", "95 %", "speed-up", "95 %")
    yield from ("", markdown_table(headings, [_cells(row) for row in page.rows]))
    findings = [f"{w.sentence} {w.remedy}".strip() for w in page.warnings]
    if findings:
        yield from ("", "## Before you trust this", "")
        yield from (f"- {markdown_text(finding)}" for finding in findings)
    for chart in page.scatters:
        yield from ("", f"## {markdown_text(chart.title)}", "", markdown_text(chart.note), "")
        yield from (
            f"- {markdown_text(entry.name)}: {markdown_text(entry.value)}" for entry in chart.rows
        )
        if chart.sources:
            yield from ("", f"Published in: {markdown_text('; '.join(chart.sources))}.")
    if page.has_timelines:
        yield from ("", "## Lanes", "")
    for row in page.rows:
        if row.timeline:
            yield f"- {markdown_text(row.name)}: {markdown_text(row.timeline.facts)}"
    if page.parts:
        yield from _table("Parts of an inference", page.parts)
    yield from _table("More than time", page.costs)
    yield from _table("All figures", page.figures)
    yield from ("", "## How it was measured", "", "```", page.command, "```", "")
    yield from (f"- {markdown_text(f'{name}: {value}')}" for name, value in page.facts)


def _cells(row: RowView) -> tuple[str, ...]:
    tags = f" ({', '.join(tag.text for tag in row.tags)})" if row.tags else ""
    return (
        f"{row.name}{tags}",
        f"{row.median} ms",
        row.interval or "-",
        row.speedup,
        row.speedup_interval,
    )


def _table(title: str, table: TableView) -> Iterator[str]:
    rows = [[cell.text for cell in cells] for cells in table.rows]
    yield from ("", f"## {title}", "", markdown_table(table.headings, rows))
    if table.remarks:
        yield ""
        yield from (f"- {markdown_text(remark)}" for remark in table.remarks)
