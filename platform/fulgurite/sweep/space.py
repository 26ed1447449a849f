"""What a W&B sweep file says: its parameters, their distributions, and how a point becomes options.

Source: the keys and distributions of W&B's sweep configuration, https://docs.wandb.ai/guides/sweeps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import ConfigError
from fulgurite.systems import config_path

__all__ = [
    "Categorical",
    "Constant",
    "Distribution",
    "EarlyTerminate",
    "Parameter",
    "Sweep",
    "read_sweep",
]

Value = Any
"""What a parameter may be in a sweep file: a word, a number, a truth value, a list or a mapping."""

_IGNORED = ("name", "description", "project", "entity", "kind", "apiVersion", "program")
_KEYS = (*_IGNORED, "method", "metric", "command", "parameters", "run_cap", "early_terminate")


@dataclass(frozen=True)
class Constant:
    """A parameter with one value."""

    value: Value


@dataclass(frozen=True)
class Categorical:
    """One of several values.

    Args:
        values: The values, in the order of the file.
        probabilities: Of each value; None where all are alike.
    """

    values: tuple[Value, ...]
    probabilities: tuple[float, ...] | None = None

    def value_at(self, quantile: float) -> Value:
        """The value at a quantile of the probabilities, which must be given."""
        assert self.probabilities is not None
        bounds = itertools.accumulate(self.probabilities)
        total = sum(self.probabilities)
        for value, bound, share in zip(self.values, bounds, self.probabilities, strict=True):
            if share > 0 and quantile * total < bound:
                return value
        return next(
            v for v, p in zip(self.values[::-1], self.probabilities[::-1], strict=True) if p
        )


@dataclass(frozen=True)
class Distribution:
    """A distribution of numbers, by its quantile function.

    Args:
        name: W&B's word for it without ``q_``: ``uniform``, ``int_uniform``, ``log_uniform``
            (``low`` and ``high`` are natural logarithms), ``log_uniform_values``,
            ``inv_log_uniform``, ``inv_log_uniform_values``, ``normal``, ``log_normal`` or ``beta``.
        first: ``min``, ``mu`` or ``a``.
        second: ``max``, ``sigma`` or ``b``.
        step: Values are rounded to multiples of it (``q``); None for no rounding.
    """

    name: str
    first: float
    second: float
    step: float | None = None

    def value_at(self, quantile: float) -> float | int:
        """The value below which a share ``quantile`` of the distribution lies.

        Args:
            quantile: In [0, 1].
        """
        from scipy import stats

        low, high = self.first, self.second
        if self.name == "int_uniform":
            return min(int(low) + int(quantile * (high - low + 1)), int(high))
        if self.name == "uniform":
            value = low + quantile * (high - low)
        elif self.name == "log_uniform":
            value = math.exp(low + quantile * (high - low))
        elif self.name == "log_uniform_values":
            value = math.exp(math.log(low) + quantile * (math.log(high) - math.log(low)))
        elif self.name == "inv_log_uniform":
            value = math.exp(-(high + quantile * (low - high)))
        elif self.name == "inv_log_uniform_values":
            value = 1 / math.exp(-math.log(low) + quantile * (math.log(low) - math.log(high)))
        elif self.name == "normal":
            value = float(stats.norm.ppf(quantile, loc=low, scale=high))
        elif self.name == "log_normal":
            value = float(stats.lognorm.ppf(quantile, s=high, scale=math.exp(low)))
        else:
            value = float(stats.beta.ppf(quantile, a=low, b=high))
        if self.name.endswith("uniform_values"):
            value = min(max(value, low), high)  # exp of a logarithm may miss the end by rounding
        return value if self.step is None else _round_to(value, self.step)

    @property
    def grid(self) -> list[float | int] | None:
        """All values where they are finitely many, as W&B's grid takes them; else None."""
        if self.name == "int_uniform":
            return list(range(int(self.first), int(self.second) + 1))
        if self.name == "uniform" and self.step is not None:
            count = math.ceil((self.second - self.first) / self.step - 1e-9)
            return [_as_step(self.first + i * self.step, self.step) for i in range(count)]
        return None


def _round_to(value: float, step: float) -> float | int:
    return _as_step(round(value / step) * step, step)


