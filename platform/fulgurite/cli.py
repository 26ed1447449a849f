"""``fulgurite fit|validate|test|predict``: LightningCLI with run folders and one-line errors."""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry

import fulgurite
import fulgurite.strategies
from fulgurite.base import check_callbacks
from fulgurite.checkpoints import (
    CheckpointFiles,
    RunCheckpoint,
    batches_done,
    check_checkpoint,
)
from fulgurite.errors import (
    CheckpointError,
    ConfigError,
    FulguriteError,
    RunError,
    Terminated,
)
from fulgurite.io import atomic_write, checksum, load_plain
from fulgurite.ranks import end_launched_ranks, is_first_process
from fulgurite.records import remove_objects
from fulgurite.replacing import dropping_replaced_arguments
from fulgurite.resuming import (
    ENDED,
    MetricsLogger,
    RunTrainer,
    TrainingState,
    has_stopped,
    masked,
    masked_arguments,
    masked_names,
)
from fulgurite.runs import (
    CHECKPOINT_VARIABLE,
    LAST,
    LINKS,
    RUN_DIR_VARIABLE,
    RunLock,
    RunOptions,
    describe,
    differences,
    environment,
    find_checkpoint,
    find_run,
    holds_run,
    identity_differences,
    new_run_folder,
    recorded_config,
    recorded_environment,
    run_folder_of,
    set_records_aside,
    training_differences,
    write_json,
)
from fulgurite.systems import check_kind, read_keys, resolve_config, system_of_config

__all__ = ["FulguriteCLI", "main", "parse", "run"]

COMMANDS = ("fit", "validate", "test", "predict")

# Shared defaults of all systems, in this one place; a config or option overrides them.
# One device: Lightning's default takes every GPU there is, with DDP, for configurations of one.
# Hyperparameters are in config.yaml, which every logger gets: not a second time by the model.
TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "devices": 1,
    "enable_autolog_hparams": False,
}


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a command begins with.

    Args:
        path: The file; None where there is none.
        run: Its run folder, if it lies in one.
        continued: Whether ``fit`` goes on in that folder.
        ended: Whether that training has ended, with all of its records.
        facts: What is recorded of the checkpoint.
    """

    path: Path | None = None
    run: Path | None = None
    continued: bool = False
    ended: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


class SaveRun(SaveConfigCallback):
    """Writes the resolved configuration and the environment, and gives both to every logger."""

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        folder: Path,
        record: str,
        facts: Mapping[str, Any],
        command: str,
        seed: int | bool | None,
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder, self.record, self.facts = folder, record, facts
        self.command, self.seed = command, seed

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` and ``environment.json`` (rank 0 only).

        Those of the command that this one goes on with are kept as ``config.1.yaml`` and so on.
        """
        ended = ["summary.json"]
        if not self.facts.get("checkpoint"):
            ended.append("metrics.csv")  # of a run that starts over
        replaced = ("config.yaml", "environment.json")
        set_records_aside(self.folder, replaced=replaced, ended=ended)
        with atomic_write(self.folder / "config.yaml") as temporary:
            Path(temporary).write_text(self.record, encoding="utf-8")
        argv = masked_arguments(sys.argv[1:])
        facts = environment(self.seed, self.command, argv) | dict(self.facts)
        write_json(self.folder / "environment.json", facts)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({**yaml.safe_load(self.record), "environment": facts})


