"""Notices that configuration files are edited while the trials of a comparison run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fulgurite.compare.identity import Resolver
from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.plan_file import find_config
from fulgurite.compare.trial import Trial
from fulgurite.compare.trials import define_trials
from fulgurite.compare.yaml_file import read_yaml
from fulgurite.errors import ConfigError, FulguriteError

__all__ = ["ConfigFiles", "ConfigWatch"]

Stamps = dict[Path, tuple[int, int]]
"""Time of change [ns] and size [bytes] of files."""


class ConfigFiles:
    """Configuration files and those that they include, and whether they were edited.

    Args:
        files: The files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [*files]
        self.accept()

    def accept(self) -> None:
        """Take the files as they are now."""
        self._stamps = self._look()

    def find_changed(self) -> str | None:
        """Names of the files that were edited, in a text; None where none was."""
        stamps = self._look()
        if stamps == self._stamps:
            return None
        changed = sorted(path for path in stamps if stamps[path] != self._stamps.get(path))
        return ", ".join(map(str, changed)) or "a configuration file"

    def _look(self) -> Stamps:
        stamps: Stamps = {}
        for file in self._files:
            for path in _with_included(file, set()):
                try:
                    facts = path.stat()
                except OSError:
                    continue
                stamps[path] = (facts.st_mtime_ns, facts.st_size)
        return stamps


class ConfigWatch:
    """Ends a comparison whose next trials would run something else than they are taken for.

    Args:
        plan: The comparison.
        trials: Its trials as they were when it began.
        runner: ``module:function`` that runs a command line.
    """

    def __init__(self, plan: ComparisonPlan, trials: Sequence[Trial], runner: str) -> None:
        self._plan = plan
        self._runner = runner
        self._digests = [trial.digest for trial in trials]
        names = [plan.config, *(m.config for m in plan.methods.values() if m.config)]
        self._files = ConfigFiles(find_config(name, plan.folder) for name in names)

    def check(self) -> None:
        """Check that nothing was changed that matters.

        Raises:
            ConfigError: The trials run something else by now.
        """
        changed = self._files.find_changed()
        if changed is None:
            return
        try:
            trials = define_trials(self._plan, Resolver(self._runner))
            same = [trial.digest for trial in trials] == self._digests
        except FulguriteError:  # half-way through an edit
            same = False
        if not same:
            raise ConfigError(
                f"{changed} changed while cells ran, so that these were not recorded.",
                "The same command goes on, with the new configuration.",
            )
        self._files.accept()


def _with_included(file: Path, visited: set[Path]) -> Iterator[Path]:
    """A configuration file and those that its values name."""
    if file in visited:
        return
    visited.add(file)
    yield file
    try:
        content = read_yaml(file)
    except ConfigError:
        return
    for text in _texts(content):
        if text.endswith((".yaml", ".yml", ".json")) and (file.parent / text).is_file():
            yield from _with_included(file.parent / text, visited)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
