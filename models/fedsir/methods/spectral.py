"""Stage I of FedSIR: clients train alone, and their class spectra tell clean from noisy.

Axes: K clients, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    ClientStates,
    Federation,
    LogitLoss,
    Replies,
    Reply,
    Request,
    TrainingTask,
    TrainReply,
)
from fulgurite.models.fedsir.identification import ClientSplit, split_clients
from fulgurite.models.fedsir.spectra import SpectraAccumulator, client_score, similarity
from fulgurite.models.fedsir.wire import on_wire
from fulgurite.options import NonNegativeInt, check_options

__all__ = [
    "Identification",
    "IdentifyReply",
    "IdentifyRequest",
    "ModelRequest",
    "SpectralClientSide",
    "SpectralIdentification",
    "accumulate",
    "clean_reference",
]


@dataclass(frozen=True)
class Identification:
    """Outcome of Stage I.

    Attributes:
        split: The predicted clean clients, and the reason.
        scores: off_mean and off_energy of each client. Shape: (K, 2).
        similarities: Cosines between the classes' dominant directions. Shape: (K, C, C).
        clean_state: Average of the clean clients' models after training alone; the global model
            where no client is clean. Shape: (P,).
    """

    split: ClientSplit
    scores: Tensor
    similarities: Tensor
    clean_state: Tensor

    @property
    def evidence(self) -> dict[str, Tensor]:
        """What the split rests on, on the CPU, for figures and checkpoints."""
        return {
            "scores": self.scores.cpu(),
            "similarities": self.similarities.cpu(),
            "p_clean": self.split.p_clean.cpu(),
        }


@dataclass(frozen=True, kw_only=True)
class IdentifyRequest(Request):
    """Train alone, and score the class spectra of your features.

    Attributes:
        purpose: Key of the random numbers, which differs in repeated identifications.
        restore_labels: Take up the given labels again, and forget what was known of samples.
    """

    model: Tensor
    purpose: str = "identify"
    restore_labels: bool = False


@dataclass(frozen=True, kw_only=True)
class IdentifyReply(Reply):
    """Scores of a client.

    Attributes:
        scores: off_mean and off_energy. Shape: (2,).
        similarities: Cosines between the classes' dominant directions, for figures. Shape: (C, C).
    """

    scores: Tensor = field(metadata=on_wire(torch.float32))
    similarities: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Request):
    """Send the model that you have trained alone."""

    continues: ClassVar[bool] = True


def accumulate(
    client: Client, state: Tensor, labels: Tensor, *, augmented: str | None = None
) -> SpectraAccumulator:
    """Class spectra of a client's features under a model.

    Args:
        client: Client whose samples are used.
        state: Flat state of the model. Shape: (P,).
        labels: Labels that group the samples into classes. Shape: (N_k,).
        augmented: Key of the augmentation's random numbers, as in
            :meth:`~fulgurite.models.fedsir.federation.LocalTrainer.features`.
    """
    spectra: SpectraAccumulator | None = None
    for features, _, part in client.features(state, augmented=augmented):
        if spectra is None:
            classes = client.trainer.num_classes
            spectra = SpectraAccumulator(classes, features.shape[1], features.device)
        spectra.update(features, labels[part])
    assert spectra is not None  # a client without samples is refused by the DataModule
    return spectra


class SpectralClientSide(ClientSide):
    """Clients that train alone, score their class spectra, and send their model where asked to.

    Args:
        identification: Options of Stage I.

    Source: docs/papers/fedsir.md Stage I.
    """

    def __init__(self, identification: SpectralIdentification) -> None:
        self.identification = identification

    def task(self, client: Client, request: Request) -> TrainingTask | None:
        """Train by cross-entropy, on the given labels where they are to be restored."""
        if not isinstance(request, IdentifyRequest):
            return super().task(client, request)
        if request.restore_labels:
            client.relabel(client.given_labels)
            client.forget()
        return TrainingTask(LogitLoss(), request.purpose, self.identification.optimizer)

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Answer with scores, or with the model behind them."""
        if isinstance(request, ModelRequest):
            return TrainReply(model=client.intermediate.pop("model"))
        if not isinstance(request, IdentifyRequest) or trained is None:
            return super().reply(client, request, trained)
        options = self.identification
        augmented = request.purpose if options.features == "augmented" else None
        spectra = accumulate(client, trained, client.labels, augmented=augmented)
        client.intermediate["model"] = trained
        return IdentifyReply(
            scores=client_score(spectra, options.min_count),
            similarities=similarity(spectra, options.min_count),
        )


