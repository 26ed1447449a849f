"""The study behind a sweep: where trials are kept, which point comes next, what became of each."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from fulgurite.errors import ConfigError
from fulgurite.sweep.pruning import BandPruner
from fulgurite.sweep.space import Categorical, Constant, Distribution, EarlyTerminate, Sweep
from fulgurite.sweep.storage import hide_password, open_storage

__all__ = [
    "ERROR",
    "METRICS",
    "RUN_DIR",
    "SECONDS",
    "VALUES",
    "Point",
    "TrialWatch",
    "as_choice",
    "counted_trials",
    "distribution_of_values",
    "enqueue_grid",
    "has_queue",
    "load_study",
    "next_point",
    "open_study",
    "retry_failed_trials",
    "tell",
]

ERROR, METRICS, RUN_DIR, SECONDS, VALUES = "error", "metrics", "run_dir", "seconds", "values"
"""Attributes of a trial."""

_ALIVE, _OWNER, _RETRIES = "alive", "owner", "retries"

_CONTENT, _RULE = "sweep", "early_terminate"  # attributes of a study


@dataclass(frozen=True)
class Point:
    """A trial that is to be run.

    Args:
        trial: The trial of the study.
        values: The value of each parameter that is not constant.
    """

    trial: optuna.Trial
    values: Mapping[str, Any]


def load_study(url: str, name: str) -> optuna.Study:
    """Open a study that is there.

    Args:
        url: Address of the storage, such as ``sqlite:///study.db``.
        name: Name of the study.

    Raises:
        ConfigError: The storage cannot be reached, or has no such study.
    """
    try:
        study = optuna.load_study(study_name=name, storage=open_storage(url))
    except KeyError as error:
        raise ConfigError(
            f"The storage {hide_password(url)} has no study {name}.", "Name another --storage."
        ) from error
    if _RULE in study.user_attrs:
        study.pruner = BandPruner(EarlyTerminate(**study.user_attrs[_RULE]))
    return study


def open_study(sweep: Sweep, url: str, name: str, seed: int) -> optuna.Study:
    """Open the study of a sweep, or make it.

    Args:
        sweep: The sweep.
        url: Address of the storage.
        name: Name of the study, under which several machines find it.
        seed: Seed of random and Bayesian search.

    Raises:
        ConfigError: The storage cannot be reached, or its study is of another sweep.
    """
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(url),
        sampler=SeededSampler(sweep.method, seed),
        pruner=BandPruner(sweep.early_terminate)
        if sweep.early_terminate
        else optuna.pruners.NopPruner(),
        direction="maximize" if sweep.maximize else "minimize",
        load_if_exists=True,
    )
    content = json.dumps([sweep.content, seed])
    recorded = study.user_attrs.get(_CONTENT)
    if recorded is None:
        maximizes = study.direction == optuna.study.StudyDirection.MAXIMIZE
        if study.get_trials(deepcopy=False) or maximizes != sweep.maximize:
            raise ConfigError(
                f"The study {name} in {hide_password(url)} is none of `fulgurite sweep`.",
                "Give another --name to begin a new one.",
            )
        if sweep.early_terminate:
            study.set_user_attr(_RULE, vars(sweep.early_terminate))
        study.set_user_attr(_CONTENT, content)
    elif recorded != content:
        raise ConfigError(
            f"The study {name} in {hide_password(url)} is of another sweep than {sweep.path} "
            f"({_first_difference(recorded, content)}).",
            "Give another --out or --name to begin a new one.",
        )
    return study


def _first_difference(recorded: str, content: str) -> str:
    """The first key in which two sweeps differ."""
    (before, seed_before), (now, seed_now) = json.loads(recorded), json.loads(content)
    if seed_before != seed_now:
        return f"seed {seed_before}, not {seed_now}"
    old, new = json.loads(before), json.loads(now)
    return next((f"{key} differs" for key in new if old.get(key) != new[key]), "another version")


class SeededSampler(optuna.samplers.BaseSampler):
    """Random or TPE search whose draws depend on the seed and the number of a trial alone.

    So trials are the same whichever process or machine asks for them, and after a restart; TPE's
    depend on the finished trials as well.

    Args:
        method: ``random``, ``bayes`` (TPE), or ``grid``, whose points are in the queue.
        seed: The seed.
    """

    def __init__(self, method: str, seed: int) -> None:
        self.method, self.seed = method, seed

    def _sampler(self, number: int, parameter: str) -> optuna.samplers.BaseSampler:
        # a stream for each parameter: else all of a trial would lie at the same quantile
        digest = hashlib.sha256(f"{self.seed}/{number}/{parameter}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        if self.method == "bayes":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Parameters are drawn one by one."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters are drawn one by one."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter."""
        sampler = self._sampler(trial.number, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def enqueue_grid(study: optuna.Study, sweep: Sweep, limit: int) -> None:
    """Queue the points of a grid that are not in the study yet.

    Args:
        study: The study.
        sweep: A grid.
        limit: Largest number of points.
    """
    queued = {
        json.dumps(_queued_params(trial), sort_keys=True)
        for trial in study.get_trials(deepcopy=False)
    }
    for number, point in enumerate(sweep.grid):
        if number >= limit:
            return
        if json.dumps(point, sort_keys=True) not in queued:
            study.enqueue_trial(point)


def _queued_params(trial: FrozenTrial) -> dict[str, Any]:
    return dict(trial.system_attrs.get("fixed_params") or trial.params)


def next_point(study: optuna.Study, sweep: Sweep, limit: int) -> Point | None:
    """Draw the next trial.

    Args:
        study: The study.
        sweep: Its sweep.
        limit: Largest number of trials that count.

    Returns:
        The trial; None where another machine took it meanwhile.
    """
    trial = study.ask()
    trial.set_user_attr(_OWNER, _owner())
    trials = study.get_trials(deepcopy=False)  # by number
    earlier = [t for t in _select_counted(trials) if t.number < trial.number]
    queued = trials[trial.number].system_attrs.get("fixed_params")
    superfluous = len(earlier) >= limit
    if sweep.method == "grid":
        twice = any(_queued_params(t) == queued for t in earlier)
        superfluous = superfluous or twice or not queued
    if superfluous:
        study.tell(trial, state=TrialState.FAIL)
        return None
    values: dict[str, Any] = {}
    for name, parameter in sweep.parameters.items():
        if isinstance(parameter, Constant):
            continue
        if sweep.method == "grid":
            choices = sweep.grid_values[name]
            values[name] = choices[trial.suggest_int(name, 0, len(choices) - 1)]
        else:
            values[name] = _suggest(trial, name, parameter)
    trial.set_user_attr(VALUES, values)
    return Point(trial, values)


def tell(
    study: optuna.Study, number: int, value: float | None = None, state: TrialState | None = None
) -> None:
    """Tell a study how a trial ended.

    Args:
        study: The study.
        number: Number of the trial.
        value: What it reached, where it is complete.
        state: How it ended, where it is not.

    Raises:
        UpdateFinishedTrialError: Another process has ended it, such as one that took this one for
            dead.
    """
    try:
        study.tell(number, value, state)
    except ValueError as error:
        trial = study.get_trials(deepcopy=False)[number]
        if trial.state.is_finished():
            raise UpdateFinishedTrialError(str(error)) from error
        raise


def _select_counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count: they run, or came to a result or to an error of their own.

    Those that do not wait, were cut short and are repeated by another, or failed and are retried.

    Args:
        trials: All trials of a study.
    """
    retried = {trial.user_attrs.get(_RETRIES) for trial in trials}
    failed, waiting = TrialState.FAIL, TrialState.WAITING
    return [
        trial
        for trial in trials
        if trial.state != waiting
        and (trial.state != failed or (ERROR in trial.user_attrs and trial.number not in retried))
    ]


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of a study that run, or came to a result or to an error of their own."""
    return _select_counted(study.get_trials(deepcopy=False))


def retry_failed_trials(study: optuna.Study) -> list[int]:
    """Queue the points of trials that failed again.

    Args:
        study: The study.

    Returns:
        Numbers of the trials.
    """
    failed = [trial for trial in counted_trials(study) if trial.state == TrialState.FAIL]
    for trial in failed:
        study.enqueue_trial(_queued_params(trial), user_attrs={_RETRIES: trial.number})
    return [trial.number for trial in failed]


def has_queue(study: optuna.Study) -> bool:
    """Whether a point waits to be run."""
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _suggest(trial: optuna.Trial, name: str, parameter: Categorical | Distribution) -> Any:
    """A value: from Optuna's own distribution where it has one, else from its quantile."""
    if isinstance(parameter, Categorical):
        if parameter.probabilities is None:
            index = trial.suggest_categorical(name, list(range(len(parameter.values))))
            return parameter.values[index]
        return parameter.value_at(trial.suggest_float(name, 0.0, 1.0))
    if parameter.step is None:
        low, high = parameter.first, parameter.second
        if parameter.name == "int_uniform":
            return trial.suggest_int(name, int(low), int(high))
        if parameter.name == "uniform":
            return trial.suggest_float(name, low, high)
        if parameter.name in ("log_uniform_values", "inv_log_uniform_values"):
            return trial.suggest_float(name, low, high, log=True)
    # both ends of a quantile may lie at infinity
    return parameter.value_at(trial.suggest_float(name, 1e-9, 1 - 1e-9))


def distribution_of_values(
    parameter: Categorical | Distribution, values: list[Any]
) -> BaseDistribution:
    """A distribution over the values themselves, for Optuna's figures.

    Args:
        parameter: The parameter.
        values: All values that were drawn.
    """
    if isinstance(parameter, Categorical):
        return CategoricalDistribution([as_choice(value) for value in parameter.values])
    if all(isinstance(value, int) for value in values):
        return IntDistribution(min(values), max(values))
    log = "log" in parameter.name and min(values) > 0
    return FloatDistribution(min(values), max(values), log=log)


def as_choice(value: Any) -> Any:
    """A value that Optuna takes as one of several: the text of a list or mapping."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class TrialWatch:
    """Tells which running trials have lost their process.

    Those of this machine are known by their process, those of others by a mark that does not change
    any more. By this machine's clock: those of others may differ.

    Args:
        study: The study.
        patience: How long another machine may be silent [s].
    """

    def __init__(self, study: optuna.Study, patience: float = 120.0) -> None:
        self.study, self.patience = study, patience
        self._marks: dict[int, tuple[Any, float]] = {}

    def mark(self, trials: Iterable[optuna.Trial]) -> None:
        """Mark trials that run here as alive."""
        for trial in trials:
            with suppress(UpdateFinishedTrialError):  # given up meanwhile; the others are marked
                trial.set_user_attr(_ALIVE, time.time())

    def running(self) -> list[FrozenTrial]:
        """The trials that run somewhere."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def fail_dead_trials(self) -> list[int]:
        """Give up trials whose process is gone, and queue their points again.

        Returns:
            Numbers of the trials, less those that ended meanwhile.
        """
        given_up = []
        for trial in self.running():
            if not self._is_dead(trial):
                continue
            try:
                tell(self.study, trial.number, state=TrialState.FAIL)
            except UpdateFinishedTrialError:
                continue
            given_up.append(trial.number)
            params = _queued_params(trial)
            if params:
                self.study.enqueue_trial(params)
        return given_up

    def _is_dead(self, trial: FrozenTrial) -> bool:
        machine, _, process = str(trial.user_attrs.get(_OWNER, "")).rpartition(" ")
        if machine == _owner().rpartition(" ")[0]:
            return not _is_alive(process)
        mark, now = trial.user_attrs.get(_ALIVE), time.monotonic()
        before, since = self._marks.setdefault(trial.number, (mark, now))
        if mark != before:
            self._marks[trial.number] = (mark, now)
            return False
        return now - since > self.patience


def _owner() -> str:
    """Machine, boot, container and process: containers may share a name."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return f"{'/'.join(parts)} {os.getpid()}"


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
