"""Metrics of a run as text, the telling ones first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fulgurite.run_folders.metrics import rank_stage

__all__ = ["metrics_table", "select_telling_metrics", "sort_metrics"]

_ROWS = 24  # of a table that is read at the end of a fit


def select_telling_metrics(metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """All metrics of a fit if they are few, else those of training and validation."""
    stages = ("train/", "val/")
    few = len(metrics) <= _ROWS or not any(name.startswith(stages) for name in metrics)
    yield from (m for m in metrics.items() if few or m[0].startswith(stages))


def sort_metrics(metrics: Mapping[str, float], monitor: str | None) -> dict[str, float]:
    """Metrics with the monitored one first: test, validation, training, and what else there is.

    Example:
        >>> list(sort_metrics({"fed/a": 1, "train/loss": 2, "val/acc": 3, "val/f1": 4}, "val/f1"))
        ['val/f1', 'val/acc', 'train/loss', 'fed/a']
    """
    first = (monitor or "").rpartition("/")[2]

    def rank(name: str) -> tuple[int, bool, str]:
        metric = name.partition("/")[2]
        return rank_stage(name), metric.rpartition("/")[2] != first, name

    return {name: metrics[name] for name in sorted(metrics, key=rank)}


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Metrics as text, with a column for each set that they are of.

    Example:
        >>> print(metrics_table({"test/a/acc": 0.5, "test/b/acc": 0.25, "test/a/loss": 2.0}))
              test/a  test/b
        acc      0.5    0.25
        loss       2
    """
    cells: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        group, _, metric = name.rpartition("/")
        cells.setdefault(metric, {})[group] = f"{value:.4g}"
    groups = list(dict.fromkeys(group for row in cells.values() for group in row))
    lines = [["", *groups], *([m, *(row.get(g, "") for g in groups)] for m, row in cells.items())]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    padded = ([name.ljust(first), *map(str.rjust, row, widths)] for name, *row in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)
