"""What a comparison is: methods, settings, seeds, and how their results are compared."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fulgurite.compare.resources import Resources, read_resources
from fulgurite.compare.schema import (
    Axes,
    Overrides,
    check_mapping,
    read_axes,
    read_name,
    read_overrides,
    read_section,
    read_seeds,
    reader,
)
from fulgurite.compare.trial import LAST_CHECKPOINT, Setting, Trial, setting_label, trial_id
from fulgurite.errors import ConfigError

__all__ = [
    "ComparisonMethod",
    "ComparisonPlan",
    "Tune",
    "WarmStart",
    "method_to_dict",
    "read_method",
    "read_methods",
    "read_tune",
    "settings_of",
]

Mode = Literal["max", "min"]


class WarmStart(NamedTuple):
    """What a training takes from another method's.

    Args:
        method: Id of that method.
        key: Command-line key that receives the path.
        path: What is taken, relative to that training's run folder.
    """

    method: str
    key: str
    path: str = LAST_CHECKPOINT


def _read_warm_start(after: object, key_path: str) -> WarmStart | None:
    """What ``after`` says: ``{METHOD: key}``, or ``{METHOD: {key: path}}``."""
    origins = check_mapping(after or {}, key_path)
    if not origins:
        return None
    if len(origins) > 1:
        raise ConfigError(
            f"{key_path} names {len(origins)} methods.",
            "A training starts from one other: write `after: {METHOD: dotted.key}`.",
        )
    ((origin, taken),) = origins.items()
    here = f"{key_path}.{origin}"
    paths = taken if isinstance(taken, dict) else {str(taken): LAST_CHECKPOINT}
    ((key, path),) = read_overrides(paths, here).items() if len(paths) == 1 else ((None, None),)
    if key is None or not isinstance(path, str) or _leaves(path):
        raise ConfigError(
            f"{here} is {taken!r}.",
            "Write the dotted key that receives the last checkpoint, or `{key: path}` with a path "
            "in the run folder.",
        )
    return WarmStart(str(origin), key, path)


def _leaves(path: str) -> bool:
    """Whether a relative path may leave the folder that it starts in."""
    return Path(path).is_absolute() or ".." in Path(path).parts


def _read_predict(value: object, key_path: str) -> Overrides | None:
    return None if value is None else read_overrides(value, key_path)


@dataclass(frozen=True)
class ComparisonMethod:
    """One line of the table.

    Args:
        id: Name in file names and on the command line.
        label: Name in tables and figures.
        args: Command-line overrides of this method.
        config: A further YAML file, read after the common one.
        test_args: Overrides of the evaluation alone.
        after: The method whose checkpoint, or another file of whose run, this one starts from.
        predict: Overrides of a ``fulgurite predict`` that follows the training; None for none.
        listed: Whether it has a line in the table; else it only serves methods after it.
        ignores: Axes under ``settings`` that make no difference to it: all their labels stand for
            the first one, and cells that are then the same are run once.
    """

    id: str = field(metadata={"key": False})
    label: str
    args: Overrides = field(default_factory=dict, metadata=reader(read_overrides))
    config: str | None = None
    test_args: Overrides = field(default_factory=dict, metadata=reader(read_overrides))
    after: WarmStart | None = field(default=None, metadata=reader(_read_warm_start))
    predict: Overrides | None = field(default=None, metadata=reader(_read_predict))
    listed: bool = True
    ignores: tuple[str, ...] = ()


def read_method(name: object, values: object) -> ComparisonMethod:
    """A method as the file describes it.

    Raises:
        ConfigError: The name or a key is wrong.
    """
    name = read_name(name, "methods")
    key_path = f"methods.{name}"
    described = check_mapping(values or {}, key_path)
    described["label"] = described.get("label") or name
    return ComparisonMethod(id=name, **read_section(ComparisonMethod, described, key_path))


def read_methods(value: object, key_path: str = "methods") -> dict[str, ComparisonMethod]:
    """The methods of a file by id.

    Raises:
        ConfigError: An option is wrong.
    """
    described = check_mapping(value, key_path).items()
    return {name: read_method(name, values) for name, values in described}


def method_to_dict(method: ComparisonMethod) -> dict[str, Any]:
    """A method in the form of the file, from which :func:`read_method` reads it back."""
    start = method.after
    after = None
    if start is not None:
        last = start.path == LAST_CHECKPOINT
        after = {start.method: start.key if last else {start.key: start.path}}
    described = {key: value for key, value in vars(method).items() if key != "id"}
    return {**described, "after": after, "ignores": list(method.ignores)}


@dataclass(frozen=True)
class Tune:
    """Trainings of which a method takes the one that does best on validation data.

    Args:
        grid: Axes of what is tried; each training of their product is run.
        metric: Metric of ``fulgurite validate`` that decides.
        mode: ``max`` where more is better, else ``min``.
    """

    grid: Axes = field(metadata=reader(read_axes))
    metric: str = "val/acc"
    mode: Mode = "max"


def read_tune(value: object, key_path: str) -> Tune | None:
    """How trainings are chosen, as the file describes it; None where it says nothing.

    Raises:
        ConfigError: A key is wrong, or nothing is tried.
    """
    if not value:
        return None
    tune = {"grid": {}, **read_section(Tune, check_mapping(value, key_path), key_path)}
    if not tune["grid"]:
        raise ConfigError(
            f"{key_path} has no grid.", "Name what is tried: `grid: {AXIS: {LABEL: {…}}}`."
        )
    return Tune(**tune)


@dataclass(frozen=True)
class ComparisonPlan:
    """A checked comparison file.

    Args:
        title: Heading of the table.
        config: Packaged name or path of the configuration that all cells share.
        methods: Lines of the table, by id.
        settings: For each axis its labels, for each label its overrides.
        seeds: Seeds of each method in each setting.
        seed_keys: Command-line keys that receive the seed.
        metric: Name of the metric that is compared.
        mode: ``max`` where more is better, else ``min``.
        baseline: Id of the method that the others are compared with.
        after_fit: Subcommand that runs on the last checkpoint after ``fit``; None for none.
        args: Overrides that all cells share.
        folder: Folder of the file, in which relative paths are looked up too.
        tests: Axes of the evaluation alone: their cells share one training.
        tune: How each method's training is chosen; None where there is nothing to choose.
        also: Further metrics, of which there is a table each.
        modes: Which values of a further metric are better, where ``mode`` does not say it: ``max``,
            ``min``, or ``none`` where neither is, as of the coverage of intervals.
        costs: Metrics of the training that say what it spent; they have one table, by method.
        sizes: Metrics beside each of these (``images`` beside ``test/acc`` is ``test/images``) that
            tell what a setting was measured on: a line each below the methods of a table.
        names: What figures call axes and metrics, by their names here.
        highlight: Id of the method that figures show in front; None for none.
        resources: What each cell reserves on a cluster; None for what it takes.
        source: The file that it was read from.
    """

    title: str
    config: str
    methods: dict[str, ComparisonMethod] = field(metadata=reader(read_methods))
    settings: Axes = field(metadata=reader(read_axes))
    seeds: tuple[int, ...] = field(metadata=reader(read_seeds))
    seed_keys: tuple[str, ...] = ("seed_everything", "data.init_args.seed")
    metric: str = "test/acc"
    mode: Mode = "max"
    baseline: str | None = None
    after_fit: Literal["test", "validate"] | None = "test"
    args: Overrides = field(default_factory=dict, metadata=reader(read_overrides))
    folder: Path | None = field(default=None, metadata={"key": False})
    tests: Axes = field(default_factory=dict, metadata=reader(read_axes))
    tune: Tune | None = field(default=None, metadata=reader(read_tune))
    also: tuple[str, ...] = ()
    modes: Mapping[str, Literal["max", "min", "none"]] = field(default_factory=dict)
    costs: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    highlight: str | None = None
    resources: Resources | None = field(default=None, metadata=reader(read_resources))
    source: str = ""

    @property
    def rows(self) -> dict[str, ComparisonMethod]:
        """The methods that have a line in the table, by id."""
        return {name: method for name, method in self.methods.items() if method.listed}

    @property
    def axes(self) -> Axes:
        """All axes of the table."""
        return {**self.settings, **self.tests}

    @property
    def grid(self) -> list[Setting]:
        """All settings: the product of the axes."""
        return settings_of(self.axes)

    @property
    def trial_ids(self) -> list[str]:
        """Names of the trials, seeds outermost."""
        cells = itertools.product(self.seeds, self.grid, self.rows)
        return [trial_id(method, setting, seed) for seed, setting, method in cells]

    def only(
        self, methods: Container[str], labels: Mapping[str, Container[str]], seeds: Container[int]
    ) -> ComparisonPlan:
        """A part of this comparison; trainings that others of the part start from stay in it.

        Args:
            methods: Ids of the methods that stay in the table.
            labels: For axes, the labels that stay.
            seeds: The seeds that stay.
        """
        axes = [
            {
                axis: {k: v for k, v in values.items() if k in labels.get(axis, values)}
                for axis, values in kind.items()
            }
            for kind in (self.settings, self.tests)
        ]
        return replace(
            self,
            methods={
                m.id: replace(m, listed=m.listed and m.id in methods) for m in self.methods.values()
            },
            settings=axes[0],
            tests=axes[1],
            seeds=tuple(seed for seed in self.seeds if seed in seeds),
            baseline=self.baseline if self.baseline in methods else None,
            highlight=self.highlight if self.highlight in methods else None,
        )

    @property
    def shares(self) -> bool:
        """Whether trials may be evaluated on one another's trainings."""
        methods = self.methods.values()
        return bool(self.tests or self.tune or any(m.test_args or m.after for m in methods))

    def label(self, trial: Trial, trained: bool = False) -> str:
        """What people read of a trial, or of its training alone."""
        setting = tuple(s for s in trial.setting if not trained or s[0] in self.settings)
        parts = [self.methods[trial.method].label, setting_label(setting), f"seed={trial.seed}"]
        return " ".join(filter(None, parts))

    def mode_of(self, metric: str | None) -> str:
        """Which values of a metric are better: ``max``, ``min`` or ``none``."""
        return self.modes.get(metric or self.metric, self.mode)

    def to_dict(self) -> dict[str, Any]:
        """The plan in the form of the file, from which :func:`read_plan` reads it back."""
        return {
            "title": self.title,
            "config": self.config,
            "methods": {m.id: method_to_dict(m) for m in self.methods.values()},
            "settings": self.settings,
            "seeds": list(self.seeds),
            "seed_keys": list(self.seed_keys),
            "metric": self.metric,
            "mode": self.mode,
            "baseline": self.baseline,
            "after_fit": self.after_fit,
            "args": self.args,
            "tests": self.tests,
            "tune": self.tune and vars(self.tune),
            "also": list(self.also),
            **({"modes": dict(self.modes)} if self.modes else {}),
            "costs": list(self.costs),
            "sizes": list(self.sizes),
            "names": dict(self.names),
            "highlight": self.highlight,
            **({"resources": vars(self.resources)} if self.resources else {}),
            "source": self.source,
        }

    def options_to_dict(self) -> dict[str, Any]:
        """The parts of :meth:`to_dict` in which options of commands stand."""
        content = self.to_dict()
        return {key: content[key] for key in ("methods", "settings", "args", "tests", "tune")}


def settings_of(axes: Axes) -> list[Setting]:
    """All settings of some axes: the product of their labels.

    >>> settings_of({"p": {"0": {}, "1": {}}})
    [(('p', '0'),), (('p', '1'),)]
    """
    return list(
        itertools.product(*([(axis, label) for label in labels] for axis, labels in axes.items()))
    )
