"""What a comparison is: the YAML file, checked, and the grid of cells that it spans."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fulgurite.errors import ConfigError
from fulgurite.systems import config_path, resolve_config

__all__ = ["Cell", "Method", "Plan", "cell_id", "find_config", "read_plan", "spell"]

_T = TypeVar("_T")

Overrides = dict[str, Any]
"""Dotted command-line keys and their values."""

_NAME = re.compile(r"[\w.+-]+")
_COMMON = ("title", "config", "methods", "settings", "seeds", "metric", "mode", "baseline", "args")
_PLAN_KEYS = (*_COMMON, "seed_keys", "after_fit", "quick")
_METHOD_KEYS = ("label", "args", "config")


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        id: Name in file names and on the command line.
        label: Name in tables and figures.
        args: Command-line overrides of this method.
        config: A further YAML file, read after the common one.
    """

    id: str
    label: str
    args: Overrides = field(default_factory=dict)
    config: str | None = None


@dataclass(frozen=True)
class Cell:
    """One run: a method in a setting with a seed.

    Args:
        method: Id of the method.
        setting: Pairs (axis, label), in the order of the axes.
        seed: The seed, given to every key of ``seed_keys``.
        options: Command-line options of ``fit`` and ``test``, without the run folder.
        digest: Hash of everything that defines the run.
    """

    method: str
    setting: tuple[tuple[str, str], ...]
    seed: int
    options: tuple[str, ...]
    digest: str

    @property
    def id(self) -> str:
        """Name of the cell in file names."""
        return cell_id(self.method, self.setting, self.seed)

    def commands(self, run_dir: Path, after_fit: str | None) -> list[list[str]]:
        """The command lines of the cell, in the order in which they run."""
        place = ["--run.dir", str(run_dir)]
        commands = [["fit", *self.options, *place]]
        if after_fit:
            commands.append([after_fit, *self.options, *place, "--ckpt_path", "last"])
        return commands