class FulguriteCLI(LightningCLI):
    """LightningCLI with run folders, packaged configs and links from data to model."""

    def __init__(self, argv: Sequence[str], *, only_parse: bool = False) -> None:
        self.argv = [*argv]
        self.only_parse = only_parse
        self.folder = Path()
        self.record = ""
        self.start = StartingPoint()
        self.lock: RunLock | None = None
        self.wandb_id = ""
        parser_options = {"exit_on_error": False}
        try:
            self._start(parser_options)
        except BaseException:
            if (trainer := getattr(self, "trainer", None)) is not None:
                end_launched_ranks(trainer)
            raise
        finally:
            lock: RunLock | None = getattr(self, "lock", None)
            if lock is not None:
                lock.release()

    def _start(self, parser_options: Mapping[str, Any]) -> None:
        """Parse, make everything and run; all of it is what the base class does when it is made."""
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveRun,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_class=RunTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={**parser_options, **dict.fromkeys(self.subcommands(), parser_options)},
            args=self.argv if self.only_parse else None,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # always on an instance
        """The subcommand that is asked for, with the arguments that the CLI fills itself.

        All four where none is: their parsers take a fifth of the time of a start.
        """
        names = [name for name in COMMANDS if name in self.argv[:1]] or COMMANDS
        return {name: LightningCLI.subcommands()[name] for name in names}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a class that replaces another one begins with its own defaults."""
        with dropping_replaced_arguments():
            super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ``run`` group and the links from data to model."""
        parser.add_class_arguments(RunOptions, "run")
        for name in LINKS:
            parser.link_arguments(
                "data",
                f"model.init_args.{name}",
                compute_fn=lambda data, name=name: self._from_data(data, name),
                apply_on="instantiate",
            )

    def _from_data(self, data: LightningDataModule, name: str) -> Any:
        """The DataModule's attribute, or what the user gave the model where data has none."""
        if hasattr(data, name):
            return getattr(data, name)
        return self.section.get(f"model.init_args.{name}")

    @property
    def section(self) -> Namespace:
        """The configuration of the chosen subcommand."""
        configuration: Namespace = self.config[self.config.subcommand]
        return configuration

    @property
    def options(self) -> RunOptions:
        """Where this run is recorded."""
        return RunOptions(**self.section.run.as_dict())

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint to :meth:`before_instantiate_classes`.

        Lightning's method of this name lets the checkpoint's hyperparameters beat the command
        line silently (its issue 21455); it offers no public hook for it.
        """

    @property
    def _first_config(self) -> Path | None:
        first = next((c for c in self.section.get("config") or []), None)
        return Path(str(first)) if first else None

    def _name_run(self) -> None:
        """System and name of the run from its first configuration file, unless given."""
        run, path = self.section.run, self._first_config
        if run.system is None and path is not None:
            run.system = system_of_config(path) or path.resolve().parent.name
        if run.name is None and path is not None:
            run.name = path.stem

    def _find_start(self, now: Mapping[str, Any]) -> StartingPoint:
        """The checkpoint that the command begins with, and whose it is.

        Args:
            now: The resolved configuration.

        Raises:
            CheckpointError: There is no such checkpoint, or nothing can go on from it.
            ConfigError: The checkpoint is of a training with other options.
        """
        checkpoint, command = self.section.get("ckpt_path"), str(self.config.subcommand)
        if not checkpoint:
            if command != "fit" and is_first_process():
                print(
                    f"note: no --ckpt_path: {command} takes the weights that the model is made "
                    "with, which are untrained unless its options name some",
                    file=sys.stderr,
                )
            return StartingPoint()
        options, fits = self.options, command == "fit"
        if checkpoint in ("last", "best"):
            inherited = os.environ.get(CHECKPOINT_VARIABLE) if "LOCAL_RANK" in os.environ else None
            if inherited:
                path = Path(inherited)
                run = run_folder_of(path)
            else:
                run = find_run(options, checkpoint, now, self._first_config)
                path = find_checkpoint(run, checkpoint)
        else:
            path = Path(checkpoint)
            run = run_folder_of(path) if path.is_file() else None
        stored = load_plain(path, "--ckpt_path", "Give a checkpoint, `last` or `best`.", mmap=True)
        check_checkpoint(stored, path, resumes=fits)
        self._say_differences(run, stored, now)
        facts = {
            "path": str(path.resolve()),
            "sha256": checksum(path),
            "epoch": int(stored.get("epoch", 0)),
            "step": int(stored.get("global_step", 0)),
        }
        if not fits:
            return StartingPoint(path, run, facts=facts)
        target = self._resumed_folder(path, run)
        if target is None:
            return StartingPoint(path, run, facts=facts)
        self._check_same_training(target, path, stored, now)
        ended = (target / "summary.json").is_file() and self._nothing_left(stored)
        return StartingPoint(path, target, continued=True, ended=ended, facts=facts)

    def _resumed_folder(self, path: Path, run: Path | None) -> Path | None:
        """The folder in which a fit goes on, or None for a new one.

        Raises:
            ConfigError: ``--run.dir`` holds another run than that of the checkpoint.
        """
        options = self.options
        if options.new:
            return None
        if options.dir is None:
            if run is None:
                return None
            with suppress(ValueError):  # as the user would spell it
                return run.relative_to(Path.cwd().resolve())
            return run
        explicit = Path(options.dir)
        if not holds_run(explicit):
            return None
        if run is not None and run.resolve() != explicit.resolve():
            raise ConfigError(
                f"--run.dir={explicit} holds another run than that of --ckpt_path={path}.",
                "Leave --run.dir out to go on in the checkpoint's run, or name a new folder.",
            )
        return explicit

    def _check_same_training(
        self, run: Path, path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]
    ) -> None:
        """Whether a fit may go on in the folder of a run.

        Raises:
            ConfigError: The run has other options, or has gone further than the checkpoint.
        """
        new = f"--ckpt_path={path} --run.new=true goes on in a new folder."
        if differing := training_differences(recorded_config(run), now):
            raise ConfigError(
                f"--ckpt_path={path} is of a training with other options: {describe(differing)}.",
                f"Resume with the options of the run, --config {run / 'config.yaml'}; with other "
                f"ones on purpose, {new}",
            )
        last = run / LAST
        if not last.is_file() or last.resolve() == path.resolve():
            return
        newest = load_plain(last, "--ckpt_path", mmap=True)
        reached, here = batches_done(newest), batches_done(stored)
        if reached is not None and here is not None and reached > here:
            raise ConfigError(
                f"--ckpt_path={path} was written after {here} batches, and its run has gone on to "
                f"{reached}: resuming it would lose them.",
                f"Resume with --ckpt_path={last}, or {new}",
            )

    def _nothing_left(self, stored: Mapping[str, Any]) -> bool:
        """Whether a checkpoint is of a stopped training, or of what the trainer's limits allow."""
        trainer = self.section.trainer
        epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
        if epochs is None and steps in (None, -1):
            epochs = 1000  # Lightning's default
        loop = stored["loops"]["fit_loop"]
        done = int(loop["epoch_progress"]["current"]["processed"])
        callbacks = stored.get("callbacks") or {}
        stops = [state for name, state in callbacks.items() if name.startswith("EarlyStopping")]
        ended = any(isinstance(s, Mapping) and s.get(ENDED) is True for s in callbacks.values())
        if ended or any(map(has_stopped, stops)):
            return True
        in_epochs = epochs is not None and epochs >= 0 and done >= epochs
        in_steps = steps is not None and steps >= 0 and int(stored.get("global_step", 0)) >= steps
        return bool(in_epochs or in_steps)

    def _say_differences(
        self, run: Path | None, stored: Mapping[str, Any], now: Mapping[str, Any]
    ) -> None:
        """Print a line for each option that is not the one of the checkpoint's training."""
        if not is_first_process():
            return
        if run is not None:
            differing = identity_differences(recorded_config(run), now)
        else:
            model = dict((now.get("model") or {}).get("init_args") or {})
            hyper_parameters = dict(stored.get("hyper_parameters") or {})
            shared = [key for key in model if key in hyper_parameters and key not in LINKS]
            pairs = [{key: values[key] for key in shared} for values in (hyper_parameters, model)]
            differing = list(differences(pairs[0], pairs[1], "model.init_args"))
        for key, before, here in differing:
            print(
                f"note: the checkpoint was trained with {key}={before}; this run uses {here}",
                file=sys.stderr,
            )

    def resolved_config(self) -> dict[str, Any]:
        """Every option with its value, without those of one run alone; plain types."""
        # it was validated when it was parsed, and takes a sixth of a short run to validate again
        recorded = self.parser.dump(self.config, skip_unset=False, skip_validation=True)
        content: dict[str, Any] = remove_objects(yaml.safe_load(recorded)[self.config.subcommand])
        for name in ("dir", "new"):
            content.get("run", {}).pop(name, None)
        content.pop("ckpt_path", None)
        return content

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, make the run folder and point the loggers to it."""
        section = self.section
        self._name_run()
        if self.only_parse:
            raise _Parsed(section)
        content = self.resolved_config()
        if hidden := masked_names(content):
            raise ConfigError(
                f"The value of {', '.join(hidden)} was masked when the configuration was recorded.",
                "Give it again on the command line.",
            )
        content = masked(content)
        self.record = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        self.fast = bool(section.trainer.get("fast_dev_run"))
        self.start = self._find_start(content)
        if self.start.path is not None:
            section.ckpt_path = str(self.start.path)
            os.environ[CHECKPOINT_VARIABLE] = str(self.start.path.resolve())
        if self.fast:
            return
        command, resumed = str(self.config.subcommand), self.start
        self.folder = new_run_folder(
            self.options, command, resumed=resumed.run if resumed.continued else None
        )
        if command == "fit" and is_first_process():
            self.lock = RunLock(self.folder)
            for leftover in self.folder.rglob(".*.tmp-*"):
                leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if section.trainer.get("default_root_dir") is None:
            section.trainer.default_root_dir = str(self.folder)
        loggers = section.trainer.get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and "init_args" in logger:
                self._point_logger(logger.init_args)

    def _point_logger(self, args: Namespace) -> None:
        """Loggers with the default place write into the run folder."""
        if args.get("save_dir", "") in (".", None):
            args.save_dir = str(self.folder)
        if args.get("project", "") in ("lightning_logs", None):
            args.project = "fulgurite"
        if "project" in args and args.get("name") is None:
            args.name = "/".join(self.folder.parts[-3:])
        unnamed = args.get("id", "") is None and args.get("version", "") is None
        named = os.environ.get("WANDB_RUN_ID")  # by the agent of a sweep
        if "anonymous" in args and unnamed and not named and self.config.subcommand == "fit":
            args.id = self._wandb_id()

    def _wandb_id(self) -> str:
        """The id of the run at Weights & Biases: a resumed run goes on with its own."""
        before = recorded_environment(self.folder) if self.start.continued else {}
        self.wandb_id = str(before.get("wandb_id") or secrets.token_hex(4))
        return self.wandb_id

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """CSV is the record and comes first; checkpoints go into the run folder."""
        config = self._get(self.config_init, "trainer")
        callbacks = [*(config.get("callbacks") or [])]
        self.state = TrainingState(
            continued=self.start.continued,
            resumes=self.subcommand == "fit" and self.start.path is not None,
        )
        callbacks.append(self.state)
        if not self.fast:
            logger = config.get("logger")
            others = logger if isinstance(logger, list) else [logger]
            csv = MetricsLogger(self.folder)
            kwargs["logger"] = [csv, *(x for x in others if not isinstance(x, bool | None))]
            facts: dict[str, Any] = {"checkpoint": dict(self.start.facts) or None}
            if self.wandb_id:
                facts["wandb_id"] = self.wandb_id
            self.save_config_kwargs = {
                "folder": self.folder,
                "record": self.record,
                "facts": facts,
                "command": str(self.subcommand),
                "seed": self.section.seed_everything,
            }
        if config.get("enable_checkpointing") is not False and not self.fast:
            has_own_checkpoints = any(isinstance(c, ModelCheckpoint) for c in callbacks)
            callbacks += self._checkpoints(only_last=has_own_checkpoints)
        kwargs["callbacks"] = callbacks
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        _check_strategy(config.get("strategy"))
        check_callbacks(callbacks, self.model)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(
                f"The trainer cannot be made: {problem}", "Correct trainer.*."
            ) from error

    def _checkpoints(self, *, only_last: bool) -> list[ModelCheckpoint]:
        """``last.ckpt`` after every epoch, ``best.ckpt`` by the model's monitored metric.

        Two callbacks: ``save_last`` of one writes only when the metric improves.
        """
        options: dict[str, Any] = {
            "continued": self.start.continued,
            "dirpath": self.folder / "checkpoints",
            "save_on_train_epoch_end": True,
            "enable_version_counter": False,
        }
        last = RunCheckpoint(filename="last", **options)
        monitor = getattr(self.model, "monitor", None)
        if monitor is None or only_last:
            return [last]
        mode = getattr(self.model, "mode", "min")
        return [RunCheckpoint(filename="best", monitor=monitor, mode=mode, **options), last]

    @property
    def _metrics(self) -> dict[str, float]:
        metrics = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
        return sort_metrics(metrics, getattr(self.model, "monitor", None))

    def _write_metrics(self, file: str) -> None:
        if self.fast or not self.trainer.is_global_zero:
            return
        # beside the fit that --run.dir names, and in the folder of this command
        fits = self.config.subcommand == "fit"
        for folder in {self.folder, Path((not fits and self.section.run.dir) or self.folder)}:
            write_json(folder / file, self._metrics)
        none = "" if self._metrics else " (the model logged no metric)"
        print(f"{self.config.subcommand}: recorded in {self.folder}{none}")

    def fit(self, **kwargs: Any) -> None:
        """Train; a training that has ended is left as it is."""
        if self.start.ended:
            print(f"fit: nothing left to do in {self.folder}; see trainer.max_epochs")
            return
        if self.start.path is not None and not self.start.continued and is_first_process():
            print(
                f"note: a new run goes on from {self.start.path}; its metrics and best.ckpt count "
                f"from there, in {self.folder}",
                file=sys.stderr,
            )
        self.trainer.fit(**kwargs)

    def after_fit(self) -> None:
        """Print the last metrics and the best checkpoint's, and write ``summary.json``."""
        if self.start.ended:
            return
        if self.trainer.is_global_zero and self._metrics:
            print(metrics_table(dict(_most_telling(self._metrics))))
            for best in self.trainer.checkpoint_callbacks:
                score = getattr(best, "best_model_score", None)
                if isinstance(best, ModelCheckpoint) and best.monitor and score is not None:
                    print(f"best {best.monitor}: {float(score):.4g}")
        self._write_metrics("summary.json")

    def test(self, **kwargs: Any) -> None:
        """Test, print the metrics once, and write ``test_metrics.json``."""
        self._evaluate("test", **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Validate, print the metrics once, and write ``validate_metrics.json``."""
        self._evaluate("validate", **kwargs)

    def _evaluate(self, command: str, *, verbose: bool = True, **kwargs: Any) -> None:
        # Lightning's own table repeats each metric for every loader
        getattr(self.trainer, command)(verbose=False, **kwargs)
        if verbose and self.trainer.is_global_zero:
            print(metrics_table(self._metrics))
            if self.start.path is not None:
                print(f"{command}: evaluated {self.start.path} (epoch {self.start.facts['epoch']})")
        self._write_metrics(f"{command}_metrics.json")

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write ``predictions.npz``; see :mod:`fulgurite.predictions`."""
        from fulgurite.predictions import PredictionWriter

        writer = PredictionWriter(None if self.fast else self.folder)
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self.trainer.predict(**{**kwargs, "return_predictions": False})


_ROWS = 24  # of a table that is read at the end of a fit


def _most_telling(metrics: Mapping[str, float]) -> Iterator[tuple[str, float]]:
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
    stages = ("test", "val", "train")
    first = (monitor or "").rpartition("/")[2]

    def place(name: str) -> tuple[int, bool, str]:
        stage, _, metric = name.partition("/")
        order = stages.index(stage) if stage in stages else len(stages)
        return order, metric.rpartition("/")[2] != first, name

    return {name: metrics[name] for name in sorted(metrics, key=place)}


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


class _Parsed(Exception):
    """Ends the construction of a CLI that was only to parse."""


def _check_strategy(strategy: Any) -> None:
    """Say how a strategy is named; Lightning takes a class path without arguments for a name.

    Raises:
        ConfigError: There is no strategy of this name, or it starts its processes by pickling.
    """
    start = strategy if isinstance(strategy, str) else getattr(strategy, "_start_method", None)
    if isinstance(start, str) and ("spawn" in start.lower() or start == "forkserver"):
        raise ConfigError(
            f"--trainer.strategy={start} sends the model to its processes as a pickle, and a model "
            "of the command line holds functions that make optimizers, which cannot be pickled.",
            "Use --trainer.strategy=ddp, which starts the command once for each process.",
        )
    names = [*StrategyRegistry.available_strategies(), "auto"]
    if not isinstance(strategy, str) or strategy.lower() in names:
        return
    near = difflib.get_close_matches(strategy.lower(), names, n=1, cutoff=0.7)
    classes = vars(fulgurite.strategies)
    last = strategy.rpartition(".")[2]
    if "." in strategy or last in classes:
        path = strategy if "." in strategy else f"fulgurite.strategies.{strategy}"
        hint = f"Use --trainer.strategy.class_path={path}."
    else:
        hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(sorted(names))}."
    raise ConfigError(f"There is no strategy named '{strategy}'.", hint)


