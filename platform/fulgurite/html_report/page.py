"""The parts of a page, and how they become one file that opens without a network."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from fulgurite import __version__
from fulgurite.io import write_text

__all__ = [
    "Cell",
    "Chart",
    "Image",
    "Page",
    "Section",
    "Table",
    "Text",
    "embed_image",
    "texts_of_files",
    "write_page",
]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: What is shown.
        value: What it is sorted by; None for the text.
        title: Shown when the pointer rests on it.
        best: Whether it is the best of its column.
        verdict: ``beats``, ``loses`` or empty.
        wide: Whether it may be broken into lines.
    """

    text: str
    value: float | None = None
    title: str = ""
    best: bool = False
    verdict: str = ""
    wide: bool = False

    @classmethod
    def of_number(cls, value: float | None) -> Cell:
        """A number with five digits, whole where it is large; empty for None."""
        if value is None:
            return cls("")
        if math.isnan(value):  # which has no place in an order
            return cls("nan")
        return cls(f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}", value)


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers alone."""
        return [
            all(row[i].value is not None or row[i].text in ("", "nan") for row in self.rows)
            and bool(self.rows)
            for i in range(len(self.heads))
        ]


@dataclass(frozen=True)
class Chart:
    """An inline SVG with a heading.

    Args:
        title: The heading.
        svg: The SVG, whose texts are escaped.
        legend: Names of its lines, in the order of their colours; empty where there is one.
    """

    title: str
    svg: str
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class Image:
    """A picture within the page."""

    title: str
    address: str


@dataclass(frozen=True)
class Text:
    """A text that can be opened."""

    title: str
    content: str
    open: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading."""

    title: str
    notes: Sequence[str] = ()
    legend: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    images: Sequence[Image] = ()
    texts: Sequence[Text] = ()

    @property
    def id(self) -> str:
        """What a link on the page names."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing under the heading."""
        return not (self.notes or self.tables or self.charts or self.images or self.texts)


@dataclass(frozen=True)
class Page:
    """A page: its title, a line below, and sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def embed_image(path: Path, title: str) -> Image:
    """A PNG file as part of the page.

    Args:
        path: The file.
        title: What it shows.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Image(title, f"data:image/png;base64,{data}")


def write_page(page: Page, path: Path) -> None:
    """Write a page as one HTML file that needs no other.

    Args:
        page: The page.
        path: The file.
    """
    import jinja2
    from markupsafe import Markup

    folder = resources.files(__package__)

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(read("page.html.j2"))
    sections = [
        replace(section, charts=[replace(c, svg=Markup(c.svg)) for c in section.charts])
        for section in page.sections
        if not section.is_empty
    ]
    content = template.render(
        page=Page(page.title, page.subtitle, sections),
        version=__version__,
        style=Markup(read("style.css")),
        script=Markup(read("script.js")),
    )
    write_text(path, content)


def texts_of_files(files: Iterable[tuple[str, Path]]) -> list[Text]:
    """The content of those files that are there, each under its title."""
    return [
        Text(title, path.read_text(encoding="utf-8", errors="replace"))
        for title, path in files
        if path.is_file()
    ]
