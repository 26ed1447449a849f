"""Read W&B's sweep files; what cannot be honoured is refused by its name.

Source: the keys and distributions of W&B's sweep configuration, https://docs.wandb.ai/guides/sweeps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulgurite.compare.yaml_file import read_yaml
from fulgurite.errors import ConfigError
from fulgurite.sweep.space import (
    Categorical,
    Constant,
    Distribution,
    EarlyTerminate,
    Parameter,
    Sweep,
)
from fulgurite.systems import check_kind, read_keys, resolve_config

__all__ = ["MOST_POINTS", "read_sweep"]

_IGNORED = ("name", "description", "project", "entity", "kind", "apiVersion", "program")
_KEYS = (*_IGNORED, "method", "metric", "command", "parameters", "run_cap", "early_terminate")
_FOLDER_OPTIONS = ("run", "run.dir", "run.root", "run.new")
MOST_POINTS = 100_000
"""Largest number of points of a grid: each is a row of the study before the first trial runs."""

_RANGES = (
    "uniform",
    "int_uniform",
    "log_uniform",
    "log_uniform_values",
    "inv_log_uniform",
    "inv_log_uniform_values",
)
_ARGUMENTS = {
    **dict.fromkeys(_RANGES, ("min", "max")),
    "normal": ("mu", "sigma"),
    "log_normal": ("mu", "sigma"),
    "beta": ("a", "b"),
}
_DEFAULTS = {"mu": 0.0, "sigma": 1.0, "a": 1.0, "b": 1.0}
_ROUNDED = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
_DISTRIBUTIONS = (*_ARGUMENTS, *(f"q_{name}" for name in _ROUNDED))


def read_sweep(name: str) -> Sweep:
    """Read a sweep file.

    Args:
        name: A path, or a packaged name such as ``fedsir/sweep.yaml``.

    Raises:
        ConfigError: There is no such file, or it holds something that cannot be honoured.
    """
    path = resolve_config(name)
    check_kind(name, read_keys(path), "sweep")
    return _SweepReader(path).read(read_yaml(path))


class _SweepReader:
    """Checks a file's content part by part; each error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, problem: str, hint: str) -> ConfigError:
        return ConfigError(f"{self.path}: {problem}", hint)

    def check_keys(self, key: str, mapping: Any, allowed: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(mapping, dict):
            raise self.refuse(f"{key} is no mapping.", "Write `key: value` lines.")
        for name in mapping:
            if name not in allowed:
                raise self.refuse(
                    f"{key} has {name!r}, which `fulgurite sweep` cannot honour.",
                    f"Known here: {', '.join(allowed)}. `wandb agent` may know more.",
                )
        return mapping

    def check_number(self, key: str, value: Any, *, minimum: float | None = None) -> float | int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.refuse(f"{key} is {value!r}.", "Give a finite number.")
        if minimum is not None and value < minimum:
            raise self.refuse(f"{key} is {value}.", f"Give {minimum} or more.")
        return value

    def check_count(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(f"{key} is {value!r}.", "Give a whole number of 1 or more.")
        return value

    def check_word(self, key: str, value: Any, words: Sequence[str]) -> str:
        if value not in words:
            raise self.refuse(f"{key} is {value!r}.", f"Give {', '.join(words)}.")
        return str(value)

    def read(self, raw: Any) -> Sweep:
        raw = self.check_keys("the file", raw, _KEYS)
        method = self.check_word("method", raw.get("method"), ("grid", "random", "bayes"))
        parameters: dict[str, Parameter] = {}
        for option, parameter in self.read_parameters(raw.get("parameters"), ""):
            if option in parameters:
                raise self.refuse(
                    f"parameters.{option} is there twice, with dots and nested.", "Leave one out."
                )
            parameters[option] = parameter
        if not parameters:
            raise self.refuse("there are no parameters.", "Give `parameters`.")
        command = self.read_command(raw.get("command"))
        self.check_run_folder(parameters, command)
        metric, maximize, target = self.read_metric(raw.get("metric"))
        early = raw.get("early_terminate")
        if metric is None and (method == "bayes" or early is not None):
            need = "method: bayes" if method == "bayes" else "early_terminate"
            raise self.refuse(f"{need} has no metric.", "Give `metric: {name: val/…, goal: …}`.")
        if method == "grid":
            self.check_grid(parameters)
        run_cap = raw.get("run_cap")
        return Sweep(
            path=self.path,
            method=method,
            metric=metric,
            maximize=maximize,
            target=target,
            command=command,
            parameters=parameters,
            run_cap=None if run_cap is None else self.check_count("run_cap", run_cap),
            early_terminate=None if early is None else self.read_early_terminate(early),
        )

    def read_metric(self, raw: Any) -> tuple[str | None, bool, float | None]:
        if raw is None:
            return None, False, None
        raw = self.check_keys("metric", raw, ("name", "goal", "target"))
        if not isinstance(raw.get("name"), str):
            raise self.refuse("metric has no name.", "Give `name: val/…`.")
        goal = self.check_word("metric.goal", raw.get("goal", "minimize"), ("minimize", "maximize"))
        target = raw.get("target")
        target = None if target is None else self.check_number("metric.target", target)
        return raw["name"], goal == "maximize", target

    def read_command(self, raw: Any) -> tuple[str, ...]:
        hint = "Write it as [${env}, fulgurite, fit, --config, FILE, ${args}]."
        words = [str(word) for word in raw] if isinstance(raw, list) else []
        if words[:1] == ["${env}"]:
            words = words[1:]
        if words[:1] != ["fulgurite"] or words[-1:] != ["${args}"]:
            raise self.refuse(f"the command is {raw}.", hint)
        words = words[1:-1]
        if words[:1] != ["fit"] or any("${" in word for word in words):
            raise self.refuse(f"the command is {raw}.", hint)
        return tuple(words)

    def check_run_folder(self, parameters: Mapping[str, Parameter], command: Sequence[str]) -> None:
        """Refuse what the folder of each trial would be laid over."""
        words = [word.partition("=")[0].removeprefix("--") for word in command if word[:2] == "--"]
        for name in (*parameters, *words):
            if name in _FOLDER_OPTIONS:
                raise self.refuse(
                    f"{name} is set, and each trial has a folder of its own.",
                    "Leave it out; --out names the folder of all trials.",
                )

    def read_parameters(self, raw: Any, prefix: str) -> Iterator[tuple[str, Parameter]]:
        if not isinstance(raw, dict):
            raise self.refuse(
                f"parameters{prefix and ' of ' + prefix} is no mapping.", "Repair it."
            )
        for option, spec in raw.items():
            name = f"{prefix}{option}"
            if isinstance(spec, dict) and "parameters" in spec:
                self.check_keys(name, spec, ("parameters",))
                yield from self.read_parameters(spec["parameters"], f"{name}.")
            else:
                yield name, self.read_parameter(name, spec)

    def read_parameter(self, name: str, spec: Any) -> Parameter:
        key = f"parameters.{name}"
        if not isinstance(spec, dict):
            raise self.refuse(f"{key} is {spec!r}.", "Give `value`, `values`, or a distribution.")
        if "value" in spec:
            self.check_keys(key, spec, ("value", "distribution"))
            self.check_word(
                f"{key}.distribution", spec.get("distribution", "constant"), ("constant",)
            )
            return Constant(spec["value"])
        if "values" in spec:
            return self.read_categorical(key, spec)
        return self.read_distribution(key, spec)

    def read_categorical(self, key: str, spec: Mapping[str, Any]) -> Categorical:
        self.check_keys(key, spec, ("values", "probabilities", "distribution"))
        values, weights = spec["values"], spec.get("probabilities")
        words = ("categorical",) if weights is None else ("categorical_w_probabilities",)
        self.check_word(f"{key}.distribution", spec.get("distribution", words[0]), words)
        if not isinstance(values, list) or not values:
            raise self.refuse(f"{key}.values is {values!r}.", "Give a list with a value or more.")
        if weights is None:
            return Categorical(tuple(values))
        if not isinstance(weights, list) or len(weights) != len(values):
            raise self.refuse(
                f"{key}.probabilities has not one number for each value.",
                f"Give {len(values)} numbers.",
            )
        numbers = [
            self.check_number(f"{key}.probabilities", weight, minimum=0.0) for weight in weights
        ]
        if not math.isclose(sum(numbers), 1, rel_tol=1e-6):
            raise self.refuse(f"{key}.probabilities sum to {sum(numbers):g}.", "Let them sum to 1.")
        return Categorical(tuple(values), tuple(numbers))

    def read_distribution(self, key: str, spec: Mapping[str, Any]) -> Distribution:
        name = spec.get("distribution")
        if name is None:
            ends = (spec.get("min"), spec.get("max"))
            name = "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"
        self.check_word(f"{key}.distribution", name, _DISTRIBUTIONS)
        rounded = name.startswith("q_")
        kind = name.removeprefix("q_")
        arguments = _ARGUMENTS[kind]
        self.check_keys(key, spec, ("distribution", *arguments, *(["q"] if rounded else [])))
        values = []
        for argument in arguments:
            if argument not in spec and argument not in _DEFAULTS:
                raise self.refuse(
                    f"{key} has no {argument!r}.", "Give `value`, `values`, or `min` and `max`."
                )
            values.append(
                self.check_number(f"{key}.{argument}", spec.get(argument, _DEFAULTS.get(argument)))
            )
        self.check_arguments(key, kind, values)
        step = None
        if rounded:
            step = self.check_number(f"{key}.q", spec.get("q", 1))
            if step <= 0:
                raise self.refuse(f"{key}.q is {step}.", "Give a number above 0.")
        return Distribution(kind, values[0], values[1], step)

    def check_arguments(self, key: str, kind: str, values: Sequence[float]) -> None:
        first, second = values
        if kind in _RANGES and first >= second:
            raise self.refuse(
                f"{key} goes from {first} to {second}.", "Give a `min` that is below `max`."
            )
        if kind == "int_uniform" and not all(isinstance(value, int) for value in values):
            raise self.refuse(
                f"{key} goes from {first} to {second}.", "Give whole numbers, or `uniform`."
            )
        if kind.endswith("_values") and first <= 0:
            raise self.refuse(f"{key}.min is {first}.", "Give a number above 0.")
        if kind in ("log_uniform", "inv_log_uniform") and max(map(abs, values)) > 700:
            raise self.refuse(
                f"{key}: exp({second}) is no number.",
                f"{kind} takes natural logarithms; give {kind}_values for the values.",
            )
        if kind in ("normal", "log_normal") and second <= 0:
            raise self.refuse(f"{key}.sigma is {second}.", "Give a number above 0.")
        if kind == "beta" and min(values) <= 0:
            raise self.refuse(f"{key}: a and b are {values}.", "Give numbers above 0.")

    def check_grid(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            key = f"parameters.{name}"
            if isinstance(parameter, Categorical) and parameter.probabilities is not None:
                raise self.refuse(
                    f"{key} has probabilities, which a grid cannot honour.",
                    "Leave them out, or give `method: random`.",
                )
            if isinstance(parameter, Distribution) and parameter.grid_size > MOST_POINTS:
                raise self.refuse(
                    f"{key} has {parameter.grid_size:,} values, and a grid has {MOST_POINTS:,} "
                    "points at most.",
                    "Give fewer, or `method: random`.",
                )
            if isinstance(parameter, Distribution) and not parameter.grid_size:
                raise self.refuse(
                    f"{key} has no finite list of values for a grid.",
                    "Give `values`, or `method: random`.",
                )

    def read_early_terminate(self, raw: Any) -> EarlyTerminate:
        raw = self.check_keys(
            "early_terminate", raw, ("type", "min_iter", "max_iter", "s", "eta", "strict")
        )
        self.check_word("early_terminate.type", raw.get("type"), ("hyperband",))
        eta = self.check_number("early_terminate.eta", raw.get("eta", 3))
        if eta <= 1:
            raise self.refuse(f"early_terminate.eta is {eta}.", "Give a number above 1.")
        strict = raw.get("strict", True)
        if not isinstance(strict, bool):
            raise self.refuse(f"early_terminate.strict is {strict!r}.", "Give true or false.")
        return EarlyTerminate(self.read_bands(raw, eta), eta, strict)

    def read_bands(self, raw: Mapping[str, Any], eta: float) -> tuple[int, ...]:
        if "max_iter" in raw and "min_iter" in raw:
            raise self.refuse(
                "early_terminate has both min_iter and max_iter.", "Give one of them."
            )
        if "max_iter" in raw:
            last = self.check_count("early_terminate.max_iter", raw["max_iter"])
            count = self.check_count("early_terminate.s", raw.get("s"))
            values = (last / eta**i for i in range(1, count + 1))
            bands = [int(value) for value in itertools.takewhile(lambda value: value >= 1, values)]
            if not bands:
                raise self.refuse(
                    f"early_terminate: max_iter {last} over eta {eta} is below 1.",
                    "Give a larger max_iter, or a smaller eta.",
                )
            return tuple(sorted(bands))
        if "s" in raw:
            raise self.refuse("early_terminate has s without max_iter.", "Give max_iter too.")
        first = self.check_count("early_terminate.min_iter", raw.get("min_iter"))
        return tuple(int(first * eta**i) for i in range(100) if first * eta**i < 1e9)