def _run_config(name: str) -> Path:
    """The file of a configuration of a run.

    Raises:
        ConfigError: There is no such configuration, or it describes a comparison or a sweep.
    """
    path = resolve_config(name)
    check_kind(name, read_keys(path), "run")
    return path


def prepare_arguments(argv: Sequence[str]) -> list[str]:
    """Replace packaged configuration names by their files, and nulls by what is parsed as such.

    Example:
        >>> prepare_arguments(["--data.init_args.source.init_args.test=null", "--model=A"])
        ['--data={"init_args": {"source": {"init_args": {"test": null}}}}', '--model=A']
    """
    return _with_nulls(_with_resolved_configs(argv))


# an argument of a class that is itself an argument, and the words that YAML takes for null
_INNER_ARGUMENT = re.compile(r"--(data|model)(\.init_args\.\w+){2,}")
_NULLS = ("null", "Null", "NULL", "~")


def _with_nulls(argv: Sequence[str]) -> list[str]:
    """Write a null of an inner argument as JSON, since jsonargparse 4.53 makes it the text None."""
    out: list[str] = []
    for arg in argv:
        name, eq, value = arg.partition("=")
        if not eq and out and _INNER_ARGUMENT.fullmatch(out[-1]):
            name, value = out[-1], arg
        if value not in _NULLS or not _INNER_ARGUMENT.fullmatch(name):
            out.append(arg)
            continue
        if not eq:
            out.pop()
        first, *parts = name.removeprefix("--").split(".")
        content: Any = None
        for part in reversed(parts):
            content = {part: content}
        out.append(f"--{first}={json.dumps(content)}")
    return out


