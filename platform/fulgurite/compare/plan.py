"""What a comparison is: the YAML file, checked, and the grid of cells that it spans."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fulgurite.compare.devices import device_count
from fulgurite.compare.identity import Definition, digest
from fulgurite.compare.yaml_file import read_yaml
from fulgurite.errors import ConfigError, FulguriteError
from fulgurite.systems import check_kind, config_path, resolve_config

__all__ = [
    "LAST_CHECKPOINT",
    "Candidate",
    "Cell",
    "ComparisonMethod",
    "ComparisonPlan",
    "Tune",
    "WarmStart",
    "cell_id",
    "find_config",
    "read_plan",
    "setting_label",
    "spell",
]

_T = TypeVar("_T")

Overrides = dict[str, Any]
"""Dotted command-line keys and their values."""

Define = Callable[[Sequence[str]], Definition]
"""Takes a command line to what it would run."""

LAST_CHECKPOINT = "checkpoints/last.ckpt"
"""Where a run keeps its last checkpoint, relative to its folder."""

_NAME = re.compile(r"[\w.+-]+")
_COMMON = (
    "title", "config", "methods", "settings", "tests", "tune", "seeds", "metric", "mode",
    "baseline", "args",
)  # fmt: skip
_PLAN_KEYS = (
    *_COMMON, "seed_keys", "after_fit", "also", "modes", "costs", "sizes", "quick", "names",
    "highlight", "source",
)  # fmt: skip
_METHOD_KEYS = ("label", "args", "config", "test_args", "after", "predict", "listed", "ignores")
_TUNE_KEYS = ("metric", "mode", "grid")

Axes = dict[str, dict[str, Overrides]]
"""For each axis its labels, for each label its overrides."""

Setting = tuple[tuple[str, str], ...]
"""Pairs (axis, label), in the order of the axes."""


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

    id: str
    label: str
    args: Overrides = field(default_factory=dict)
    config: str | None = None
    test_args: Overrides = field(default_factory=dict)
    after: WarmStart | None = None
    predict: Overrides | None = None
    listed: bool = True
    ignores: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tune:
    """Trainings of which a method takes the one that does best on validation data.

    Args:
        grid: Axes of what is tried; each training of their product is run.
        metric: Metric of ``fulgurite validate`` that decides.
        mode: ``max`` where more is better, else ``min``.
    """

    grid: Axes
    metric: str = "val/acc"
    mode: str = "max"


@dataclass(frozen=True)
class Candidate:
    """One training that a cell may be evaluated on.

    Args:
        label: What is tried, e.g. ``lr=0.1``; empty where nothing is.
        fit: Command-line options of ``fit``.
        validate: Command-line options of ``validate``.
        test: Command-line options of the evaluation.
        key: Hash of everything that defines the training.
        predict: Command-line options of the prediction that follows the training, if any does.
        validation: Hash of what defines its validation beside the training.
    """

    label: str
    fit: tuple[str, ...]
    validate: tuple[str, ...]
    test: tuple[str, ...]
    key: str
    predict: tuple[str, ...] | None = None
    validation: str = ""

    @property
    def validation_key(self) -> str:
        """Hash of everything that defines the training's validation."""
        return digest([self.key, self.validation])

    def starting_from(self, option: str, key: str) -> Candidate:
        """The same training after another.

        Args:
            option: Command-line option that names what is taken from that training.
            key: What defines that training.
        """
        fit, validate, test = ((*o, option) for o in (self.fit, self.validate, self.test))
        predict = None if self.predict is None else (*self.predict, option)
        combined_key = digest([self.key, key])
        return Candidate(self.label, fit, validate, test, combined_key, predict, self.validation)


