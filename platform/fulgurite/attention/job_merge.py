"""Brings together what the tasks of a job have computed apart.

Axes: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fulgurite.attention.merging import merge_
from fulgurite.attention.parts import Part, PartRecord, read_part
from fulgurite.attention.progress import bar
from fulgurite.attention.units import clear_
from fulgurite.errors import CheckpointError

__all__ = ["merge_parts"]

_Bounds = tuple[tuple[int, int], ...]

#: For each result and place the numbers of the tasks that have a part of it, ascending.
_Regions = dict[tuple[str, _Bounds], "array[int]"]


def merge_parts(
    folder: Path,
    job: str,
    paths: Sequence[Path],
    results: Mapping[str, Tensor],
    *,
    progress: bool = False,
) -> None:
    """Merge parts of attention, or add parts of gradients, place by place in the order of tasks.

    Two parts of a place are in memory at once, and the index of one file: which records a file
    has is read anew for each place, since all indices together would not fit a small budget.

    Args:
        folder: Folder of the job, as errors call it.
        job: Its identity.
        paths: File of each task, in the order in which they are summed.
        results: ``out`` and ``lse``, or gradients, overwritten. Shape: (B, H, N, D), (B, H, N).
        progress: Show a bar.

    Raises:
        CheckpointError: A file is missing, damaged or of another job.

    Source: docs/papers/stream_cqsa.md section 1.6 (merge; a fixed order for the same bits) and 1.7
    (sums).
    """
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        raise CheckpointError(
            f"The job {folder} is not complete: of {len(paths)} tasks {_spans(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing.",
            "Run the job, or copy the files of these tasks into its folder `parts`.",
        )

    def open_part(number: int) -> Part:
        part = read_part(paths[number])
        if part.facts != {"job": job, "task": number}:
            raise CheckpointError(
                f"The file {part.path} is of another job or task than task {number} of {folder}.",
                "Remove it, and run this task again.",
            )
        return part

    regions: _Regions = {}
    for number in range(len(paths)):
        for record in open_part(number).records:
            if record.name != "lse":  # comes with its result
                regions.setdefault((record.name, _bounds(record)), array("L")).append(number)
    _clear_rest(regions, results)
    with bar("merge", len(regions), show=progress) as advance:
        for (name, bounds), numbers in regions.items():
            batch, heads, tokens = (slice(*span) for span in bounds)
            at = batch, heads, tokens
            shares = (_read(open_part(number), name, bounds) for number in numbers)
            total = next(shares)
            for part in shares:
                if name == "out":
                    merge_(total[0], total[1], part[0], part[1])
                else:
                    total[0].add_(part[0])
                del part  # or it would take memory beside the next
            for result, values in zip((name, "lse"), total, strict=False):
                results[result][at] = values
            advance(tokens.stop - tokens.start)


def _read(part: Part, name: str, bounds: _Bounds) -> list[Tensor]:
    """Read what a part has of a place: attention with its log-sum-exp, or a gradient."""
    records = {r.name: r for r in part.records if _bounds(r) == bounds}
    return [part.read(records[n]) for n in ((name, "lse") if name == "out" else (name,))]


def _bounds(record: PartRecord) -> _Bounds:
    return tuple((s.start, s.stop) for s in record.at)


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


def _clear_rest(regions: _Regions, results: Mapping[str, Tensor]) -> None:
    """Set what no task has a part of: queries that see no keys, keys that nobody sees."""
    covered = dict.fromkeys(results, 0)
    for name, bounds in regions:
        tokens = 1
        for start, stop in bounds:
            tokens *= stop - start
        covered[name] += tokens
    for name, result in results.items():
        rows = result.shape[0] * result.shape[1] * result.shape[2]
        if name == "lse" or covered[name] == rows:
            continue
        if name == "out":
            clear_(result, results["lse"])
        else:
            result.zero_()
