"""What the trials of a study are: all of one configuration, and in folders of that study alone."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from fulgurite.compare.hashing import digest
from fulgurite.compare.identity import RUNNER, Resolver
from fulgurite.compare.watch import ConfigFiles
from fulgurite.errors import ConfigError, FulguriteError
from fulgurite.io import write_text
from fulgurite.sweep.space import Sweep
from fulgurite.sweep.storage import hide_password
from fulgurite.systems import resolve_config

__all__ = ["Definition", "TrialDefinition", "claim_folder", "define_point"]

Definition = Mapping[str, str]
"""Hash of each option, of each file of data and of each version, by name."""

_DEFINITION, _FOLDER = "definition", "folder"  # attributes of a study
_ID_FILE = "study.id"
_WAY_OUT = "Undo the change to go on, or give another --out or --name to begin a new sweep."


def define_point(sweep: Sweep, point: Mapping[str, Any], resolver: Resolver) -> Definition:
    """What a point of a sweep would run, which checks its options.

    Args:
        sweep: The sweep.
        point: A value for each parameter that is not constant.
        resolver: Resolves command lines.

    Raises:
        FulguriteError: An option of the command, or a value of it, is wrong.
    """
    configuration, data, versions = resolver([*sweep.command, *sweep.options(point)])
    return {
        **{name: digest(value) for name, value in _options(configuration)},
        **{f"the content of {name}": identity for name, identity in data.items()},
        **{f"the version of {name}": version for name, version in versions.items()},
    }


def _options(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration, by their names with dots.

    >>> dict(_options({"model": {"lr": 1, "sizes": [2, 3]}, "seed": 0}))
    {'model.lr': 1, 'model.sizes': [2, 3], 'seed': 0}
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _options(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


class TrialDefinition:
    """What the trials of a study run beside their parameters, which must stay the same.

    Args:
        sweep: The sweep.
        runner: ``module:function`` that runs a command line.

    Raises:
        FulguriteError: An option of the first point is wrong.
    """

    def __init__(self, sweep: Sweep, runner: str = RUNNER) -> None:
        self._sweep, self._runner = sweep, runner
        self._definition = self._define()
        self._files = ConfigFiles(_config_files(sweep.command))

    def _define(self) -> Definition:
        return define_point(self._sweep, self._sweep.first_point, Resolver(self._runner))

    def check_study(self, study: optuna.Study, url: str) -> None:
        """Check that the trials of a study so far were of this configuration, or record it.

        Args:
            study: The study.
            url: Address of its storage.

        Raises:
            ConfigError: A configuration, the data or a version has changed since.
        """
        recorded = study.user_attrs.get(_DEFINITION)
        if recorded is None:
            study.set_user_attr(_DEFINITION, json.dumps(self._definition))
        elif changes := _differences(json.loads(recorded), self._definition):
            raise ConfigError(
                f"The trials of {study.study_name} in {hide_password(url)} were of another "
                f"configuration than {' '.join(self._sweep.command)} is now ({changes}).",
                _WAY_OUT,
            )

    def check_files(self) -> None:
        """Check that no configuration file was edited in a way that matters.

        Raises:
            ConfigError: The trials run something else by now.
        """
        changed = self._files.find_changed()
        if changed is None:
            return
        try:
            changes = _differences(self._definition, self._define())
        except FulguriteError as error:  # half-way through an edit
            changes = str(error)
        if changes:
            raise ConfigError(
                f"{changed} changed while trials ran, so that these were not recorded ({changes}).",
                _WAY_OUT,
            )
        self._files.accept()


def _differences(before: Definition, now: Definition) -> str:
    """In what two definitions differ, in words; nothing where they do not."""
    names = [k for k in dict.fromkeys([*before, *now]) if before.get(k) != now.get(k)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = "differs" if len(names) == 1 else "differ"
    return f"{', '.join(names[:3])}{more} {verb}" if names else ""


def _config_files(command: Sequence[str]) -> Iterator[Path]:
    """The configuration files that a command names."""
    for number, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or number + 1 < len(command)):
            yield resolve_config(value if equals else command[number + 1])


def claim_folder(study: optuna.Study, url: str, folder: Path) -> None:
    """Take a folder for the trials of a study, unless it holds those of another.

    Args:
        study: The study.
        url: Address of its storage.
        folder: Folder of results.

    Raises:
        ConfigError: The folder holds trials of another study.
    """
    file = folder / _ID_FILE
    identity = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if identity and f"{_FOLDER} {identity}" in study.user_attrs:
        return
    # an earlier version gave folders no identity
    is_foreign = bool(identity) or not study.get_trials(deepcopy=False)
    if is_foreign and any((folder / "trials").glob("*")):
        raise ConfigError(
            f"{folder} holds the trials of another study than {study.study_name} in "
            f"{hide_password(url)}.",
            "Give another --out, or the --name and --storage of those trials.",
        )
    identity = uuid.uuid4().hex
    study.set_user_attr(f"{_FOLDER} {identity}", True)  # a key for each: none overwrites another's
    write_text(file, f"{identity}\n")