def _with_resolved_configs(argv: Sequence[str]) -> list[str]:
    """Replace packaged configuration names by their files."""
    out: list[str] = []
    for i, arg in enumerate(argv):
        flag, eq, value = arg.partition("=")
        if flag in ("--config", "-c") and eq:
            out.append(f"--config={_run_config(value)}")
        elif i and argv[i - 1] in ("--config", "-c"):
            out.append(str(_run_config(arg)))
        else:
            out.append(arg)
    return out


def _parameters(class_path: str) -> list[str]:
    """Names of the constructor arguments of a class given by its path."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


# jsonargparse reports the whole tree of types it tried; these lines of it say nothing to a user
_NOISE = re.compile(
    r"(Parser key|Given value|Does not validate|Subtypes:|Errors:|Problem with given class_path"
    r"|Expected a <class 'NoneType'>)"
)
_ALTERNATIVES = ("Expected a <class 'collections.abc.Iterable'>", "Expected a <class 'bool'>")
_UNION = "Does not validate against any of the Union subtypes"


def _one_line(message: str) -> str:
    """The innermost reason in jsonargparse's message, with the nearest name to a wrong one."""
    keys = ["seed_everything", "ckpt_path", "config", "model", "data"]
    keys += [f"trainer.{p}" for p in inspect.signature(Trainer.__init__).parameters]
    keys += [f"run.{p}" for p in inspect.signature(RunOptions).parameters]
    key = re.search(r'(?:Parser key|Key) "([^"]+)"', message)
    prefix = f"{key[1]}: " if key else ""
    classes = re.findall(r"class_path '([^']+)'", message)
    owner = classes[-1] if classes else ""
    if wrong := re.search(r"Option '([^']+)' is not accepted", message):
        near = difflib.get_close_matches(wrong[1], _parameters(owner), n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"It has: {', '.join(_parameters(owner))}."
        return f"{prefix}{owner or 'the class'} has no option '{wrong[1]}'. {hint}"
    if unknown := re.search(r"(?:[Uu]nrecognized arguments: --|[Kk]ey ')([\w.]+)", message):
        near = difflib.get_close_matches(unknown[1], keys, n=1, cutoff=0.6)
        hint = f"Did you mean '{near[0]}'?" if near else "See `fulgurite fit --help`."
        return f"There is no option '{unknown[1]}'. {hint}"
    if named := re.search(r"trainer\.strategy[\s\S]*import path string: (\w+)", message):
        return (
            f"The strategy '{named[1]}' is given by its name, which takes no options. Use "
            "--trainer.strategy.class_path=... and --trainer.strategy.init_args.OPTION=...; "
            "`fulgurite fit --trainer.strategy.help CLASS` lists them."
        )
    if absent := re.search(
        r"module '[^']+' has no attribute '[^']+'|No module named [^\n]+", message
    ):
        places = ""
        if absent[0].startswith("No module"):
            places = ": modules of the current folder and installed packages are found"
        hint = f"Check the class path{_near_class(message)}{places}."
        return f"{prefix}{absent[0].strip()}. {hint}"
    lines = [line.strip(" -") for line in message.splitlines()]
    if "Given value: Namespace(class_path=" in message:  # the class was found and refused
        lines = [line for line in lines if line != "Expected a <class 'str'>"]
    reasons = dict.fromkeys(line for line in lines if line and not _NOISE.match(line))
    # what else a logger or a callback may be tells nothing where there is another reason
    telling = [line for line in reasons if line not in _ALTERNATIVES]
    reasons = dict.fromkeys(telling) or reasons
    refused = re.search(r"key='([\w.]+)', val=('[^']*'|[^)]*)\)", message)
    value = f" (given: {refused[1]}={refused[2]})" if refused else ""
    if not refused and (plain := re.findall(r"Given value: (\S+)$", message, re.MULTILINE)):
        value = f" (given: {plain[-1]})"
    inside = f"{owner}: " if owner else ""
    return f"{prefix}{inside}{'; '.join(reasons) or message}{value}"


def _near_class(message: str) -> str:
    absent = re.search(r"module '([^']+)' has no attribute '([^']+)'", message)
    if not absent:
        return ""
    module = importlib.import_module(absent[1])
    near = difflib.get_close_matches(absent[2], dir(module), n=1, cutoff=0.5)
    return f" (did you mean '{absent[1]}.{near[0]}'?)" if near else ""


def run(argv: Sequence[str]) -> FulguriteCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` in this process.

    Raises:
        FulguriteError: If the configuration, the data or a checkpoint is wrong.
    """
    if not argv or argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0] if argv else "", COMMANDS, n=1)
        raise ConfigError(
            f"There is no command '{argv[0] if argv else ''}'.",
            f"Did you mean '{near[0]}'?" if near else "`fulgurite --help` lists the commands.",
        )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    program, before = sys.argv, os.environ.get(RUN_DIR_VARIABLE)
    # a strategy that launches processes gives them sys.argv
    sys.argv = [program[0], *argv]
    try:
        with _signals():
            return construct(prepare_arguments(argv))
    except Terminated:
        raise Terminated(f"terminated{_way_on(argv[0])}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_way_on(argv[0])}") from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends with status 1
            raise KeyboardInterrupt(f"interrupted{_way_on(argv[0])}") from None
        raise
    finally:
        sys.argv = program
        os.environ.pop(CHECKPOINT_VARIABLE, None)
        if before is None and (run_dir := os.environ.pop(RUN_DIR_VARIABLE, None)):
            with suppress(OSError):  # a run that failed before it wrote anything leaves no folder
                Path(run_dir).rmdir()


@contextmanager
def _signals() -> Iterator[None]:
    """End at SIGTERM as orderly as at Ctrl-C; afterwards handlers are what they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = os.getpid()

    def leave(number: int, frame: Any) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked process ends as it would without us
        os.kill(os.getpid(), number)

    if before[signal.SIGTERM] == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _way_on(command: str) -> str:
    """How to go on with the fit that was just stopped."""
    folder = Path(os.environ.get(RUN_DIR_VARIABLE, ""))
    if command != "fit" or not holds_run(folder):
        return ""
    with suppress(ValueError):
        folder = folder.relative_to(Path.cwd().resolve())
    again = f"fulgurite fit --config {folder / 'config.yaml'}"
    if (folder / LAST).is_file():
        return f"; go on with `{again} --ckpt_path last`"
    return f" before the first checkpoint; start over with `{again} --run.dir {folder}`"


def _no_advertisement(record: logging.LogRecord) -> bool:
    # Lightning 2.6 recommends services each time
    return not any(service in record.getMessage() for service in ("litlogger", "litmodels"))


def construct(
    argv: list[str], kind: type[FulguriteCLI] = FulguriteCLI, *, only_parse: bool = False
) -> FulguriteCLI:
    """Make a CLI, which runs its command; errors of options become one line.

    Args:
        argv: The command line, prepared by :func:`prepare_arguments`.
        kind: What to make.
        only_parse: Whether to stop after parsing.

    Raises:
        FulguriteError: If the configuration, the data or a checkpoint is wrong.
    """
    program = sys.argv
    # the CLI reads sys.argv, and warns where it is given arguments beside it
    sys.argv = program[:1] if only_parse else [program[0], *argv]
    try:
        with warnings.catch_warnings():
            # evaluation loaders hold whole batches in memory; workers would only copy them
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            # Lightning 2.6's combined loader uses a name that torch 2.13 deprecates
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            if argv[0] != "fit":  # an evaluation has a folder of its own and writes no checkpoints
                warnings.filterwarnings("ignore", "The dirpath has changed")
            # defaults that are objects; the record leaves them out
            warnings.filterwarnings("ignore", r"(?s).*Unable to serialize instance")
            # Lightning 2.6 calls jsonargparse by names that 4.49 deprecates
            jsonargparse = r"(?s).*(was deprecated in v4\.|JsonargparseDeprecationWarning)"
            warnings.filterwarnings("ignore", jsonargparse)
            return kind(argv, only_parse=only_parse)
    except Exception as error:
        if ours := _cause(error):
            raise ours from None
        if isinstance(error, ArgumentError) or _UNION in str(error):
            raise ConfigError(_one_line(str(error))) from error
        if isinstance(error, MisconfigurationException):
            raise ConfigError(" ".join(str(error).split())) from error
        if outside := _outside(error):
            raise outside from error
        if "no `dataloader_idx` argument" in str(error):  # of a model that has one loader in mind
            raise ConfigError(" ".join(str(error).split())) from error
        if "Error(s) in loading state_dict" in str(error):
            problem = " ".join(str(error).split())
            raise CheckpointError(
                f"The checkpoint does not fit the model: {problem[:300]}",
                "Use the model.* options of the run that wrote it.",
            ) from error
        raise
    finally:
        sys.argv = program


# what a full, read-only or foreign disk answers
_DISK = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
_DISTRIBUTED = re.compile(
    r"gloo|ProcessGroup|NCCL|EADDRINUSE|address already in use|TCPStore|Connection (reset|closed)",
    re.IGNORECASE,
)


def _outside(error: BaseException | None) -> RunError | None:
    """A failure of a disk or of another process, as one line."""
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, torch.distributed.DistError) or (
            type(error) is RuntimeError and _DISTRIBUTED.search(text)
        ):
            if re.search("EADDRINUSE|address already in use", text, re.IGNORECASE):
                return RunError(
                    f"The port of the process group is taken ({text[:160]}).",
                    "Set MASTER_PORT to a free one, or leave it out.",
                )
            return RunError(
                f"The processes of the run have lost each other ({text[:160]}).",
                "See what the others printed before; a fit goes on with --ckpt_path=last.",
            )
        if isinstance(error, OSError) and error.errno in _DISK:
            file = error.filename or "a file"
            return RunError(
                f"{file} cannot be written or read ({error.strerror}).",
                "Make room, or name another folder with --run.dir; checkpoints are as they were.",
            )
        error = error.__cause__ or error.__context__
    return None


def _cause(error: BaseException | None) -> FulguriteError | None:
    """Our own error in a chain of exceptions: jsonargparse wraps those of constructors."""
    while error is not None:
        if isinstance(error, FulguriteError):
            return error
        error = error.__cause__ or error.__context__
    return None


def parse(argv: Sequence[str]) -> Namespace:
    """The parsed configuration of a command line, without running it.

    Raises:
        ConfigError: The command line or the configuration is wrong.
    """
    try:
        construct(prepare_arguments(argv), only_parse=True)
    except _Parsed as done:
        return done.args[0]  # type: ignore[no-any-return]
    raise AssertionError("parsing ended without a result")


def main(argv: Sequence[str]) -> int:
    """As the command ``fulgurite``, in this process: errors become a line and a status."""
    from fulgurite.__main__ import main as command

    return command([*argv])


__version__ = fulgurite.__version__
