"""Judges what a strategy does to the attention of models of transformers.

A cell of its table is an architecture in a mode, such as Mistral with packed documents: the model
runs with its own attention and under the strategy, with the same weights and in double precision,
and what both compute must agree. A strategy may refuse a cell by an error of fulgurite; it may
not be wrong.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from fulgurite.errors import FulguriteError
from fulgurite.testing.transformers_models import (
    Architecture,
    Values,
    build_model,
    compute_values,
    take_modes,
)

__all__ = [
    "TOLERANCE",
    "ImplementationStrategy",
    "Judgement",
    "ObservedCall",
    "compare_values",
    "judge_architecture",
    "judge_mode",
    "name_implementations",
    "record_attention",
]

Verdict = Literal["exact", "refused", "unsupported", "wrong", "crashed"]

#: Largest difference that is rounding, relative to the largest number.
TOLERANCE = 1e-9

_RECORDER = "fulgurite_recorder"


def compare_values(values: Values, reference: Values) -> tuple[float, str]:
    """Return the largest relative difference, and of what.

    A gradient is measured by its parameter's own, as long as that is not below a thousandth of
    the largest of all: the gradient of a key's bias is zero but for rounding.

    Args:
        values: What is judged.
        reference: What it should be.

    Returns:
        The difference relative to the largest number, infinite for other tokens, other shapes or
        numbers that are not finite; and its name.

    Example:
        >>> compare_values({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)})
        (0.5, 'loss')
    """
    gradients = [x for name, x in reference.items() if name.startswith("grad ") and x.numel()]
    floor = 1e-3 * max((float(x.abs().max()) for x in gradients), default=0.0)
    worst, worst_name = 0.0, ""
    for name in {**reference, **values}:
        expected, actual = reference.get(name), values.get(name)
        # no gradient is as good as one of zeros
        if expected is None:
            expected = torch.zeros_like(values[name])
        if actual is None:
            actual = torch.zeros_like(expected)
        difference = _measure_difference(actual, expected, floor if name[:5] == "grad " else 0.0)
        if not worst_name or difference > worst:
            worst, worst_name = difference, name
    return worst, worst_name


def _measure_difference(actual: Tensor, expected: Tensor, floor: float) -> float:
    if actual.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    if not expected.numel():
        return 0.0
    magnitude = max(float(expected.abs().max()), floor, torch.finfo(expected.dtype).tiny)
    difference = float((actual - expected).abs().max()) / magnitude
    return math.inf if math.isnan(difference) else difference


# --- implementations of attention ---------------------------------------------------------------


def name_implementations(model: nn.Module) -> dict[str, str]:
    """Return the attention implementation of each sub-model, by its path.

    Args:
        model: Any module.

    Example:
        >>> name_implementations(nn.Linear(1, 1))
        {}
    """
    return {
        path: part.config._attn_implementation
        for path, part in model.named_modules()
        if hasattr(getattr(part, "config", None), "_attn_implementation")
    }


class ImplementationStrategy(SingleDeviceStrategy):
    """Runs a model with another attention implementation that transformers knows.

    For checks of the judge: ``eager`` must agree with ``sdpa``, and what is wrong must not.

    Args:
        implementation: Its name in transformers.
    """

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation
        self._before: list[tuple[Any, str]] = []

    def setup(self, trainer: Trainer) -> None:
        """Put the implementation in place."""
        super().setup(trainer)
        model: Any = self.lightning_module.model if self.lightning_module else None
        paths = name_implementations(model)
        self._before = [(model.get_submodule(path).config, name) for path, name in paths.items()]
        model.set_attn_implementation(self.implementation)

    def teardown(self) -> None:
        """Put back what was there before."""
        for config, name in self._before:  # sub-models after what they are part of
            config._attn_implementation_internal = name
        super().teardown()


@dataclass(frozen=True)
class ObservedCall:
    """What a module gave to the attention function.

    Attributes:
        module: Its class.
        is_causal: Its attribute, if it has one.
        query: Shape.
        key: Shape.
        value: Shape.
        mask: Type and shape of the mask.
        keywords: The others that are not None, in words.
    """

    module: str
    is_causal: bool | None
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: str
    keywords: str


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def record_attention(
    architecture: Architecture, model: Any, mode: str = "plain"
) -> tuple[list[ObservedCall], list[str]]:
    """Record what a model gives to an attention function that takes a mask as ``sdpa`` does.

    Args:
        architecture: Which.
        model: Its model.
        mode: Mode of the run.

    Returns:
        The calls, each kind once; and the classes of the modules named attention that computed it
        themselves.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    calls: dict[ObservedCall, None] = {}
    total = 0

    def record(  # noqa: PLR0917  # as transformers calls it
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **keywords: Any,
    ) -> Any:
        nonlocal total
        total += 1
        words = [f"{name}={_describe(x)}" for name, x in keywords.items() if x is not None]
        call = ObservedCall(
            type(module).__name__, getattr(module, "is_causal", None), tuple(query.shape),
            tuple(key.shape), tuple(value.shape), _describe(attention_mask), ", ".join(words),
        )  # fmt: skip
        calls[call] = None
        keywords.pop("softcap", None)  # it is not computed right, only recorded
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)

    AttentionInterface.register(_RECORDER, record)
    AttentionMaskInterface.register(_RECORDER, sdpa_mask)
    counts: dict[nn.Module, int] = {}
    self_computed: dict[str, None] = {}

    def enter(module: nn.Module, _: Any) -> None:
        counts[module] = total

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if counts.pop(module, total) == total:
            self_computed[type(module).__name__] = None

    hooks = []
    for module in model.modules():
        inner = [part for part in module.modules() if "Attention" in type(part).__name__]
        if inner == [module]:
            hooks += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
    try:
        compute_values(architecture, model, mode, ImplementationStrategy(_RECORDER))
    finally:
        for hook in hooks:
            hook.remove()
    return list(calls), list(self_computed)


