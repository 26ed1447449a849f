"""What a configuration must not ask for to run as a federation over a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.module import FederatedClassifier

__all__ = ["check_federation"]

_DATA = "FederatedDataModule"


def check_federation(model: Any, data: Any, config: Mapping[str, Any]) -> None:
    """Refuse what a federation over a network cannot do.

    An app is checked when it is written and when its server starts, since it may be edited between.

    Args:
        model: The module of the configuration.
        data: Its data module.
        config: The resolved configuration.

    Raises:
        ConfigError: The configuration asks for it.
    """
    if not isinstance(model, FederatedClassifier):
        raise ConfigError(
            f"The configuration trains a {type(model).__name__}, which is not federated.",
            "Use a configuration of fedsir, such as fedsir/digits.yaml.",
        )
    # the server has the data module's options and none of its images of training
    if type(data).__name__ != _DATA or not type(data).__module__.startswith("fulgurite."):
        raise ConfigError(
            f"The data module is a {type(data).__name__}, in whose place the server would take "
            "another one.",
            f"Use data.class_path=fulgurite.datamodules.fedsir.{_DATA}, and a source of your own.",
        )
    trainer = config["trainer"]
    if str(trainer.get("precision")) not in ("None", "32", "32-true"):
        raise ConfigError(
            f"trainer.precision is {trainer['precision']}, and the clients of a federation train "
            "in 32 bits.",
            "Set --trainer.precision=32-true.",
        )
    for name in ("devices", "num_nodes"):
        if str(trainer.get(name, 1)) not in ("1", "auto", "None"):
            raise ConfigError(
                f"trainer.{name} is {trainer[name]}, and the server of a federation is one "
                "process.",
                f"Set --trainer.{name}=1.",
            )
    if model.local.vectorize not in (0, 1):
        raise ConfigError(
            f"model.init_args.local.vectorize is {model.local.vectorize}, and each client of a "
            "federation trains alone.",
            "Set --model.local.vectorize=0.",
        )
