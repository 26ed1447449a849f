"""LightningCLI with run folders, packaged configurations and links from data to model."""

from __future__ import annotations

import difflib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

import fulgurite.strategies
from fulgurite.base import check_callbacks
from fulgurite.checkpoints import CheckpointFiles, RunCheckpoint, check_file_names
from fulgurite.cli.links import choose_size, given_sizes
from fulgurite.cli.metrics import metrics_table, select_telling_metrics, sort_metrics
from fulgurite.cli.saving import SaveRun
from fulgurite.cli.starting_point import StartFinder, StartingPoint
from fulgurite.cli.trainer_options import check_trainer_options, describe_limit, has_run
from fulgurite.errors import ConfigError, DataError
from fulgurite.indexing import indexing_arguments
from fulgurite.masking import masked, masked_names
from fulgurite.predictions import PredictionWriter
from fulgurite.predictions.inputs import locate_input
from fulgurite.ranks import end_launched_ranks, is_first_process
from fulgurite.records import remove_objects
from fulgurite.replacing import dropping_replaced_arguments
from fulgurite.resuming import MetricsLogger, RunTrainer, TrainingState
from fulgurite.run_folders import (
    CHECKPOINT_VARIABLE,
    LINKS,
    NO_NAME,
    NO_SYSTEM,
    RunLock,
    RunOptions,
    new_run_folder,
    recorded_environment,
    write_json,
)
from fulgurite.systems import RUN_COMMANDS, name_system

__all__ = ["FulguriteCLI", "Parsed"]

# Shared defaults of all systems, in this one place; a config or option overrides them.
# One device: Lightning's default takes every GPU there is, with DDP, for configurations of one.
# Hyperparameters are in config.yaml, which every logger gets: not a second time by the model.
TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "devices": 1,
    "enable_autolog_hparams": False,
}


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
        # `--trainer.max_epoch` is a misspelling, and not short for the only option that begins so
        parser_options = {"exit_on_error": False, "allow_abbrev": False}
        try:
            with indexing_arguments():
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
        names = [name for name in RUN_COMMANDS if name in self.argv[:1]] or RUN_COMMANDS
        return {name: LightningCLI.subcommands()[name] for name in names}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a class that replaces another one begins with its own defaults.

        The subcommand's own parser does it: the one above it would complete and validate all
        options a second time. That one prints them, though (``--print_config``).
        """
        command, *options = self.argv or [""]
        with dropping_replaced_arguments():
            if command in self._subcommand_parsers and not any(
                word.startswith("--print_config") for word in options
            ):
                section = self._subcommand_parsers[command].parse_args(options)
                self.config = Namespace(  # type: ignore[no-untyped-call]
                    {"config": None, "subcommand": command, command: section}
                )
            else:
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
        """The DataModule's attribute, or what the user gave the model where data has none.

        Where other files are predicted, the data of the training need not be there: then it is
        what the checkpoint says.

        Raises:
            ConfigError: Data and options contradict each other, or neither says it.
            DataError: The data are not there, and nothing else says it.
        """
        try:
            return choose_size(self.section, data, name)
        except DataError:
            if not self.section.get("input") or name not in self.start.sizes:
                raise
            return self.start.sizes[name]

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
        """System and name of the run from its first configuration file, unless given.

        They are recorded also where there is no such file, so that a record that is run again is
        not called after the folder that it lies in.
        """
        run, path = self.section.run, self._first_config
        if run.system is None:
            run.system = name_system(path) if path else NO_SYSTEM
        if run.name is None:
            run.name = path.stem if path else NO_NAME

    def resolved_config(self) -> dict[str, Any]:
        """Every option with its value, without those of one run alone; plain types."""
        # it was validated when it was parsed, and takes a sixth of a short run to validate again
        recorded = self.parser.dump(self.config, skip_unset=False, skip_validation=True)
        content: dict[str, Any] = remove_objects(yaml.safe_load(recorded)[self.config.subcommand])
        if sizes := given_sizes(self.section):  # the dump leaves out what may be from the data
            content["model"].setdefault("init_args", {}).update(sizes)
        for name in ("dir", "new"):
            content.get("run", {}).pop(name, None)
        for name in ("ckpt_path", "input"):
            content.pop(name, None)
        return content

    def _dump_config(self) -> None:
        """Prepare what checkpoints record of model and data.

        Lightning's method of this name validates all options once more, which takes a sixth of a
        short run; it offers no public hook for it.
        """
        if not hasattr(self, "config_dump"):
            recorded = self.parser.dump(
                self.config, skip_unset=False, skip_validation=True, skip_link_targets=False
            )
            self.config_dump = yaml.safe_load(recorded)[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint, make the run folder and point the loggers to it."""
        section = self.section
        self._name_run()
        if self.only_parse:
            raise Parsed(section)
        content = self.resolved_config()
        if hidden := masked_names(content):
            raise ConfigError(
                f"The value of {', '.join(hidden)} was masked when the configuration was recorded.",
                "Give it again on the command line.",
            )
        content = masked(content)
        self.record = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        self.fast = bool(section.trainer.get("fast_dev_run"))
        finder = StartFinder(str(self.config.subcommand), section, self.options, self._first_config)
        self.start = finder.find(content)
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
            if files := self.section.get("input"):
                facts["input"] = str(locate_input(files).absolute())
            self.save_config_kwargs = {
                "folder": self.folder,
                "record": self.record,
                "facts": facts,
                "command": str(self.subcommand),
                "seed": self.section.seed_everything,
            }
        if config.get("enable_checkpointing") is not False and not self.fast:
            has_own_checkpoints = any(isinstance(c, ModelCheckpoint) for c in callbacks)
            check_file_names(callbacks)
            callbacks += self._checkpoints(only_last=has_own_checkpoints)
        kwargs["callbacks"] = callbacks
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        _check_strategy(config.get("strategy"))
        check_trainer_options(config)
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
        reason = "the model logged no metric" if has_run(self.trainer) else "there was no batch"
        none = "" if self._metrics else f" ({reason})"
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
            print(metrics_table(dict(select_telling_metrics(self._metrics))))
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
        self._tell_limit()
        if verbose and self.trainer.is_global_zero:
            print(metrics_table(self._metrics))
            if self.start.path is not None:
                print(f"{command}: evaluated {self.start.path} (epoch {self.start.facts['epoch']})")
        self._write_metrics(f"{command}_metrics.json")

    def _tell_limit(self) -> None:
        if not self.fast and is_first_process() and (note := describe_limit(self.trainer)):
            print(note, file=sys.stderr)

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write ``predictions.npz``; see :mod:`fulgurite.predictions`."""
        writer = PredictionWriter(None if self.fast else self.folder)
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self.trainer.predict(**{**kwargs, "return_predictions": False})
        self._tell_limit()
        if not has_run(self.trainer) and is_first_process():
            print("predict: there was no batch to predict")


class Parsed(Exception):
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
