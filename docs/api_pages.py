"""The reference of public names, from docstrings, without importing what they describe.

An import of all packages would need every extra and most of a minute; the source says the same.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from citations import link_citations
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

ROOT = Path(__file__).resolve().parents[1]

_NAPOLEON = Config(
    napoleon_use_rtype=False,
    napoleon_use_ivar=True,  # else attributes that are properties too are described twice
    napoleon_custom_sections=[("Shape", "notes"), ("Source", "notes"), ("Shapes", "notes")],
)
_SOURCE = re.compile(r"^(?P<indent> *)Source: (?P<text>.+?)(?=\n\s*\n|\n *\w+:\n|\Z)", re.M | re.S)
Described = ast.ClassDef | ast.FunctionDef


def source_of(module: str) -> Path:
    """The file of a module, by the mapping of folders in ``setup.py``.

    Raises:
        FileNotFoundError: There is no such module.
    """
    parts = module.split(".")[1:]
    top = ROOT if parts and parts[0] in ("models", "datamodules", "callbacks") else None
    path = (top or ROOT / "platform" / "fulgurite").joinpath(*parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise FileNotFoundError(module)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def _imports(module: str) -> dict[str, str]:
    """Modules of the names that a module takes from other modules of fulgurite.

    The stub of a package names what it imports on first use, from modules inside it.
    """
    stub = source_of(module).with_suffix(".pyi")
    tree = ast.parse(stub.read_text(encoding="utf-8")) if stub.is_file() else _tree(module)
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = f"{module}.{node.module}" if node.level else str(node.module)
            if source.startswith("fulgurite"):
                modules |= {(alias.asname or alias.name): source for alias in node.names}
    return modules


def _public(module: str) -> list[str]:
    """Names in ``__all__``, or what a package imports for its users where that is computed."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            if names:
                return [str(name) for name in names]
    return [*_imports(module)]


def _find(module: str, name: str) -> Described | None:
    """The definition of a name, followed through the modules that pass it on."""
    for _ in range(4):
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
        if name not in (imports := _imports(module)) or imports[name] == module:
            return None
        module = imports[name]
    return None


def _arguments(function: ast.FunctionDef) -> str:
    """The argument list, without types and without self."""
    bare = ast.parse(ast.unparse(function)).body[0]
    assert isinstance(bare, ast.FunctionDef)
    arguments = bare.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for rest in filter(None, (arguments.vararg, arguments.kwarg)):
        rest.annotation = None
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    return " ".join(ast.unparse(arguments).split())


def _public_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Methods of a class for its users; of overloads and setters the first definition."""
    methods: dict[str, ast.FunctionDef] = {}
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            methods.setdefault(method.name, method)
    return [*methods.values()]


def _link_source(match: re.Match[str]) -> str:
    """The source of a docstring in one line, its cited sections as links to the papers' pages."""
    text = " ".join(match["text"].split())
    linked = link_citations(text, lambda words, label: f":ref:`{words} <{label}>`")
    linked = re.sub(r"docs/papers/(\w+)\.md", r":doc:`/papers/\1`,", linked)
    return f"{match['indent']}Source: {linked}"


def _describe(kind: str, name: str, node: Described, arguments: str | None) -> Iterator[str]:
    yield f".. py:{kind}:: {name}" + ("" if arguments is None else f"({arguments})")
    yield ""
    docstring = re.sub(r"\n {9,}(?=Shape: )", "\n        ", ast.get_docstring(node) or "")
    docstring = _SOURCE.sub(_link_source, docstring)
    yield from textwrap.indent(str(GoogleDocstring(docstring, _NAPOLEON)), "   ").splitlines()
    yield ""


def _entry(module: str, name: str) -> Iterator[str]:
    """The lines of one public name, nothing where it is no class or function."""
    node = _find(module, name)
    if isinstance(node, ast.FunctionDef):
        yield from _describe("function", f"{module}.{name}", node, _arguments(node))
    elif isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        arguments = _arguments(made[0]) if made else ""
        yield from _describe("class", f"{module}.{name}", node, arguments)
        for method in _public_methods(node):
            is_property = any("property" in ast.unparse(d) for d in method.decorator_list)
            arguments = None if is_property else _arguments(method)
            kind = "property" if is_property else "method"
            lines = _describe(kind, method.name, method, arguments)
            yield from (f"   {line}" if line else "" for line in lines)


def render_module(module: str) -> str:
    """The section of a module: its docstring's first paragraph, and its public names."""
    summary = (ast.get_docstring(_tree(module)) or "").partition("\n\n")[0]
    lines = [line for name in sorted(_public(module)) for line in _entry(module, name)]
    described = "\n".join(lines)
    return f"## {module}\n\n```{{eval-rst}}\n{summary}\n\n{described}\n```\n"
