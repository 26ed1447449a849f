"""FedAvg as a user of PyTorch writes it; needs nothing but torch. Flower's clients use it too.

Axes: N samples of a client, C channels, H, W image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass
class Problem:
    """The clients' data, and how to train on it.

    Attributes:
        images: uint8 images of each client. Shape of each: (N, C, H, W).
        labels: Shape of each: (N,).
        scale: Of pixels. Shape: (C, 1, 1).
        offset: Added after scaling. Shape: (C, 1, 1).
        pad: Random shifts by as many pixels.
        flip: Mirror half of the images.
        batch_size: Of local training.
        optimizer: Arguments of ``torch.optim.Adam``.
    """

    images: list[Tensor]
    labels: list[Tensor]
    scale: Tensor
    offset: Tensor
    pad: int
    flip: bool
    batch_size: int
    optimizer: dict[str, float | bool]

    @classmethod
    def of(cls, trainer: object, pad: int, flip: bool, **optimizer: float | bool) -> Problem:
        """The clients of a Trainer's DataModule, and the batch size of its model."""
        data, model = trainer.datamodule, trainer.lightning_module  # type: ignore[attr-defined]
        clients = range(data.num_clients)
        zero = torch.zeros(1, data.in_channels, 1, 1, dtype=torch.uint8)
        offset = data.plain_batch(zero)[0]
        return cls(
            [data.client_images(k) for k in clients],
            [data.labels.given[data.client_index(k)] for k in clients],
            data.plain_batch(zero + 1)[0] - offset,
            offset,
            pad,
            flip,
            model.local.batch_size if model else 64,
            optimizer,
        )


class ClientImages(Dataset):  # type: ignore[type-arg]
    """One client's images, augmented one by one."""

    def __init__(self, problem: Problem, client: int) -> None:
        self.problem = problem
        self.images, self.labels = problem.images[client], problem.labels[client]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        p, image = self.problem, self.images[i]
        if p.pad:
            height, width = image.shape[1:]
            down, right = torch.randint(0, 2 * p.pad + 1, (2,)).tolist()
            padded = F.pad(image, (p.pad,) * 4)
            image = padded[:, down : down + height, right : right + width]
        if p.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image.float() * p.scale + p.offset, self.labels[i]


def tensor_batches(problem: Problem, client: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Shuffled batches without a DataLoader: augmentation on whole batches of resident tensors."""
    images, labels, p = problem.images[client], problem.labels[client], problem
    for indices in torch.randperm(len(labels)).split(p.batch_size):
        batch = images[indices]
        if p.pad:
            size, (height, width) = len(batch), batch.shape[2:]
            down, right = torch.randint(0, 2 * p.pad + 1, (2, size, 1))
            rows = (down + torch.arange(height))[:, None, :, None]
            columns = (right + torch.arange(width))[:, None, None, :]
            at, channel = torch.arange(size)[:, None, None, None], torch.arange(batch.shape[1])
            batch = F.pad(batch, (p.pad,) * 4)[at, channel[None, :, None, None], rows, columns]
        if p.flip:
            mirror = torch.rand(len(batch)) < 0.5
            batch = torch.where(mirror[:, None, None, None], batch.flip(3), batch)
        yield batch.float() * p.scale + p.offset, labels[indices]


def train_client(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], problem: Problem
) -> None:
    """One local epoch."""
    optimizer = torch.optim.Adam(model.parameters(), **problem.optimizer)  # type: ignore[arg-type]
    model.train()
    for images, labels in batches:
        if len(labels) == 1:
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@cache
def load_problem(path: str) -> tuple[nn.Module, Problem]:
    """Model and problem as ``fedsir_rounds`` saved them a moment ago, once per process."""
    torch.set_num_threads(1)
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


class PlainFedAvg:
    """FedAvg in a loop over clients.

    Args:
        model: The global model.
        problem: The clients.
        loader: Read through one DataLoader per client, rather than by :func:`tensor_batches`.
    """

    def __init__(self, model: nn.Module, problem: Problem, *, loader: bool = True) -> None:
        self.model, self.problem = copy.deepcopy(model), problem
        self.sources = [
            DataLoader(ClientImages(problem, k), problem.batch_size, shuffle=True)
            if loader
            else None
            for k in range(len(problem.labels))
        ]

    def round(self) -> None:
        """Train every client from the global model, and average by size."""
        states, p = [], self.problem
        for client, source in enumerate(self.sources):
            local = copy.deepcopy(self.model)
            train_client(local, source or tensor_batches(p, client), p)
            states.append(copy.deepcopy(local.state_dict()))
        total = sum(len(x) for x in p.labels)
        shares = [len(x) / total for x in p.labels]
        average = {
            name: sum(s * state[name] for s, state in zip(shares, states, strict=True))
            if states[0][name].is_floating_point()
            else states[0][name]
            for name in states[0]
        }
        self.model.load_state_dict(average)
