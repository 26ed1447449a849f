"""What a run records of itself while it trains, so that it can go on as if it had not stopped."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins import DoublePrecision
from typing_extensions import override

from fulgurite.checkpoints import describe_weights
from fulgurite.errors import CheckpointError
from fulgurite.foreign.reading import Reading, reading
from fulgurite.io import atomic_write
from fulgurite.predictions.inputs import serve_input
from fulgurite.random_states import gather_random_states, set_random_state
from fulgurite.sampling import forget_training_data, list_generators, restart_training_data

__all__ = ["ENDED", "MetricsLogger", "RunTrainer", "TrainingState", "has_stopped"]

# --- metrics ------------------------------------------------------------------------------------


class _MetricsFile(ExperimentWriter):
    """``metrics.csv``, which a resumed run goes on with."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.file = Path(self.metrics_file_path)
        self.rows = 0  # in the file

    def _check_log_dir_exists(self) -> None:
        """Delete nothing: the run folder is this run's."""

    def read(self) -> list[dict[str, str]]:
        """The rows of the file, without one that was cut off."""
        if not self.file.is_file():
            return []
        hint = "Put back a copy of it, or move it away: its rows are lost then."
        record = reading(self.file, "The record of metrics", hint)
        with record, self.file.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row and None not in row.values()]
            self.metrics_keys = list(reader.fieldnames or [])
        return rows

    def rewind(self, rows: int | None) -> None:
        """Take up the first rows of the file, all of them for None, and drop the others."""
        first_rows = self.read()[:rows]
        self.rows = len(first_rows)
        self._rewrite(first_rows)

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not self.metrics_keys:
            return
        with (
            atomic_write(self.file) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

    def save(self) -> None:
        """Append the new rows; rewrite the file, in one step, when there are new columns."""
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        if new := sorted(set().union(*rows) - set(self.metrics_keys)):
            before = self.read()
            self.metrics_keys = sorted([*self.metrics_keys, *new])
            self._rewrite([*before, *rows])
        else:
            with self.file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(rows)
        self.rows += len(rows)


class MetricsLogger(CSVLogger):
    """The record of all metrics of a run, written row by row to ``metrics.csv``.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder.parent), name="", version=folder.name)

    @property
    def experiment(self) -> Any:
        """What writes the file; something that ignores all calls on ranks other than 0."""
        if self._experiment is None and _is_rank_zero():
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _MetricsFile(self.log_dir)
        return super().experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write a row at once."""
        super().log_metrics(metrics, step)
        if self._experiment is not None:
            self._experiment.save()

    def log_hyperparams(self, params: Any = None) -> None:
        """Leave them to ``config.yaml``."""

    def save(self) -> None:
        """Write what is left."""
        if self._experiment is not None:
            self._experiment.save()

    @property
    def rows(self) -> int:
        """Rows that were written."""
        experiment: Any = self._experiment
        return 0 if experiment is None else int(experiment.rows)

    def rewind(self, rows: int | None) -> None:
        """Go on after the first rows of the file; None keeps all."""
        if _is_rank_zero():
            self.experiment.rewind(rows)


def _is_rank_zero() -> bool:
    from lightning_utilities.core.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def metrics_logger(trainer: Trainer) -> MetricsLogger | None:
    """The trainer's record of metrics, if it has one."""
    return next((x for x in trainer.loggers if isinstance(x, MetricsLogger)), None)


# --- state --------------------------------------------------------------------------------------

_KEY = "fulgurite"

ENDED = "ended_training"
"""Key of a callback's state that is true where the callback has ended the training."""


def has_stopped(state: Mapping[str, Any]) -> bool:
    """Whether a state of ``EarlyStopping`` is that of a training which it has ended."""
    return bool(state["stopped_epoch"]) and state["wait_count"] >= state["patience"]


class TrainingState(Callback):
    """Keeps in each checkpoint what Lightning leaves out, and takes it up when a run goes on.

    That are the states of the random number generators of all ranks, those of loaders among them,
    how many rows of metrics there were, the row that is logged right after the checkpoint, what
    schedulers on a plateau are told then, the last values of all metrics, and the conditions on
    which results depend in their last digits. A loader of training batches that was made too early
    (a model that asks for ``estimated_stepping_batches``) is made again.

    Args:
        continued: Whether training goes on in the run's own folder.
        resumes: Whether it goes on from a checkpoint at all.
    """

    def __init__(self, *, continued: bool = False, resumes: bool = False) -> None:
        self.continued, self.resumes = continued, resumes
        self.trained = False
        self._stored: dict[str, Any] = {}
        self._counts: tuple[int, int] | None = None
        self._cut_at: tuple[int, int] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Last values of all metrics when the checkpoint was written."""
        return dict(self._stored.get("metrics") or {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make weights of double precision before a checkpoint is taken up, not after it."""
        if isinstance(trainer.precision_plugin, DoublePrecision):
            pl_module.double()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state; called on all ranks."""
        logger = metrics_logger(trainer)
        checkpoint[_KEY] = {
            "random": gather_random_states(list_generators(trainer)),
            "rows": logger.rows if logger is not None else None,
            "pending": _pending(trainer),
            "plateaus": _pending_plateaus(trainer),
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "conditions": conditions(trainer),
            "batches": float(trainer.num_training_batches),  # of an epoch; may be infinite
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until training starts."""
        for sentence in describe_weights(checkpoint, pl_module):
            print(f"note: {sentence}", file=sys.stderr)
        if self.resumes:
            with self._taking_up(trainer):
                self._stored = dict(checkpoint.get(_KEY) or {})
            self._counts = len(checkpoint["optimizer_states"]), len(checkpoint["lr_schedulers"])
            self._cut_at = _find_cut(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that nothing of the checkpoint would be left out.

        Raises:
            CheckpointError: The checkpoint has states of fewer or more optimizers than the model.
        """
        if self._counts is None:
            return
        counts = len(trainer.optimizers), len(trainer.lr_scheduler_configs)
        for kind, before, now in zip(
            ("optimizers", "schedulers"), self._counts, counts, strict=True
        ):
            if before != now:
                raise CheckpointError(
                    f"The checkpoint has the states of {before} {kind}, the model has {now}.",
                    "Resume with the model.* options of the run, from a checkpoint that is whole.",
                )
        forget_training_data(trainer)
        self._say_conditions(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and has_stopped(callback.state_dict()):
                trainer.should_stop = True  # Lightning would train one more epoch to find out

    def _say_conditions(self, trainer: Trainer) -> None:
        before, now = self._stored.get("conditions") or {}, conditions(trainer)
        differing = [f"{k} {v} (now {now[k]})" for k, v in before.items() if now.get(k, v) != v]
        if differing and trainer.is_global_zero:
            print(
                f"note: the run went on {', '.join(differing)} so far: results may differ from an "
                "uninterrupted run in their last digits",
                file=sys.stderr,
            )
        if self._cut_at is not None and trainer.is_global_zero:
            batches, epoch = self._cut_at
            print(
                f"note: the run ended within epoch {epoch}, after {batches} of its batches, as by "
                "trainer.max_steps: it goes on with the next epoch, without the rest of this one",
                file=sys.stderr,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up metrics and random numbers."""
        if self._stored:
            with self._taking_up(trainer):
                self._take_up(trainer, pl_module)
            restart_training_data(trainer)

    def _taking_up(self, trainer: Trainer) -> Reading:
        hint = "It is damaged, or of another program: give another checkpoint."
        path = str(trainer.ckpt_path)
        fault = f"has a state of its run, '{_KEY}', that cannot be taken up"
        return reading(path, "The checkpoint", hint, error=CheckpointError, fault=fault)

    def _take_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.continued and (logger := metrics_logger(trainer)) is not None:
            logger.rewind(self._stored.get("rows"))
            if pending := self._stored.get("pending"):
                logger.log_metrics(pending["metrics"], pending["step"])
        metrics = trainer.callback_metrics
        for name, value in self.metrics.items():
            metrics.setdefault(name, torch.tensor(value, device=pl_module.device))
        self._take_up_random_state(trainer)
        for index, value in (self._stored.get("plateaus") or {}).items():
            config = trainer.lr_scheduler_configs[index]
            if config.reduce_on_plateau:
                pl_module.lr_scheduler_step(config.scheduler, value)

    def _take_up_random_state(self, trainer: Trainer) -> None:
        states = self._stored.get("random") or []
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank], list_generators(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up random numbers again where only the end of an epoch was left.

        The iterator that was made for it has drawn some in vain.
        """
        if self._stored and not self.trained:
            self._take_up_random_state(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Remember that something is trained."""
        self.trained = True


class RunTrainer(Trainer):
    """A trainer whose fit ends in the same way when it is resumed after its last epoch."""

    @override
    def predict(  # Lightning's
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        input: str | None = None,
    ) -> Any:
        """Predict, as Lightning's trainer does.

        Args:
            model: The module.
            dataloaders: Instead of a DataModule.
            datamodule: The DataModule.
            return_predictions: Whether to return what ``predict_step`` returns.
            ckpt_path: ``last``, ``best``, or the path of a checkpoint.
            weights_only: Whether to read the checkpoint without running code.
            input: File or folder to predict instead of a split of the data, read with what was
                trained; which files, docs/how_to/predict_own_files.md says.
        """
        if input is not None:
            serve_input(datamodule, input, ckpt_path)
        return super().predict(
            model, dataloaders, datamodule, return_predictions,
            ckpt_path=ckpt_path, weights_only=weights_only,
        )  # fmt: skip

    def _run_stage(self) -> Any:
        """Let callbacks end a training of which only the end was missing."""
        result = super()._run_stage()
        states = [c for c in self.callbacks if isinstance(c, TrainingState)]  # type: ignore[attr-defined]
        if self.training and any(s.resumes and not s.trained for s in states):
            self.fit_loop.on_run_start()
            self.fit_loop.on_run_end()
        return result


def _find_cut(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Find where a training ended within an epoch, which Lightning counts as done all the same.

    Returns:
        Number of batches and the epoch, from 0; None for an epoch that is whole or not counted yet.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = (loops[f"{loop}_progress"] for loop in ("epoch", "epoch_loop.batch"))
    processed = int(epochs["current"]["processed"])
    is_counted = processed > 0 and processed == epochs["current"]["ready"]
    trained = int(batches["current"]["completed"])
    usual = (checkpoint.get(_KEY) or {}).get("batches", trained)  # not in older checkpoints
    if not is_counted or batches["is_last_batch"] or not 0 < trained < usual:
        return None
    return trained, processed - 1


def conditions(trainer: Trainer) -> dict[str, Any]:
    """On what the last digits of results depend, beside the configuration."""
    return {
        "threads": torch.get_num_threads(),
        "ranks": trainer.world_size,
        "device": trainer.strategy.root_device.type,
        "torch": str(torch.__version__),
    }


def _pending(trainer: Trainer) -> dict[str, Any] | None:
    """The row of metrics that Lightning logs right after the hook that writes a checkpoint."""
    if not trainer.training:
        return None
    connector: Any = trainer._logger_connector
    loop: Any = trainer.fit_loop.epoch_loop
    at_epoch_end = connector._first_loop_iter is None
    if not at_epoch_end and (
        not connector.should_update_logs
        or (loop._should_accumulate() and trainer.lightning_module.automatic_optimization)
    ):
        return None
    metrics = {k: float(v) for k, v in connector.metrics["log"].items()}
    if not metrics:
        return None
    step = metrics.pop("step", None)
    if step is None:
        metrics.setdefault("epoch", trainer.current_epoch)
        step = loop._batches_that_stepped - at_epoch_end
    return {"metrics": metrics, "step": int(step)}


def _pending_plateaus(trainer: Trainer) -> dict[int, float]:
    """What Lightning tells schedulers on a plateau after the last hook that writes a checkpoint.

    When it goes on from that checkpoint, it never tells them.

    Returns:
        The monitored value by the index of the scheduler.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    is_told = (
        trainer.lightning_module.automatic_optimization
        and epoch.ready > epoch.completed
        and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    )
    if not is_told:
        return {}
    return {
        index: float(trainer.callback_metrics[config.monitor])
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and (trainer.current_epoch + 1) % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    }
