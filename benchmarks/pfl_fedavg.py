"""FedAvg by Apple's pfl-research, on a problem of ``fedsir_rounds``.

Its ``SimulatedBackend`` trains one client after another in one process, with the networks, the
optimizer and the augmented batches of :mod:`benchmarks.plain_fedavg`. pfl pins older versions of
packages that fulgurite needs; it runs with them as they are when it is installed by ``pip install
--no-deps pfl==0.6.0 multiprocess==0.70.19 dill dp-accounting==0.5.0 prv-accountant==0.2.0``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_fedavg import PlainFedAvg, Problem, tensor_batches


class LossModule(nn.Module):
    """A network with the two methods that pfl's model calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of one batch."""
        self.train()
        return F.cross_entropy(self.network(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """None: the rounds that are timed evaluate nothing."""
        return {}


class PflFedAvg:
    """Rounds of pfl's ``FederatedAveraging``, one at a time.

    Args:
        model: The global model.
        problem: The clients.
    """

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.aggregate.weighting import WeightByDatapoints
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.pytorch import PyTorchTensorDataset
        from pfl.hyperparam.base import NNTrainHyperParams
        from pfl.model.pytorch import PyTorchModel

        class ShuffledClient(PyTorchTensorDataset):  # type: ignore[misc]
            """A client whose batches are shuffled and augmented in each epoch."""

            def __init__(self, client: int) -> None:
                super().__init__((problem.images[client], problem.labels[client]), str(client))
                self.client = client

            def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
                """The batches of the loop over tensors; for a first round's evaluation the data."""
                if batch_size != problem.batch_size:
                    return iter([self.raw_data])
                return (b for b in tensor_batches(problem, self.client) if len(b[1]) > 1)

        count = len(problem.labels)
        self.module = LossModule(copy.deepcopy(model))
        optimizer = {k: v for k, v in problem.optimizer.items() if k != "lr"}
        self.model = PyTorchModel(
            self.module,
            partial(torch.optim.Adam, **optimizer),
            torch.optim.SGD(self.module.parameters(), lr=1.0),
        )
        order = itertools.cycle(range(count))
        clients = [ShuffledClient(client) for client in range(count)]
        data = FederatedDataset(clients.__getitem__, lambda: next(order))
        self.backend = SimulatedBackend(data, data, [WeightByDatapoints()])
        self.algorithm = FederatedAveraging()
        self.define_rounds = partial(
            NNAlgorithmParams,
            evaluation_frequency=2**30,
            train_cohort_size=count,
            val_cohort_size=None,
        )
        self.training = NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=problem.optimizer["lr"],
            local_batch_size=problem.batch_size,
        )
        self.rounds = 0

    def round(self) -> None:
        """Train every client from the global model, and average by size."""
        self.rounds += 1
        self.model = self.algorithm.run(
            self.define_rounds(central_num_iterations=self.rounds),
            self.backend,
            self.model,
            self.training,
            send_metrics_to_platform=False,
        )


def check_first_round(model: nn.Module, problem: Problem) -> None:
    """Raise unless pfl's first round from ``model`` is that of the loop over tensors.

    Raises:
        RuntimeError: A weight differs by more than 1e-4.
    """
    loop, pfl = PlainFedAvg(model, problem, loader=False), PflFedAvg(model, problem)
    for contestant in (loop, pfl):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            contestant.round()
    for (name, expected), weight in zip(
        loop.model.named_parameters(), pfl.module.network.parameters(), strict=True
    ):
        if not torch.allclose(expected, weight, atol=1e-4):
            raise RuntimeError(f"pfl's first round is not the loop's: {name} differs.")