@dataclass(frozen=True)
class Plan:
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
    """

    title: str
    config: str
    methods: dict[str, Method]
    settings: dict[str, dict[str, Overrides]]
    seeds: tuple[int, ...]
    seed_keys: tuple[str, ...] = ("seed_everything", "data.init_args.seed")
    metric: str = "test/acc"
    mode: str = "max"
    baseline: str | None = None
    after_fit: str | None = "test"
    args: Overrides = field(default_factory=dict)
    folder: Path | None = None

    @property
    def grid(self) -> list[tuple[tuple[str, str], ...]]:
        """All settings: the product of the axes."""
        axes = [[(axis, label) for label in labels] for axis, labels in self.settings.items()]
        return list(itertools.product(*axes))

    def cells(self) -> list[Cell]:
        """All cells, seeds outermost, so that an interrupted comparison is evenly filled.

        Raises:
            ConfigError: A configuration file does not exist, or two cells have the same name.
        """
        configs = {
            name: _content(name, self.folder)
            for name in (self.config, *(m.config for m in self.methods.values()))
            if name
        }
        cells = [
            self._cell(method, setting, seed, configs)
            for seed in self.seeds
            for setting in self.grid
            for method in self.methods.values()
        ]
        twice = _duplicates(cell.id for cell in cells)
        if twice:
            raise ConfigError(
                f"Two cells of the comparison have the same file name: {twice[0]}.",
                "Give labels that differ in letters, digits, '.', '+' or '-'.",
            )
        return cells

    def _cell(
        self,
        method: Method,
        setting: tuple[tuple[str, str], ...],
        seed: int,
        configs: Mapping[str, tuple[str, Any]],
    ) -> Cell:
        merged: Overrides = {}
        layers = [self.args, method.args, *(self.settings[a][v] for a, v in setting)]
        for layer in (*layers, dict.fromkeys(self.seed_keys, seed)):
            for key, value in layer.items():
                merged.pop(key, None)  # the last one wins, and comes last
                merged[key] = value
        overrides = [f"--{key}={spell(value)}" for key, value in merged.items()]
        names = [name for name in (self.config, method.config) if name]
        options = [part for name in names for part in ("--config", configs[name][0])]
        defining = [[configs[name][1] for name in names], overrides, self.after_fit]
        digest = hashlib.sha256(json.dumps(defining, default=str).encode()).hexdigest()
        return Cell(method.id, setting, seed, (*options, *overrides), digest[:16])

    def to_dict(self) -> dict[str, Any]:
        """The plan in the form of the file, from which :func:`read_plan` reads it back."""
        return {
            "title": self.title,
            "config": self.config,
            "methods": {
                m.id: {"label": m.label, "args": m.args, "config": m.config}
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
        }


def cell_id(method: str, setting: tuple[tuple[str, str], ...], seed: int) -> str:
    """Name of a cell in file names.

    >>> cell_id("fedavg", (("noise", "30 %"),), 1)
    'fedavg__noise=30--__seed=1'
    """
    parts = [method, *(f"{axis}={label}" for axis, label in setting), f"seed={seed}"]
    return "__".join(re.sub(r"[^\w.=+-]", "-", part) for part in parts)


def spell(value: object) -> str:
    """A value as the command line spells it.

    >>> spell(0.5), spell(None), spell(True), spell("iid"), spell([1, 2])
    ('0.5', 'null', 'true', 'iid', '[1, 2]')
    """
    return value if isinstance(value, str) else json.dumps(value)


def find_config(name: str, folder: Path | None = None) -> Path:
    """The file that a path (relative to here or to ``folder``) or a packaged name means.

    Raises:
        ConfigError: There is no such file.
    """
    if folder and not Path(name).is_file() and (folder / name).is_file():
        return folder / name
    return resolve_config(name)


def read_plan(file: str | Path, *, quick: bool = False) -> Plan:
    """Read and check a comparison file.

    Args:
        file: Path or packaged name.
        quick: Apply the overrides under ``quick``.

    Raises:
        ConfigError: Anything that the schema does not allow, with the key and the mend.
    """
    path = find_config(str(file))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}.", "") from error
    top = _mapping(raw, str(file))
    _known(top, _PLAN_KEYS, str(file))
    small = _mapping(top.pop("quick", None) or {}, "quick")
    _known(small, _COMMON, "quick")
    plan = _plan(top, path.parent)
    return _quick(plan, small) if quick else plan


def _plan(top: Mapping[str, Any], folder: Path | None) -> Plan:
    for key in ("config", "methods"):
        if not top.get(key):
            raise ConfigError(f"A comparison needs {key!r}.", f"Add `{key}:` to the file.")
    methods = {
        name: _method(name, spec) for name, spec in _mapping(top["methods"], "methods").items()
    }
    settings = {
        _name(axis, "settings"): _axis(axis, spec)
        for axis, spec in _mapping(top.get("settings") or {}, "settings").items()
    }
    after_fit = top.get("after_fit", "test")
    if after_fit not in ("test", "validate", None):
        raise ConfigError(f"after_fit is {after_fit!r}.", "Use test, validate or null.")
    return _consistent(
        Plan(
            title=str(top.get("title", top["config"])),
            config=str(top["config"]),
            methods=methods,
            settings=settings,
            seeds=_seeds(top.get("seeds", [0])),
            seed_keys=tuple(_strings(top.get("seed_keys", list(Plan.seed_keys)), "seed_keys")),
            metric=str(top.get("metric", Plan.metric)),
            mode=str(top.get("mode", Plan.mode)),
            baseline=top.get("baseline"),
            after_fit=after_fit,
            args=_overrides(top.get("args"), "args"),
            folder=folder,
        )
    )


def _quick(plan: Plan, small: Mapping[str, Any]) -> Plan:
    values: dict[str, Any] = dict(vars(plan))
    values.update({k: str(small[k]) for k in ("title", "config", "metric", "mode") if k in small})
    values["baseline"] = small.get("baseline", plan.baseline)
    values["args"] = {**plan.args, **_overrides(small.get("args"), "quick.args")}
    if "seeds" in small:
        values["seeds"] = _seeds(small["seeds"])
    chosen = small.get("methods") or {}
    if isinstance(chosen, list):  # a selection
        values["methods"] = {m: _pick(plan.methods, m, "quick.methods") for m in chosen}
    else:
        values["methods"] = dict(plan.methods)
        for name, spec in _mapping(chosen, "quick.methods").items():
            old, new = _pick(plan.methods, name, "quick.methods"), _mapping(spec, f"methods.{name}")
            merged = {**vars(old), **new, "args": {**old.args, **(new.get("args") or {})}}
            merged.pop("id")
            values["methods"][name] = _method(name, merged)
    values["settings"] = dict(plan.settings)
    for axis, spec in _mapping(small.get("settings") or {}, "quick.settings").items():
        labels = _pick(plan.settings, axis, "quick.settings")
        where = f"quick.settings.{axis}"
        if isinstance(spec, list):  # a selection
            values["settings"][axis] = {spell(v): _pick(labels, spell(v), where) for v in spec}
        else:
            values["settings"][axis] = _axis(axis, spec)
    return _consistent(Plan(**values))


def _consistent(plan: Plan) -> Plan:
    if plan.mode not in ("max", "min"):
        raise ConfigError(f"mode is {plan.mode!r}.", "Use max or min.")
    if plan.baseline is not None and plan.baseline not in plan.methods:
        raise ConfigError(
            f"The baseline {plan.baseline!r} is not one of the methods.",
            _hint(str(plan.baseline), plan.methods) or "Name a method's id as `baseline`.",
        )
    return plan


def _method(name: object, spec: object) -> Method:
    name = _name(name, "methods")
    given = _mapping(spec or {}, f"methods.{name}")
    _known(given, _METHOD_KEYS, f"methods.{name}")
    args = _overrides(given.get("args"), f"methods.{name}.args")
    return Method(name, str(given.get("label") or name), args, given.get("config"))


def _axis(axis: str, spec: object) -> dict[str, Overrides]:
    where = f"settings.{axis}"
    given = _mapping(spec, where)
    if set(given) == {"key", "values"}:
        values = given["values"]
        if not isinstance(values, list) or any(isinstance(v, dict | list) for v in values):
            raise ConfigError(
                f"{where}.values is not a list of plain values.",
                f"Use `{where}: {{LABEL: {{dotted.key: value}}}}` for anything else.",
            )
        labels = {spell(value): {str(given["key"]): value} for value in values}
    else:
        labels = {
            spell(label): _overrides(value, f"{where}.{spell(label)}")
            for label, value in given.items()
        }
    if not labels:
        raise ConfigError(f"{where} has no values.", "Give one at least, or leave the axis out.")
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


def _overrides(value: object, where: str) -> Overrides:
    given = _mapping(value or {}, where)
    for key in given:
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_][\w.+]*", key):
            raise ConfigError(
                f"{where} has the key {key!r}, which is not a dotted command-line key.",
                "Write it as in `model.init_args.lr: 0.1`, without dashes.",
            )
    return dict(given)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a mapping.", "Write it as `key: value` lines.")
    return dict(value)


def _strings(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or any(not isinstance(v, str) for v in value):
        raise ConfigError(f"{where} is not a list of names.", f"Write `{where}: [name, name]`.")
    return value


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(
            f"{where} has the name {value!r}.", "Use letters, digits, '_', '.', '+' and '-'."
        )
    return value


def _known(given: Iterable[str], allowed: Sequence[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"{where} has the unknown key {key!r}.",
                _hint(str(key), allowed) or f"Known are {', '.join(allowed)}.",
            )


def _pick(choices: Mapping[str, _T], name: str, where: str) -> _T:
    if name not in choices:
        known = f"Known are {', '.join(choices)}."
        raise ConfigError(f"{where} names {name!r}.", _hint(str(name), choices) or known)
    return choices[name]


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def _duplicates(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]


def _content(name: str, folder: Path | None) -> tuple[str, Any]:
    """A config as the command line spells it, and its content (comments do not count)."""
    path = find_config(name, folder)
    spelled = name if path == config_path(name) else str(path.resolve())
    return spelled, yaml.safe_load(path.read_text(encoding="utf-8"))