@dataclass(frozen=True)
class Cell:
    """One place of the table: a method in a setting with a seed.

    Args:
        method: Id of the method.
        setting: Pairs (axis, label), in the order of the axes.
        seed: The seed, given to every key of ``seed_keys``.
        candidates: The trainings that it may be evaluated on; several where the plan tunes.
        parts: Hashes of what defines the result: its ``configuration``, its ``data`` and the
            ``version`` of the code.
        origin: The cell whose training this one's starts from.
        devices: Number of accelerators that each of its commands takes; 0 for all that are there.
    """

    method: str
    setting: Setting
    seed: int
    candidates: tuple[Candidate, ...]
    parts: Mapping[str, str]
    origin: Cell | None = None
    devices: int = 1

    @property
    def digest(self) -> str:
        """Hash of everything that defines the result."""
        return digest(self.parts)

    @property
    def id(self) -> str:
        """Name of the cell in file names."""
        return cell_id(self.method, self.setting, self.seed)

    def commands(self, run_dir: Path, after_fit: str | None) -> list[list[str]]:
        """The command lines of a cell with a training of its own, in the order of their run."""
        options = self.candidates[0].fit
        run_dir_option = ["--run.dir", str(run_dir)]
        commands = [["fit", *options, *run_dir_option]]
        if after_fit:
            commands.append([after_fit, *options, *run_dir_option, "--ckpt_path", "last"])
        return commands


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
        source: The file that it was read from.
    """

    title: str
    config: str
    methods: dict[str, ComparisonMethod]
    settings: Axes
    seeds: tuple[int, ...]
    seed_keys: tuple[str, ...] = ("seed_everything", "data.init_args.seed")
    metric: str = "test/acc"
    mode: str = "max"
    baseline: str | None = None
    after_fit: str | None = "test"
    args: Overrides = field(default_factory=dict)
    folder: Path | None = None
    tests: Axes = field(default_factory=dict)
    tune: Tune | None = None
    also: tuple[str, ...] = ()
    modes: Mapping[str, str] = field(default_factory=dict)
    costs: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    highlight: str | None = None
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
        return _product(self.axes)

    @property
    def cell_ids(self) -> list[str]:
        """Names of the table's cells, seeds outermost."""
        places = itertools.product(self.seeds, self.grid, self.rows)
        return [cell_id(method, setting, seed) for seed, setting, method in places]

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
        """Whether cells may be evaluated on one another's trainings."""
        methods = self.methods.values()
        return bool(self.tests or self.tune or any(m.test_args or m.after for m in methods))

    def label(self, cell: Cell, trained: bool = False) -> str:
        """What people read of a cell, or of its training alone."""
        setting = tuple(s for s in cell.setting if not trained or s[0] in self.settings)
        parts = [self.methods[cell.method].label, setting_label(setting), f"seed={cell.seed}"]
        return " ".join(filter(None, parts))

    def cells(self, define: Define | None = None) -> list[Cell]:
        """The table's cells, seeds outermost: interrupted, a comparison is evenly filled.

        Args:
            define: Takes a command line to what it would run, such as
                :class:`~fulgurite.compare.identity.Resolver`; by default it stands for itself.

        Raises:
            ConfigError: A configuration file does not exist, two cells have the same name, or
                ``define`` refuses an option.
        """
        define = define or _as_written
        configs = {
            name: _spelling(name, self.folder)
            for name in (self.config, *(m.config for m in self.methods.values()))
            if name
        }
        cells: dict[tuple[str, Setting, int], Cell] = {}
        for seed in self.seeds:
            for setting in self.grid:
                for method in self._origins_first():
                    origin = cells[method.after.method, setting, seed] if method.after else None
                    cells[method.id, setting, seed] = self._cell(
                        method, setting, seed, configs, origin, define
                    )
        twice = _duplicates(cell.id for cell in cells.values())
        if twice:
            raise ConfigError(
                f"Two cells of the comparison have the same file name: {twice[0]}.",
                "Give labels that differ in letters, digits, '.', '+' or '-'.",
            )
        places = itertools.product(self.seeds, self.grid, self.rows)
        return [cells[method, setting, seed] for seed, setting, method in places]

    def _origins_first(self) -> list[ComparisonMethod]:
        return sorted(self.methods.values(), key=lambda m: len(_chain(m, self.methods)))

    def _cell(
        self,
        method: ComparisonMethod,
        setting: Setting,
        seed: int,
        configs: Mapping[str, str],
        origin: Cell | None,
        define: Define,
    ) -> Cell:
        names = [name for name in (self.config, method.config) if name]
        files = [part for name in names for part in ("--config", configs[name])]
        seeds, any_seed = (dict.fromkeys(self.seed_keys, value) for value in (seed, 0))
        start = method.after
        taken = {start.key: f"{start.method}/{start.path}"} if start else {}

        def meant(command: str, layers: Sequence[Overrides]) -> Definition:
            # one for all seeds: resolving takes longer than all else here
            options = _options([*layers, any_seed, taken])
            try:
                return define([command, *files, *options])
            except FulguriteError as error:
                key_path = " ".join(filter(None, [f"methods.{method.id}", setting_label(setting)]))
                raise ConfigError(
                    f"{key_path}: `{command}`: {error.problem}", error.hint
                ) from error

        trained = [
            next(iter(self.settings[axis].values()))
            if axis in method.ignores
            else self.settings[axis][label]
            for axis, label in setting
            if axis in self.settings
        ]
        tested = [self.tests[axis][label] for axis, label in setting if axis in self.tests]
        grid = self.tune.grid if self.tune else {}
        candidates: list[Candidate] = []
        definitions: list[Definition] = []
        for tried in _product(grid):
            fit = [self.args, method.args, *trained, *(grid[axis][label] for axis, label in tried)]
            layers = fit, [*fit, method.test_args], [*fit, method.test_args, *tested]
            run, validate, test = ((*files, *_options([*part, seeds])) for part in layers)
            training, predict, validation = [meant("fit", fit)], None, ""
            if method.predict is not None:
                predict = (*files, *_options([*fit, method.predict, seeds]))
                training.append(meant("predict", [*fit, method.predict]))
            definitions += training
            if self.tune:
                definitions.append(meant("validate", layers[1]))
                validation = digest(definitions[-1])
            if self.shares:
                definitions.append(meant(str(self.after_fit), layers[2]))
            label, key = ", ".join(f"{axis}={value}" for axis, value in tried), [seed, training]
            candidates.append(
                Candidate(label, run, validate, test, digest(key), predict, validation)
            )
        tune = self.tune and [self.tune.metric, self.tune.mode]
        frame = [seed, self.after_fit, self.shares, tune, method.after]
        before = origin.parts if origin else {}
        parts = {
            "configuration": digest([frame, [d.configuration for d in definitions], before]),
            "data": digest([[d.data for d in definitions], before.get("data")]),
            "version": digest([[d.versions for d in definitions], before.get("version")]),
        }
        devices = [device_count(d.configuration) for d in definitions]
        devices_needed = max(devices) if all(devices) else 0
        return Cell(method.id, setting, seed, tuple(candidates), parts, origin, devices_needed)

    def mode_of(self, metric: str | None) -> str:
        """Which values of a metric are better: ``max``, ``min`` or ``none``."""
        return self.modes.get(metric or self.metric, self.mode)

    def to_dict(self) -> dict[str, Any]:
        """The plan in the form of the file, from which :func:`read_plan` reads it back."""
        return {
            "title": self.title,
            "config": self.config,
            "methods": {
                m.id: {
                    "label": m.label,
                    "args": m.args,
                    "config": m.config,
                    "test_args": m.test_args,
                    "after": m.after and _after(m.after),
                    "predict": m.predict,
                    "listed": m.listed,
                    "ignores": list(m.ignores),
                }
                for m in self.methods.values()
            },
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
            "source": self.source,
        }


