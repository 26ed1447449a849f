"""A configuration from Python: its module, its data and its trainer, made as the CLI makes them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from fulgurite.cli import FulguriteCLI, construct, prepare_arguments
from fulgurite.errors import ConfigError

__all__ = ["LoadedConfig", "load"]


@dataclass(frozen=True)
class LoadedConfig:
    """What a configuration describes.

    Args:
        model: The module.
        data: The data module.
        trainer_arguments: Arguments of :class:`lightning.pytorch.Trainer` that differ from its
            defaults, with the configuration's callbacks.
        config: The resolved configuration, plain types that ``yaml.safe_dump`` takes.
    """

    model: LightningModule
    data: LightningDataModule
    trainer_arguments: Mapping[str, Any]
    config: Mapping[str, Any]

    def make_trainer(self, **overrides: Any) -> Trainer:
        """Make the trainer of the configuration.

        Args:
            **overrides: Arguments of :class:`lightning.pytorch.Trainer` that replace the
                configuration's; ``callbacks`` are added to its callbacks.

        Raises:
            TypeError: The trainer has no such argument.
        """
        arguments = {**self.trainer_arguments, **overrides}
        callbacks = [self.trainer_arguments.get("callbacks"), overrides.get("callbacks")]
        arguments["callbacks"] = [callback for group in callbacks for callback in _as_list(group)]
        return Trainer(**arguments)


def load(
    name: str,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed_everything: int | None = None,
) -> LoadedConfig:
    """Make what a configuration describes, without running it and without a run folder.

    The seed is set before the module is made, so that its weights are those of ``fulgurite fit``.

    Args:
        name: A packaged configuration such as ``fedsir/digits``, or a YAML file.
        model: Options of the module by their names on the command line after ``--model.``, such as
            ``{"method.relabeling.every": 2}``.
        data: Options of the data module, such as ``{"noise.rate": 0.9}``.
        trainer: Options of the trainer, such as ``{"max_epochs": 3}``.
        seed_everything: The seed; None for the configuration's.

    Raises:
        ConfigError: There is no such configuration, or an option is unknown or has a value that no
            configuration can hold.

    Example:
        >>> digits = load("fedsir/smoke", data={"noise.rate": 0.9}, trainer={"max_epochs": 1})
        >>> type(digits.model).__name__, digits.trainer_arguments["max_epochs"]
        ('FederatedClassifier', 1)
    """
    config = name if Path(name).suffix in (".yaml", ".yml") else f"{name}.yaml"
    argv = ["fit", "--config", config]
    for group, options in (("model", model), ("data", data), ("trainer", trainer)):
        argv += [_as_option(f"{group}.{key}", value) for key, value in (options or {}).items()]
    if seed_everything is not None:
        argv.append(_as_option("seed_everything", seed_everything))
    cli = construct(prepare_arguments(argv), _LoadingCLI)
    assert isinstance(cli, _LoadingCLI)
    return LoadedConfig(cli.model, cli.datamodule, cli.trainer_arguments, cli.resolved)


def _as_option(name: str, value: Any) -> str:
    """An option as the command line spells it.

    Raises:
        ConfigError: The value is an object that no configuration can hold.
    """
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        return f"--{name}={value}"
    try:
        return f"--{name}={json.dumps(value, allow_nan=False)}"
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is {value!r}, which no configuration can hold.",
            "Give plain values; load without it, and set it on the object that is made.",
        ) from error


class _LoadingCLI(FulguriteCLI):
    """Parses and makes the objects, and runs nothing."""

    trainer_arguments: dict[str, Any]
    resolved: dict[str, Any]

    def before_instantiate_classes(self) -> None:
        """Keep the resolved configuration; there is no run folder."""
        self._name_run()
        self.resolved = self.resolved_config()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Keep the arguments instead."""
        config = self._get(self.config_init, "trainer")
        defaults = inspect.signature(Trainer.__init__).parameters
        self.trainer_arguments = {
            key: value for key, value in config.items() if value != defaults[key].default
        }
        return None  # type: ignore[return-value]  # nothing is run with it

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _as_list(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]