def _as_step(value: float, step: float) -> float | int:
    """An integer where the step is one; else without the digits that rounding adds."""
    return int(value) if isinstance(step, int) and value == int(value) else float(f"{value:.12g}")


Parameter = Constant | Categorical | Distribution

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


@dataclass(frozen=True)
class EarlyTerminate:
    """W&B's Hyperband.

    Args:
        bands: Numbers of logged values after which a run is judged, ascending.
        eta: A run must be among the best 1/eta of those that came as far.
        strict: Judge the value at the band; else the best value so far.
    """

    bands: tuple[int, ...]
    eta: float
    strict: bool


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Args:
        path: The file.
        method: ``grid``, ``random`` or ``bayes``.
        metric: The metric that decides; None for a grid or random search without one.
        maximize: Whether more is better.
        target: The sweep ends once a run reaches it; None for never.
        command: Words of the command before the options, such as ``fit --config FILE``.
        parameters: By option.
        run_cap: Largest number of runs; None for no limit.
        early_terminate: When runs are ended early; None for never.
    """

    path: Path
    method: str
    metric: str | None
    maximize: bool
    target: float | None
    command: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    run_cap: int | None
    early_terminate: EarlyTerminate | None

    @property
    def content(self) -> str:
        """What decides the trials, as JSON: two sweeps with the same content may share a study."""
        fields = {k: v for k, v in vars(self).items() if k not in ("path", "run_cap", "parameters")}
        parameters = [[k, type(v).__name__, vars(v)] for k, v in self.parameters.items()]
        return json.dumps({**fields, "parameters": parameters}, default=vars, sort_keys=True)

    @property
    def grid(self) -> Iterator[dict[str, int]]:
        """The points of a grid: the index of each parameter's value, the last varying fastest."""
        choices = {name: range(len(values)) for name, values in self.grid_values.items()}
        for point in itertools.product(*choices.values()):
            yield dict(zip(choices, point, strict=True))

    @property
    def grid_size(self) -> int:
        """How many points the grid has."""
        return math.prod(len(values) for values in self.grid_values.values())

    @property
    def grid_values(self) -> dict[str, list[Value]]:
        """The values of each parameter of a grid that has more than a constant."""
        values: dict[str, list[Value]] = {}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Categorical):
                values[name] = list(parameter.values)
            elif isinstance(parameter, Distribution):
                values[name] = parameter.grid or []
        return values

    def options(self, point: Mapping[str, Value]) -> list[str]:
        """The options of a run, in the order and the spelling in which W&B's agent writes them.

        Args:
            point: A value for each parameter that is not constant.
        """
        values = {
            name: parameter.value if isinstance(parameter, Constant) else point[name]
            for name, parameter in self.parameters.items()
        }
        return [f"--{name}={value}" for name, value in values.items()]


def read_sweep(name: str) -> Sweep:
    """Read a sweep file.

    Args:
        name: A path, or a packaged name such as ``fedsir/sweep.yaml``.

    Raises:
        ConfigError: There is no such file, or it holds something that cannot be honoured.
    """
    path = Path(name)
    if not path.is_file():
        packaged = config_path(name)
        if packaged is None:
            raise ConfigError(
                f"There is no sweep file {name}.",
                "Name a file, or a packaged sweep that `fulgurite systems` lists.",
            )
        path = Path(packaged)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as YAML ({error}).", "Repair the file."
        ) from error
    return _Reader(path).sweep(raw)


