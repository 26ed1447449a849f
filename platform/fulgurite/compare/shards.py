"""Shards of a comparison: parts that processes on several machines run without a scheduler."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.trial import Trial
from fulgurite.errors import ConfigError

__all__ = ["Shard", "parse_shard", "select_shard"]


@dataclass(frozen=True)
class Shard:
    """One of several parts of a comparison.

    Args:
        number: Which part, from 1.
        count: Number of parts.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """A shard from the spelling of the command line.

    Raises:
        ConfigError: The text is not of the form ``NUMBER/COUNT``, or the number is out of range.

    Example:
        >>> parse_shard("3/16")
        Shard(number=3, count=16)
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match:
        shard = Shard(int(match[1]), int(match[2]))
        if 1 <= shard.number <= shard.count:
            return shard
    raise ConfigError(
        f"--shard is {text!r}.",
        "Write the number of the part and how many there are: --shard 1/16 to --shard 16/16.",
    )


def select_shard(trials: Sequence[Trial], shard: Shard, plan: ComparisonPlan) -> list[Trial]:
    """The trials of a shard, in their order; those that share a training are in one shard.

    What is finished makes no difference, so that a shard is the same at each start.

    Args:
        trials: All trials that are to be run.
        shard: Which part of them.
        plan: The comparison.
    """
    groups = _connected(trials, plan)
    loads = [0] * min(shard.count, len(groups))  # further shards have nothing to run
    selected: set[str] = set()
    # the largest first, each to the shard with the least: even by count, and stable
    for group in sorted(groups, key=len, reverse=True):
        target = loads.index(min(loads))
        loads[target] += len(group)
        if target == shard.number - 1:
            selected.update(trial.id for trial in group)
    return [trial for trial in trials if trial.id in selected]


def _connected(trials: Sequence[Trial], plan: ComparisonPlan) -> list[list[Trial]]:
    """The trials in groups that have no training and no result in common."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for trial in trials:
        first, *others = _common_keys(trial, plan)
        for other in others:
            parents[root(other)] = root(first)
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(root(trial.digest), []).append(trial)
    return [*groups.values()]


def _common_keys(trial: Trial, plan: ComparisonPlan) -> Iterator[str]:
    """What a trial may have in common with others: its result, and trainings that it needs."""
    yield trial.digest
    step: Trial | None = trial if plan.shares else None
    while step is not None:
        # before it is linked to an origin: a key then joins some trials more than it must
        yield from (training.key for training in step.trainings)
        step = step.origin
