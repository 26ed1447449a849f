"""Local training of clients, one after the other, and what their models compute on their data.

Axes: N_k samples of client k, B mini-batch, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fulgurite.devices import move
from fulgurite.domains.fedsir import FederatedData
from fulgurite.models.fedsir.federation.objectives import MiniBatch, Objective
from fulgurite.models.fedsir.federation.randomness import (
    keyed_generator,
    keyed_randomness,
    mini_batches,
)
from fulgurite.models.fedsir.federation.states import FlatState

__all__ = ["LocalTrainer", "OptimizerFactory"]

OptimizerFactory = Callable[[Any], Optimizer]


@dataclass
class LocalTrainer:
    """Trains one client after the other in one network, and computes features of their samples.

    Args:
        data: The federated data.
        network: Network trained in place; it holds the global model between rounds.
        optimizer: Makes a client's local optimizer from its parameters.
        seed: Seed of all random numbers in local training.
        batch_size: Mini-batch size of local training.
        local_epochs: Epochs a client trains in a round.
        evaluation_batch_size: Batch size of feature extraction.
        autocast: Makes the context of forward passes (mixed precision).
        resident: Keep a client's images on the device while it trains. Off for clients whose
            images do not fit there.
        vectorize: Number of clients trained in one pass where their objective allows; 0 is off.
        on_step: Called after every local step, to show progress.
    """

    data: FederatedData
    network: nn.Module
    optimizer: OptimizerFactory
    seed: int = 0
    batch_size: int = 64
    local_epochs: int = 1
    evaluation_batch_size: int = 512
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    resident: bool = True
    vectorize: int = 0
    on_step: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.state = FlatState(self.network)
        self.num_clients = self.data.num_clients
        self.num_classes = self.data.num_classes
        self.labels = self.data.labels
        self.index = [self.data.client_index(k) for k in range(self.num_clients)]
        self.sizes = torch.tensor([len(i) for i in self.index])
        self.device = next(self.network.parameters()).device
        self.loss_sum = torch.zeros(self.num_clients, device=self.device)
        self._teacher: nn.Module | None = None

    def client_labels(self, client: int) -> Tensor:
        """Current labels of a client. Shape: (N_k,)."""
        return self.labels.current[self.index[client]]

    def batches(self, client: int, purpose: int | str, epochs: int) -> Iterator[MiniBatch]:
        """The mini-batches of a client's local training, augmented, on the device."""
        images = self.data.client_images(client)
        labels = move(self.client_labels(client), self.device)
        if self.resident:
            images = move(images, self.device)
        for epoch in range(epochs):
            generator = keyed_generator(self.seed, "batches", purpose, client, epoch)
            batches = mini_batches(len(labels), self.batch_size, generator)
            # one copy for the epoch
            device_batches = torch.split(
                move(torch.cat(batches), self.device), [len(b) for b in batches]
            )
            for rows, device_rows in zip(batches, device_batches, strict=True):
                batch_images = move(images[device_rows if self.resident else rows], self.device)
                yield MiniBatch(
                    self.data.augment_batch(batch_images, generator),
                    labels[device_rows],
                    rows,
                )

    def train_one(
        self,
        client: int,
        objective: Objective,
        purpose: int | str,
        start: Tensor,
        *,
        epochs: int,
        make: OptimizerFactory,
    ) -> Tensor:
        """Train a client, whose mean loss goes to ``loss_sum``, and return its flat state.

        Args:
            client: Client to train.
            objective: Its local loss.
            purpose: Key of the random numbers: the round, or the name of a stage.
            start: Flat state to start from. Shape: (P,).
            epochs: Local epochs.
            make: Makes the optimizer.
        """
        self.state.write(start)
        optimizer = make(self.network.parameters())
        self.network.train()
        total = torch.zeros((), device=self.device)
        steps = 0
        with keyed_randomness(self.device, self.seed, "network", purpose, client):
            for batch in self.batches(client, purpose, epochs):
                if len(batch.labels) == 1:
                    self.network.eval()  # BatchNorm has no variance of one sample
                optimizer.zero_grad()
                with self.autocast():
                    loss = objective(self.network, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
                steps += 1
                self.on_step()
        self.network.train()
        self.loss_sum[client] = total / max(steps, 1)
        return self.state.read()

    # --- features and logits of a client's data -------------------------------------------------

    @torch.no_grad()
    def features(
        self, client: int, state: Tensor, *, augmented: str | None = None
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Penultimate features and logits of a client's samples, in their order.

        Args:
            client: Client whose samples are used.
            state: Flat state of the model that computes the features. Shape: (P,).
            augmented: Key of the random numbers for training augmentation; None for plain images.

        Yields:
            Features (B, D), logits (B, C), and the slice of the client's samples.
        """
        self.state.write(state)
        self.network.eval()
        images = self.data.client_images(client)
        generator = keyed_generator(self.seed, "features", augmented or "", client)
        network: Any = self.network
        for begin in range(0, len(images), self.evaluation_batch_size):
            part = slice(begin, begin + self.evaluation_batch_size)
            picked = move(images[part], self.device)
            inputs = (
                self.data.augment_batch(picked, generator)
                if augmented
                else self.data.plain_batch(picked)
            )
            with self.autocast():
                features = network.features(inputs)
                logits = network.head(features)
            yield features, logits, part
        self.network.train()

    def logits(self, client: int, state: Tensor) -> Tensor:
        """Logits of all samples of a client under a model. Shape: (N_k, C)."""
        return torch.cat([logits.float() for _, logits, _ in self.features(client, state)])

    def frozen(self, state: Tensor) -> nn.Module:
        """A frozen copy of the network with another state, in evaluation mode.

        Args:
            state: Flat state of the copy. Shape: (P,).
        """
        if self._teacher is None:
            self._teacher = copy.deepcopy(self.network).requires_grad_(False).eval()
        FlatState(self._teacher).write(state)
        return self._teacher
