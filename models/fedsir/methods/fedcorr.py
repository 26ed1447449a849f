"""FedCorr: noisy clients from the dimension of their predictions, noisy labels from losses.

Axes: K clients, N samples of a client, B mini-batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.devices import move
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
    TrainReply,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.methods.fedavg import proximal_loss
from fulgurite.models.fedsir.mixtures import fit_two_gaussians
from fulgurite.models.fedsir.wire import on_wire
from fulgurite.options import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_arguments,
)

EPSILON = 1e-6
"""Keeps the intrinsic dimension finite; the authors' value."""

__all__ = [
    "EPSILON",
    "CorrectRequest",
    "FedCorr",
    "FedCorrClientSide",
    "FedCorrTrainReply",
    "FedCorrTrainRequest",
    "LevelReply",
    "LevelRequest",
    "MixupLoss",
    "intrinsic_dimension",
    "upper_group",
]


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
    column = values.detach().cpu().double().numpy()[:, None]
    if len(column) < 2 or np.allclose(column, column[:1]):
        return torch.zeros(len(column), dtype=torch.bool)
    mixture = fit_two_gaussians(column, random_state=seed)
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


@dataclass(frozen=True, kw_only=True)
class FedCorrTrainRequest(TrainRequest):
    """Train in one of the stages.

    Attributes:
        preprocessing: Whether this is a round of the first stage.
        level: The client's estimated fraction of wrong labels.
    """

    preprocessing: bool
    level: float


@dataclass(frozen=True, kw_only=True)
class FedCorrTrainReply(TrainReply):
    """A trained model, and the dimension of its predictions.

    Attributes:
        dimension: Mean local intrinsic dimension, float64; None after the first stage. Shape: ().
    """

    dimension: Tensor | None = field(default=None, metadata=on_wire(torch.float32))


@dataclass(frozen=True, kw_only=True)
class LevelRequest(Request):
    """Estimate your noise level; with a model, relabel the samples of large losses by it."""

    continues: ClassVar[bool] = True
    optional: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LevelReply(Reply):
    """The estimated fraction of wrong labels.

    Attributes:
        level: float64; 0 for a client that was sent no model. Shape: ().
    """

    level: Tensor = field(metadata=on_wire(torch.float32))


@dataclass(frozen=True, kw_only=True)
class CorrectRequest(Request):
    """Relabel all samples for which a model is confident."""

    optional: ClassVar[bool] = True

    model: Tensor


