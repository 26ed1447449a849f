"""The client side: a client's own samples, and how it answers the server's requests.

Axes: N_k samples of the client, C classes, P flat state size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.models.fedsir.federation.messages import Reply, Request, TrainReply, TrainRequest
from fulgurite.models.fedsir.federation.objectives import LogitLoss, Objective
from fulgurite.models.fedsir.federation.training import LocalTrainer, OptimizerFactory

__all__ = ["Client", "ClientSide", "TrainingTask"]


class Client:
    """A simulated client: its samples and labels, and what it keeps between requests.

    Args:
        trainer: Trains its models and computes features.
        number: Its number.
    """

    def __init__(self, trainer: LocalTrainer, number: int) -> None:
        self.trainer, self.number = trainer, number
        self.index = trainer.index[number]
        #: What it knows of its samples, such as weights of their losses. Part of checkpoints.
        self.memory: dict[str, Tensor] = {}
        #: What the next request needs, if that continues; not part of checkpoints.
        self.intermediate: dict[str, Tensor] = {}
        self.has_changed = False  # its labels or memory, since ranks last exchanged them

    def __len__(self) -> int:
        return len(self.index)

    @property
    def given_labels(self) -> Tensor:
        """Labels as given. Shape: (N_k,)."""
        return self.trainer.labels.given[self.index]

    @property
    def labels(self) -> Tensor:
        """Current labels. Shape: (N_k,)."""
        return self.trainer.client_labels(self.number)

    def count_labels(self, *, current: bool = False) -> Tensor:
        """Number of samples of each class, by the given labels or the current ones. Shape: (C,)."""
        labels = self.labels if current else self.given_labels
        return labels.bincount(minlength=self.trainer.num_classes)

    def relabel(self, labels: Tensor) -> None:
        """Replace the current labels. Shape: (N_k,)."""
        self.trainer.labels.write(self.index, labels.cpu())
        self.has_changed = True

    def remember(self, **vectors: Tensor) -> None:
        """Keep vectors over the samples, by name, on the CPU."""
        self.memory |= {name: vector.cpu() for name, vector in vectors.items()}
        self.has_changed = True

    def forget(self) -> None:
        """Empty the memory."""
        self.memory = {}
        self.has_changed = True

    def features(
        self, state: Tensor, *, augmented: str | None = None
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Features and logits of its samples; see :meth:`LocalTrainer.features`."""
        return self.trainer.features(self.number, state, augmented=augmented)

    def logits(self, state: Tensor) -> Tensor:
        """Logits of its samples under a model. Shape: (N_k, C)."""
        return self.trainer.logits(self.number, state)

    def frozen(self, state: Tensor) -> nn.Module:
        """A frozen model, in evaluation mode, until another is asked for."""
        return self.trainer.frozen(state)

    @property
    def images(self) -> Tensor:
        """Its images as stored. Shape: (N_k, channels, height, width)."""
        return self.trainer.data.client_images(self.number)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Network input of some images, augmented. Shape: (B, channels, height, width)."""
        return self.trainer.data.augment_batch(move(images, self.trainer.device), generator)


@dataclass(frozen=True)
class TrainingTask:
    """Local training that a request asks for.

    Attributes:
        objective: The local loss.
        purpose: Key of the random numbers: the round, or the name of a stage.
        optimizer: Makes the optimizer; the federation's by default.
    """

    objective: Objective
    purpose: int | str
    optimizer: OptimizerFactory | None = None


class ClientSide:
    """How the clients of FedAvg answer: they train by cross-entropy, and send their model.

    It holds options and no state, so that a process of its own may run it beside each client. A
    method with more stages answers their requests, too.
    """

    def task(self, client: Client, request: Request) -> TrainingTask | None:
        """The training that a request asks for, from its model over its epochs, or none."""
        if isinstance(request, TrainRequest):
            return TrainingTask(self.objective(client, request), request.round)
        return None

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """The local loss of a round."""
        return LogitLoss()

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Answer a request.

        Args:
            client: The client.
            request: What the server asks.
            trained: Flat state after the training of :meth:`task`. Shape: (P,).
        """
        if isinstance(request, TrainRequest) and trained is not None:
            return TrainReply(model=trained)
        raise TypeError(f"{type(self).__name__} has no answer to a {type(request).__name__}.")
