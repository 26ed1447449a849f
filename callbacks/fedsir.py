"""Federated rounds: when clients train, when a method acts, and what is recorded.

Axes: K clients, N samples, C classes, P flat state size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.logging import log_figure
from fulgurite.models.fedsir.federation import (
    ClientStates,
    Costs,
    Federation,
    VisibleData,
    keyed_generator,
)
from fulgurite.models.fedsir.methods import FederatedMethod
from fulgurite.models.fedsir.module import FederatedClassifier
from fulgurite.plotting import heatmap, new_figure, use_integer_ticks
from fulgurite.resuming import ENDED
from fulgurite.strategies import FederatedStrategy

__all__ = ["FederatedRounds"]


class FederatedRounds(Callback):
    """Runs a federated method: an epoch is a round, a batch is one client's local training.

    Under ``--trainer.strategy=federated`` the clients are distributed over the ranks; the global
    weights are the same bit for bit for any number of ranks (unless clients train in vectorised
    groups, whose composition depends on the ranks). The whole state of the rounds is in
    the checkpoint, so an interrupted run resumes without a difference in results.

    The method never sees true labels; this callback reads ``datamodule.evaluation`` where there
    is one, to report how well clients were identified and labels corrected.

    Args:
        participation: Fraction of the clients sampled in each round, at least one.
        dropout: Probability that a sampled client fails to report in a round; if all fail, the
            first of them reports after all.
        figures: Draw figures when training ends.

    Raises:
        ConfigError: ``participation`` is outside (0, 1] or ``dropout`` outside [0, 1), or the
            model, data or trainer are not federated.

    Source: FedSIR, arXiv 2604.20825, section 1; participation, dropout and ranks: inferred.
    """

    def __init__(
        self, participation: float = 1.0, dropout: float = 0.0, figures: bool = True
    ) -> None:
        if not 0 < participation <= 1:
            raise ConfigError(
                f"FederatedRounds.participation={participation} is not in (0, 1].",
                "Give the fraction of the clients in a round, e.g. 0.1.",
            )
        if not 0 <= dropout < 1:
            raise ConfigError(
                f"FederatedRounds.dropout={dropout} is not in [0, 1).",
                "Give the probability that a client fails to report, e.g. 0.1.",
            )
        self.participation, self.dropout, self.figures = participation, dropout, figures
        self.history: list[dict[str, Any]] = []
        self._resumed: dict[str, Any] | None = None
        self._states: ClientStates = {}
        self._clients: list[int] = []
        self._groups: list[list[int]] = []
        self._upcoming = 0  # client-epochs of the next round
        self._ended = False  # by the budget of client-epochs

    # --- start ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that model, data and strategy fit, and set the number of slots in a round."""
        if stage != "fit":
            return
        if not isinstance(pl_module, FederatedClassifier):
            raise ConfigError(
                f"FederatedRounds cannot drive a {type(pl_module).__name__}.",
                "Use model.class_path=fulgurite.models.fedsir.FederatedClassifier.",
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "client_images"):
            raise ConfigError(
                f"{type(data).__name__} is not federated: it has no clients.",
                "Use data.class_path=fulgurite.datamodules.fedsir.FederatedDataModule.",
            )
        if trainer.world_size > 1 and not isinstance(trainer.strategy, FederatedStrategy):
            raise ConfigError(
                f"{type(trainer.strategy).__name__} would average the gradients of different "
                "clients.",
                "Use --trainer.strategy=federated.",
            )
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"Local training does not do --trainer.precision={trainer.precision}.",
                "Use bf16-mixed or 32-true.",
            )
        _refuse_weight_schedules(trainer)
        per_rank = -(-self._clients_per_round(data.num_clients) // trainer.world_size)
        data.train_slots = -(-per_rank // max(1, pl_module.vectorize))
        pl_module.slot_trainer = self
        # what is logged here is equal on every rank already
        warnings.filterwarnings("ignore", ".*recommended to use `self.log.*sync_dist=True.*")
        # rounds are logged, not steps
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")

    def _clients_per_round(self, clients: int) -> int:
        return max(1, int(self.participation * clients + 0.5))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a resumed training that has spent its budget before it trains one more round.

        Raises:
            CheckpointError: The checkpoint has no record of spent client-epochs.
        """
        if self._resumed is None:
            return
        if "costs" not in self._resumed:
            raise CheckpointError(
                "The checkpoint is of an earlier version, which did not count client-epochs.",
                "Train anew, or go on with the version that wrote it.",
            )
        spent = int(self._resumed["costs"]["client_epochs"])
        if _exceeds(spent + int(self._resumed["upcoming"]), pl_module):
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the federation; identify clean clients unless a checkpoint has them."""
        assert isinstance(pl_module, FederatedClassifier)
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        if self._resumed:
            seed = self._resumed["seed"]
        self.method: FederatedMethod = pl_module.method
        self.fed = Federation(
            VisibleData(self._data),
            pl_module.network,
            pl_module.optimizer,
            seed=seed,
            batch_size=pl_module.batch_size,
            local_epochs=pl_module.local_epochs,
            autocast=trainer.precision_plugin.forward_context,
            resident=pl_module.resident,
            vectorize=pl_module.vectorize,
        )
        self._slots = self._data.train_slots
        if trainer.num_training_batches != self._slots:
            raise ConfigError(
                f"A round has {self._slots} slots, and the trainer allows "
                f"{trainer.num_training_batches}.",
                "Leave out limit_train_batches, overfit_batches and fast_dev_run; a quick run is "
                "--config fedsir/smoke.yaml --trainer.max_epochs=1.",
            )
        try:
            pl_module.optimizer(list(pl_module.network.parameters()))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"The clients' optimizer cannot be made: {error}.",
                "Change model.init_args.optimizer.init_args.",
            ) from error
        if self._resumed:
            if self._resumed["name"] != type(self.method).__name__:
                raise CheckpointError(
                    f"The checkpoint is of {self._resumed['name']}, not of "
                    f"{type(self.method).__name__}.",
                    "Resume with the method of the run, model.init_args.method.",
                )
            self._data.labels.load_state_dict(self._resumed["labels"])
            self.method.load_state_dict(_move_models(self._resumed["method"], self.fed.device))
            self.fed.costs = Costs(**self._resumed["costs"])
            self.fed.receivers = set(self._resumed["receivers"])
            self.history = self._resumed["history"]
            self._resumed = None
            return
        self._check_budget(trainer, pl_module)
        # ranks that were not seeded alike would start from different weights
        self.fed.global_state = self.fed.broadcast(self.fed.global_state)
        self.fed.state.write(self.fed.global_state)
        with self._show_progress(trainer):
            self.method.before_rounds(self.fed)
        self.fed.state.write(self.fed.global_state)
        self._upcoming = self._next_client_epochs()
        if _exceeds(self.fed.costs.client_epochs + self._upcoming, pl_module):
            raise ConfigError(
                f"model.init_args.max_client_epochs={pl_module.max_client_epochs} does not "
                f"suffice for the first round: {self.fed.costs.client_epochs} client-epochs were "
                f"spent before it, and it needs {self._upcoming}.",
                "Give more, or fewer epochs of identification.",
            )
        self._save_before_first_round(trainer)
        facts = self._score_identification()
        if facts:
            rank_zero_info("identification: " + ", ".join(f"{k} {v:.3g}" for k, v in facts.items()))

    def _check_budget(self, trainer: Trainer, module: FederatedClassifier) -> None:
        """Refuse a budget that is too small, or that the trainer's minimum may exceed.

        Raises:
            ConfigError: The budget is below the first round's, or the trainer has a minimum.
        """
        limit = module.max_client_epochs
        if limit is None:
            return
        if trainer.min_epochs or trainer.min_steps:
            raise ConfigError(
                "model.init_args.max_client_epochs cannot be kept with trainer.min_epochs or "
                "trainer.min_steps.",
                "Leave those out.",
            )
        before = self.fed.num_clients * self.method.local_rounds()
        if before + self.fed.local_epochs > limit:
            raise ConfigError(
                f"model.init_args.max_client_epochs={limit} does not suffice: {before} "
                "client-epochs are spent before the first round.",
                f"Give {before + self.fed.num_clients * self.fed.local_epochs} or more, or fewer "
                "epochs of identification.",
            )

    def _next_client_epochs(self) -> int:
        """Client-epochs of the next round; an upper bound if it identifies clients again."""
        fed, round = self.fed, self.fed_round
        before = self.method.client_epochs_before(fed, round)
        clients = self._sample_clients(round)
        if not before:
            clients = self._draw_reporting(self.method.participants(fed, round, clients), round)
        return before + len(clients) * fed.local_epochs

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

            self.fed.on_step = step
            yield
        self.fed.on_step = lambda: None

    # --- a round -------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the method act, choose the round's clients and deal them out to slots.

        A method's own exchanges (identification, references) reach all clients, sampled or not.
        """
        round = trainer.current_epoch
        before = self._label_noise()
        refreshes = len(getattr(self.method, "relabel_rounds", ()))
        self.fed.global_state = self.fed.state.read()
        self.method.before_round(self.fed, round)
        self.fed.state.write(self.fed.global_state)
        self._noise_before = None  # of a round that begins with a refresh of the labels
        if len(getattr(self.method, "relabel_rounds", ())) > refreshes:
            self._noise_before = self._mean_noise(before)
        sampled = self._sample_clients(round)
        self._clients = self._draw_reporting(
            self.method.participants(self.fed, round, sampled), round
        )
        self.fed.send_global(self._clients)
        clients = self.fed.local_clients(self._clients)
        size = max(1, self.fed.vectorize)
        if size > 1:  # clients of a group that end together waste no passes
            clients = sorted(clients, key=lambda k: -int(self.fed.sizes[k]))
        self._groups = [clients[i : i + size] for i in range(0, len(clients), size)]
        self._states = {}

    def _sample_clients(self, round: int) -> list[int]:
        number = self._clients_per_round(self.fed.num_clients)
        generator = keyed_generator(self.fed.seed, "participation", round)
        order = torch.randperm(self.fed.num_clients, generator=generator)
        return sorted(order[:number].tolist())

    def _draw_reporting(self, clients: list[int], round: int) -> list[int]:
        if not self.dropout:
            return clients
        draws = {
            k: float(torch.rand((), generator=keyed_generator(self.fed.seed, "drop", round, k)))
            for k in clients
        }
        return [k for k in clients if draws[k] >= self.dropout] or clients[:1]

    def train_slot(self, slot: int) -> Tensor | None:
        """Train the clients of a slot; after the last, aggregate.

        Returns:
            The aggregate after the last slot of the round, else None. Shape: (P,).
        """
        round = self.fed_round
        if slot < len(self._groups):
            self._states |= self.fed.train_local(
                self._groups[slot],
                lambda client: self.method.objective(self.fed, client, round),
                purpose=round,
            )
        if slot + 1 < self._slots:
            return None
        weights = self.method.weights(self.fed, round, self._clients, self._states)
        self._weights = weights
        aggregate = self.fed.average(self._states, weights)
        costs = self.fed.costs
        costs.rounds += 1
        costs.client_epochs += len(self._clients) * self.fed.local_epochs
        costs.bytes_up += len(self._clients) * self.fed.state_bytes
        return aggregate

    @property
    def fed_round(self) -> int:
        """The current round, counted from 0."""
        return len(self.history)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last slot: let the method look at the round, and log it."""
        if batch_idx + 1 < self._slots:
            return
        fed, round = self.fed, self.fed_round
        fed.global_state = fed.state.read()
        self.method.after_round(fed, round, self._clients, self._states)
        losses = fed.gather_rows({k: fed.loss_sum[k] for k in self._states}, self._clients)
        noise = self._label_noise()
        record = {
            "clients": self._clients,
            "weights": [self._weights.get(k, 0.0) for k in range(fed.num_clients)],
            "noise": noise.tolist() if noise is not None else None,
        }
        logged = {
            "train/loss": float(losses.mean()),
            "fed/clients": float(len(self._clients)),
        }
        logged |= {f"cost/{name}": float(value) for name, value in asdict(fed.costs).items()}
        logged |= {f"fed/{name}": value for name, value in self.method.report().items()}
        logged |= {f"identify/{k}": v for k, v in self._score_identification().items()}
        logged |= {f"fed/label_noise{k}": v for k, v in (self._mean_noise(noise) or {}).items()}
        if self._noise_before:
            before = self._noise_before.items()
            logged |= {f"fed/label_noise_before{k}": v for k, v in before}
        pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1)
        record |= {k: v for k, v in logged.items() if k in ("train/loss", "fed/label_noise")}
        self.history.append(record)
        self._states = {}
        assert isinstance(pl_module, FederatedClassifier)
        self._upcoming = self._next_client_epochs()
        self._ended = _exceeds(fed.costs.client_epochs + self._upcoming, pl_module)
        if self._ended:
            rank_zero_info(
                f"{fed.costs.client_epochs} of {pl_module.max_client_epochs} client-epochs are "
                f"spent after {len(self.history)} rounds, and a further round would exceed them."
            )
            trainer.should_stop = True

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
        wrong = ((self.fed.labels.current != evaluation.true) & has_truth).double()
        return torch.stack([wrong[i].sum() / has_truth[i].sum() for i in self.fed.index])

    def _mean_noise(self, noise: Tensor | None) -> dict[str, float] | None:
        """Fraction of wrong labels over all clients (no suffix) and over the noisy ones."""
        if noise is None:
            return None
        noisy, has_truth = self._data.evaluation.noisy_clients, self._data.evaluation.true >= 0
        sizes = torch.stack([has_truth[i].sum() for i in self.fed.index]).double()
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
        if self.method.clean is None or evaluation is None or bool((evaluation.true < 0).any()):
            return {}
        predicted_noisy, true_noisy = ~self.method.clean.cpu(), evaluation.noisy_clients
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
        """Rounds so far, labels, method, traffic and seed; plain types and tensors."""
        return {
            "name": type(self.method).__name__,
            "seed": self.fed.seed,
            "labels": self._data.labels.state_dict(),
            "method": _move_models(self.method.state_dict(), torch.device("cpu")),
            "costs": asdict(self.fed.costs),
            "receivers": sorted(self.fed.receivers),
            "upcoming": self._upcoming,
            ENDED: self._ended,
            "history": list(self.history),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store a checkpoint's state until the federation is built."""
        self._resumed = dict(state_dict)

    # --- figures -------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw weights and noise per client and round, and a clean and a noisy client."""
        if not (self.figures and self.history and trainer.is_global_zero):
            return
        weights = np.array([r["weights"] for r in self.history]).T
        noisy = (
            (~self.method.clean.cpu()).nonzero().flatten().tolist()
            if self.method.clean is not None
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
            heatmap(
                ax, values, title=title, limits=limits, highlight_rows=noisy, xlabel="round",
                ylabel="client (bold: identified as noisy)",
            )  # fmt: skip
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
        evidence = getattr(self.method, "evidence", None)
        if not evidence or self.method.clean is None:
            return
        clean = self.method.clean.cpu()
        scores = evidence["scores"][:, 0]
        kinds = {"clean": (clean, 1.0), "noisy": (~clean, -1.0)}
        examples = [
            (name, int((sign * scores).masked_fill(~mask, torch.inf).argmin()))
            for name, (mask, sign) in kinds.items()
            if bool(mask.any())
        ]
        figure, axes = new_figure(1, len(examples), width=3.8)
        for ax, (name, client) in zip(axes[0], examples, strict=True):
            heatmap(
                ax, evidence["similarities"][client].numpy(), limits=(0, 1), xlabel="class",
                ylabel="class",
                title=f"{name} client {client}: mean off the diagonal {scores[client]:.2f}",
            )  # fmt: skip
        log_figure(trainer, "similarities", figure)


def _exceeds(client_epochs: int, module: LightningModule) -> bool:
    """Whether a number of client-epochs is above the budget of the module, if it has one."""
    limit = getattr(module, "max_client_epochs", None)
    return limit is not None and client_epochs > limit


def _refuse_weight_schedules(trainer: Trainer) -> None:
    """Refuse a callback that anneals a learning rate, which the server does not have.

    Raises:
        ConfigError: The trainer has StochasticWeightAveraging.
    """
    if any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            "StochasticWeightAveraging anneals the learning rate of the trainer's optimizer, and "
            "in federated rounds that optimizer only takes the clients' average.",
            "Use lightning.pytorch.callbacks.EMAWeightAveraging, which averages the global model "
            "over the rounds, or leave it out.",
        )


def _move_models(value: Any, device: torch.device) -> Any:
    """Move the flat models (1-D floats) of a method's state; all else stays on the CPU."""
    if isinstance(value, Tensor):
        return value.to(device) if value.is_floating_point() and value.ndim == 1 else value.cpu()
    if isinstance(value, dict):
        return {k: _move_models(v, device) for k, v in value.items()}
    return value
