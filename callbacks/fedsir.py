"""What is logged and drawn of federated rounds, and the checks against true labels.

Axes: K clients, N samples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.logging import log_figure
from fulgurite.models.fedsir.engine import FinishedRound, RoundEngine
from fulgurite.models.fedsir.module import FederatedClassifier
from fulgurite.plotting import heatmap, new_figure, use_integer_ticks
from fulgurite.resuming import ENDED

__all__ = ["FederatedRounds"]


class FederatedRounds(Callback):
    """Starts identification and relabeling in their rounds, and logs and draws the rounds.

    The module's :class:`~fulgurite.models.fedsir.engine.RoundEngine` runs the rounds, with the same
    weights where this callback is left out. Here the hooks of the trainer ask it for what comes
    before round 0 (with a progress bar, and a checkpoint afterwards) and for what begins a round,
    between two looks at the labels.

    The method never sees true labels; this callback reads ``datamodule.evaluation`` where there
    is one, to report how well clients were identified and labels corrected.

    Args:
        figures: Draw figures when training ends.

    Raises:
        ConfigError: The model is not federated.

    Source: docs/papers/fedsir.md section 1.
    """

    def __init__(self, figures: bool = True) -> None:
        self.figures = figures
        self.history: list[dict[str, Any]] = []
        self._resumed = False
        self._noise_before: dict[str, float] | None = None

    # --- start ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model is federated."""
        if stage != "fit":
            return
        if not isinstance(pl_module, FederatedClassifier):
            raise ConfigError(
                f"FederatedRounds cannot drive a {type(pl_module).__name__}.",
                "Use model.class_path=fulgurite.models.fedsir.FederatedClassifier.",
            )
        # what is logged here is equal on every rank already
        warnings.filterwarnings("ignore", ".*recommended to use `self.log.*sync_dist=True.*")
        # rounds are logged, not steps
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Identify clean clients unless a checkpoint has them, and save them."""
        assert isinstance(pl_module, FederatedClassifier)
        self.engine: RoundEngine = pl_module.engine
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.open_rounds()
        if self._resumed:
            self._resumed = False
            return
        with self._show_progress(trainer):
            self.engine.start()
        self._save_before_first_round(trainer)
        facts = self._score_identification()
        if facts:
            rank_zero_info("identification: " + ", ".join(f"{k} {v:.3g}" for k, v in facts.items()))

    def _save_before_first_round(self, trainer: Trainer) -> None:
        """Save a checkpoint before round 0, so that a kill during it loses no work."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.filename == "last":
                path = Path(str(callback.dirpath)) / "last.ckpt"
                trainer.save_checkpoint(path, weights_only=False)  # with the state of callbacks

    @contextmanager
    def _show_progress(self, trainer: Trainer) -> Iterator[None]:
        """Show the local steps before the first round; Lightning's bar shows rounds only."""
        if not (trainer.progress_bar_callback and trainer.is_global_zero):
            yield
            return
        from tqdm.auto import tqdm

        with tqdm(desc="Before round 0", unit=" steps", leave=False) as bar:

            def step() -> None:
                bar.update()

            self.engine.fed.on_step = step
            yield
        self.engine.fed.on_step = lambda: None

    # --- a round -------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a round, and note the labels' noise before a relabeling."""
        before = self._label_noise()
        relabelings = len(getattr(self.engine.method, "relabel_rounds", ()))
        self.engine.begin_round()
        self._noise_before = None
        if len(getattr(self.engine.method, "relabel_rounds", ())) > relabelings:
            self._noise_before = self._mean_noise(before)

    def on_train_batch_end(  # noqa: PLR0917 (Lightning's hook)
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a round after its last group."""
        if batch_idx + 1 < trainer.num_training_batches:
            return
        finished, costs = self.engine.finished, self.engine.fed.costs
        assert finished is not None
        noise = self._label_noise()
        logged = self._collect_metrics(finished, noise)
        pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1)
        self.history.append(
            {
                "clients": finished.clients,
                "weights": finished.weights,
                "noise": noise.tolist() if noise is not None else None,
            }
            | {k: v for k, v in logged.items() if k in ("train/loss", "fed/label_noise")}
        )
        if self.engine.exhausted:
            rank_zero_info(
                f"{costs.client_epochs} of {self.engine.options.max_client_epochs} client-epochs "
                f"are spent after {self.engine.round} rounds, and a further round would exceed "
                "them."
            )

    def _collect_metrics(self, finished: FinishedRound, noise: Tensor | None) -> dict[str, float]:
        method = self.engine.method
        logged = {"train/loss": finished.loss, "fed/clients": float(len(finished.clients))}
        costs = asdict(self.engine.fed.costs)
        logged |= {f"cost/{name}": float(value) for name, value in costs.items()}
        logged |= {f"fed/{name}": value for name, value in method.report().items()}
        logged |= {f"identify/{k}": v for k, v in self._score_identification().items()}
        logged |= {f"fed/label_noise{k}": v for k, v in (self._mean_noise(noise) or {}).items()}
        if self._noise_before:
            before = self._noise_before.items()
            logged |= {f"fed/label_noise_before{k}": v for k, v in before}
        return logged

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the accuracy of the round's global model for the figure."""
        accuracy = trainer.callback_metrics.get("val/acc")
        if self.history and accuracy is not None:
            self.history[-1]["val/acc"] = float(accuracy)

    # --- evaluation: reads true labels, which the method never receives ------------------------

    def _label_noise(self) -> Tensor | None:
        """Fraction of wrong current labels per client, float64; NaN without known true labels.

        Shape: (K,).
        """
        evaluation = getattr(self._data, "evaluation", None)
        if evaluation is None:
            return None
        has_truth = evaluation.true >= 0
        wrong = ((self.engine.fed.labels.current != evaluation.true) & has_truth).double()
        return torch.stack([wrong[i].sum() / has_truth[i].sum() for i in self.engine.fed.index])

    def _mean_noise(self, noise: Tensor | None) -> dict[str, float] | None:
        """Fraction of wrong labels over all clients (no suffix) and over the noisy ones."""
        if noise is None:
            return None
        noisy, has_truth = self._data.evaluation.noisy_clients, self._data.evaluation.true >= 0
        sizes = torch.stack([has_truth[i].sum() for i in self.engine.fed.index]).double()
        noise = noise.nan_to_num()  # of clients whose size is 0 here
        means = {"": float((noise * sizes).sum() / sizes.sum())}
        if bool(noisy.any()):
            means["_noisy"] = float((noise * sizes)[noisy].sum() / sizes[noisy].sum())
        return means

    def _score_identification(self) -> dict[str, float]:
        """Precision and recall of the noisy clients, once the method has split them.

        Empty where some true labels are unknown, since the noisy clients are then unknown.
        """
        evaluation = getattr(self._data, "evaluation", None)
        clean = self.engine.method.clean
        if clean is None or evaluation is None or bool((evaluation.true < 0).any()):
            return {}
        predicted_noisy, true_noisy = ~clean.cpu(), evaluation.noisy_clients
        hits = float((predicted_noisy & true_noisy).sum())
        return {
            "precision": hits / max(1.0, float(predicted_noisy.sum()))
            if bool(predicted_noisy.any())
            else 1.0,
            "recall": hits / float(true_noisy.sum()) if bool(true_noisy.any()) else 1.0,
            "exact": float(torch.equal(predicted_noisy, true_noisy)),
        }

    # --- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the figures show of the rounds so far, and whether the limit has ended them."""
        return {ENDED: self.engine.exhausted, "history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rounds for the figures."""
        self.history, self._resumed = state_dict["history"], True

    # --- figures -------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw weights and noise per client and round, and a clean and a noisy client."""
        if not (self.figures and self.history and trainer.is_global_zero):
            return
        weights = np.array([r["weights"] for r in self.history]).T
        noisy = (
            (~self.engine.method.clean.cpu()).nonzero().flatten().tolist()
            if self.engine.method.clean is not None
            else []
        )
        has_noise = self.history[0]["noise"] is not None
        figure, axes = new_figure(1, 1 + has_noise, height=3.6)
        panels: list[tuple[str, Any, tuple[float, float] | None]] = [
            ("weight in the global model", weights, None)
        ]
        if has_noise:
            noise = np.array([r["noise"] for r in self.history]).T
            panels.append(("share of wrong labels", noise, (0.0, 1.0)))
        for ax, (title, values, limits) in zip(axes[0], panels, strict=True):
            heatmap(ax, values, limits=limits, highlight_rows=noisy)
            ax.set(title=title, xlabel="round", ylabel="client (bold: identified as noisy)")
        log_figure(trainer, "clients", figure)
        self._draw_rounds(trainer)
        self._draw_similarities(trainer)

    def _draw_rounds(self, trainer: Trainer) -> None:
        """Accuracy, loss and label noise by round."""
        titles = {
            "val/acc": "validation accuracy of the global model",
            "train/loss": "mean local loss",
            "fed/label_noise": "share of wrong labels, all clients",
        }
        panel_titles = {k: title for k, title in titles.items() if k in self.history[0]}
        figure, axes = new_figure(1, len(panel_titles))
        for ax, (key, title) in zip(axes[0], panel_titles.items(), strict=True):
            ax.plot(range(len(self.history)), [r.get(key, np.nan) for r in self.history])
            ax.set(title=title, xlabel="round")
            use_integer_ticks(ax)
        log_figure(trainer, "rounds", figure)

    def _draw_similarities(self, trainer: Trainer) -> None:
        evidence = getattr(self.engine.method, "evidence", None)
        if not evidence or self.engine.method.clean is None:
            return
        clean = self.engine.method.clean.cpu()
        scores = evidence["scores"][:, 0]
        kinds = {"clean": (clean, 1.0), "noisy": (~clean, -1.0)}
        examples = [
            (name, int((sign * scores).masked_fill(~mask, torch.inf).argmin()))
            for name, (mask, sign) in kinds.items()
            if bool(mask.any())
        ]
        figure, axes = new_figure(1, len(examples), width=3.8)
        for ax, (name, client) in zip(axes[0], examples, strict=True):
            heatmap(ax, evidence["similarities"][client].numpy(), limits=(0, 1))
            title = f"{name} client {client}: mean off the diagonal {scores[client]:.2f}"
            ax.set(title=title, xlabel="class", ylabel="class")
        log_figure(trainer, "similarities", figure)
