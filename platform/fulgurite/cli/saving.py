"""The records of a run: its resolved configuration and its environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from fulgurite.io import write_text
from fulgurite.masking import masked_arguments
from fulgurite.run_folders import environment, set_records_aside, write_json

__all__ = ["SaveRun"]


class SaveRun(SaveConfigCallback):
    """Writes the resolved configuration and the environment, and gives both to every logger."""

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        *,
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
        write_text(self.folder / "config.yaml", self.record)
        argv = masked_arguments(sys.argv[1:])
        facts = environment(self.seed, self.command, argv) | dict(self.facts)
        write_json(self.folder / "environment.json", facts)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({**yaml.safe_load(self.record), "environment": facts})
