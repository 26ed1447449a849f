"""Records of trials on disk: one JSON per finished trial, one per failed one."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulgurite import __version__
from fulgurite.compare.trial import Trial, TrialResult, trial_id
from fulgurite.masking import masked_arguments
from fulgurite.run_folders import write_json

__all__ = ["UNREADABLE", "Record", "TrialRecords", "outdated_name", "read_record"]

Record = dict[str, Any]
"""What is kept of a trial."""


UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError,
)  # fmt: skip
"""What reading JSON raises that is damaged, or of another program."""


def read_record(path: Path, name: str | None = None) -> Record | None:
    """The record of a finished or failed trial; None for a file that is none.

    Args:
        path: The file.
        name: Id of the trial that it is of; by default the stem of the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        numbers = [*record["metrics"].values(), record["seconds"]]
        [float(number) for number in numbers]  # an integer may be too large for one
        texts = [record["digest"], record["method"], record.get("error", "")]
        settings = record["setting"].items()
        is_one = (
            all(isinstance(n, int | float) for n in numbers)
            and all(isinstance(text, str) for text in [*texts, *itertools.chain(*settings)])
            and (name or path.stem) == trial_id(record["method"], tuple(settings), record["seed"])
        )
    except UNREADABLE:
        return None
    return record if is_one else None


@dataclass(frozen=True)
class TrialRecords:
    """The records of a comparison's trials under its folder.

    Args:
        folder: Folder of the comparison.
        costs: Metrics of the training that a trial's record takes over.
    """

    folder: Path
    costs: Sequence[str] = ()

    def result_path(self, name: str) -> Path:
        """Where the record of a finished trial lies."""
        return self.folder / "results" / f"{name}.json"

    def failed_path(self, name: str) -> Path:
        """Where the record of a failed trial lies, and its log beside it."""
        return self.folder / "failed" / f"{name}.json"

    def is_open(self, trial: Trial, retry_failed: bool) -> bool:
        """Whether a trial is to be run: it has no result, and did not fail or is to be retried."""
        if self.result_path(trial.id).is_file():
            return False
        return retry_failed or not self.failed_path(trial.id).is_file()

    def will_run(self, trial: Trial, equals: Sequence[Trial], retry_failed: bool) -> bool:
        """Whether a command would run a trial, once outdated records have been set aside.

        Args:
            trial: The trial.
            equals: The trials that run the same, itself included, whose result it would take.
            retry_failed: Whether failed trials are run again.
        """
        aside = self.folder / "outdated"
        for same in equals:
            paths = (self.result_path(same.id), aside / outdated_name(same.id, same.digest))
            if any(_is_result_of(path, same) for path in paths):
                return False
        failed = self.failed_path(trial.id)
        record = read_record(failed) if failed.is_file() else None
        return retry_failed or record is None or record["digest"] != trial.digest

    def archive_outdated(self, trials: Sequence[Trial]) -> None:
        """Move records of what is no longer run to ``outdated/``, and back what is run again."""
        reasons: Counter[str] = Counter()
        returned = 0
        aside = self.folder / "outdated"
        for trial in trials:
            for path in (self.result_path(trial.id), self.failed_path(trial.id)):
                if not path.exists():
                    continue
                record = read_record(path)
                if record is not None and record["digest"] == trial.digest:
                    continue
                aside.mkdir(exist_ok=True)
                mark = record["digest"] if record else "unreadable"
                path.replace(_find_free_path(aside / outdated_name(trial.id, mark)))
                reasons[_reason(record, trial)] += 1
            returned += self._take_back(aside / outdated_name(trial.id, trial.digest), trial)
        if reasons:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            print(f"Records set aside in {aside}: {reasons.total()} ({why}).")
        if returned:
            print(f"Records taken back from {aside}: {returned}.")

    def _take_back(self, archived: Path, trial: Trial) -> bool:
        """Move an archived result back to where it counts, if it is one of the trial as it is."""
        path = self.result_path(trial.id)
        if not _is_result_of(archived, trial) or path.exists():
            return False
        path.parent.mkdir(exist_ok=True)
        archived.replace(path)
        return True

    def take_equal_result(self, trial: Trial, same: Sequence[Trial]) -> bool:
        """Give a trial the result of a finished one of those that run the same, if there is one."""
        for other in same:
            path = self.result_path(other.id)
            record = read_record(path) if other.id != trial.id and path.is_file() else None
            if record is not None and record["digest"] == trial.digest:
                self._write_result(trial, {**record, **_identify_trial(trial)})
                return True
        return False

    def _write_result(self, trial: Trial, record: Mapping[str, Any]) -> None:
        write_json(self.result_path(trial.id), record)
        failed = self.failed_path(trial.id)
        for old in (failed, failed.with_suffix(".log")):
            old.unlink(missing_ok=True)

    def write(
        self,
        trial: Trial,
        result: TrialResult,
        commands: Sequence[Sequence[str]] = (),
        trained: TrialResult | None = None,
    ) -> None:
        """Write the record of a trial that finished or failed.

        Args:
            trial: The trial.
            result: Its result, or that of one which runs the same.
            commands: What was run.
            trained: Result of the training that it was evaluated on, where trials share those.
        """
        training = trained.metrics if trained else {}
        spent = {name: training[name] for name in self.costs if name in training}
        record: dict[str, Any] = {
            **_identify_trial(trial),
            "digest": trial.digest,
            "parts": dict(trial.parts),
            "commands": [masked_arguments(command) for command in commands],
            "metrics": {**spent, **result.metrics},
            "seconds": round(result.seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "version": __version__,
        }
        if trained and trained.training and trained.training.label:
            record["chosen"] = trained.training.label
        if not result.error:
            self._write_result(trial, record)
            return
        failed = self.failed_path(trial.id)
        write_json(failed, {**record, "error": result.error})
        with suppress(FileNotFoundError):
            if trained and trained.log:  # of a training: other trials show it as well
                shutil.copyfile(trained.log, failed.with_suffix(".log"))
            else:
                log = self.folder / "logs" / f"{result.id}.log"
                shutil.copyfile(log, failed.with_suffix(".log"))
                if result.id == trial.id:
                    log.unlink()


def _is_result_of(path: Path, trial: Trial) -> bool:
    """Whether a file is the record of a finished trial as it is now."""
    record = read_record(path, trial.id) if path.is_file() else None
    return record is not None and "error" not in record and record["digest"] == trial.digest


def _reason(record: dict[str, Any] | None, trial: Trial) -> str:
    """Why a record is not one of this trial as it is now."""
    if record is None:
        return "damaged or something else"
    parts = record.get("parts")
    if not isinstance(parts, dict) or parts.keys() != trial.parts.keys():
        return "of an earlier form"
    differ = [kind for kind, value in trial.parts.items() if parts[kind] != value]
    return f"of another {' and '.join(differ)}"


def outdated_name(name: str, mark: str) -> str:
    """The file under ``outdated/`` of a trial's record with a digest, or another mark."""
    mark = re.sub(r"[^\w.-]", "-", mark)[:40]
    return f"{name}.{mark}.json"


def _find_free_path(path: Path) -> Path:
    """The path itself, or with a number where something is there."""
    numbered = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _identify_trial(trial: Trial) -> dict[str, Any]:
    """The fields of a record that name its trial."""
    return {
        "id": trial.id,
        "method": trial.method,
        "setting": dict(trial.setting),
        "seed": trial.seed,
    }
