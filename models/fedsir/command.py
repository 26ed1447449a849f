"""``fulgurite federate app CONFIG``: a configuration as a Flower app."""

from __future__ import annotations

import argparse
import importlib.util
import json
import keyword
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.io import atomic_write
from fulgurite.loading import load

__all__ = ["main", "write_app"]

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = {description}
license = "Apache-2.0"
dependencies = ["fulgurite[flower]=={version}"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = {publisher}

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# Each is an option of `flwr run --run-config`.
[tool.flwr.app.config]
{options}
"""

_MODULE = '''\
"""The {side} of the federation."""

from pathlib import Path

from fulgurite.models.fedsir.flower import make_{side}_app

app = make_{side}_app(Path(__file__).parent)
'''


def write_app(
    config: str,
    folder: Path,
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    publisher: str = "fulgurite",
) -> None:
    """Write the folder of a Flower app.

    Args:
        config: A packaged configuration such as ``fedsir/digits.yaml``, or a YAML file.
        folder: The new folder.
        overrides: Options of ``model``, ``data`` and ``trainer``, as in :func:`fulgurite.load`.
        publisher: Name of the publisher in Flower's sense.

    Raises:
        ConfigError: The folder is there already or cannot name a package, the configuration is no
            federation, or it needs what no federation over a network has.
        MissingExtraError: Flower is not installed.
    """
    optional_import("flwr", "flower", "`fulgurite federate`")
    from fulgurite.models.fedsir.flower.checks import check_federation
    from fulgurite.models.fedsir.flower.server import RUN_CONFIG

    if folder.exists():
        raise ConfigError(f"{folder} is there already.", "Give another folder by --out.")
    package = _name_package(folder)
    options = dict(overrides or {})
    loaded = load(
        config,
        model=options.get("model"),
        data=options.get("data"),
        trainer=options.get("trainer"),
    )
    check_federation(loaded.model, loaded.data, loaded.config)
    lines = [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        for name, value in RUN_CONFIG.items()
    ]
    contents = {
        "pyproject.toml": _PYPROJECT.format(
            name=package.replace("_", "-"),
            package=package,
            description=_quote(f"Federation of {config}"),
            version=metadata.version("fulgurite"),
            publisher=_quote(publisher),
            options="\n".join(lines),
        ),
        f"{package}/__init__.py": "",
        f"{package}/server_app.py": _MODULE.format(side="server"),
        f"{package}/client_app.py": _MODULE.format(side="client"),
        f"{package}/config.yaml": yaml.safe_dump(dict(loaded.config), sort_keys=False),
    }
    with atomic_write(folder) as temporary:
        for name, content in contents.items():
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")


def _name_package(folder: Path) -> str:
    """Return the name of an app's package, after its folder.

    Raises:
        ConfigError: No package can be called so, or a module of this name is installed.
    """
    package = re.sub(r"\W+", "_", folder.name).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise ConfigError(
            f"{folder.name!r} cannot be the name of an app.",
            "Begin the folder's name by a letter, and take no word of Python.",
        )
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:  # else it is a folder beside this one
        raise ConfigError(
            f"There is a module {package!r} already, which the app's package would hide.",
            "Give the folder another name.",
        )
    return package


def _quote(text: str) -> str:
    """Return a string as TOML writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def main(argv: Sequence[str]) -> int:
    """Run ``fulgurite federate``.

    Args:
        argv: Its arguments.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="fulgurite federate",
        description="Write a Flower app that runs a configuration's rounds over a network.",
        epilog="Further options are those of the configuration, such as "
        "--model.method.relabeling.every=2, --data.clients=3 or --trainer.max_epochs=5.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    app = commands.add_parser("app", help="write the app", allow_abbrev=False)
    app.add_argument("config", help="such as fedsir/digits.yaml")
    app.add_argument("--out", help="the new folder; default: ./NAME of the configuration")
    app.add_argument("--publisher", default="fulgurite", help="in Flower's sense")
    arguments, rest = parser.parse_known_args(list(argv))
    name = Path(arguments.config).with_suffix("").as_posix().replace("/", "_")
    folder = Path(arguments.out or re.sub(r"\W+", "_", f"federation_{name}"))
    write_app(
        arguments.config, folder, overrides=_group_options(rest), publisher=arguments.publisher
    )
    print(
        f"{folder} is a Flower app. Start it by\n  flwr run {folder} NAME-OF-A-SUPERLINK --stream"
    )
    return 0


def _group_options(options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Sort options such as ``--data.clients=3`` by what they belong to.

    Raises:
        ConfigError: An option has another form.
    """
    groups: dict[str, dict[str, Any]] = {}
    for option in options:
        match = re.fullmatch(r"--(model|data|trainer)\.([\w.]+)=(.*)", option, re.DOTALL)
        if match is None:
            raise ConfigError(
                f"fulgurite federate has no option {option}.",
                "Give --out, --publisher, or --model.KEY=VALUE, --data.KEY=VALUE, "
                "--trainer.KEY=VALUE.",
            )
        groups.setdefault(match[1], {})[match[2]] = match[3]
    return groups
