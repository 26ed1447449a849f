"""Configuration of the documentation: ``make docs``."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

sys.path.insert(0, str(Path(__file__).parent))
from api_pages import render_module

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

project = "fulgurite"
author = "The fulgurite developers"
copyright = f"2026, {author}"
release = metadata.version("fulgurite")
version = release

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"fulgurite {release}"

_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")
_MODULE = re.compile(r"<!-- module: ([\w.]+) -->")
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def _page_of(path: Path) -> Path | None:
    """The page that shows a file of the repository, or None where there is none."""
    if path.name == "README.md" and path.parent.parent == ROOT / "models":
        return DOCS / "systems" / f"{path.parent.name}.md"
    return path if path.suffix == ".md" and path.is_relative_to(DOCS) else None


def _rewrite_links(text: str, folder: Path, page: Path) -> str:
    """Lead relative links to pages; files that are no pages are named instead.

    Args:
        text: Markdown whose links start at ``folder``.
        folder: The folder of the file that holds the text.
        page: The page that shows it.
    """

    def rewrite(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        place, _, anchor = target.partition("#")
        if not place or re.match(r"[a-z]+:", place):
            return match[0]
        path = (folder / place).resolve()
        if not path.exists():  # a label
            return match[0]
        shown = path if image else _page_of(path)
        if shown is None:
            return f"`{path.relative_to(ROOT).as_posix()}`"
        there = Path(os.path.relpath(shown, page.parent)).as_posix()
        return f"{image}[{words}]({there}{'#' * bool(anchor)}{anchor})"

    parts = _FENCE.split(text)
    return "".join(part if i % 2 else _LINK.sub(rewrite, part) for i, part in enumerate(parts))


def _read_source(app: Any, docname: str, source: list[str]) -> None:
    """Show READMEs of systems and docstrings as pages, and lead links of all pages to pages."""
    page = DOCS / f"{docname}.md"
    if docname.startswith("systems/") and docname != "systems/index":
        readme = ROOT / "models" / page.stem / "README.md"
        source[0] = _rewrite_links(readme.read_text(encoding="utf-8"), readme.parent, page)
    elif docname.startswith("reference/"):
        source[0] = _MODULE.sub(lambda match: render_module(match[1]), source[0])
    else:
        source[0] = _rewrite_links(source[0], page.parent, page)


def setup(app: Any) -> None:
    """Connect what reads the pages."""
    app.add_lexer("csv", TextLexer)
    app.connect("source-read", _read_source)