class FedCorrClientSide(ClientSide):
    """Clients that measure their predictions and correct their labels.

    Args:
        method: The method, of which only options are used.

    Source: FedCorr, CVPR 2022.
    """

    def __init__(self, method: FedCorr) -> None:
        self.options = method

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """Cross-entropy, mixed, with the proximal term in the pre-processing stage."""
        assert isinstance(request, FedCorrTrainRequest)
        loss = LogitLoss()
        strength = 2 * self.options.beta * request.level
        if request.preprocessing and strength > 0:
            loss = proximal_loss(client, request.model, strength)
        return MixupLoss(loss, self.options.mixup) if self.options.mixup else loss

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Answer with a trained model, with a noise level, or without anything."""
        if isinstance(request, LevelRequest):
            return LevelReply(level=self._estimate_level(client, request))
        if isinstance(request, CorrectRequest):
            every = torch.ones(len(client), dtype=torch.bool)
            client.relabel(self._correct_labels(client, request.model, every))
            return Reply()
        if not isinstance(request, FedCorrTrainRequest) or trained is None:
            return super().reply(client, request, trained)
        dimension = self._measure(client, trained) if request.preprocessing else None
        return FedCorrTrainReply(model=trained, dimension=dimension)

    def _measure(self, client: Client, trained: Tensor) -> Tensor:
        """Mean dimension of the predictions of the client's own model, whose losses it keeps."""
        logits = client.logits(trained)
        dimension = intrinsic_dimension(logits.softmax(1), self.options.neighbours).mean().cpu()
        client.intermediate["losses"] = F.cross_entropy(
            logits.cpu(), client.labels, reduction="none"
        )
        return dimension

    def _estimate_level(self, client: Client, request: LevelRequest) -> Tensor:
        loss = client.intermediate.pop("losses")
        if request.model is None:
            return torch.zeros((), dtype=torch.float64)
        level = upper_group(loss, client.trainer.seed % 2**32).double().mean()
        number = int(len(loss) * float(level) * self.options.relabel_ratio)
        worst = torch.zeros(len(loss), dtype=torch.bool)
        worst[loss.argsort(descending=True, stable=True)[:number]] = True
        client.relabel(self._correct_labels(client, request.model, worst))
        return level

    def _correct_labels(self, client: Client, model: Tensor, among: Tensor) -> Tensor:
        """Labels of a client, replaced where a model is confident. Shape: (N_k,)."""
        sure, guess = client.logits(model).softmax(1).cpu().max(1)
        return guess.where(among & (sure > self.options.confidence), client.labels)


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
        preprocessing: PositiveInt = 5,
        finetuning: NonNegativeInt = 50,
        *,
        beta: NonNegativeFloat = 5.0,
        neighbours: PositiveInt = 20,
        relabel_ratio: ClosedUnitInterval = 0.5,
        confidence: ClosedUnitInterval = 0.5,
        clean_level: ClosedUnitInterval = 0.1,
        mixup: NonNegativeFloat = 1.0,
    ) -> None:
        check_arguments(FedCorr.__init__, locals(), "model.init_args.method.init_args")
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

    @property
    def client_side(self) -> ClientSide:
        """Clients that measure their predictions and correct their labels."""
        return FedCorrClientSide(self)

    def training_request(self, fed: Federation, client: int, round: int) -> TrainRequest:
        """The global model, the stage, and the client's noise level."""
        return FedCorrTrainRequest(
            model=fed.global_state,
            epochs=fed.local_epochs,
            round=round,
            preprocessing=round < self.preprocessing,
            level=0.0 if self.level is None else float(self.level[client]),
        )

    def after_round(self, fed: Federation, round: int, replies: Replies[Any]) -> None:
        """Detect and correct after a pre-processing round."""
        if round < self.preprocessing:
            self._preprocess(fed, replies)

    def before_round(self, fed: Federation, round: int) -> None:
        """Correct with the finetuned model before the first round of the third stage."""
        if self.finetuning and round == self.preprocessing + self.finetuning:
            self._correct_all(fed)

    def _preprocess(self, fed: Federation, replies: Replies[Any]) -> None:
        if self.lid_sum is None or self.lid_count is None or self.level is None:
            self.lid_sum = torch.zeros(fed.num_clients, dtype=torch.float64)
            self.lid_count = torch.zeros(fed.num_clients, dtype=torch.float64)
            self.level = torch.ones(fed.num_clients, dtype=torch.float64)
        client_rows = torch.tensor(replies.clients)
        self.lid_sum[client_rows] += replies.stack(lambda client, reply: reply.dimension).cpu()
        self.lid_count[client_rows] += 1
        measured = self.lid_count > 0
        self.is_clean = measured.clone()
        self.is_clean[measured] = ~upper_group(
            (self.lid_sum / self.lid_count)[measured], fed.seed % 2**32
        )
        self.level[self.is_clean] = 0.0
        requests = {
            k: LevelRequest(model=None if bool(self.is_clean[k]) else fed.global_state)
            for k in replies.clients
        }
        levels: Replies[LevelReply] = fed.exchange(self.client_side, requests)
        for client, reply in levels.gather().items():
            self.level[client] = reply.level

    def _correct_all(self, fed: Federation) -> None:
        if self.is_clean is None:
            return
        noisy = torch.nonzero(~self.is_clean).flatten().tolist()
        request = CorrectRequest(model=fed.global_state)
        fed.exchange(self.client_side, dict.fromkeys(noisy, request))

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
