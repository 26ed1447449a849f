"""FedCorr: noisy clients from the dimension of their predictions, noisy labels from losses.

Axes: K clients, N samples of a client, B mini-batch, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation import (
    ClientStates,
    Federation,
    LogitLoss,
    MiniBatch,
    Objective,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod

EPSILON = 1e-6
"""Keeps the intrinsic dimension finite; the authors' value."""

__all__ = ["EPSILON", "FedCorr", "MixupLoss", "intrinsic_dimension", "upper_group"]


def intrinsic_dimension(points: Tensor, neighbours: int = 20) -> Tensor:
    """Local intrinsic dimension of each point among the others (maximum likelihood).

    ``−k / Σ_i log(r_i / (r_k + ε))`` over the distances r_1 ≤ … ≤ r_k to the k nearest neighbours,
    with ε = 1e-6: where predictions are saturated, neighbours are so close that their distances
    are rounding, and without ε one such point decides the mean of its client.

    Args:
        points: Predictions, or other points. Shape: (N, C).
        neighbours: Number of nearest neighbours k; at most N − 1 are used.

    Returns:
        Local dimensions, float64; 0 for a duplicated point. Shape: (N,).

    Example:
        >>> line = torch.linspace(0, 1, 200)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(float(intrinsic_dimension(line, 20).median()))
        1

    Source: FedCorr, CVPR 2022, equation of LID, and ε of its authors' code, where it is added to
    the sum (which may then be positive), not taken from it; Amsaleg et al., KDD 2015.
    """
    points = points.double()
    k = min(neighbours, len(points) - 1)
    if k < 1:
        return torch.zeros(len(points), dtype=torch.float64, device=points.device)
    dimensions = []
    for start in range(0, len(points), 1024):  # N × N distances need not fit at once
        rows = points[start : start + 1024]
        distance = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        row_index = torch.arange(len(rows), device=points.device)
        distance[row_index, start + row_index] = torch.inf
        nearest = distance.topk(k, largest=False).values
        logs = (nearest / (nearest[:, -1:] + EPSILON)).log().sum(1)  # −inf for a duplicate
        dimensions.append(k / (EPSILON - logs))
    return torch.cat(dimensions)


def upper_group(values: Tensor, seed: int = 0) -> Tensor:
    """Mask of the values that a mixture of two Gaussians assigns to the component of larger mean.

    Args:
        values: Values to split. Shape: (N,).
        seed: Random state of the mixture.

    Returns:
        Mask, bool; all false where the values are equal. Shape: (N,).

    Example:
        >>> upper_group(torch.tensor([0.1, 0.2, 5.0, 0.15, 5.1])).tolist()
        [False, False, True, False, True]

    Source: FedCorr, CVPR 2022, pre-processing stage.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    column = values.detach().cpu().double().numpy()[:, None]
    if len(column) < 2 or np.allclose(column, column[:1]):
        return torch.zeros(len(column), dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture = GaussianMixture(2, random_state=seed).fit(column)
    return torch.from_numpy(mixture.predict(column) == mixture.means_[:, 0].argmax())


class MixupLoss:
    """A loss of mixed pairs of a mini-batch, with mixed labels.

    Draws from torch's CPU generator, which the federation seeds for each client.

    Args:
        loss: The loss of mixed images and label distributions.
        alpha: Mixing weights of the pairs are Beta(alpha, alpha).

    Source: mixup, Zhang et al., ICLR 2018, as FedCorr uses it.
    """

    def __init__(self, loss: LogitLoss, alpha: float) -> None:
        self.loss, self.alpha = loss, alpha

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The loss of mixed pairs."""
        concentration = torch.tensor([self.alpha, self.alpha])
        mix_weight = float(torch.distributions.Dirichlet(concentration).sample()[0])
        order = move(torch.randperm(len(batch.labels)), batch.labels.device)
        classes: int = network.head.out_features  # type: ignore[union-attr, assignment]
        labels = F.one_hot(batch.labels, classes).to(batch.images)
        mixed = MiniBatch(
            mix_weight * batch.images + (1 - mix_weight) * batch.images[order],
            mix_weight * labels + (1 - mix_weight) * labels[order],
            batch.index,
        )
        return self.loss(network, mixed)


