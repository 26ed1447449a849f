"""Local cleaning: each client finds wrong labels among its own samples with cleanlab.

Axes: N samples, N_k samples of client k, B mini-batch, C classes, D feature dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.extras import optional_import
from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    Federation,
    LogitLoss,
    MiniBatch,
    Objective,
    Replies,
    Reply,
    Request,
    TrainingTask,
    TrainRequest,
    keyed_generator,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.options import IntAboveOne, NonNegativeInt, PositiveInt, check_arguments

__all__ = [
    "CleanReply",
    "CleanRequest",
    "CleaningClientSide",
    "FoldRequest",
    "LocalCleaning",
    "ProbeRequest",
    "SubsetLoss",
    "find_issues",
]


def find_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Find the samples whose label is wrong according to confident learning.

    Args:
        labels: Given labels. Shape: (N,).
        probabilities: Out-of-fold class probabilities. Shape: (N, C).

    Returns:
        Mask of the samples with label issues, bool. Shape: (N,).

    Raises:
        MissingExtraError: cleanlab is not installed.

    Source: Northcutt et al., Confident learning, JAIR 2021 (cleanlab).
    """
    cleanlab = optional_import("cleanlab.filter", "cleaning", "LocalCleaning")
    if len(labels) == 0 or bool((labels == labels[0]).all()):
        return torch.zeros(len(labels), dtype=torch.bool)
    # one job: the ranks share a machine
    issues = cleanlab.find_label_issues(labels.numpy(), probabilities.double().numpy(), n_jobs=1)
    return torch.from_numpy(np.asarray(issues, dtype=bool))


class SubsetLoss:
    """Cross-entropy of some of the samples; the others only pass through BatchNorm.

    Args:
        mask: Mask of the client's samples that have a loss, bool. Shape: (N_k,).

    Source: inferred.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """Mean over the samples of the mask; 0 if the batch has none."""
        losses = F.cross_entropy(network(batch.images), batch.labels, reduction="none")
        mask = move(self.mask[batch.index], losses.device, losses.dtype)
        return (losses * mask).sum() / mask.sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class FoldRequest(Request):
    """Train on the other folds, and predict the samples of one.

    Attributes:
        fold: Index of the fold.
    """

    continues: ClassVar[bool] = True

    model: Tensor
    fold: int


@dataclass(frozen=True, kw_only=True)
class ProbeRequest(Request):
    """Predict all samples by a probe on a model's features, fitted on the other folds."""

    model: Tensor


@dataclass(frozen=True, kw_only=True)
class CleanRequest(Request):
    """Clean your labels by what was predicted."""

    continues: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class CleanReply(Reply):
    """Numbers of samples.

    Attributes:
        samples: All samples.
        trained: Those without an issue; all where none would be left.
    """

    samples: int
    trained: int


