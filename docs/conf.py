"""Configuration of the documentation: ``make docs``."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

sys.path.insert(0, str(Path(__file__).parent))
from api_pages import render_module
from reference_pages import render_configurations, render_errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

project = "fulgurite"
author = "The fulgurite developers"
copyright = f"2026, {author}"
release = metadata.version("fulgurite")
version = release

extensions = ["myst_nb", "mathml"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
# Tutorials are executed at each build, on data that they generate, in a folder of their own.
nb_execution_mode = "auto"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # of a cell [s]; a tutorial takes less than a minute of one core
nb_merge_streams = True
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"fulgurite {release}"

_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")
_MODULE = re.compile(r"<!-- module: ([\w.]+) -->")
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def _name_files(text: str, folder: Path) -> str:
    """Name the files that relative links lead to where they are no pages or pictures.

    Args:
        text: Markdown whose links start at ``folder``.
        folder: The folder of the page.
    """

    def rewrite(match: re.Match[str]) -> str:
        image, _, target = match.groups()
        place = target.partition("#")[0]
        if not place or re.match(r"[a-z]+:", place):
            return match[0]
        path = (folder / place).resolve()
        is_page = path.suffix == ".md" and path.is_relative_to(DOCS)
        if not path.exists() or image or is_page:  # what does not exist, Sphinx names
            return match[0]
        return f"`{path.relative_to(ROOT).as_posix()}`"

    parts = _FENCE.split(text)
    return "".join(part if i % 2 else _LINK.sub(rewrite, part) for i, part in enumerate(parts))


def _read_source(app: Any, docname: str, source: list[str]) -> None:
    """Show docstrings as pages, and lead links of all pages to pages."""
    page = DOCS / f"{docname}.md"
    if docname.startswith("reference/"):
        text = _MODULE.sub(lambda match: render_module(match[1]), source[0])
        text = text.replace("<!-- configurations -->", render_configurations())
        source[0] = text.replace("<!-- errors -->", render_errors())
    else:
        source[0] = _name_files(source[0], page.parent)


def setup(app: Any) -> None:
    """Connect what reads the pages."""
    app.add_lexer("csv", TextLexer)
    app.connect("source-read", _read_source)
