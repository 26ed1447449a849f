"""What a folder holds decides which page is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fulgurite.compare.comparison import PLAN_FILE, Comparison
from fulgurite.errors import ConfigError
from fulgurite.html_report.comparison_page import describe_comparison
from fulgurite.html_report.page import write_page
from fulgurite.html_report.run_page import describe_runs

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write a report.

    Args:
        folders: One folder of a comparison, or run folders that are shown beside each other.
        out: The file; the default is ``report.html`` in the first folder.

    Returns:
        The file.

    Raises:
        ConfigError: A folder holds neither, or several folders are not all runs.
    """
    comparisons = [folder for folder in folders if (folder / PLAN_FILE).is_file()]
    if comparisons and len(folders) > 1:
        raise ConfigError(
            f"{comparisons[0]} is a comparison, which is reported alone.",
            "Name one comparison, or several runs.",
        )
    if comparisons:
        page = describe_comparison(Comparison.read(comparisons[0]))
    else:
        page = describe_runs(folders)
    path = out or folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, path)
    return path
