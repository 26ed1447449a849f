"""Stage I of FedSIR: clients train alone, and their class spectra tell clean from noisy.

Axes: K clients, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation import ClientStates, Federation, LogitLoss
from fulgurite.models.fedsir.spectra import SpectraAccumulator, client_score, similarity

if TYPE_CHECKING:
    from fulgurite.models.fedsir.identification import ClientSplit

__all__ = ["Identification", "SpectralIdentification", "accumulate"]


@dataclass(frozen=True)
class Identification:
    """Outcome of Stage I.

    Attributes:
        split: The predicted clean clients, and the reason.
        scores: off_mean and off_energy of each client. Shape: (K, 2).
        similarities: Cosines between the classes' dominant directions. Shape: (K, C, C).
        states: Models after training alone, of this rank's clients.
    """

    split: ClientSplit
    scores: Tensor
    similarities: Tensor
    states: ClientStates


def accumulate(
    fed: Federation, client: int, state: Tensor, labels: Tensor, *, augmented: str | None = None
) -> SpectraAccumulator:
    """Class spectra of a client's features under a model.

    Args:
        fed: The federation.
        client: Client whose samples are used.
        state: Flat state of the model. Shape: (P,).
        labels: Labels that group the samples into classes. Shape: (N_k,).
        augmented: Key of the augmentation's random numbers, as in :meth:`Federation.features`.
    """
    spectra: SpectraAccumulator | None = None
    for features, _, part in fed.features(client, state, augmented=augmented):
        if spectra is None:
            spectra = SpectraAccumulator(fed.num_classes, features.shape[1], features.device)
        spectra.update(features, labels[part])
    assert spectra is not None  # a client without samples is refused by the DataModule
    return spectra


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

    Source: FedSIR, arXiv 2604.20825, Stage I.
    """

    epochs: int = 5
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
        if self.epochs < 0:
            raise ConfigError(
                f"identification.epochs={self.epochs} is negative.", "Give 0 or more."
            )

    def __call__(self, fed: Federation, *, purpose: str = "identify") -> Identification:
        """Train, score and split; every rank takes part and gets the same split.

        Args:
            fed: The federation; its global model is where each client starts.
            purpose: Key of the random numbers, which differs in repeated identifications.
        """
        from fulgurite.models.fedsir.identification import split_clients

        clients = range(fed.num_clients)
        fed.send_global(clients)  # the common start
        states = fed.train(
            clients,
            lambda client: LogitLoss(),
            purpose=purpose,
            epochs=self.epochs,
            optimizer=self.optimizer,
        )
        augmented = purpose if self.features == "augmented" else None
        scores, cosines = {}, {}
        for client, state in states.items():
            labels = fed.client_labels(client)
            spectra = accumulate(fed, client, state, labels, augmented=augmented)
            scores[client] = client_score(spectra, self.min_count)
            cosines[client] = similarity(spectra, self.min_count)
        fed.costs.bytes_up += fed.num_clients * 2 * 4  # two float32 statistics each
        table = fed.gather_rows(scores, clients)
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
        fed.state.write(fed.global_state)
        return Identification(split, table, fed.gather_rows(cosines, clients), states)


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
