"""Local cleaning: each client finds wrong labels among its own samples with cleanlab.

Axes: N samples, N_k samples of client k, B mini-batch, C classes, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.errors import ConfigError, MissingExtraError
from fulgurite.models.fedsir.federation import (
    Federation,
    LogitLoss,
    MiniBatch,
    Objective,
    keyed_generator,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod

__all__ = ["LocalCleaning", "SubsetLoss", "find_issues"]


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
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise MissingExtraError(
            "LocalCleaning needs cleanlab, which is not installed.",
            "Install it: pip install fulgurite[cleaning]",
        ) from error
    if len(labels) == 0 or bool((labels == labels[0]).all()):
        return torch.zeros(len(labels), dtype=torch.bool)
    # one job: the ranks share a machine
    issues = find_label_issues(labels.numpy(), probabilities.double().numpy(), n_jobs=1)
    return torch.from_numpy(np.asarray(issues, dtype=bool))


class SubsetLoss:
    """Cross-entropy of some of the samples; the others only pass through BatchNorm.

    Args:
        mask: Mask of the samples that have a loss, bool. Shape: (N,).

    Source: inferred.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """Mean over the samples of the mask; 0 if the batch has none."""
        losses = F.cross_entropy(network(batch.images), batch.labels, reduction="none")
        mask = move(self.mask[batch.index], losses.device, losses.dtype)
        return (losses * mask).sum() / mask.sum().clamp_min(1)


def _constant_objective(loss: Objective) -> Callable[[int], Objective]:
    return lambda client: loss


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
        folds: int = 4,
        epochs: int = 5,
        warmup: int = 5,
    ) -> None:
        for name, value, low in (
            ("folds", folds, 2), ("epochs", epochs, 1), ("warmup", warmup, 0)
        ):  # fmt: skip
            if value < low:
                raise ConfigError(
                    f"model.init_args.method.init_args.{name}={value} is too small.",
                    f"Give {low} or more.",
                )
        self.action, self.probabilities = action, probabilities
        self.folds, self.epochs, self.warmup = folds, epochs, warmup
        self.kept: Tensor | None = None  # samples that train, bool, (N,)
        self.issues: float | None = None

    def local_rounds(self) -> int:
        """Epochs of the folds' models."""
        return self.folds * self.epochs if self.probabilities == "folds" else 0

    def before_rounds(self, fed: Federation) -> None:
        """Check for cleanlab; clean with the folds' models."""
        find_issues(torch.tensor([0, 1]), torch.eye(2))
        if self.probabilities == "folds":
            fed.send_global(range(fed.num_clients))  # the common start
            self._clean(fed, self._predict_by_folds(fed))

    def before_round(self, fed: Federation, round: int) -> None:
        """Clean with the probe once the warm-up is over."""
        if self.probabilities == "probe" and round >= self.warmup and self.kept is None:
            fed.send_global(range(fed.num_clients))
            clients = fed.local_clients(range(fed.num_clients))
            self._clean(fed, {k: self._predict_by_probe(fed, k) for k in clients})
            fed.state.write(fed.global_state)

    def _assign_folds(self, fed: Federation, client: int) -> Tensor:
        """Index of the fold that holds out each sample of a client. Shape: (N_k,)."""
        samples = len(fed.index[client])
        order = torch.randperm(samples, generator=keyed_generator(fed.seed, "folds", client))
        return order % self.folds

    def _predict_by_folds(self, fed: Federation) -> dict[int, Tensor]:
        clients = range(fed.num_clients)
        fold = torch.zeros(len(fed.labels.given), dtype=torch.int64)
        for client in clients:
            fold[fed.index[client]] = self._assign_folds(fed, client)
        probabilities = {
            k: torch.zeros(len(fed.index[k]), fed.num_classes) for k in fed.local_clients(clients)
        }  # fmt: skip
        for held_out in range(self.folds):
            states = fed.train(
                clients,
                _constant_objective(SubsetLoss(fold != held_out)),
                purpose=f"fold-{held_out}",
                epochs=self.epochs,
            )
            for client, state in states.items():
                test = fold[fed.index[client]] == held_out
                probabilities[client][test] = fed.logits(client, state).softmax(1).cpu()[test]
        fed.state.write(fed.global_state)
        return probabilities

    def _predict_by_probe(self, fed: Federation, client: int) -> Tensor:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features = torch.cat([f.float() for f, _, _ in fed.features(client, fed.global_state)])
        table = features.cpu().double().numpy()
        labels = fed.labels.given[fed.index[client]].numpy()
        fold = self._assign_folds(fed, client).numpy()
        probabilities = np.full((len(labels), fed.num_classes), 1 / fed.num_classes)
        for held_out in range(self.folds):
            train = fold != held_out
            if held_out not in fold or len(np.unique(labels[train])) < 2:
                continue
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(table[train], labels[train])
            probabilities[~train] = 0.0
            probabilities[np.ix_(~train, probe.classes_)] = probe.predict_proba(table[~train])
        return torch.from_numpy(probabilities)

    def _clean(self, fed: Federation, probabilities: dict[int, Tensor]) -> None:
        masks, labels = {}, {}
        for client, table in probabilities.items():
            given_labels = fed.labels.given[fed.index[client]]
            wrong = find_issues(given_labels, table)
            labels[client] = table.argmax(1).where(wrong, given_labels)
            # a client that would keep nothing keeps all: it cannot train on nothing
            masks[client] = ~wrong if not bool(wrong.all()) else torch.ones_like(wrong)
        if self.action == "relabel":
            fed.relabel(labels)
        self.kept = torch.ones(len(fed.labels.given), dtype=torch.bool)
        for client, mask in fed.gather_objects(masks).items():
            self.kept[fed.index[client]] = mask
        self.issues = 1 - float(self.kept.double().mean())

    def objective(self, fed: Federation, client: int, round: int) -> Objective:
        """Cross-entropy of the samples without issues."""
        if self.kept is None or self.action == "relabel":
            return LogitLoss()
        return SubsetLoss(self.kept)

    def report(self) -> dict[str, float]:
        """Fraction of the samples with issues."""
        return {} if self.issues is None else {"issues": self.issues}

    def state_dict(self) -> dict[str, Any]:
        """The samples without issues, and the fraction of the others."""
        return {"kept": self.kept, "issues": self.issues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.kept, self.issues = state["kept"], state["issues"]