@dataclass
class SpectralIdentification:
    """Identification of clients with clean labels from models that each trained alone.

    Args:
        epochs: Local epochs of each client.
        optimizer: Optimizer of these epochs; the federation's by default. (Paper: Adam, lr 5e-5,
            weight decay 5e-2, from ImageNet weights; from scratch the lr must be larger.)
        features: Images from which features are computed: ``plain`` ones, or ``augmented`` as in
            training, as the authors' code does.
        statistics: Scores used: ``both`` off_mean and off_energy (paper), or ``off_mean`` alone.
        min_count: Classes with fewer samples are left out of a client's score.
        always_split: Split into two groups even where the scores show only one (paper).
        threshold: Smallest posterior of a clean client.
        small_gap: Smallest gap of a significant split; see
            :func:`~fulgurite.models.fedsir.identification.split_clients`.
        wide_gap: Gap of a split that needs no test.
        level: Significance level of the test.
        noisy_above: Mean off_mean above which clients that are all alike are all noisy; by
            default they are all clean.

    Raises:
        ConfigError: ``epochs`` is negative.

    Source: docs/papers/fedsir.md Stage I.
    """

    epochs: NonNegativeInt = 5
    optimizer: OptimizerCallable | None = None
    features: Literal["plain", "augmented"] = "plain"
    statistics: Literal["both", "off_mean"] = "both"
    min_count: int = 20
    always_split: bool = False
    threshold: float = 0.5
    small_gap: float = 0.02
    wide_gap: float = 0.06
    level: float = 0.05
    noisy_above: float | None = None

    def __post_init__(self) -> None:
        check_options(self, "model.init_args.method.init_args.identification.init_args")

    def __call__(
        self, fed: Federation, *, purpose: str = "identify", restore_labels: bool = False
    ) -> Identification:
        """Let clients train and score, and split them; every rank gets the same split.

        Args:
            fed: The federation; its global model is where each client starts.
            purpose: Key of the random numbers, which differs in repeated identifications.
            restore_labels: Identify on the given labels: relabeled ones would make noisy clients
                look clean.
        """
        side = SpectralClientSide(self)
        request = IdentifyRequest(
            model=fed.global_state,
            epochs=self.epochs,
            purpose=purpose,
            restore_labels=restore_labels,
        )
        replies: Replies[IdentifyReply] = fed.exchange(
            side, dict.fromkeys(range(fed.num_clients), request)
        )
        table = replies.stack(lambda client, reply: reply.scores)
        judged = table if self.statistics == "both" else table[:, :1].expand(-1, 2)
        split = split_clients(
            judged.cpu(),
            seed=fed.seed % 2**32,
            threshold=self.threshold,
            force_two=self.always_split,
            small_gap=self.small_gap,
            wide_gap=self.wide_gap,
            level=self.level,
            noisy_above=self.noisy_above,
        )
        rank_zero_info(f"identification: {split.reason}")
        clean_clients = torch.nonzero(split.clean).flatten().tolist()
        models = fed.exchange(side, dict.fromkeys(clean_clients, ModelRequest())).models
        return Identification(
            split,
            table,
            replies.stack(lambda client, reply: reply.similarities),
            clean_reference(fed, split.clean, models),
        )


def clean_reference(fed: Federation, clean: Tensor, states: ClientStates) -> Tensor:
    """FedAvg of clean clients' models.

    Args:
        fed: The federation.
        clean: Mask of the clean clients, bool. Shape: (K,).
        states: Flat states of this rank's clients.

    Returns:
        Flat model; the global one where no client is clean. Shape: (P,).
    """
    clean_clients = torch.nonzero(clean).flatten().tolist()
    if not clean_clients:
        return fed.global_state
    clean_states = {k: states[k] for k in clean_clients if k in states}
    return fed.average(clean_states, fed.size_weights(clean_clients))
