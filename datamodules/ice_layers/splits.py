"""Splits by flight segment, never by random stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fulgurite.data.exclusions import name_some
from fulgurite.data.splits import check_fractions
from fulgurite.datamodules.ice_layers.stack import LayerStack
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "PARTS",
    "check_split",
    "describe_parts",
    "leave_guard",
    "refuse_second_split",
    "split_segments",
]

#: The parts of a split.
PARTS = ("train", "val", "test")


def check_split(val: float | Sequence[str], test: float | Sequence[str]) -> tuple[float, float]:
    """Return the fractions of validation and test, 0 for names of segments.

    Raises:
        ConfigError: Fractions leave nothing for training.

    Example:
        >>> check_split(0.25, ["2012"])
        (0.25, 0.0)
    """
    fractions = tuple(
        float(selection) if isinstance(selection, float | int) else 0.0 for selection in (val, test)
    )
    check_fractions(fractions[0], fractions[1], "data.init_args.split", ("val", "test"))
    return fractions[0], fractions[1]


def split_segments(
    segments: Sequence[str],
    val: float | Sequence[str],
    test: float | Sequence[str],
    order: Literal["random", "name"] = "random",
    *,
    seed: int = 0,
) -> dict[str, tuple[str, ...]]:
    """Deal flight segments out to training, validation and test.

    Args:
        segments: Names of all segments.
        val: Fraction of segments for validation, or names (a name's beginning is enough: ``2012``).
        test: Fraction or names of segments for the test, as for ``val``.
        order: ``random``, or by ``name``: names begin with the date, so the last flights are the
            test and those before them the validation.
        seed: Seed of the random order.

    Returns:
        Names of the segments of ``train``, ``val`` and ``test``.

    Raises:
        ConfigError: Fractions leave nothing for training.
        DataError: A name is unknown or in two parts.

    Source: docs/papers/ice_layers.md section 1.8 (random echograms leak between neighbours).

    Example:
        >>> split_segments(["a", "b", "c", "d"], 0.25, ["c"], order="name")
        {'train': ('a', 'b'), 'val': ('d',), 'test': ('c',)}
    """
    fractions = check_split(val, test)
    names = sorted(set(segments))
    parts: dict[str, list[str]] = {"val": [], "test": []}
    for part, selection in (("val", val), ("test", test)):
        if isinstance(selection, float | int):
            continue
        for prefix in selection:
            matches = [name for name in names if name.startswith(prefix)]
            if not matches:
                raise DataError(
                    f"No flight segment is called {prefix} (there are {name_some(names)}).",
                    f"Set `--data.init_args.split.{part}` to names of segments, or to a fraction.",
                )
            parts[part] += matches
    if overlap := set(parts["val"]) & set(parts["test"]):
        raise DataError(
            f"The flight segment {sorted(overlap)[0]} is in validation and in test.",
            "Set `--data.init_args.split.val` and `--data.init_args.split.test` to different "
            "segments.",
        )
    remaining = [name for name in names if name not in (*parts["val"], *parts["test"])]
    if order == "random":
        remaining = [remaining[k] for k in np.random.default_rng(seed).permutation(len(remaining))]
    for part, fraction in zip(("test", "val"), (fractions[1], fractions[0]), strict=True):
        count = max(1, round(fraction * len(names))) if fraction > 0 else 0
        if count >= len(remaining) + (fraction == 0):
            raise ConfigError(
                f"There are {len(names)} flight segments, which leaves none for training.",
                f"Lower `--data.init_args.split.{part}`, or give more segments; to complete new "
                "flights with a trained network, set `split.val` and `split.test` to 0.",
            )
        if count:
            parts[part] += remaining[len(remaining) - count :]
            remaining = remaining[: len(remaining) - count]
    return {
        "train": tuple(sorted(remaining)),
        "val": tuple(sorted(parts["val"])),
        "test": tuple(sorted(parts["test"])),
    }


def refuse_second_split(val: object, test: object, order: str) -> None:
    """Refuse options of a split where the files have one of their own.

    Args:
        val: Option for validation; None if not given.
        test: Option for the test; None if not given.
        order: Option for the order; ``random`` if not given.

    Raises:
        ConfigError: One of the options is given.
    """
    for name, value, default in (
        ("val", val, None),
        ("test", test, None),
        ("order", order, "random"),
    ):
        if value != default:
            raise ConfigError(
                f"The files have a split of their own, so that {name}={value} decides nothing.",
                f"Leave `--data.init_args.split.{name}` out, or set "
                "`--data.init_args.source.init_args.folders.split=segments`.",
            )


def describe_parts(parts: Mapping[str, Sequence[LayerStack]]) -> str:
    """Say in one line how many stacks and flight segments each part has."""
    return "split: " + ", ".join(
        f"{part} {len(parts[part])} stacks on {len({s.segment for s in parts[part]})} segments"
        for part in PARTS
    )


def leave_guard(
    stacks: Sequence[LayerStack], evaluated: Sequence[str], years: float
) -> tuple[list[LayerStack], int]:
    """Leave out stacks of flights within some years of evaluated ones; also how many.

    Args:
        stacks: Training stacks.
        evaluated: Names of the evaluated segments, which begin with the date.
        years: Least distance in time [years].

    Raises:
        ConfigError: A name does not begin with a date.

    Source: inferred.
    """
    others = np.array([_date(name) for name in sorted(set(evaluated))])
    near = {
        name
        for name in {stack.segment for stack in stacks}
        if len(others) and np.abs(others - _date(name)).min() < years * 365.25
    }
    distant = [stack for stack in stacks if stack.segment not in near]
    return distant, len(stacks) - len(distant)


def _date(name: str) -> float:
    """The day that a segment's name begins with [days since 1970]."""
    try:
        day = np.datetime64(f"{name[:4]}-{name[4:6]}-{name[6:8]}", "D")
    except ValueError as error:
        raise ConfigError(
            f"The name of the flight segment {name} does not begin with a date (YYYYMMDD).",
            "Set `--data.init_args.split.guard=0`.",
        ) from error
    return float(day.astype(np.int64))