def _as_written(command: Sequence[str]) -> Definition:
    return Definition([*command])


def _product(axes: Axes) -> list[Setting]:
    return list(
        itertools.product(*([(axis, label) for label in labels] for axis, labels in axes.items()))
    )


def _options(layers: Iterable[Overrides]) -> list[str]:
    merged: Overrides = {}
    for layer in layers:
        for key, value in layer.items():
            merged.pop(key, None)  # the last one wins, and comes last
            merged[key] = value
    return [f"--{key}={spell(value)}" for key, value in merged.items()]


def cell_id(method: str, setting: Setting, seed: int) -> str:
    """Name of a cell in file names.

    >>> cell_id("fedavg", (("noise", "30 %"),), 1)
    'fedavg__noise=30--__seed=1'
    """
    parts = [method, *(f"{axis}={label}" for axis, label in setting), f"seed={seed}"]
    return "__".join(re.sub(r"[^\w.=+-]", "-", part) for part in parts)


def setting_label(setting: Setting) -> str:
    """A setting as a column heading.

    >>> setting_label((("p", "0.3"), ("alpha", "2")))
    'p=0.3, alpha=2'
    """
    return ", ".join(f"{axis}={label}" for axis, label in setting)


def spell(value: object) -> str:
    """A value as the command line spells it.

    >>> spell(0.5), spell(None), spell(True), spell("iid"), spell([1, 2])
    ('0.5', 'null', 'true', 'iid', '[1, 2]')
    """
    return value if isinstance(value, str) else json.dumps(value)


