"""What takes the jobs of a comparison, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fulgurite.compare.trial import TrialResult
from fulgurite.compare.worker import Job

__all__ = ["Workers"]


class Workers(Protocol):
    """What takes jobs and returns their results; all that runs ends when it is left."""

    def __enter__(self) -> Any:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End what still runs."""

    @property
    def idle(self) -> int:
        """How many more jobs can be taken."""

    @property
    def busy(self) -> int:
        """How many jobs have no result yet."""

    def submit(self, job: Job) -> None:
        """Take a job."""

    def wait(self) -> Sequence[TrialResult]:
        """Wait for results, about a second at most; none may have come."""
