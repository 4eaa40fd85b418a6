"""A result as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from parnet_bench.report.page_view import view_of

if TYPE_CHECKING:
    from parnet_bench.results.result import Result

_CODE = re.compile(r"`([^`]+)`|(--[a-z0-9-]+(?: \d+(?:\.\d+)?)?)")

_TEMPLATES = Environment(
    loader=PackageLoader("parnet_bench"),
    autoescape=True,  # names come from files of others
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)


def coded(text: str) -> Markup:
    """Return text as HTML in which options, and what stands in backticks, are code."""
    return Markup(_CODE.sub(r"<code>\1\2</code>", str(escape(text))))  # noqa: S704 -- escaped


_TEMPLATES.filters["coded"] = coded


def render_page(result: Result) -> str:
    """Return a result as an HTML document; equal results give equal documents.

    Styles and pictures are in it; it runs no script and loads nothing. It follows the
    reader's choice of a light or dark theme, and fits the width of a phone.
    """
    return render_template("report.html", page=view_of(result))


def render_template(name: str, **values: object) -> str:
    """Return one of the package's templates, filled in and styled like every page."""
    style = _TEMPLATES.get_template("report.css").render()
    return _TEMPLATES.get_template(name).render(style=style, **values)