def find_config(name: str, folder: Path | None = None) -> Path:
    """The file that a path (relative to here or to ``folder``) or a packaged name means.

    Raises:
        ConfigError: The file does not exist.
    """
    if folder and not Path(name).is_file() and (folder / name).is_file():
        return folder / name
    return resolve_config(name)


def read_plan(file: str | Path, *, quick: bool = False) -> ComparisonPlan:
    """Read and check a comparison file.

    Args:
        file: Path or packaged name.
        quick: Apply the overrides under ``quick``.

    Raises:
        ConfigError: Anything that the schema does not allow, with the key and the hint.
    """
    path = find_config(str(file))
    top = _mapping(read_yaml(path), str(file))
    check_kind(str(file), top, "comparison")
    _check_keys(top, _PLAN_KEYS, str(file))
    small = _mapping(top.pop("quick", None) or {}, "quick")
    _check_keys(small, _COMMON, "quick")
    top.setdefault("source", str(path.resolve()))
    plan = _plan(top, path.parent)
    return _quick(plan, small) if quick else plan


def _plan(top: Mapping[str, Any], folder: Path | None) -> ComparisonPlan:
    for key in ("config", "methods"):
        if not top.get(key):
            raise ConfigError(f"A comparison needs {key!r}.", f"Add `{key}:` to the file.")
    methods = {
        name: _method(name, spec) for name, spec in _mapping(top["methods"], "methods").items()
    }
    after_fit = top.get("after_fit", "test")
    if after_fit not in ("test", "validate", None):
        raise ConfigError(f"after_fit is {after_fit!r}.", "Use test, validate or null.")
    return _check_plan(
        ComparisonPlan(
            title=_text(top.get("title", top["config"]), "title"),
            config=_text(top["config"], "config"),
            methods=methods,
            settings=_axes(top.get("settings"), "settings"),
            seeds=_seeds(top.get("seeds", [0])),
            seed_keys=tuple(
                _strings(top.get("seed_keys", list(ComparisonPlan.seed_keys)), "seed_keys")
            ),
            metric=_text(top.get("metric", ComparisonPlan.metric), "metric"),
            mode=_text(top.get("mode", ComparisonPlan.mode), "mode"),
            baseline=_text_or_none(top.get("baseline"), "baseline"),
            after_fit=after_fit,
            args=_overrides(top.get("args"), "args"),
            folder=folder,
            tests=_axes(top.get("tests"), "tests"),
            tune=_tune(top["tune"]) if top.get("tune") else None,
            also=tuple(_strings(top.get("also") or [], "also")),
            modes=_mapping(top.get("modes") or {}, "modes"),
            costs=tuple(_strings(top.get("costs") or [], "costs")),
            sizes=tuple(_strings(top.get("sizes") or [], "sizes")),
            names=_names(top.get("names") or {}),
            highlight=_text_or_none(top.get("highlight"), "highlight"),
            source=_text(top["source"], "source"),
        )
    )