class _Reader:
    """Checks a file's content part by part; each error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, problem: str, hint: str) -> ConfigError:
        return ConfigError(f"{self.path}: {problem}", hint)

    def keys(self, where: str, mapping: Any, known: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(mapping, dict):
            raise self.refuse(f"{where} is no mapping.", "Write `key: value` lines.")
        for key in mapping:
            if key not in known:
                raise self.refuse(
                    f"{where} has {key!r}, which `fulgurite sweep` cannot honour.",
                    f"Known here: {', '.join(known)}. `wandb agent` may know more.",
                )
        return mapping

    def number(self, where: str, value: Any, *, least: float | None = None) -> float | int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.refuse(f"{where} is {value!r}.", "Give a finite number.")
        if least is not None and value < least:
            raise self.refuse(f"{where} is {value}.", f"Give {least} or more.")
        return value

    def integer(self, where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(f"{where} is {value!r}.", "Give a whole number of 1 or more.")
        return value

    def word(self, where: str, value: Any, words: Sequence[str]) -> str:
        if value not in words:
            raise self.refuse(f"{where} is {value!r}.", f"Give {', '.join(words)}.")
        return str(value)

    def sweep(self, raw: Any) -> Sweep:
        raw = self.keys("the file", raw, _KEYS)
        method = self.word("method", raw.get("method"), ("grid", "random", "bayes"))
        parameters = dict(self.parameters(raw.get("parameters"), ""))
        if not parameters:
            raise self.refuse("there are no parameters.", "Give `parameters`.")
        metric, maximize, target = self.metric(raw.get("metric"))
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
            command=self.command(raw.get("command")),
            parameters=parameters,
            run_cap=None if run_cap is None else self.integer("run_cap", run_cap),
            early_terminate=None if early is None else self.early_terminate(early),
        )

    def metric(self, raw: Any) -> tuple[str | None, bool, float | None]:
        if raw is None:
            return None, False, None
        raw = self.keys("metric", raw, ("name", "goal", "target"))
        if not isinstance(raw.get("name"), str):
            raise self.refuse("metric has no name.", "Give `name: val/…`.")
        goal = self.word("metric.goal", raw.get("goal", "minimize"), ("minimize", "maximize"))
        target = raw.get("target")
        target = None if target is None else self.number("metric.target", target)
        return raw["name"], goal == "maximize", target

    def command(self, raw: Any) -> tuple[str, ...]:
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

    def parameters(self, raw: Any, prefix: str) -> Iterator[tuple[str, Parameter]]:
        if not isinstance(raw, dict):
            raise self.refuse(
                f"parameters{prefix and ' of ' + prefix} is no mapping.", "Repair it."
            )
        for key, spec in raw.items():
            name = f"{prefix}{key}"
            if isinstance(spec, dict) and "parameters" in spec:
                self.keys(name, spec, ("parameters",))
                yield from self.parameters(spec["parameters"], f"{name}.")
            else:
                yield name, self.parameter(name, spec)

    def parameter(self, name: str, spec: Any) -> Parameter:
        where = f"parameters.{name}"
        if not isinstance(spec, dict):
            raise self.refuse(f"{where} is {spec!r}.", "Give `value`, `values`, or a distribution.")
        if "value" in spec:
            self.keys(where, spec, ("value", "distribution"))
            self.word(f"{where}.distribution", spec.get("distribution", "constant"), ("constant",))
            return Constant(spec["value"])
        if "values" in spec:
            return self.categorical(where, spec)
        return self.distribution(where, spec)

    def categorical(self, where: str, spec: Mapping[str, Any]) -> Categorical:
        self.keys(where, spec, ("values", "probabilities", "distribution"))
        values, weights = spec["values"], spec.get("probabilities")
        words = ("categorical",) if weights is None else ("categorical_w_probabilities",)
        self.word(f"{where}.distribution", spec.get("distribution", words[0]), words)
        if not isinstance(values, list) or not values:
            raise self.refuse(f"{where}.values is {values!r}.", "Give a list with a value or more.")
        if weights is None:
            return Categorical(tuple(values))
        if not isinstance(weights, list) or len(weights) != len(values):
            raise self.refuse(
                f"{where}.probabilities has not one number for each value.",
                f"Give {len(values)} numbers.",
            )
        numbers = [self.number(f"{where}.probabilities", weight, least=0.0) for weight in weights]
        if not math.isclose(sum(numbers), 1, rel_tol=1e-6):
            raise self.refuse(
                f"{where}.probabilities sum to {sum(numbers):g}.", "Let them sum to 1."
            )
        return Categorical(tuple(values), tuple(numbers))

    def distribution(self, where: str, spec: Mapping[str, Any]) -> Distribution:
        name = spec.get("distribution")
        if name is None:
            ends = (spec.get("min"), spec.get("max"))
            name = "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"
        self.word(f"{where}.distribution", name, _DISTRIBUTIONS)
        rounded = name.startswith("q_")
        kind = name.removeprefix("q_")
        arguments = _ARGUMENTS[kind]
        self.keys(where, spec, ("distribution", *arguments, *(["q"] if rounded else [])))
        values = []
        for argument in arguments:
            if argument not in spec and argument not in _DEFAULTS:
                raise self.refuse(
                    f"{where} has no {argument!r}.", "Give `value`, `values`, or `min` and `max`."
                )
            values.append(
                self.number(f"{where}.{argument}", spec.get(argument, _DEFAULTS.get(argument)))
            )
        self.check_arguments(where, kind, values)
        step = None
        if rounded:
            step = self.number(f"{where}.q", spec.get("q", 1))
            if step <= 0:
                raise self.refuse(f"{where}.q is {step}.", "Give a number above 0.")
        return Distribution(kind, values[0], values[1], step)

    def check_arguments(self, where: str, kind: str, values: Sequence[float]) -> None:
        first, second = values
        if kind in _RANGES and first >= second:
            raise self.refuse(
                f"{where} goes from {first} to {second}.", "Give a `min` that is below `max`."
            )
        if kind == "int_uniform" and not all(isinstance(value, int) for value in values):
            raise self.refuse(
                f"{where} goes from {first} to {second}.", "Give whole numbers, or `uniform`."
            )
        if kind.endswith("_values") and first <= 0:
            raise self.refuse(f"{where}.min is {first}.", "Give a number above 0.")
        if kind in ("log_uniform", "inv_log_uniform") and max(map(abs, values)) > 700:
            raise self.refuse(
                f"{where}: exp({second}) is no number.",
                f"{kind} takes natural logarithms; give {kind}_values for the values.",
            )
        if kind in ("normal", "log_normal") and second <= 0:
            raise self.refuse(f"{where}.sigma is {second}.", "Give a number above 0.")
        if kind == "beta" and min(values) <= 0:
            raise self.refuse(f"{where}: a and b are {values}.", "Give numbers above 0.")

    def check_grid(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            where = f"parameters.{name}"
            if isinstance(parameter, Categorical) and parameter.probabilities is not None:
                raise self.refuse(
                    f"{where} has probabilities, which a grid cannot honour.",
                    "Leave them out, or give `method: random`.",
                )
            if isinstance(parameter, Distribution) and not parameter.grid:
                raise self.refuse(
                    f"{where} has no finite list of values for a grid.",
                    "Give `values`, or `method: random`.",
                )

    def early_terminate(self, raw: Any) -> EarlyTerminate:
        raw = self.keys(
            "early_terminate", raw, ("type", "min_iter", "max_iter", "s", "eta", "strict")
        )
        self.word("early_terminate.type", raw.get("type"), ("hyperband",))
        eta = self.number("early_terminate.eta", raw.get("eta", 3))
        if eta <= 1:
            raise self.refuse(f"early_terminate.eta is {eta}.", "Give a number above 1.")
        strict = raw.get("strict", True)
        if not isinstance(strict, bool):
            raise self.refuse(f"early_terminate.strict is {strict!r}.", "Give true or false.")
        return EarlyTerminate(self.bands(raw, eta), eta, strict)

    def bands(self, raw: Mapping[str, Any], eta: float) -> tuple[int, ...]:
        if "max_iter" in raw and "min_iter" in raw:
            raise self.refuse(
                "early_terminate has both min_iter and max_iter.", "Give one of them."
            )
        if "max_iter" in raw:
            last = self.integer("early_terminate.max_iter", raw["max_iter"])
            count = self.integer("early_terminate.s", raw.get("s"))
            bands = [int(last / eta**i) for i in range(1, count + 1) if last / eta**i >= 1]
            if not bands:
                raise self.refuse(
                    f"early_terminate: max_iter {last} over eta {eta} is below 1.",
                    "Give a larger max_iter, or a smaller eta.",
                )
            return tuple(sorted(bands))
        if "s" in raw:
            raise self.refuse("early_terminate has s without max_iter.", "Give max_iter too.")
        first = self.integer("early_terminate.min_iter", raw.get("min_iter"))
        return tuple(int(first * eta**i) for i in range(100) if first * eta**i < 1e9)
