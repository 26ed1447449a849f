"""The schema of the configuration of a run."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from fulgurite import __version__
from fulgurite.cli.lightning_cli import TRAINER_DEFAULTS
from fulgurite.resuming import RunTrainer
from fulgurite.run_folders import RunOptions
from fulgurite.schema.annotations import Schema, SchemaBuilder

__all__ = ["describe_run"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def describe_run() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the files that ``--config`` takes.

    Example:
        >>> sorted(describe_run()["properties"])[:4]
        ['ckpt_path', 'data', 'input', 'model']
    """
    builder = SchemaBuilder()
    properties: dict[str, Schema] = {
        "seed_everything": {"anyOf": [{"type": "boolean"}, {"type": "integer"}], "default": 0},
        "run": builder.refer(RunOptions, "fulgurite.run_folders.RunOptions"),
        "trainer": builder.refer(Trainer, "lightning.pytorch.Trainer"),
        "model": builder.describe_object(LightningModule),
        "data": builder.describe_object(LightningDataModule),
        **_describe_commands(builder),
    }
    trainer = builder.definitions["lightning.pytorch.Trainer"]["properties"]
    for name, default in TRAINER_DEFAULTS.items():
        trainer[name]["default"] = default
    return {
        "$schema": _DIALECT,
        "title": f"a run of fulgurite {__version__}",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": dict(sorted(builder.definitions.items())),
    }


def _describe_commands(builder: SchemaBuilder) -> dict[str, Schema]:
    """Options of ``fit``, ``validate``, ``test`` and ``predict`` themselves."""
    options = {}
    for command, filled in LightningCLI.subcommands().items():
        method = getattr(RunTrainer, command)
        hints = get_type_hints(method)
        for name in inspect.signature(method).parameters:
            if name != "self" and name not in filled:
                options[name] = builder.describe(hints[name])
    return options