class FedCorr(FederatedMethod):
    """Pre-processing that detects and corrects, finetuning on clean clients, then FedAvg.

    All three stages are rounds of ``trainer.max_epochs``:

    1. ``preprocessing`` rounds. Each client's local model predicts its samples; the mean local
       intrinsic dimension (LID) of the predictions is accumulated, and a mixture splits the
       clients, noisy ones having the larger. On a noisy client a mixture of the losses splits
       the samples; the fraction of the upper ones estimates its noise level, and of the samples
       with the largest losses, ``relabel_ratio`` times that fraction is relabeled where the
       global model is confident. Local training has a proximal term ``β · level · ‖w −
       w_global‖²``.
    2. ``finetuning`` rounds of clients with a level up to ``clean_level``.
    3. All confident samples of noisy clients are relabeled by the global model; then FedAvg on
       all clients in the remaining rounds. Without remaining rounds there is no such relabeling.

    From the paper and its authors' code: the above and the defaults (5 : 50 : 45 is the paper's
    CIFAR-10 schedule in passes over all clients). Simplified: in a pre-processing round all
    clients start from one global model, where the authors train them one after the other, each
    from the one before. Ours: the loss of a sample is the cross-entropy (the code takes it of
    probabilities as if they were logits); the proximal term is squared as in the paper (the
    code takes the norm); the mean LID is over the rounds in which a client took part, and a
    client that took part in none counts as noisy with level 1. Under partial participation a
    finetuning round without a clean client trains the sampled client of the lowest level.

    Args:
        preprocessing: Rounds of the first stage.
        finetuning: Rounds of the second stage.
        beta: β of the proximal term.
        neighbours: Number of neighbours k of the LID.
        relabel_ratio: Fraction of the detected samples that may be relabeled.
        confidence: Smallest probability of a new label.
        clean_level: Largest noise level of clients that finetune.
        mixup: Parameter of mixup, in all stages; 0 for none.

    Raises:
        ConfigError: A number is below its minimum, or a fraction outside [0, 1].

    Source: Xu et al., FedCorr, CVPR 2022 (arXiv 2204.04677).
    """

    def __init__(
        self,
        preprocessing: int = 5,
        finetuning: int = 50,
        beta: float = 5.0,
        neighbours: int = 20,
        relabel_ratio: float = 0.5,
        confidence: float = 0.5,
        clean_level: float = 0.1,
        mixup: float = 1.0,
    ) -> None:
        fractions = {
            "relabel_ratio": relabel_ratio, "confidence": confidence, "clean_level": clean_level
        }  # fmt: skip
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"model.init_args.method.init_args.{name}={value} is not in [0, 1].",
                    "Give a share.",
                )
        minima = {"preprocessing": 1, "finetuning": 0, "neighbours": 1, "beta": 0, "mixup": 0}
        numbers = (preprocessing, finetuning, neighbours, beta, mixup)
        for (name, low), number in zip(minima.items(), numbers, strict=True):
            if number < low:
                raise ConfigError(
                    f"model.init_args.method.init_args.{name}={number} is too small.",
                    f"Give {low} or more.",
                )
        self.preprocessing, self.finetuning, self.beta = preprocessing, finetuning, beta
        self.neighbours, self.relabel_ratio, self.confidence = (
            neighbours, relabel_ratio, confidence
        )  # fmt: skip
        self.clean_level, self.mixup = clean_level, mixup
        self.is_clean: Tensor | None = None
        self.lid_sum: Tensor | None = None  # over the rounds a client took part in, (K,)
        self.lid_count: Tensor | None = None  # those rounds, (K,)
        self.level: Tensor | None = None  # estimated fraction of wrong labels, (K,)

    @property
    def clean(self) -> Tensor | None:
        """Predicted clean mask, bool; None before identification. Shape: (K,)."""
        return self.is_clean

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """In the finetuning stage, the sampled clients of a low level."""
        level = self.level
        if level is None or not 0 <= round - self.preprocessing < self.finetuning:
            return list(sampled)
        low_noise = [k for k in sampled if float(level[k]) <= self.clean_level]
        return low_noise or [min(sampled, key=lambda k: (float(level[k]), k))]

    def objective(self, fed: Federation, client: int, round: int) -> Objective:
        """Cross-entropy, mixed, with the proximal term in the pre-processing stage."""
        loss = LogitLoss()
        level = 0.0 if self.level is None else float(self.level[client])
        if round < self.preprocessing and self.beta * level > 0:
            anchor = {n: p.detach() for n, p in fed.teacher().named_parameters()}
            loss = LogitLoss(proximal=2 * self.beta * level, anchor=anchor)
        return MixupLoss(loss, self.mixup) if self.mixup else loss

    def after_round(
        self, fed: Federation, round: int, clients: Sequence[int], states: ClientStates
    ) -> None:
        """Detect and correct after a pre-processing round."""
        if round < self.preprocessing:
            self._preprocess(fed, clients, states)

    def before_round(self, fed: Federation, round: int) -> None:
        """Correct with the finetuned model before the first round of the third stage."""
        if self.finetuning and round == self.preprocessing + self.finetuning:
            self._correct_all(fed)

    def _preprocess(self, fed: Federation, clients: Sequence[int], states: ClientStates) -> None:
        seed = fed.seed % 2**32
        means, losses = {}, {}
        for client, state in states.items():
            logits = fed.logits(client, state)
            lid = intrinsic_dimension(logits.softmax(1), self.neighbours)
            means[client] = lid.mean().cpu()
            losses[client] = F.cross_entropy(
                logits.cpu(), fed.client_labels(client), reduction="none"
            )
        if self.lid_sum is None or self.lid_count is None or self.level is None:
            self.lid_sum = torch.zeros(fed.num_clients, dtype=torch.float64)
            self.lid_count = torch.zeros(fed.num_clients, dtype=torch.float64)
            self.level = torch.ones(fed.num_clients, dtype=torch.float64)
        client_rows = torch.tensor(list(clients))
        self.lid_sum[client_rows] += fed.gather_rows(means, clients).cpu()
        self.lid_count[client_rows] += 1
        measured = self.lid_count > 0
        self.is_clean = measured.clone()
        self.is_clean[measured] = ~upper_group((self.lid_sum / self.lid_count)[measured], seed)
        self.level[self.is_clean] = 0.0

        levels: dict[int, float] = {}
        new: dict[int, Tensor] = {}
        for client, loss in losses.items():
            if not self.is_clean[client]:
                levels[client] = float(upper_group(loss, seed).double().mean())
                number = int(len(loss) * levels[client] * self.relabel_ratio)
                worst = torch.zeros(len(loss), dtype=torch.bool)
                worst[loss.argsort(descending=True, stable=True)[:number]] = True
                new[client] = self._correct_labels(fed, client, worst)
        fed.state.write(fed.global_state)
        for client, value in fed.gather_objects(levels).items():
            self.level[client] = value
        fed.send_global([k for k in clients if not self.is_clean[k]])  # relabels their samples
        fed.relabel(new)
        fed.costs.bytes_up += len(clients) * 2 * 4  # mean LID and noise level

    def _correct_labels(self, fed: Federation, client: int, among: Tensor) -> Tensor:
        """Labels of a client, replaced where the global model is confident. Shape: (N,)."""
        sure, guess = fed.logits(client, fed.global_state).softmax(1).cpu().max(1)
        return guess.where(among & (sure > self.confidence), fed.client_labels(client))

    def _correct_all(self, fed: Federation) -> None:
        if self.is_clean is None:
            return
        noisy = torch.nonzero(~self.is_clean).flatten().tolist()
        fed.relabel(
            {
                k: self._correct_labels(fed, k, torch.ones(len(fed.index[k]), dtype=torch.bool))
                for k in fed.local_clients(noisy)
            }
        )
        fed.state.write(fed.global_state)
        fed.send_global(noisy)

    def report(self) -> dict[str, float]:
        """Mean estimated noise level of the noisy clients."""
        if self.level is None or self.is_clean is None or bool(self.is_clean.all()):
            return {}
        return {"noise_level": float(self.level[~self.is_clean].mean())}

    def state_dict(self) -> dict[str, Any]:
        """The split, and the dimensions and levels behind it."""
        return {
            "split_clean": self.is_clean,
            "lid_sum": self.lid_sum,
            "lid_count": self.lid_count,
            "level": self.level,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.is_clean = state["split_clean"]
        for name in ("lid_sum", "lid_count", "level"):
            value = state[name]
            setattr(self, name, None if value is None else value.cpu())