def _quick(plan: ComparisonPlan, small: Mapping[str, Any]) -> ComparisonPlan:
    values: dict[str, Any] = dict(vars(plan))
    for key in ("title", "config", "metric", "mode"):
        if key in small:
            values[key] = _text(small[key], f"quick.{key}")
    values["baseline"] = _text_or_none(small.get("baseline", plan.baseline), "quick.baseline")
    values["args"] = {**plan.args, **_overrides(small.get("args"), "quick.args")}
    if "seeds" in small:
        values["seeds"] = _seeds(small["seeds"])
    methods = small.get("methods") or {}
    if isinstance(methods, list):  # a selection
        values["methods"] = {m: _pick(plan.methods, m, "quick.methods") for m in methods}
    else:
        values["methods"] = dict(plan.methods)
        for name, spec in _mapping(methods, "quick.methods").items():
            old, new = _pick(plan.methods, name, "quick.methods"), _mapping(spec, f"methods.{name}")
            merged = {**vars(old), **new, "args": {**old.args, **(new.get("args") or {})}}
            merged.pop("id")
            merged["ignores"] = list(merged["ignores"])
            merged["after"] = new.get("after", old.after and _after(old.after))
            values["methods"][name] = _method(name, merged)
    for kind in ("settings", "tests"):
        axes = values[kind] = dict(getattr(plan, kind))
        for axis, spec in _mapping(small.get(kind) or {}, f"quick.{kind}").items():
            labels, key_path = _pick(axes, axis, f"quick.{kind}"), f"quick.{kind}.{axis}"
            if isinstance(spec, list):  # a selection
                axes[axis] = {spell(v): _pick(labels, spell(v), key_path) for v in spec}
            else:
                axes[axis] = _axis(key_path, spec)
    if plan.highlight not in values["methods"]:
        values["highlight"] = None
    if plan.metric != values["metric"]:
        values["names"] = {key: name for key, name in plan.names.items() if key != plan.metric}
    if "tune" in small:
        values["tune"] = _tune(small["tune"]) if small["tune"] else None
    return _check_plan(ComparisonPlan(**values))


def _check_plan(plan: ComparisonPlan) -> ComparisonPlan:
    for key, mode in (("mode", plan.mode), ("tune.mode", plan.tune and plan.tune.mode)):
        if mode not in ("max", "min", None):
            raise ConfigError(f"{key} is {mode!r}.", "Use max or min.")
    for metric, mode in plan.modes.items():
        if metric not in plan.also:
            raise ConfigError(
                f"modes has {metric!r}, which is none of the further metrics.",
                _hint(str(metric), plan.also) or f"There are {', '.join(plan.also) or 'none'}.",
            )
        if mode not in ("max", "min", "none"):
            raise ConfigError(f"modes.{metric} is {mode!r}.", "Use max, min or none.")
    common_axes = sorted(plan.settings.keys() & plan.tests.keys())
    if common_axes:
        raise ConfigError(
            f"The axis {common_axes[0]!r} is both under settings and under tests.",
            "Rename one; what stands under tests changes the evaluation alone.",
        )
    if plan.shares and plan.after_fit is None:
        raise ConfigError(
            "Nothing is evaluated after the fit, but the file says what to evaluate.",
            "Set `after_fit: test`, or leave out tests, tune, test_args and after.",
        )
    if not plan.rows:
        raise ConfigError("No method is listed.", "Leave out `listed: false` of one.")
    for method in plan.methods.values():
        _chain(method, plan.methods)
    for key, name in (("baseline", plan.baseline), ("highlight", plan.highlight)):
        if name is not None and name not in plan.rows:
            raise ConfigError(
                f"The {key} {name!r} is not one of the methods.",
                _hint(name, plan.rows) or f"Name a listed method's id as `{key}`.",
            )
    for method in plan.methods.values():
        for axis in method.ignores:
            if axis not in plan.settings:
                raise ConfigError(
                    f"methods.{method.id}.ignores names {axis!r}, which is no axis under settings.",
                    _hint(axis, plan.settings)
                    or f"There are {', '.join(plan.settings) or 'none'}.",
                )
    axes = {*plan.axes, plan.metric, *plan.also, *plan.costs, *plan.sizes}
    for name in plan.names.keys() - axes:
        raise ConfigError(
            f"names has {name!r}, which is neither an axis nor a metric of the comparison.",
            _hint(name, axes) or f"There are {', '.join(sorted(axes))}.",
        )
    return plan


