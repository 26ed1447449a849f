"""The configuration that a run folder holds, as reports read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulgurite.compare.yaml_file import read_yaml
from fulgurite.errors import ConfigError

__all__ = ["name_run", "read_run_config"]


def read_run_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run.

    Raises:
        ConfigError: The file is damaged, or is something else.
    """
    config = read_yaml(folder / "config.yaml") or {}
    if not isinstance(config, dict) or not isinstance(config.get("run") or {}, dict):
        raise ConfigError(f"{folder / 'config.yaml'} is no configuration of a run.")
    return config


def name_run(config: Mapping[str, Any], folder: Path) -> str:
    """System and name of a run, or the name of its folder."""
    run = config.get("run") or {}
    return "/".join(str(run[key]) for key in ("system", "name") if run.get(key)) or folder.name