class CleaningClientSide(ClientSide):
    """Clients that clean their own labels.

    A client remembers which of its samples train (``kept``, bool), once they are cleaned.
    Shape: (N_k,).

    Args:
        method: The method, of which only options are used.

    Source: cleanlab's ``find_label_issues`` with its defaults; its use per client: inferred.
    """

    def __init__(self, method: LocalCleaning) -> None:
        self.options = method

    def task(self, client: Client, request: Request) -> TrainingTask | None:
        """The training on the other folds, or that of a round."""
        if not isinstance(request, FoldRequest):
            return super().task(client, request)
        loss = SubsetLoss(self._assign_folds(client) != request.fold)
        return TrainingTask(loss, f"fold-{request.fold}")

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """Cross-entropy of the samples without issues."""
        is_trained = client.memory.get("kept")
        if is_trained is None or self.options.action == "relabel":
            return LogitLoss()
        return SubsetLoss(is_trained)

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Keep predictions, clean by them, or send a trained model."""
        if isinstance(request, FoldRequest) and trained is not None:
            held_out = self._assign_folds(client) == request.fold
            empty = torch.zeros(len(client), client.trainer.num_classes)
            probabilities = client.intermediate.setdefault("probabilities", empty)
            probabilities[held_out] = client.logits(trained).softmax(1).cpu()[held_out]
            return Reply()
        if isinstance(request, ProbeRequest):
            client.intermediate["probabilities"] = self._predict_by_probe(client, request.model)
            return Reply()
        if isinstance(request, CleanRequest):
            return self._clean(client)
        return super().reply(client, request, trained)

    def _assign_folds(self, client: Client) -> Tensor:
        """Index of the fold that holds out each sample of a client. Shape: (N_k,)."""
        generator = keyed_generator(client.trainer.seed, "folds", client.number)
        return torch.randperm(len(client), generator=generator) % self.options.folds

    def _predict_by_probe(self, client: Client, model: Tensor) -> Tensor:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features = torch.cat([f.float() for f, _, _ in client.features(model)])
        table = features.cpu().double().numpy()
        labels = client.given_labels.numpy()
        fold = self._assign_folds(client).numpy()
        classes = client.trainer.num_classes
        probabilities = np.full((len(labels), classes), 1 / classes)
        for held_out in range(self.options.folds):
            train = fold != held_out
            if held_out not in fold or len(np.unique(labels[train])) < 2:
                continue
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(table[train], labels[train])
            probabilities[~train] = 0.0
            probabilities[np.ix_(~train, probe.classes_)] = probe.predict_proba(table[~train])
        return torch.from_numpy(probabilities)

    def _clean(self, client: Client) -> CleanReply:
        table, given_labels = client.intermediate.pop("probabilities"), client.given_labels
        wrong = find_issues(given_labels, table)
        # a client that would keep nothing keeps all: it cannot train on nothing
        is_trained = torch.ones_like(wrong) if bool(wrong.all()) else ~wrong
        if self.options.action == "relabel":
            client.relabel(table.argmax(1).where(wrong, given_labels))
        client.remember(kept=is_trained)
        return CleanReply(samples=len(client), trained=int(is_trained.sum()))


class LocalCleaning(FederatedMethod):
    """The common practice: every client cleans its own labels, then FedAvg.

    Out-of-fold probabilities come from one of two sources:

    - ``folds``: before round 0 each client trains, from the initial model and alone, one model
      per fold on the other folds. This costs ``folds · epochs`` local epochs, which
      :meth:`local_rounds` reports. The samples of the fold have no loss, but their images still
      pass through BatchNorm.
    - ``probe``: after ``warmup`` rounds of FedAvg, a logistic regression on the features of the
      global model, cross-validated. It costs no further epoch, but the features were trained on
      the labels.

    There is no exchange between clients that could tell which of them is noisy.

    Args:
        action: ``prune`` the samples with issues, or ``relabel`` them with the likeliest class.
        probabilities: Source of the out-of-fold probabilities, ``folds`` or ``probe``.
        folds: Number of folds of the cross-validation.
        epochs: Local epochs of a fold's model (``folds``).
        warmup: Rounds before cleaning (``probe``); part of the budget.

    Raises:
        ConfigError: A number is below its minimum.
        MissingExtraError: cleanlab is not installed; raised before anything is trained.

    Source: cleanlab's ``find_label_issues`` with its defaults; its use per client: inferred.
    """

    def __init__(
        self,
        action: Literal["prune", "relabel"] = "prune",
        probabilities: Literal["folds", "probe"] = "folds",
        *,
        folds: IntAboveOne = 4,
        epochs: PositiveInt = 5,
        warmup: NonNegativeInt = 5,
    ) -> None:
        check_arguments(LocalCleaning.__init__, locals(), "model.init_args.method.init_args")
        self.action, self.probabilities = action, probabilities
        self.folds, self.epochs, self.warmup = folds, epochs, warmup
        self.issues: float | None = None  # fraction of samples, once they are cleaned

    def local_rounds(self) -> int:
        """Epochs of the folds' models."""
        return self.folds * self.epochs if self.probabilities == "folds" else 0

    @property
    def client_side(self) -> ClientSide:
        """Clients that clean their own labels."""
        return CleaningClientSide(self)

    def before_rounds(self, fed: Federation) -> None:
        """Check for cleanlab; clean with the folds' models."""
        find_issues(torch.tensor([0, 1]), torch.eye(2))
        if self.probabilities == "folds":
            for fold in range(self.folds):
                request = FoldRequest(model=fed.global_state, epochs=self.epochs, fold=fold)
                fed.exchange(self.client_side, dict.fromkeys(range(fed.num_clients), request))
            self._clean(fed)

    def before_round(self, fed: Federation, round: int) -> None:
        """Clean with the probe once the warm-up is over."""
        if self.probabilities == "probe" and round >= self.warmup and self.issues is None:
            request = ProbeRequest(model=fed.global_state)
            fed.exchange(self.client_side, dict.fromkeys(range(fed.num_clients), request))
            self._clean(fed)

    def _clean(self, fed: Federation) -> None:
        requests = dict.fromkeys(range(fed.num_clients), CleanRequest())
        replies: Replies[CleanReply] = fed.exchange(self.client_side, requests)
        counts = replies.gather().values()
        self.issues = 1 - sum(r.trained for r in counts) / sum(r.samples for r in counts)

    def report(self) -> dict[str, float]:
        """Fraction of the samples with issues."""
        return {} if self.issues is None else {"issues": self.issues}

    def state_dict(self) -> dict[str, Any]:
        """The fraction of samples with issues."""
        return {"issues": self.issues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.issues = state["issues"]