def _chain(
    method: ComparisonMethod, methods: Mapping[str, ComparisonMethod]
) -> list[ComparisonMethod]:
    """The methods that one comes after, the nearest first.

    Raises:
        ConfigError: A method does not exist, or the methods come after each other in a circle.
    """
    chain: list[ComparisonMethod] = []
    last = method
    while last.after:
        if last.after.method not in methods:
            raise ConfigError(
                f"methods.{last.id}.after names {last.after.method!r}, which is no method.",
                _hint(last.after.method, methods) or f"Known are {', '.join(methods)}.",
            )
        last = methods[last.after.method]
        chain.append(last)
        if len(chain) > len(methods):
            raise ConfigError(
                f"methods.{method.id}.after leads in a circle.",
                "Begin with a method without `after`.",
            )
    return chain


def _method(name: object, spec: object) -> ComparisonMethod:
    name = _name(name, "methods")
    fields = _mapping(spec or {}, f"methods.{name}")
    _check_keys(fields, _METHOD_KEYS, f"methods.{name}")
    args, test_args = (
        _overrides(fields.get(key), f"methods.{name}.{key}") for key in ("args", "test_args")
    )
    predict = fields.get("predict")
    if predict is not None:
        predict = _overrides(predict, f"methods.{name}.predict")
    listed = fields.get("listed", True)
    if not isinstance(listed, bool):
        raise ConfigError(f"methods.{name}.listed is {listed!r}.", "Use true or false.")
    label = _text(fields.get("label") or name, f"methods.{name}.label")
    start = _start(name, fields.get("after"))
    config = _text_or_none(fields.get("config"), f"methods.{name}.config")
    ignores = tuple(_strings(fields.get("ignores") or [], f"methods.{name}.ignores"))
    return ComparisonMethod(name, label, args, config, test_args, start, predict, listed, ignores)


def _start(name: str, after: object) -> WarmStart | None:
    """What ``after`` says: ``{METHOD: key}``, or ``{METHOD: {key: path}}``."""
    origins = _mapping(after or {}, f"methods.{name}.after")
    if not origins:
        return None
    if len(origins) > 1:
        raise ConfigError(
            f"methods.{name}.after names {len(origins)} methods.",
            "A training starts from one other: write `after: {METHOD: dotted.key}`.",
        )
    ((origin, taken),) = origins.items()
    key_path = f"methods.{name}.after.{origin}"
    paths = taken if isinstance(taken, dict) else {str(taken): LAST_CHECKPOINT}
    ((key, path),) = _overrides(paths, key_path).items() if len(paths) == 1 else ((None, None),)
    if key is None or not isinstance(path, str) or _leaves(path):
        raise ConfigError(
            f"{key_path} is {taken!r}.",
            "Write the dotted key that receives the last checkpoint, or `{key: path}` with a path "
            "in the run folder.",
        )
    return WarmStart(str(origin), key, path)


def _leaves(path: str) -> bool:
    """Whether a relative path may leave the folder that it starts in."""
    return Path(path).is_absolute() or ".." in Path(path).parts


def _after(start: WarmStart) -> dict[str, Any]:
    """The form of the file, from which :func:`_start` reads it back."""
    last = start.path == LAST_CHECKPOINT
    return {start.method: start.key if last else {start.key: start.path}}


def _tune(value: object) -> Tune:
    fields = _mapping(value, "tune")
    _check_keys(fields, _TUNE_KEYS, "tune")
    grid = _axes(fields.get("grid"), "tune.grid")
    if not grid:
        raise ConfigError("tune has no grid.", "Name what is tried: `grid: {AXIS: {LABEL: {…}}}`.")
    metric, mode = fields.get("metric", Tune.metric), fields.get("mode", Tune.mode)
    return Tune(grid, _text(metric, "tune.metric"), _text(mode, "tune.mode"))


