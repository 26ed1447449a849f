"""The trials of a comparison: its grid, each cell by what its commands would run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulgurite.compare.devices import device_count
from fulgurite.compare.hashing import digest
from fulgurite.compare.identity import Definition
from fulgurite.compare.plan import ComparisonMethod, ComparisonPlan, settings_of
from fulgurite.compare.plan_file import find_config, methods_before
from fulgurite.compare.schema import Overrides, spell
from fulgurite.compare.trial import Setting, Training, Trial, setting_label
from fulgurite.compare.yaml_file import read_yaml
from fulgurite.errors import ConfigError, FulguriteError
from fulgurite.systems import config_path

__all__ = ["define_trials"]

Define = Callable[[Sequence[str]], Definition]
"""Takes a command line to what it would run."""


def define_trials(plan: ComparisonPlan, define: Define | None = None) -> list[Trial]:
    """The trials of a comparison, seeds outermost: interrupted, a comparison is evenly filled.

    Args:
        plan: The comparison.
        define: Takes a command line to what it would run, such as
            :class:`~fulgurite.compare.identity.Resolver`; by default it stands for itself.

    Raises:
        ConfigError: A configuration file does not exist, two trials have the same name, or
            ``define`` refuses an option.
    """
    files = {
        name: _spell_config(name, plan.folder)
        for name in (plan.config, *(m.config for m in plan.methods.values()))
        if name
    }
    definer = _TrialDefiner(plan, define or _as_written, files)
    origins_first = sorted(
        plan.methods.values(), key=lambda method: len(methods_before(method, plan.methods))
    )
    trials: dict[tuple[str, Setting, int], Trial] = {}
    for seed, setting, method in itertools.product(plan.seeds, plan.grid, origins_first):
        origin = trials[method.after.method, setting, seed] if method.after else None
        trials[method.id, setting, seed] = definer.trial(method, setting, seed, origin)
    if twice := _duplicates(trial.id for trial in trials.values()):
        raise ConfigError(
            f"Two cells of the comparison have the same file name: {twice[0]}.",
            "Give labels that differ in letters, digits, '.', '+' or '-'.",
        )
    cells = itertools.product(plan.seeds, plan.grid, plan.rows)
    return [trials[method, setting, seed] for seed, setting, method in cells]


@dataclass(frozen=True)
class _TrialDefiner:
    """Works out the trials of a plan one by one.

    Args:
        plan: The comparison.
        define: Takes a command line to what it would run.
        files: How the command line spells each configuration file.
    """

    plan: ComparisonPlan
    define: Define
    files: Mapping[str, str]

    def trial(
        self, method: ComparisonMethod, setting: Setting, seed: int, origin: Trial | None
    ) -> Trial:
        """The trial of a method in a setting with a seed, after the one that it starts from."""
        plan = self.plan
        trainings: list[Training] = []
        definitions: list[Definition] = []
        for tried in settings_of(plan.tune.grid if plan.tune else {}):
            training, defined = self._training(method, setting, seed, tried)
            trainings.append(training)
            definitions += defined
        tune = plan.tune and [plan.tune.metric, plan.tune.mode]
        frame = [seed, plan.after_fit, plan.shares, tune, method.after]
        before = origin.parts if origin else {}
        parts = {
            "configuration": digest([frame, [d.configuration for d in definitions], before]),
            "data": digest([[d.data for d in definitions], before.get("data")]),
            "version": digest([[d.versions for d in definitions], before.get("version")]),
        }
        devices = [device_count(d.configuration) for d in definitions]
        devices_needed = max(devices) if all(devices) else 0
        return Trial(method.id, setting, seed, tuple(trainings), parts, origin, devices_needed)

    def _training(
        self, method: ComparisonMethod, setting: Setting, seed: int, tried: Setting
    ) -> tuple[Training, list[Definition]]:
        """One training of a trial, and what its commands would run, in their order."""
        plan = self.plan
        grid = plan.tune.grid if plan.tune else {}
        fit = [plan.args, method.args, *self._settings(method, setting)]
        fit += [grid[axis][label] for axis, label in tried]
        tests = [plan.tests[axis][label] for axis, label in setting if axis in plan.tests]
        validate, test = [*fit, method.test_args], [*fit, method.test_args, *tests]
        defined, predict = [self._definition("fit", fit, method, setting)], None
        if method.predict is not None:
            predicted = [*fit, method.predict]
            predict = self._options(method, predicted, seed)
            defined.append(self._definition("predict", predicted, method, setting))
        key, validation = digest([seed, defined]), ""
        if plan.tune:
            validated = self._definition("validate", validate, method, setting)
            validation = digest(validated)
            defined.append(validated)
        if plan.shares:
            defined.append(self._definition(str(plan.after_fit), test, method, setting))
        training = Training(
            label=", ".join(f"{axis}={value}" for axis, value in tried),
            fit=self._options(method, fit, seed),
            validate=self._options(method, validate, seed),
            test=self._options(method, test, seed),
            key=key,
            predict=predict,
            validation=validation,
        )
        return training, defined

    def _settings(self, method: ComparisonMethod, setting: Setting) -> Iterator[Overrides]:
        """What a setting says of the training.

        Of an axis that is ignored this is the first label, but for what the method sets itself.
        """
        for axis, label in setting:
            labels = self.plan.settings.get(axis, {})
            if labels and axis in method.ignores:
                first = next(iter(labels.values()))
                yield {key: value for key, value in first.items() if key not in method.args}
            elif labels:
                yield labels[label]

    def _config_options(self, method: ComparisonMethod) -> list[str]:
        names = [name for name in (self.plan.config, method.config) if name]
        return [part for name in names for part in ("--config", self.files[name])]

    def _options(
        self, method: ComparisonMethod, layers: Sequence[Overrides], seed: int
    ) -> tuple[str, ...]:
        """Command-line options with a seed."""
        seeds = dict.fromkeys(self.plan.seed_keys, seed)
        return (*self._config_options(method), *_merge_options([*layers, seeds]))

    def _definition(
        self, command: str, layers: Sequence[Overrides], method: ComparisonMethod, setting: Setting
    ) -> Definition:
        """What a command would run: one for all seeds, since resolving takes longer than all else.

        Raises:
            ConfigError: An option or a value of it is wrong.
        """
        start = method.after
        any_seed = dict.fromkeys(self.plan.seed_keys, 0)
        taken = {start.key: f"{start.method}/{start.path}"} if start else {}
        options = [*self._config_options(method), *_merge_options([*layers, any_seed, taken])]
        try:
            return self.define([command, *options])
        except FulguriteError as error:
            key_path = " ".join(filter(None, [f"methods.{method.id}", setting_label(setting)]))
            raise ConfigError(f"{key_path}: `{command}`: {error.problem}", error.hint) from error


def _as_written(command: Sequence[str]) -> Definition:
    return Definition([*command])


def _merge_options(layers: Iterable[Overrides]) -> list[str]:
    merged: Overrides = {}
    for layer in layers:
        for key, value in layer.items():
            merged.pop(key, None)  # the last one wins, and comes last
            merged[key] = value
    return [f"--{key}={spell(value)}" for key, value in merged.items()]


def _duplicates(names: Iterable[str]) -> list[str]:
    previous: set[str] = set()
    return [name for name in names if name in previous or previous.add(name)]  # type: ignore[func-returns-value]


def _spell_config(name: str, folder: Path | None) -> str:
    """A configuration file as the command line spells it."""
    path = find_config(name, folder)
    read_yaml(path)  # refused here if it is none
    return name if path == config_path(name) else str(path.resolve())
