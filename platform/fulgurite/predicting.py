"""Predictions of a trained run from Python, as ``fulgurite predict --input`` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.cli import run as run_command
from fulgurite.errors import ConfigError
from fulgurite.export.trained import locate_checkpoint
from fulgurite.predictions import read_predictions
from fulgurite.predictions.table import name_codes

__all__ = ["predict"]


def predict(
    run: str | Path, path: str | Path, which: str | None = None
) -> dict[str, NDArray[Any] | list[NDArray[Any]]]:
    """Predict files with what a run has trained, as ``fulgurite predict --input`` does.

    The command runs in this process, on one device, and leaves its records in a new folder
    ``predict`` of the run.

    Args:
        run: A run folder, or a checkpoint in one.
        path: The file or folder to predict.
        which: ``last`` or ``best`` of a run folder; None takes ``best`` where there is one.

    Returns:
        What :func:`fulgurite.predictions.read_predictions` reads, with an array for each column of
        names, such as ``file``, beside it, unless it has a key of that name.

    Raises:
        CheckpointError: There is no such run or checkpoint.
        ConfigError: The DataModule of the run does not read files for prediction.
        DataError: The files cannot be read, or do not fit what was trained.

    Example:
        >>> predictions = predict("runs/fedsir/digits/20260101-120000", "images")  # doctest: +SKIP
        >>> predictions["file"], predictions["predicted_name"]  # doctest: +SKIP
    """
    folder, checkpoint = locate_checkpoint(Path(run), which)
    cli = run_command(
        [
            *("predict", "--config", str(folder / "config.yaml"), f"--run.dir={folder}"),
            *(f"--ckpt_path={checkpoint}", f"--input={path}", "--trainer.devices=1"),
        ]
    )
    file = cli.folder / "predictions.npz"
    if not file.is_file():
        raise ConfigError(
            f"{type(cli.model).__name__} has written no single predictions.npz into {cli.folder}.",
            "Let predict_step return something, and predict_dataloader one loader.",
        )
    predictions = read_predictions(file)
    for key, names in getattr(cli.datamodule, "prediction_names", {}).items():
        codes = predictions.get(key)
        if isinstance(names, Mapping) and isinstance(codes, np.ndarray):
            for heading, column in names.items():
                predictions.setdefault(heading, name_codes(codes, column))
    return predictions
