"""Brings together what the tasks of a job have computed apart.

Axes: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fulgurite.attention.merging import merge_
from fulgurite.attention.parts import Part, Record, read_part
from fulgurite.attention.progress import bar
from fulgurite.attention.units import clear_
from fulgurite.errors import CheckpointError

__all__ = ["merge_parts", "read_parts"]

_Bounds = tuple[tuple[int, int], ...]


#: For each result and place the parts that belong there, in the order of tasks.
Shares = dict[tuple[str, _Bounds], list[tuple[Part, Record]]]


def read_parts(folder: Path, job: str, paths: Sequence[Path]) -> Shares:
    """Read what the files of all tasks hold, without their tensors.

    Args:
        folder: Of the job, as errors call it.
        job: Its identity.
        paths: File of each task, in the order in which they are summed.

    Raises:
        CheckpointError: One is missing, damaged or of another job.
    """
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        raise CheckpointError(
            f"The job {folder} is not complete: of {len(paths)} tasks {_spans(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing.",
            "Run the job, or copy the files of these tasks into its folder `parts`.",
        )
    shares: Shares = {}
    for number, path in enumerate(paths):
        part = read_part(path)
        if part.facts != {"job": job, "task": number}:
            raise CheckpointError(
                f"The file {path} is of another job or task than task {number} of {folder}.",
                "Remove it, and run this task again.",
            )
        for record in part.records:
            bounds = tuple((s.start, s.stop) for s in record.at)
            shares.setdefault((record.name, bounds), []).append((part, record))
    return shares


def _spans(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges.

    Example:
        >>> _spans([3, 7, 8, 9])
        '3, 7 to 9'
    """
    texts, start = [], numbers[0]
    for number, following in zip(numbers, [*numbers[1:], -1], strict=True):
        if following != number + 1:
            texts.append(str(start) if start == number else f"{start} to {number}")
            start = following
    return ", ".join(texts)


def merge_parts(shares: Shares, results: Mapping[str, Tensor], *, progress: bool = False) -> None:
    """Merge parts of attention, or add parts of gradients, place by place.

    Args:
        shares: Of all tasks.
        results: ``out`` and ``lse``, or gradients, overwritten. Shape: (B, H, N, D), (B, H, N).
        progress: Show a bar.

    Raises:
        CheckpointError: A file is damaged.
    """
    _clear_rest(shares, results)
    count = sum(1 for name, _ in shares if name != "lse")
    with bar("merge", count, show=progress) as advance:
        for (name, bounds), entries in shares.items():
            if name == "lse":
                continue  # comes with its result
            batch, heads, tokens = (slice(*span) for span in bounds)
            at = batch, heads, tokens
            if name == "out":
                total = _merged([*zip(entries, shares["lse", bounds], strict=True)])
                results["out"][at], results["lse"][at] = total
            else:
                results[name][at] = _added(entries)
            advance(tokens.stop - tokens.start)


def _merged(
    shares: Sequence[tuple[tuple[Part, Record], tuple[Part, Record]]],
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all tasks."""
    total: tuple[Tensor, Tensor] | None = None
    for (part, out), (_, lse) in shares:
        share = part.read(out), part.read(lse)
        if total is None:
            total = share
        else:
            merge_(*total, *share)
    assert total is not None
    return total


def _added(shares: Sequence[tuple[Part, Record]]) -> Tensor:
    """Sum of the gradients of all tasks."""
    total: Tensor | None = None
    for part, record in shares:
        share = part.read(record)
        total = share if total is None else total.add_(share)
    assert total is not None
    return total


def _clear_rest(shares: Shares, results: Mapping[str, Tensor]) -> None:
    """Set what no task has a part of: queries that see no keys, keys that nobody sees."""
    covered = dict.fromkeys(results, 0)
    for name, bounds in shares:
        tokens = 1
        for start, stop in bounds:
            tokens *= stop - start
        covered[name] += tokens
    for name, result in results.items():
        rows = result.shape[0] * result.shape[1] * result.shape[2]
        if covered[name] == rows or name == "lse":
            continue
        if name == "out":
            clear_(result, results["lse"])
        else:
            result.zero_()
