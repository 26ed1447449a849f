"""Reference pages that are read off the repository: configurations and errors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fulgurite.systems import kind_of, read_keys

ROOT = Path(__file__).resolve().parents[1]
_COMMANDS = {"run": "fit", "comparison": "compare", "sweep": "sweep"}


def describe_configuration(path: Path) -> str:
    """The first sentence of a file's comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").strip())
    text = " ".join(comment)
    match = re.match(r".+?\.(?=\s|$)", text)
    return (match[0] if match else text).rstrip(":") or "–"


def render_configurations() -> str:
    """A table of the packaged configurations for each system."""
    sections = []
    for folder in sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        if not files:
            continue
        rows = [
            f"| `{folder.name}/{path.name}` | {_command(path)} | {describe_configuration(path)} |"
            for path in files
        ]
        head = ["| name | for | what it is |", "|---|---|---|"]
        sections.append("\n".join([f"## {folder.name}", "", *head, *rows]))
    return "\n\n".join(sections)


def _command(path: Path) -> str:
    return f"`{_COMMANDS[str(kind_of(read_keys(path)))]}`"


def render_errors() -> str:
    """Rows of the classes of ``fulgurite.errors``."""
    source = (ROOT / "platform" / "fulgurite" / "errors.py").read_text(encoding="utf-8")
    rows = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            builtin = ", ".join(f"`{base}`" for base in bases if base != "FulguriteError")
            summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
            rows.append(f"| `{node.name}` | {builtin} | {' '.join(summary.split())} |")
    return "\n".join(rows)
