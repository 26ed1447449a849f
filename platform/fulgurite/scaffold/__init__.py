"""``fulgurite new``: the package of another paper, which runs at once."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write
from fulgurite.systems import systems

__all__ = ["create_package", "main"]

_FILES = {
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    "{name}/__init__.py": "system.py.j2",
    "{name}/data.py": "data.py.j2",
    "{name}/model.py": "model.py.j2",
    "{name}/callback.py": "callback.py.j2",
    "{name}/configs/__init__.py": "configs.py.j2",
    "{name}/configs/default.yaml": "default.yaml.j2",
    "{name}/configs/smoke.yaml": "smoke.yaml.j2",
    "{name}/configs/compare.yaml": "compare.yaml.j2",
    "{name}/configs/sweep.yaml": "sweep.yaml.j2",
    "tests/test_{name}.py": "test.py.j2",
}


def create_package(name: str, folder: Path) -> list[Path]:
    """Write a package with data, module, callback, configurations, tests and entry point.

    Args:
        name: Name of the package and of the system.
        folder: Where its folder is made.

    Returns:
        The files.

    Raises:
        ConfigError: The name cannot be that of a package, is taken, or the folder is there.
    """
    import jinja2

    _check_name(name)
    root = folder / name
    if root.exists():
        raise ConfigError(f"{root} is there already.", "Give another name or --folder.")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    class_name = "".join(word.capitalize() for word in name.split("_"))
    templates = resources.files(f"{__package__}.templates")
    contents: dict[str, str] = {}
    for path, template in _FILES.items():
        source = templates.joinpath(template).read_text(encoding="utf-8")
        content = environment.from_string(source).render(name=name, class_name=class_name)
        contents[path.format(name=name)] = content
    with atomic_write(root) as temporary:  # a whole package, or none
        for path, content in contents.items():
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    return [root / path for path in contents]


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a package.",
            "Give lower-case letters, digits and underscores, such as my_paper.",
        )
    if name == "tests":
        raise ConfigError(
            "The tests of a package are in a folder 'tests' beside it.", "Give another name."
        )
    if name in systems():
        raise ConfigError(f"There is a system {name!r} already.", "Give another name.")
    if importlib.util.find_spec(name) is not None:
        raise ConfigError(
            f"There is a module {name!r} already, which the package would hide.",
            "Give another name.",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite new``."""
    parser = argparse.ArgumentParser(
        "fulgurite new", description="Write the package of another paper, which runs at once."
    )
    parser.add_argument("name", help="name of the package and of the system, such as my_paper")
    parser.add_argument("--folder", default=".", type=Path, help="where its folder is made")
    options = parser.parse_args(argv)
    files = create_package(options.name, options.folder)
    for file in files:
        print(file)
    root = options.folder / options.name
    print(
        f"\ncd {shlex.quote(str(root))}\nfulgurite fit --config {options.name}/configs/smoke.yaml"
    )
    return 0