# --- verdicts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """The judgement of an architecture in a mode.

    Attributes:
        architecture: Its name.
        mode: Mode of the run.
        verdict: ``exact``; ``refused``, by an error of fulgurite; ``unsupported``, where the
            model's own attention fails; ``wrong``; or ``crashed``, by another error.
        detail: What differs most, or the error.
        difference: Relative; None where there is none.
        seconds: Duration of both runs together [s].
        calls: How often the strategy's attention was called, if it counts.
        schedule: How its last call was cut, if it tells.
        is_reachable: Whether the model lets any of its attention be chosen.
    """

    architecture: str
    mode: str
    verdict: Verdict
    detail: str = ""
    difference: float | None = None
    seconds: float = 0.0
    calls: int | None = None
    schedule: str | None = None
    is_reachable: bool = True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def judge_mode(
    architecture: Architecture, model: Any, mode: str, make_strategy: Callable[[], Strategy]
) -> Judgement:
    """Compare a strategy with the model's own attention in a mode.

    Args:
        architecture: Which.
        model: Its model.
        mode: One of :data:`~fulgurite.testing.transformers_models.MODES` or
            :data:`~fulgurite.testing.transformers_models.EXTRA_MODES`.
        make_strategy: Makes a strategy of the Trainer.
    """
    began = time.perf_counter()
    cell = functools.partial(Judgement, architecture.name, mode)
    try:
        reference = compute_values(architecture, model, mode)
    except Exception as error:  # whatever it is, the model itself does not do this
        return cell("unsupported", f"{type(error).__name__}: {_first_line(error)}")
    if not all(x.isfinite().all() for x in reference.values()):
        return cell("unsupported", "its numbers are not finite")
    if mode == "causality" and float(reference["movement"]) > TOLERANCE:
        return cell("unsupported", "is not causal")
    implementations = name_implementations(model)
    strategy = make_strategy()
    try:
        values = compute_values(architecture, model, mode, strategy)
        if mode == "causality":  # it is relative itself, and zero but for rounding
            difference, name = float(values["movement"]), "movement"
        else:
            difference, name = compare_values(values, reference)
        judged = cell("exact" if difference <= TOLERANCE else "wrong", name, difference)
    except FulguriteError as error:
        judged = cell("refused", _first_line(error))
    except Exception as error:  # a crash is a verdict
        judged = cell("crashed", f"{type(error).__name__}: {_first_line(error)}")
    if name_implementations(model) != implementations:
        judged = cell("crashed", f"{_NOT_PUT_BACK} (before that: {judged.detail})")
    backend: Any = getattr(strategy, "backend", None)
    return replace(
        judged,
        seconds=time.perf_counter() - began,
        calls=getattr(backend, "calls", None),
        schedule=getattr(getattr(backend, "plan", None), "schedule", None),
    )


_NOT_PUT_BACK = "the model's attention is not put back"


def judge_architecture(
    architecture: Architecture,
    make_strategy: Callable[[], Strategy],
    modes: Iterable[str] | None = None,
) -> list[Judgement]:
    """Judge a strategy on an architecture, in all its modes or some.

    Args:
        architecture: Which.
        make_strategy: Makes a strategy of the Trainer.
        modes: Modes to judge, where the architecture has them; all by default.
    """
    model = build_model(architecture)
    calls, _ = record_attention(architecture, model)
    selected = None if modes is None else set(modes)
    cells = []
    for mode in take_modes(architecture, model):
        if selected is not None and mode not in selected:
            continue
        cell = judge_mode(architecture, model, mode, make_strategy)
        cells.append(replace(cell, is_reachable=bool(calls)))
        if cell.detail.startswith(_NOT_PUT_BACK):
            model = build_model(architecture)
    return cells
