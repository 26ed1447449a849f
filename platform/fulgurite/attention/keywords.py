"""Keyword arguments of the functions of this package, and the records that they make.

A function that takes many passes them on as ``**options``, typed by one of the dictionaries below;
what each means is said where it becomes a field of a record:
:class:`~fulgurite.attention.masks.Masking`, :class:`~fulgurite.attention.call_options.Scoring` and
:class:`~fulgurite.attention.call_options.StreamOptions`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, Required, TypedDict, TypeVar

import torch
from torch import Tensor

from fulgurite.attention.budget import Budget
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.masks import Documents, Offset
from fulgurite.attention.request import Schedule
from fulgurite.attention.visibility import Window
from fulgurite.errors import ConfigError

__all__ = [
    "CallKeywords", "FileKeywords", "GradientFileKeywords", "JobKeywords", "MaskKeywords",
    "PlanKeywords", "StreamKeywords", "StreamKeywordsWithLse", "StreamKeywordsWithoutLse",
    "check_keywords", "make_record", "show_keywords",
]  # fmt: skip

_Record = TypeVar("_Record")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _BudgetKeywords(TypedDict, total=False):
    memory_budget: Budget
    schedule: Schedule


class _HidingKeywords(TypedDict, total=False):
    """Masks beside the causal one."""

    window: Window | None
    prefix: int | Sequence[int]
    documents: Documents | None
    chunk: int | None
    query_offset: Offset
    lengths: Sequence[int] | Tensor | None
    starts: Sequence[int] | Tensor | None
    key_mask: Tensor | None


class MaskKeywords(_HidingKeywords, total=False):
    """All masks that are intervals of keys."""

    is_causal: bool


class CallKeywords(_HidingKeywords, total=False):
    """What decides the result, beside the arguments of PyTorch's attention."""

    softcap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None


class _StreamKeywords(_BudgetKeywords, CallKeywords, total=False):
    check_finite: bool
    device: torch.device | str | None
    kernel: str | None
    distributed: bool
    on_plan: Callable[[ExecutionPlan], None] | None


class StreamKeywords(_StreamKeywords, total=False):
    """Of :func:`~fulgurite.attention.stream_attention`."""

    return_lse: bool


class StreamKeywordsWithoutLse(_StreamKeywords, total=False):
    """The same, where the result alone is returned."""

    return_lse: Literal[False]


class StreamKeywordsWithLse(_StreamKeywords, total=False):
    """The same, where the log-sum-exp is returned too."""

    return_lse: Required[Literal[True]]


class PlanKeywords(_BudgetKeywords, _HidingKeywords, total=False):
    """Of :func:`~fulgurite.attention.plan`."""

    softcap: float | None
    alibi_slopes: Tensor | None


class GradientFileKeywords(MaskKeywords, total=False):
    """Of :func:`~fulgurite.attention.attend_files_backward`."""

    scale: float | None
    enable_gqa: bool
    softcap: float | None
    memory_budget: Budget
    check_finite: bool
    device: torch.device | str | None
    kernel: str | None
    distributed: bool


class FileKeywords(GradientFileKeywords, total=False):
    """Of :func:`~fulgurite.attention.attend_files`."""

    schedule: Schedule


class JobKeywords(MaskKeywords, total=False):
    """Of :meth:`fulgurite.attention.AttentionJob.create`."""

    scale: float | None
    enable_gqa: bool
    softcap: float | None
    memory_budget: Budget
    schedule: Literal["cqs", "rect"]
    least_tasks: int
    device: torch.device | str | None
    kernel: str | None


def check_keywords(function: str, options: Mapping[str, object], allowed: type) -> None:
    """Refuse keywords that a function does not know.

    Args:
        function: As errors call it.
        options: What was given.
        allowed: The typed dictionary of its keywords.

    Raises:
        ConfigError: A keyword is unknown.

    Example:
        >>> check_keywords("plan", {"windw": 3}, PlanKeywords)
        Traceback (most recent call last):
        ...
        fulgurite.errors.ConfigError: plan has no argument windw. Did you mean window?
    """
    names = allowed.__annotations__
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(sorted(names))}."
            raise ConfigError(f"{function} has no argument {name}.", hint)


def make_record(kind: type[_Record], options: Mapping[str, Any], **others: Any) -> _Record:
    """Make a record of the keywords that are its fields.

    Args:
        kind: The dataclass.
        options: Keywords, also those of other records.
        others: Further fields.
    """
    key: Any = kind
    return kind(**{name: options[name] for name in _field_names(key) & options.keys()}, **others)


@functools.cache
def _field_names(kind: Any) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind))


def show_keywords(allowed: type, *records: type) -> Callable[[_Function], _Function]:
    """Let the signature of a function show its keywords in the place of ``**options``.

    Args:
        allowed: The typed dictionary of its keywords.
        records: The dataclasses that have them as fields, with their defaults.
    """
    defaults = {field.name: field.default for record in records for field in fields(record)}

    def show(function: _Function) -> _Function:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if defaults.get(name, MISSING) is MISSING else defaults[name],
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in allowed.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return show
