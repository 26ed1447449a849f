"""Markdown pages as readers use them: their blocks, commands and links.

A fenced block whose first line is ``# path/file`` writes that file. Blocks of ``bash`` and
``python`` are run, in the order of the page, in one folder; a command that ends with another status
than 0 says so: ``# exit 2``. A block that cannot run here has ``<!-- not run: reason -->`` in the
line before it, or begins with ``# not run: reason``.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fakes.repository import ROOT

#: Pages whose blocks are run, or say why they are not. Tutorials are executed by the site's build.
PAGES = sorted(
    path
    for pattern in ("README.md", "docs/**/*.md", "models/*/README.md")
    for path in ROOT.glob(pattern)
    if not {"tutorials", "_build"} & set(path.parts)
)
RUN = ("bash", "python")

_FENCE = re.compile(
    r"^(?P<tick>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=tick)\s*$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"# ([\w./-]+\.\w+)$")
_NOT_RUN = re.compile(r"(?:# |<!-- )not run: (.+?)(?: -->)?$")
_STATUS = re.compile(r"# exit (\d+)")
_SHELL = re.compile(r"[|&;<>$(){}*]|^\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str
    line: int
    before: str = ""  # the line before it

    @property
    def file(self) -> str | None:
        """The file that the block writes."""
        match = _FILE.match(self.text.partition("\n")[0])
        return match[1] if match else None

    @property
    def reason(self) -> str | None:
        """Why the block is not run; None where it is, or is no commands."""
        match = _NOT_RUN.match(self.text.partition("\n")[0]) or _NOT_RUN.match(self.before)
        return match[1] if match else None

    @property
    def is_run(self) -> bool:
        """Whether the block holds commands or code that a test runs."""
        return self.language in RUN and not self.file and not self.reason

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line of a ``bash`` block, with the exit status that the page promises."""

    line: str
    status: int = 0

    @property
    def words(self) -> list[str]:
        """The command's words, without its comment."""
        return shlex.split(self.line, comments=True)

    @property
    def is_plain(self) -> bool:
        """Whether no shell is needed."""
        return not _SHELL.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", " ".join(self.words)))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    parsed = []
    for match in _FENCE.finditer(text):
        above = text[: match.start()].splitlines() or [""]
        language = match["language"].strip()
        parsed.append(Block(page, language, match["text"], len(above) + 1, above[-1]))
    return parsed


def commands(block: Block) -> list[Command]:
    """The commands of a ``bash`` block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    statuses = [_STATUS.search(line) for line in stripped]
    return [
        Command(line, int(status[1]) if status else 0)
        for line, status in zip(stripped, statuses, strict=True)
    ]


def run_page(page: Path, folder: Path, call: Callable[[list[str]], int]) -> int:
    """Write the files of a page and run its blocks, in order.

    Args:
        page: The page.
        folder: The current folder, empty at first.
        call: Runs ``fulgurite`` in this process and gives its exit status.

    Returns:
        The number of commands and blocks of code that were run.
    """
    count = 0
    for block in blocks(page):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.is_run and block.language == "python":
            code = compile(block.text, str(block), "exec")
            exec(code, {"__name__": "__main__"})
            count += 1
        elif block.is_run:
            for command in commands(block):
                status = _run(command, folder, call)
                assert status == command.status, f"{block}: {command.line} ended with {status}"
                count += 1
    return count


def _run(command: Command, folder: Path, call: Callable[[list[str]], int]) -> int:
    words = command.words
    if words[0] == "make":  # runs these tests, or this page's commands, again
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return 0 if set(words[1:]) <= set(targets) else 2
    if words[:3] == ["pip", "install", "-e"]:
        return _install(folder / words[3], folder / "site-packages")
    is_installed = (folder / "site-packages").exists()  # what this process looked up before
    if words[0] == "fulgurite" and command.is_plain and not is_installed:
        return call(words[1:])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-c", command.line], cwd=folder, env=os.environ | {"PATH": path}, check=False
    )
    return done.returncode


def _install(source: Path, target: Path) -> int:
    """Install a package where this process and its children find it, without the network."""
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], check=False
    )
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = str(target)
    return done.returncode


def imported_names(code: str) -> Iterator[str]:
    """Full names of what code takes from ``fulgurite``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fulgurite"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# --- links -------------------------------------------------------------------------------------

_LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
# other sites, and what GitHub has beside the files of a repository
_OUTSIDE = re.compile(r"[a-z]+:|\.\./\.\./actions/")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_LABEL = re.compile(r"\(([\w-]+)\)=$", re.MULTILINE)


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that lead into the repository."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]+`(?!\])", "", text)
    return [target for target in _LINK.findall(text) if not _OUTSIDE.match(target)]


def anchors(page: Path) -> set[str]:
    """What a link to a page may name after ``#``: its headings, as GitHub and MyST write them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {*_LABEL.findall(text), *(_slug(heading) for heading in _HEADING.findall(text))}


def _slug(heading: str) -> str:
    words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
