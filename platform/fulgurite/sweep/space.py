"""What a sweep searches: its parameters, their distributions, and how a point becomes options.

Source: the keys and distributions of W&B's sweep configuration, https://docs.wandb.ai/guides/sweeps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Categorical",
    "Constant",
    "Distribution",
    "EarlyTerminate",
    "Parameter",
    "Sweep",
]

Value = Any
"""What a parameter may be in a sweep file: a word, a number, a truth value, a list or a mapping."""


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
        return value if self.step is None else _round_to(value, self.step, self.bounds)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value, infinite where there is none."""
        if self.name in ("uniform", "int_uniform") or self.name.endswith("uniform_values"):
            return self.first, self.second
        if self.name == "log_uniform":
            return math.exp(self.first), math.exp(self.second)
        if self.name == "inv_log_uniform":
            return math.exp(-self.second), math.exp(-self.first)
        return (0.0, 1.0) if self.name == "beta" else (-math.inf, math.inf)

    @property
    def grid_size(self) -> int:
        """How many values a grid has, as W&B's takes them; 0 where they are not finitely many."""
        if self.name == "int_uniform":
            return int(self.second) - int(self.first) + 1
        if self.name == "uniform" and self.step is not None:
            return math.ceil((self.second - self.first) / self.step - 1e-9)
        return 0

    @property
    def grid(self) -> list[float | int] | None:
        """All values where they are finitely many; else None."""
        if not self.grid_size:
            return None
        step = 1 if self.step is None else self.step
        first = int(self.first) if self.name == "int_uniform" else self.first
        return [_as_step(first + i * step, step) for i in range(self.grid_size)]


def _round_to(value: float, step: float, bounds: tuple[float, float]) -> float | int:
    """The nearest multiple of a step within bounds; beyond them where none lies within.

    >>> _round_to(3.2, 8, (3, 200)), _round_to(199.0, 16, (3, 200)), _round_to(3.2, 8, (3, 5))
    (8, 192, 0)
    """
    low, high = bounds
    multiple = round(value / step)
    # a bound that is a multiple itself may miss it by rounding
    if multiple * step < low - 1e-9 * step and (multiple + 1) * step <= high + 1e-9 * step:
        multiple += 1
    elif multiple * step > high + 1e-9 * step and (multiple - 1) * step >= low - 1e-9 * step:
        multiple -= 1
    return _as_step(multiple * step, step)


def _as_step(value: float, step: float) -> float | int:
    """An integer where the step is one; else without the digits that rounding adds."""
    return int(value) if isinstance(step, int) and value == int(value) else float(f"{value:.12g}")


Parameter = Constant | Categorical | Distribution


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

    @property
    def first_point(self) -> dict[str, Value]:
        """A value for each parameter that is not constant: the first, or the median."""
        point: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Categorical):
                point[name] = parameter.values[0]
            elif isinstance(parameter, Distribution):
                grid = parameter.grid if self.method == "grid" else None
                point[name] = grid[0] if grid else parameter.value_at(0.5)
        return point

    def options(self, point: Mapping[str, Value]) -> list[str]:
        """The options of a run, in the order and the spelling in which W&B's agent writes them.

        Nothing is ``null``, also within lists and mappings: the agent's ``None`` is a word to
        options that take one.

        Args:
            point: A value for each parameter that is not constant.
        """
        values = {
            name: parameter.value if isinstance(parameter, Constant) else point[name]
            for name, parameter in self.parameters.items()
        }
        return [f"--{name}={_spell(value)}" for name, value in values.items()]


def _spell(value: Value) -> str:
    """A value as an option has it.

    >>> [_spell(value) for value in (None, True, 0.5, "a", [None, True, "a"], {"b": None})]
    ['null', 'True', '0.5', 'a', '[null, true, "a"]', '{"b": null}']
    """
    if value is None or isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
