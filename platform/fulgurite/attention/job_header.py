"""What a folder says about its job: options, plan, and checksums of the inputs.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.attention.budget import Budget, parse_budget
from fulgurite.attention.call_options import Scoring
from fulgurite.attention.calls import spec_of
from fulgurite.attention.checks import check_beside
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.fingerprint import digest_inputs, plan_facts
from fulgurite.attention.job_tasks import job_plan, job_tasks, token_blocks
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.locks import writing
from fulgurite.attention.masks import Masking, starts_of_ids
from fulgurite.attention.request import check_schedule
from fulgurite.attention.spec import AttentionSpec
from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.io import atomic_write

__all__ = ["BY_KEYS", "JobHeader", "input_blocks", "plain_masks"]

_FORMAT = 1

#: Inputs of which tasks read ranges of keys; of the others they read ranges of queries.
BY_KEYS = ("key", "value")


@dataclass(frozen=True)
class JobHeader:
    """What decides the results of a job.

    Args:
        options: As they were given.
        scale: Scale of the scores.
        budget: Most bytes that a task holds at once; None for no limit.
        ahead: Whether tiles are copied to a device while others are computed.
        plan: How the call is cut, see :func:`~fulgurite.attention.fingerprint.plan_facts`.
        tasks: Number of tasks.
        inputs: Shape, type and checksums of each input, by name in the order of arguments.
    """

    options: dict[str, Any]
    scale: float
    budget: int | None
    ahead: bool
    plan: dict[str, Any]
    tasks: int
    inputs: dict[str, dict[str, Any]]

    @classmethod
    def create(
        cls,
        folder: Path,
        inputs: Mapping[str, Tensor],
        options: dict[str, Any],
        *,
        scale: float | None,
        budget: Budget,
        device: torch.device,
        progress: bool,
    ) -> tuple[JobHeader, ExecutionPlan]:
        """Write the header of a job into a folder, unless the same is there.

        Args:
            folder: Folder of the job.
            inputs: By name. Shape of each: (B, H, N, D), (B, H, N) for ``lse``.
            options: Options of the call and of the plan.
            scale: Scale of the scores; 1/√D by default.
            budget: Most that a task holds at once.
            device: Where kernels run.
            progress: Whether to show a bar while long inputs are read.

        Raises:
            ConfigError: An option is not supported, or the budget is too small.
            DataError: Shapes or types do not fit.
            CheckpointError: The folder holds another job, or cannot be written.
        """
        check_schedule(options["schedule"], ("cqs", "rect"))
        query = inputs["query"]
        spec = _spec(options, scale, inputs)
        for name in inputs.keys() & {"grad", "out"}:
            check_beside(name, inputs[name], (*query.shape[:-1], spec.value_dim))
        if "lse" in inputs:
            check_beside("lse", inputs["lse"], query.shape[:-1], accumulator_dtype(query.dtype))
        earlier = _read(folder)
        size = parse_budget(budget, device)
        if earlier is not None and not isinstance(budget, int) and earlier["asked"] == budget:
            size = earlier["budget"]  # what is free may have changed since
        ahead, is_backward = device.type != "cpu", "grad" in inputs
        plan = _plan(options, size, spec, ahead=ahead, is_backward=is_backward)
        header = cls(
            options=options, scale=spec.scale, budget=size, ahead=ahead, plan=plan_facts(plan),
            tasks=sum(1 for _ in job_tasks(plan, is_backward)),
            inputs=digest_inputs(
                inputs, blocks=input_blocks(plan, tuple(inputs)), progress=progress
            ),
        )  # fmt: skip
        if earlier is None:
            content = {**header._content(), "id": header.identity, "asked": budget}
            with writing(f"job {folder}"), atomic_write(folder / "job.json") as path:
                path.write_text(json.dumps(content))
        elif earlier["id"] != header.identity:
            names = [name for name, fact in header._content().items() if earlier[name] != fact]
            raise CheckpointError(
                f"The folder {folder} holds another job (of another {', '.join(names)}).",
                "Give the tensors, budget and options of that job, or another folder.",
            )
        return header, plan

    @classmethod
    def read(cls, folder: Path) -> tuple[JobHeader, ExecutionPlan]:
        """Read the header of a job, and plan it again without its inputs.

        Raises:
            CheckpointError: There is no header, it is damaged, or this version plans it otherwise.
        """
        content = _read(folder)
        if content is None:
            raise CheckpointError(
                f"There is no job in {folder}.", "Give the folder of AttentionJob.create."
            )
        header = cls(**{field.name: content[field.name] for field in fields(cls)})
        tensors = {
            name: torch.empty(fact["shape"], dtype=getattr(torch, fact["dtype"]), device="meta")
            for name, fact in header.inputs.items()
        }
        spec = _spec(header.options, header.scale, tensors)
        plan = _plan(
            header.options, header.budget, spec, ahead=header.ahead,
            is_backward=header.is_backward,
        )  # fmt: skip
        if plan_facts(plan) != header.plan:
            raise CheckpointError(
                f"The job {folder} was made by another version, which cut it in another way.",
                "Use that version, or make the job again in another folder.",
            )
        return header, plan

    @property
    def is_backward(self) -> bool:
        """Whether the job computes gradients."""
        return "grad" in self.inputs

    @property
    def identity(self) -> str:
        """What tells jobs apart: a digest of all that decides their results."""
        return _digest(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "format": _FORMAT, "options": self.options, "scale": self.scale,
            "budget": self.budget, "ahead": self.ahead, "plan": self.plan, "tasks": self.tasks,
            "inputs": self.inputs,
        }  # fmt: skip


def input_blocks(plan: ExecutionPlan, names: tuple[str, ...]) -> dict[str, list[tuple[int, int]]]:
    """Return the ranges of tokens that have a checksum each, by the name of the input."""
    queries, keys = ([], []) if plan.spec.is_empty else token_blocks(plan)
    return {name: keys if name in BY_KEYS else queries for name in names}


def _spec(
    options: Mapping[str, Any], scale: float | None, tensors: Mapping[str, Tensor]
) -> AttentionSpec:
    masks = dict(options["masks"])
    if isinstance(masks["window"], list):  # as JSON has pairs
        masks["window"] = tuple(masks["window"])
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    scoring = Scoring(scale=scale, enable_gqa=options["enable_gqa"], softcap=options["softcap"])
    return spec_of(query, key, value, masking=Masking(**masks), scoring=scoring)


def plain_masks(masking: Masking) -> dict[str, Any]:
    """Return masks in types that JSON knows.

    Raises:
        ConfigError: A mask is of a kind that a header cannot hold.
    """
    if masking.key_mask is not None:
        raise ConfigError(
            "Jobs take no key_mask.", "Give lengths and starts, where padding is at the ends."
        )
    names = (field.name for field in fields(masking) if field.name != "key_mask")
    masks = {name: _plain(getattr(masking, name)) for name in names}
    if isinstance(masking.documents, Tensor) and masking.documents.ndim == 2:
        # ids of tokens would be read as starts
        starts = [list(starts_of_ids(row)) for row in masking.documents.cpu().numpy()]
        masks["documents"] = starts if len(starts) > 1 else starts[0]
    return masks


def _plain(value: Any) -> Any:
    """Numbers, text, or lists of them."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | str) else int(value)


def _plan(
    options: Mapping[str, Any],
    budget: int | None,
    spec: AttentionSpec,
    *,
    ahead: bool,
    is_backward: bool,
) -> ExecutionPlan:
    return job_plan(
        spec, budget=budget, schedule=options["schedule"],
        backward=is_backward, least_tasks=options["least_tasks"], ahead=ahead,
        kernel=options["kernel"],
    )  # fmt: skip


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    """What ``job.json`` holds; None if there is none.

    Raises:
        CheckpointError: The header is damaged.
    """
    path = folder / "job.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        facts = {name: fact for name, fact in content.items() if name not in ("id", "asked")}
        is_intact = content["format"] == _FORMAT and content["id"] == _digest(facts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_intact = False
    if not is_intact:
        raise CheckpointError(
            f"The job file {path} is damaged, or of another version.",
            "Copy it again from where it was made, or remove the folder and make the job again.",
        )
    return content
