"""The metrics that a run folder holds, and the order in which they are listed."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulgurite.errors import ConfigError

__all__ = ["STAGES", "rank_stage", "read_metric_rows", "read_metrics"]

STAGES = ("test", "val", "train")
"""Parts of the data that metrics are of, in the order in which people look for them."""


def rank_stage(metric: str) -> int:
    """Position of a metric's stage in a list; the last one for metrics of no stage.

    >>> sorted(["fed/clients", "train/loss", "test/acc"], key=rank_stage)
    ['test/acc', 'train/loss', 'fed/clients']
    """
    stage = metric.partition("/")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def read_metric_rows(path: Path) -> Sequence[Mapping[str, str]]:
    r"""The rows of a file of metrics; one that was being written when its run was killed is none.

    Args:
        path: The file, ``metrics.csv``.

    Raises:
        ValueError: The file is no text.
        csv.Error: The file is no table.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (path := Path(folder) / "metrics.csv").write_text("a,b\n1,2\n3,0.4")
        ...     read_metric_rows(path)  # the last number may have had more digits
        [{'a': '1', 'b': '2'}]
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows = csv.DictReader(lines)
    return [row for row in rows if None not in row and None not in row.values()]


def read_metrics(run_dir: Path) -> dict[str, float]:
    """Metrics of a run folder: those of ``fit``, then those of evaluations over them.

    Raises:
        ConfigError: A file of metrics is damaged.
    """
    metrics: dict[str, float] = {}
    for name in ("summary.json", "validate_metrics.json", "test_metrics.json"):
        path = run_dir / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8")).items()
                numbers = {k: float(v) for k, v in values if isinstance(v, int | float)}
            except (ValueError, AttributeError, RecursionError, OverflowError) as error:
                raise ConfigError(f"{path} holds no metrics.", "Run the command again.") from error
            metrics.update(numbers)
    return metrics
