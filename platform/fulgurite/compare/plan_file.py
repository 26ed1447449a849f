"""The file of a comparison: read, made small for ``--quick``, and checked as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulgurite.compare.plan import (
    ComparisonMethod,
    ComparisonPlan,
    method_to_dict,
    read_method,
)
from fulgurite.compare.schema import (
    Overrides,
    check_keys,
    check_mapping,
    read_axis,
    read_field,
    read_overrides,
    read_section,
    section_keys,
    select,
    spell,
)
from fulgurite.compare.trial import setting_label
from fulgurite.compare.yaml_file import read_yaml
from fulgurite.data.names import find_repeated
from fulgurite.errors import ConfigError, near_miss
from fulgurite.systems import check_kind, resolve_config

__all__ = ["find_config", "methods_before", "read_plan"]

_QUICK_KEYS = (
    "title", "config", "methods", "settings", "tests", "tune", "seeds", "metric", "mode",
    "baseline", "args",
)  # fmt: skip


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
    top = check_mapping(read_yaml(path), str(file))
    check_kind(str(file), top, "comparison")
    check_keys(top, [*section_keys(ComparisonPlan), "quick"], str(file))
    small = check_mapping(top.pop("quick", None) or {}, "quick")
    if quick and not small:
        raise ConfigError(
            f"{file} defines no small form of itself.", "Add `quick:` to it, or leave --quick out."
        )
    check_keys(small, _QUICK_KEYS, "quick")
    for key in ("config", "methods"):
        if not top.get(key):
            raise ConfigError(f"A comparison needs {key!r}.", f"Add `{key}:` to the file.")
    defaults = {"title": top["config"], "settings": {}, "seeds": [0], "source": str(path.resolve())}
    fields = read_section(ComparisonPlan, {**defaults, **top})
    plan = _check_plan(ComparisonPlan(**fields, folder=path.parent))
    _check_own_options(plan)
    return _quick(plan, small) if quick else plan


def _quick(plan: ComparisonPlan, small: Mapping[str, Any]) -> ComparisonPlan:
    values: dict[str, Any] = dict(vars(plan))
    for key in ("title", "config", "metric", "mode", "baseline", "seeds", "tune"):
        if key in small:
            values[key] = read_field(ComparisonPlan, key, small[key], "quick")
    args = read_field(ComparisonPlan, "args", small.get("args"), "quick")
    values["args"] = {**plan.args, **args}
    values["methods"] = _quick_methods(plan, small.get("methods") or {})
    for kind in ("settings", "tests"):
        axes = values[kind] = dict(getattr(plan, kind))
        for axis, labels in check_mapping(small.get(kind) or {}, f"quick.{kind}").items():
            known, key_path = select(axes, axis, f"quick.{kind}"), f"quick.{kind}.{axis}"
            if isinstance(labels, list):  # a selection
                axes[axis] = {spell(v): select(known, spell(v), key_path) for v in labels}
            else:
                axes[axis] = read_axis(labels, key_path)
    if plan.highlight not in values["methods"]:
        values["highlight"] = None
    if plan.metric != values["metric"]:
        values["also"] = tuple(metric for metric in plan.also if metric != values["metric"])
        values["names"] = {key: name for key, name in plan.names.items() if key != plan.metric}
    return _check_plan(ComparisonPlan(**values))


def _quick_methods(plan: ComparisonPlan, changes: object) -> dict[str, ComparisonMethod]:
    """The methods of the small form: a selection by a list, or all with changes by a mapping."""
    if isinstance(changes, list):
        return {name: select(plan.methods, name, "quick.methods") for name in changes}
    methods = dict(plan.methods)
    for name, values in check_mapping(changes, "quick.methods").items():
        before = select(plan.methods, name, "quick.methods")
        new = check_mapping(values, f"methods.{name}")
        args = {**before.args, **read_overrides(new.get("args"), f"quick.methods.{name}.args")}
        methods[name] = read_method(name, {**method_to_dict(before), **new, "args": args})
    return methods


def _check_plan(plan: ComparisonPlan) -> ComparisonPlan:
    if (name := find_repeated(plan.trial_ids)) is not None:
        cells = itertools.product(plan.seeds, plan.grid, plan.rows)
        same = [
            f"{method} {setting_label(setting)}"
            for (_, setting, method), trial in zip(cells, plan.trial_ids, strict=True)
            if trial == name
        ]
        raise ConfigError(
            f"The results of {' and of '.join(same)} would be one file, {name}.json.",
            "Give labels that differ in letters or digits.",
        )
    for metric in plan.modes:
        if metric not in (*plan.also, plan.metric):
            raise ConfigError(
                f"modes has {metric!r}, which is none of the further metrics.",
                near_miss(metric, plan.also) or f"There are {', '.join(plan.also) or 'none'}.",
            )
    common_axes = sorted(plan.settings.keys() & plan.tests.keys())
    if common_axes:
        raise ConfigError(
            f"The axis {common_axes[0]!r} is both under settings and under tests.",
            "Rename one; what stands under tests changes the evaluation alone.",
        )
    _check_layers(plan)
    metrics = (plan.metric, *plan.also)
    if repeated := [metric for metric in plan.also if metrics.count(metric) > 1]:
        raise ConfigError(
            f"also has {repeated[0]!r}, which has a table already.", "Name each metric once."
        )
    if plan.shares and plan.after_fit is None:
        raise ConfigError(
            "Nothing is evaluated after the fit, but the file says what to evaluate.",
            "Set `after_fit: test`, or leave out tests, tune, test_args and after.",
        )
    if not plan.rows:
        raise ConfigError("No method is listed.", "Leave out `listed: false` of one.")
    for method in plan.methods.values():
        methods_before(method, plan.methods)
    for key, name in (("baseline", plan.baseline), ("highlight", plan.highlight)):
        if name is not None and name not in plan.rows:
            raise ConfigError(
                f"The {key} {name!r} is not one of the methods.",
                near_miss(name, plan.rows) or f"Name a listed method's id as `{key}`.",
            )
    for method in plan.methods.values():
        for axis in method.ignores:
            if axis not in plan.settings:
                raise ConfigError(
                    f"methods.{method.id}.ignores names {axis!r}, which is no axis under settings.",
                    near_miss(axis, plan.settings)
                    or f"There are {', '.join(plan.settings) or 'none'}.",
                )
    axes = {*plan.axes, plan.metric, *plan.also, *plan.costs, *plan.sizes}
    for name in plan.names.keys() - axes:
        raise ConfigError(
            f"names has {name!r}, which is neither an axis nor a metric of the comparison.",
            near_miss(name, axes) or f"There are {', '.join(sorted(axes))}.",
        )
    return plan


def _check_layers(plan: ComparisonPlan) -> None:
    """Whether nothing that the file says is undone by what is laid over it in every cell.

    Raises:
        ConfigError: A seed, an axis or a method's own option would count nowhere.
    """
    tried = plan.tune.grid if plan.tune else {}
    axes = {
        **{f"settings.{axis}": labels for axis, labels in plan.settings.items()},
        **{f"tune.grid.{axis}": labels for axis, labels in tried.items()},
    }
    tests = {f"tests.{axis}": labels for axis, labels in plan.tests.items()}
    for name in ("method", "seed"):
        if name in plan.axes:
            raise ConfigError(
                f"An axis is called {name!r}, as methods and seeds are by --only and in tables.",
                "Rename it.",
            )
    for kind in (axes, tests):
        for (one, labels), (other, others) in itertools.combinations(kind.items(), 2):
            if common := _keys(labels) & _keys(others):
                raise ConfigError(
                    f"{one} and {other} both set {min(common)}, so that labels of {one} would not "
                    "say what is run.",
                    "Let one axis set it.",
                )
    layers: dict[str, Overrides] = {"args": plan.args}
    for method in plan.methods.values():
        layers[f"methods.{method.id}.args"] = method.args
        layers[f"methods.{method.id}.test_args"] = method.test_args
    for axis, labels in {**axes, **tests}.items():
        layers |= {f"{axis}.{label}": overrides for label, overrides in labels.items()}
    for key_path, overrides in layers.items():
        if seeded := overrides.keys() & {*plan.seed_keys}:
            raise ConfigError(
                f"{key_path} sets {min(seeded)}, but seed_keys gives it the seed of each cell.",
                "Leave it out, or give `seed_keys` without it.",
            )
    if not plan.seed_keys and len(plan.seeds) > 1:
        raise ConfigError(
            f"seed_keys is empty, so that {len(plan.seeds)} seeds would run the same.",
            "Name the options that take the seed, or give one seed.",
        )


def _check_own_options(plan: ComparisonPlan) -> None:
    """Whether each option of a method counts in some cell; only of the whole file.

    Raises:
        ConfigError: An axis sets one of them in every cell.
    """
    tests = {f"tests.{axis}": labels for axis, labels in plan.tests.items()}
    for method in plan.methods.values():
        counted = {f"settings.{axis}": labels for axis, labels in plan.settings.items()}
        for axis in method.ignores:
            counted.pop(f"settings.{axis}", None)
        for part, values, over in (
            ("args", method.args, counted),
            ("test_args", method.test_args, tests),
        ):
            for axis, labels in over.items():
                if hidden := values.keys() & set.intersection(*map(set, labels.values())):
                    raise ConfigError(
                        f"methods.{method.id}.{part} sets {min(hidden)}, but each label of {axis} "
                        "sets it over that.",
                        f"Leave it out of {part}"
                        + (", or add the axis to `ignores`." if part == "args" else "."),
                    )


def _keys(labels: Mapping[str, Overrides]) -> set[str]:
    return {key for overrides in labels.values() for key in overrides}


def methods_before(
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
                near_miss(last.after.method, methods) or f"Known are {', '.join(methods)}.",
            )
        last = methods[last.after.method]
        chain.append(last)
        if len(chain) > len(methods):
            raise ConfigError(
                f"methods.{method.id}.after leads in a circle.",
                "Begin with a method without `after`.",
            )
    return chain
