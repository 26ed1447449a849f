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
    MiniBatch,
    Objective,
    keyed_generator,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod, LogitLoss

__all__ = ["LocalCleaning", "SubsetLoss", "find_issues"]


def find_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Samples whose label confident learning holds for wrong.

    Args:
        labels: Shape: (N,).
        probabilities: Out of fold. Shape: (N, C).

    Returns:
        bool. Shape: (N,).

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
    found = find_label_issues(labels.numpy(), probabilities.double().numpy(), n_jobs=1)
    return torch.from_numpy(np.asarray(found, dtype=bool))


class SubsetLoss:
    """Cross-entropy of the samples kept; the others only pass through BatchNorm.

    Args:
        kept: bool, of all samples. Shape: (N,).

    Source: inferred.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """Mean over the samples kept; 0 for none."""
        each = F.cross_entropy(network(batch.images), batch.labels, reduction="none")
        kept = move(self.kept[batch.index], each.device, each.dtype)
        return (each * kept).sum() / kept.sum().clamp_min(1)


def _always(loss: Objective) -> Callable[[int], Objective]:
    return lambda client: loss


class LocalCleaning(FederatedMethod):
    """What practitioners do: every client cleans its own labels, then FedAvg.

    Out-of-fold probabilities come from one of two sources:

    - ``folds``: before round 0 each client trains, from the initial model and alone, one model
      per fold on the other folds. This costs ``folds · epochs`` local epochs, which
      :meth:`local_rounds` reports. The samples of the fold have no loss, but their images still
      pass through BatchNorm.
    - ``probe``: after ``warmup`` rounds of FedAvg, a logistic regression on the features of the
      global model, cross-validated. No epoch more; but the features have seen the labels.

    There is no exchange between clients that could tell which of them is noisy.

    Args:
        action: ``prune`` the samples found, or ``relabel`` them with the likeliest class.
        probabilities: See above.
        folds: Folds of the cross-validation.
        epochs: Local epochs of a fold's model (``folds``).
        warmup: Rounds before cleaning (``probe``); part of the budget.

    Raises:
        ConfigError: A number is out of range.
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
            self._clean(fed, self._from_folds(fed))

    def before_round(self, fed: Federation, round: int) -> None:
        """Clean with the probe once the warm-up is over."""
        if self.probabilities == "probe" and round >= self.warmup and self.kept is None:
            fed.send_global(range(fed.num_clients))
            own = fed.own(range(fed.num_clients))
            self._clean(fed, {k: self._from_probe(fed, k) for k in own})
            fed.state.write(fed.global_state)

    def _fold_of(self, fed: Federation, client: int) -> Tensor:
        """Which fold holds out each sample of a client. Shape: (N_k,)."""
        samples = len(fed.index[client])
        order = torch.randperm(samples, generator=keyed_generator(fed.seed, "folds", client))
        return order % self.folds

    def _from_folds(self, fed: Federation) -> dict[int, Tensor]:
        clients = range(fed.num_clients)
        fold = torch.zeros(len(fed.labels.given), dtype=torch.int64)
        for client in clients:
            fold[fed.index[client]] = self._fold_of(fed, client)
        found = {
            k: torch.zeros(len(fed.index[k]), fed.num_classes) for k in fed.own(clients)
        }  # fmt: skip
        for held in range(self.folds):
            states = fed.train(
                clients,
                _always(SubsetLoss(fold != held)),
                purpose=f"fold-{held}",
                epochs=self.epochs,
            )
            for client, state in states.items():
                out = fold[fed.index[client]] == held
                found[client][out] = fed.logits(client, state).softmax(1).cpu()[out]
        fed.state.write(fed.global_state)
        return found

    def _from_probe(self, fed: Federation, client: int) -> Tensor:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features = torch.cat([f.float() for f, _, _ in fed.features(client, fed.global_state)])
        table = features.cpu().double().numpy()
        labels = fed.labels.given[fed.index[client]].numpy()
        fold = self._fold_of(fed, client).numpy()
        found = np.full((len(labels), fed.num_classes), 1 / fed.num_classes)
        for held in range(self.folds):
            train = fold != held
            if held not in fold or len(np.unique(labels[train])) < 2:
                continue
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(table[train], labels[train])
            found[~train] = 0.0
            found[np.ix_(~train, probe.classes_)] = probe.predict_proba(table[~train])
        return torch.from_numpy(found)

    def _clean(self, fed: Federation, probabilities: dict[int, Tensor]) -> None:
        kept, labels = {}, {}
        for client, table in probabilities.items():
            given = fed.labels.given[fed.index[client]]
            wrong = find_issues(given, table)
            labels[client] = table.argmax(1).where(wrong, given)
            # a client that would keep nothing keeps all: it cannot train on nothing
            kept[client] = ~wrong if not bool(wrong.all()) else torch.ones_like(wrong)
        if self.action == "relabel":
            fed.relabel(labels)
        self.kept = torch.ones(len(fed.labels.given), dtype=torch.bool)
        for client, mask in fed.gather_objects(kept).items():
            self.kept[fed.index[client]] = mask
        self.issues = 1 - float(self.kept.double().mean())

    def objective(self, fed: Federation, client: int, round: int) -> Objective:
        """Cross-entropy of the samples kept."""
        if self.kept is None or self.action == "relabel":
            return LogitLoss()
        return SubsetLoss(self.kept)

    def report(self) -> dict[str, float]:
        """Share of the samples found to be issues."""
        return {} if self.issues is None else {"issues": self.issues}

    def state_dict(self) -> dict[str, Any]:
        """Which samples are kept."""
        return {"kept": self.kept, "issues": self.issues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state again."""
        self.kept, self.issues = state["kept"], state["issues"]