def _axes(value: object, key_path: str) -> Axes:
    return {
        _name(axis, key_path): _axis(f"{key_path}.{axis}", spec)
        for axis, spec in _mapping(value or {}, key_path).items()
    }


def _axis(key_path: str, spec: object) -> dict[str, Overrides]:
    fields = _mapping(spec, key_path)
    if set(fields) == {"key", "values"}:
        values = fields["values"]
        if not isinstance(values, list) or any(isinstance(v, dict | list) for v in values):
            raise ConfigError(
                f"{key_path}.values is not a list of plain values.",
                f"Use `{key_path}: {{LABEL: {{dotted.key: value}}}}` for anything else.",
            )
        labels = {spell(value): {str(fields["key"]): value} for value in values}
    else:
        labels = {
            spell(label): _overrides(value, f"{key_path}.{spell(label)}")
            for label, value in fields.items()
        }
    if not labels:
        raise ConfigError(f"{key_path} has no values.", "Give one at least, or leave the axis out.")
    return labels


def _seeds(value: object) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in value)
        or len(set(value)) < len(value)
    ):
        raise ConfigError(
            f"seeds is {value!r}.", "Give a list of different integers, e.g. [0, 1, 2]."
        )
    return tuple(value)


def _overrides(value: object, key_path: str) -> Overrides:
    overrides = _mapping(value or {}, key_path)
    for key in overrides:
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][\w.+]*", key):
            raise ConfigError(
                f"{key_path} has the key {key!r}, which is not a dotted command-line key.",
                "Write it as in `model.init_args.lr: 0.1`, without dashes.",
            )
    return dict(overrides)


def _mapping(value: object, key_path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key_path} is not a mapping.", "Write it as `key: value` lines.")
    return dict(value)


def _text(value: object, key_path: str) -> str:
    if isinstance(value, bool | list | dict) or value is None:
        raise ConfigError(f"{key_path} is {value!r}.", f"Write `{key_path}:` and a name.")
    return str(value)


def _text_or_none(value: object, key_path: str) -> str | None:
    return None if value is None else _text(value, key_path)


def _strings(value: object, key_path: str) -> list[str]:
    if not isinstance(value, list) or any(not isinstance(v, str) for v in value):
        raise ConfigError(
            f"{key_path} is not a list of names.", f"Write `{key_path}: [name, name]`."
        )
    return value


def _name(value: object, key_path: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(
            f"{key_path} has the name {value!r}.", "Use letters, digits, '_', '.', '+' and '-'."
        )
    return value


def _check_keys(keys: Iterable[str], allowed: Sequence[str], key_path: str) -> None:
    for key in keys:
        if key not in allowed:
            raise ConfigError(
                f"{key_path} has the unknown key {key!r}.",
                _hint(str(key), allowed) or f"Known are {', '.join(allowed)}.",
            )


def _pick(choices: Mapping[str, _T], name: str, key_path: str) -> _T:
    if not isinstance(name, str) or name not in choices:
        choices_hint = f"Known are {', '.join(choices)}."
        raise ConfigError(f"{key_path} names {name!r}.", _hint(str(name), choices) or choices_hint)
    return choices[name]


def _hint(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def _duplicates(names: Iterable[str]) -> list[str]:
    previous: set[str] = set()
    return [name for name in names if name in previous or previous.add(name)]  # type: ignore[func-returns-value]


def _spelling(name: str, folder: Path | None) -> str:
    """A configuration file as the command line spells it."""
    path = find_config(name, folder)
    read_yaml(path)  # refused here if it is none
    return name if path == config_path(name) else str(path.resolve())


def _names(value: object) -> dict[str, str]:
    names = _mapping(value, "names")
    for key, name in names.items():
        if not isinstance(name, str):
            raise ConfigError(f"names.{key} is {name!r}.", "Write what figures shall call it.")
    return {str(key): name for key, name in names.items()}
