"""Probes of number embeddings during training, and their records.

Axes: N numbers, D embedding width, T period.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from fulgurite.errors import ConfigError, DataError
from fulgurite.io import write_text
from fulgurite.logging import is_logger, log_figure
from fulgurite.models.number_probing.reports.report import (
    COLUMNS,
    ProbeSettings,
    Report,
    kappa_figure,
    measure,
    spectrogram_figure,
    spectrum_figure,
    to_csv,
    to_markdown,
)
from fulgurite.models.number_probing.tables import (
    Spelling,
    number_tokens,
    parse_numbers,
    read_encoder,
)
from fulgurite.models.number_probing.tables import vocabulary as read_vocabulary
from fulgurite.models.number_probing.tables.checks import describe_numbers
from fulgurite.modes import keep_modes
from fulgurite.sharding import is_sharding

__all__ = ["EmbeddingRows", "ModularProbe"]


@dataclass(frozen=True)
class EmbeddingRows:
    """Which rows of which matrix of a model are the embeddings of numbers.

    Args:
        embedding: Path of the module or parameter whose rows are embeddings, such as
            ``model.embed_tokens``; by default the model's ``number_embeddings(numbers)``.
        tokenizer: With ``embedding``: folder or file of the tokenizer that says which row is which
            number; by default the DataModule's ``number_ids``.
        first_row: With ``embedding``: the row of number 0, if number n is row ``first_row + n``.
        spelling: With ``tokenizer``: ``bare`` "7", ``spaced`` " 7", or ``auto``.

    Raises:
        ConfigError: Options contradict each other.
    """

    embedding: str | None = None
    tokenizer: str | None = None
    first_row: int | None = None
    spelling: Spelling = "auto"

    def __post_init__(self) -> None:
        if self.embedding is None and (self.tokenizer or self.first_row is not None):
            raise ConfigError(
                "ModularProbe was given rows without an embedding.",
                "Name it: ModularProbe.rows.embedding=PATH, such as model.embed_tokens.",
            )
        if self.tokenizer is not None and self.first_row is not None:
            raise ConfigError(
                "ModularProbe was given both tokenizer and first_row.", "Leave one of them out."
            )


class ModularProbe(Callback):
    """Probes the number embeddings of any model while it is trained.

    At the start and the end of a fit, at every checkpoint and every ``every_n_steps`` batches.
    Logged by period T: ``probe/kappa_T`` (held out, shuffled folds), ``probe/train_kappa_T``,
    ``probe/kappa_nonround_T``, ``probe/kappa_decade_T``, ``probe/kappa_contiguous_T``,
    ``probe/kappa_permuted_T``, ``probe/local_ratio_T``, ``probe/phi_T`` and the others of
    ``number_probing.reports.report.COLUMNS``. The run folder gets all of them as ``probe.csv``, the
    normalised magnitudes of all frequencies as ``spectrum.csv``, and the figures ``spectrum``,
    ``spectrogram`` and ``kappa``; W&B a table, TensorBoard a text.

    Training is bit for bit the same with and without it: the model is probed in evaluation mode.
    Only rank 0 probes; the embedding must be whole there. Where a callback averages weights, those
    are probed that are trained.

    Args:
        numbers: Numbers to probe, such as ``0:1000``; by default those of the DataModule's
            ``number_ids``.
        every_n_steps: Training batches between two probes; 0 leaves only start, end and
            checkpoints.
        rows: Where the embeddings are; by default the model's ``number_embeddings(numbers)``.
        probe: What is measured, and how.
        at_checkpoints: Probe whenever a checkpoint is written.
        figures: Draw the figures when the fit ends.

    Raises:
        ConfigError: Arguments contradict each other, or do not fit the model.
        DataError: A number is missing, rows are equal, zero, or not finite.

    Source: docs/papers/number_probing.md section 6.
    """

    def __init__(
        self,
        numbers: str | None = None,
        every_n_steps: int = 0,
        rows: EmbeddingRows = EmbeddingRows(),  # it is frozen
        *,
        probe: ProbeSettings = ProbeSettings(),  # it is frozen
        at_checkpoints: bool = True,
        figures: bool = True,
    ) -> None:
        if every_n_steps < 0:
            raise ConfigError(
                f"ModularProbe.every_n_steps={every_n_steps} is negative.",
                "Give 0 (start, end and checkpoints) or more.",
            )
        self.numbers = parse_numbers(numbers) if numbers is not None else None
        self.every_n_steps, self.rows, self.settings = every_n_steps, rows, probe
        self.at_checkpoints, self.figures = at_checkpoints, figures
        self.history: list[dict[str, Any]] = []
        self.spectra: dict[int, Tensor] = {}  # normalised magnitudes by step
        self.last: Report | None = None

    # --- hooks -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which no rank has the whole embedding.

        Raises:
            ConfigError: The parameters are divided among ranks.
        """
        if is_sharding(pl_module):
            raise ConfigError(
                "ModularProbe reads the embedding on the first rank, and "
                f"{type(trainer.strategy).__name__} divides it among all.",
                "Use --trainer.strategy=ddp; or leave ModularProbe out, and give the embedding of "
                "the checkpoint to `fulgurite probe`.",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the model as it starts, unless it is resumed from a probed step."""
        self._warn_of_absent_numbers(trainer)
        self._probe(trainer, pl_module, self._batches(trainer))

    def on_train_batch_end(  # noqa: PLR0917 (Lightning's hook)
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe after every ``every_n_steps`` batches."""
        step = self._batches(trainer)
        if self.every_n_steps and step % self.every_n_steps == 0:
            self._probe(trainer, pl_module, step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Probe the saved model, and put the history into the checkpoint."""
        if self.at_checkpoints and trainer.training:
            self._probe(trainer, pl_module, self._batches(trainer))
            checkpoint.setdefault("callbacks", {})[self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, draw figures, and give tables to the loggers that show them."""
        self._probe(trainer, pl_module, self._batches(trainer))
        if not (trainer.is_global_zero and self.history):
            return
        if self.figures:
            if self.last is None:  # resumed after the last probe
                self.last = self._measure(trainer, pl_module)
            log_figure(
                trainer, "spectrum", spectrum_figure(self.last.spectrum, self.settings.periods)
            )
            log_figure(trainer, "spectrogram", spectrogram_figure(self.spectra))
            log_figure(trainer, "kappa", kappa_figure(self.history, "held-out κ"))
        self._tables(trainer)

    @staticmethod
    def _batches(trainer: Trainer) -> int:
        """Batches trained on. Not ``global_step``, which counts each of several optimizers."""
        return trainer.fit_loop.total_batch_idx + 1

    # --- probing ---------------------------------------------------------------------------------

    def _probe(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not trainer.is_global_zero or (self.history and self.history[-1]["step"] >= step):
            return
        self.last = self._measure(trainer, pl_module)
        self.history += [{"step": step, **row} for row in self.last.rows]
        self.spectra[step] = self.last.spectrum.normalised.float().cpu()
        metrics = self.last.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        # `log` is not allowed in all of the hooks above
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
        if (folder := self._folder(trainer)) is not None:
            names = [f"{nu:.6g}" for nu in self.last.spectrum.frequency.tolist()]
            spectra = [
                {"step": step} | {n: f"{v:.4g}" for n, v in zip(names, line.tolist(), strict=True)}
                for step, line in self.spectra.items()
            ]
            for name, rows in (("probe.csv", self.history), ("spectrum.csv", spectra)):
                write_text(folder / name, to_csv(rows))

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        # the model's own method may draw random numbers, and parts of it may count what they see
        # (spectral norm counts each look at a weight); training must not see that it did
        random_numbers = isolate_rng(include_cuda=pl_module.device.type == "cuda")
        with random_numbers, torch.no_grad(), keep_modes(pl_module):
            for part in pl_module.modules():
                part.training = False  # not eval(), which a module may have made its own
            numbers, embeddings = self._embeddings(trainer, pl_module)
            report = measure(embeddings, numbers, self.settings)
        for sentence in report.notes:
            rank_zero_warn(f"ModularProbe: {sentence}")  # said once, by Python's filter
        return report

    @staticmethod
    def _folder(trainer: Trainer) -> Path | None:
        # not trainer.log_dir: that one is broadcast, and only rank 0 comes here
        log_dir = trainer.logger.log_dir if trainer.logger else None
        return Path(log_dir) if log_dir else None

    def _embeddings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[Sequence[int], Tensor]:
        """Return the numbers to probe and their embeddings."""
        number_ids: Mapping[int, int] | None = getattr(
            getattr(trainer, "datamodule", None), "number_ids", None
        )
        if self.rows.embedding is None:
            number_embeddings = getattr(pl_module, "number_embeddings", None)
            if number_embeddings is None:
                raise ConfigError(
                    f"{type(pl_module).__name__} has no number_embeddings(numbers).",
                    "Name its embedding: ModularProbe.rows.embedding=PATH, such as "
                    "model.embed_tokens.",
                )
            numbers = self._numbers(number_ids)
            try:
                embeddings = number_embeddings(numbers)
            except KeyError as error:
                raise DataError(
                    f"{type(pl_module).__name__} has no embedding of {error.args[0]!r}.",
                    "Name numbers that it has: ModularProbe.numbers=0:100.",
                ) from error
            return numbers, embeddings
        weight = self._weight(pl_module, self.rows.embedding)
        if self.rows.first_row is not None:
            numbers = self._numbers(None)
            rows = [self.rows.first_row + n for n in numbers]
        else:
            if self.rows.tokenizer is not None:
                folder = Path(self.rows.tokenizer)
                number_ids, _ = number_tokens(
                    read_vocabulary(folder), self.numbers, self.rows.spelling,
                    encode=read_encoder(folder),
                )  # fmt: skip
            numbers = self._numbers(number_ids)
            if number_ids is None:
                raise ConfigError(
                    "ModularProbe does not know which row is which number.",
                    "Give ModularProbe.rows.tokenizer, ModularProbe.rows.first_row, or a "
                    "DataModule with number_ids.",
                )
            if missing := [n for n in numbers if n not in number_ids]:
                raise DataError(
                    f"The DataModule has no token for {describe_numbers(missing)}.",
                    "Leave them out of ModularProbe.numbers.",
                )
            rows = [number_ids[n] for n in numbers]
        if len(rows) != len(set(rows)) or min(rows) < 0 or max(rows) >= len(weight):
            raise DataError(
                f"The rows {min(rows)} to {max(rows)} of {len(rows)} numbers do not fit the "
                f"{len(weight)} rows of {self.rows.embedding}.",
                "Give the tokenizer (or first_row) that belongs to the model.",
            )
        return numbers, weight.detach()[torch.tensor(rows, device=weight.device)]

    def _numbers(self, number_ids: Mapping[int, int] | None) -> Sequence[int]:
        if self.numbers is not None:
            return self.numbers
        if number_ids is None:
            raise ConfigError(
                "ModularProbe does not know which numbers the model has.",
                "Name them: ModularProbe.numbers=0:1000.",
            )
        return sorted(number_ids)

    def _warn_of_absent_numbers(self, trainer: Trainer) -> None:
        """Warn of numbers that no text has, whose embeddings stay as they begin."""
        data = getattr(trainer, "datamodule", None)
        number_ids, counts = getattr(data, "number_ids", None), getattr(data, "token_counts", None)
        if (
            not number_ids
            or counts is None
            or self.rows.tokenizer
            or self.rows.first_row is not None
        ):
            return  # or the data do not say which token is which number
        numbers = [n for n in self._numbers(number_ids) if n in number_ids]
        absent = [n for n in numbers if not counts[number_ids[n]]]
        if absent:
            rank_zero_warn(
                f"ModularProbe: {len(absent)} of the {len(numbers)} numbers never occur in the "
                f"text, so that their embeddings are not learned: {describe_numbers(absent)}. "
                "Leave them out of ModularProbe.numbers."
            )

    @staticmethod
    def _weight(pl_module: LightningModule, path: str) -> Tensor:
        weight: Any = pl_module
        for part in path.split("."):
            weight = getattr(weight, part, None)
        if isinstance(weight, nn.Module):
            weight = getattr(weight, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            names = [n for n, m in pl_module.named_modules() if isinstance(m, nn.Embedding)]
            raise ConfigError(
                f"ModularProbe.rows.embedding={path} is no matrix of {type(pl_module).__name__}.",
                f"Its embeddings are {', '.join(names) or '(none)'}.",
            )
        return weight

    # --- record ----------------------------------------------------------------------------------

    def _tables(self, trainer: Trainer) -> None:
        columns = ["step", "period", "verdict", *COLUMNS]
        for logger in trainer.loggers:
            if is_logger(logger, "WandbLogger"):
                data = [[row[c] for c in columns] for row in self.history]
                logger.log_table("probe", columns=columns, data=data)  # type: ignore[attr-defined]
            elif is_logger(logger, "TensorBoardLogger"):
                logger.experiment.add_text(  # type: ignore[attr-defined]
                    "probe", to_markdown(self.history, columns), trainer.global_step
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain numbers, strings and tensors."""
        return {"history": [dict(row) for row in self.history], "spectra": dict(self.spectra)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history of a checkpoint."""
        self.history = [dict(row) for row in state_dict["history"]]
        self.spectra = dict(state_dict["spectra"])
