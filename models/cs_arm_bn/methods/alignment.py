"""Baselines that align the features of training plates: DANN and DeepCORAL, plates as domains.

Both use images of training plates only.

Axes: M rows, L queries, C channels, D feature dim, P plates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn.batchnorm import Context
from fulgurite.models.cs_arm_bn.embedding import embed_and_classify, find_head
from fulgurite.models.cs_arm_bn.methods.statistics import ERM

__all__ = ["DANN", "DeepCORAL", "coral_distance", "reversal_strength", "reverse_gradient"]


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """Return the input unchanged; its gradient is reversed and scaled.

    Args:
        x: Input of any shape.
        strength: Factor λ of the gradient.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])

    Source: Ganin et al., JMLR 2016 (arXiv 1505.07818), section 4.2.
    """
    return _GradientReversal.apply(x, strength)  # type: ignore[no-any-return,no-untyped-call]


def reversal_strength(progress: float, gamma: float = 10.0) -> float:
    """Factor of the reversed gradient, which rises from 0 towards 1 during training.

    Args:
        progress: Finished fraction of the training.
        gamma: Rate of the rise.

    Example:
        >>> reversal_strength(0.0), round(reversal_strength(1.0), 4)
        (0.0, 0.9999)

    Source: Ganin et al., JMLR 2016, section 5.2.2: 2/(1 + exp(−10 p)) − 1.
    """
    return 2 / (1 + math.exp(-gamma * progress)) - 1


def coral_distance(first: Tensor, second: Tensor) -> Tensor:
    """Distance between the covariances of two groups of features.

    Args:
        first: Features of one plate. Shape: (n, D), n of at least 2.
        second: Features of another plate. Shape: (m, D), m of at least 2.

    Returns:
        ‖C₁ − C₂‖² (Frobenius) / 4D². Shape: ().

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> coral_distance(x, 2 * x)  # variances 2 and 8
        tensor(9.)

    Source: Sun and Saenko, ECCV 2016 workshops (arXiv 1607.01719), equations 1 to 3.
    """
    size = first.shape[1]
    covariances = [torch.cov(x.T).view(size, size) for x in (first.float(), second.float())]
    return (covariances[0] - covariances[1]).square().sum() / (4 * size**2)


def _require_plates(batch: PlateBatch, method: str) -> Tensor:
    """Return the plate of each query; refuse batches of a single plate. Shape: (L,)."""
    plates = batch.query_domain
    if len(torch.unique(plates)) < 2:
        raise DataError(
            f"{method} aligns plates, and a training batch has queries of one.",
            "Set data.init_args.episodes.mixed=true and data.init_args.episodes.plates=4.",
        )
    return plates


class DANN(ERM):
    """Adversarial training: a second head classifies plates, and the features prevent that.

    Training batches mix plates (``data.init_args.episodes.mixed=true`` with ``plates``). At test it
    is an ordinary network with running statistics.

    Args:
        weight: Weight of the loss of the second head.
        hidden: Width of the hidden layer of the second head.
        gamma: Rate at which the reversed gradient grows; see :func:`reversal_strength`.

    Raises:
        ConfigError: ``weight`` is negative, ``hidden`` is below 1, or ``gamma`` is not positive.

    Source: Ganin et al., JMLR 2016 (arXiv 1505.07818); the weight: docs/papers/cs_arm_bn.md section
    1.2; plates of the training set as domains instead of a source and an unlabelled target:
    inferred.
    """

    discriminator: nn.Module | None

    def __init__(self, weight: float = 0.5, hidden: int = 64, gamma: float = 10.0) -> None:
        super().__init__()
        if weight < 0 or hidden < 1 or gamma <= 0:
            raise ConfigError(
                f"DANN cannot have weight={weight}, hidden={hidden} and gamma={gamma}.",
                "Give a weight of 0 or more, hidden of 1 or more, and a positive gamma.",
            )
        self.weight, self.hidden, self.gamma = weight, hidden, gamma
        self.discriminator = None

    def build(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        """Read the feature dimension of the network: see :meth:`Method.build`."""
        self.features = find_head(network).in_features

    def prepare_domains(self, count: int) -> None:
        """Make the head that classifies ``count`` plates."""
        self.discriminator = nn.Sequential(
            nn.Linear(self.features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, count)
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Make the head for the number of plates in the checkpoint."""
        bias = state_dict.get(f"{prefix}discriminator.2.bias")
        if isinstance(bias, Tensor):
            discriminator = self.discriminator
            if discriminator is None or discriminator.get_parameter("2.bias").shape != bias.shape:
                self.prepare_domains(len(bias))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def training_outputs(
        self, network: nn.Module, batch: PlateBatch, context: Context, progress: float
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the plate classification loss on features of reversed gradient."""
        plates = _require_plates(batch, "DANN")
        if self.discriminator is None:
            raise ConfigError(
                "DANN does not know the number of plates.",
                "Train it by the Trainer with a DataModule that has `domains`.",
            )
        features, logits = embed_and_classify(network, self.images(batch, context))
        reversed_features = reverse_gradient(features, reversal_strength(progress, self.gamma))
        return logits, self.weight * F.cross_entropy(
            self.discriminator(reversed_features).float(), plates
        )


class DeepCORAL(ERM):
    """Alignment of the feature covariances of the plates in a batch.

    Training batches mix plates, several images of each (``data.init_args.episodes.mixed=true`` with
    ``plates``). At test it is an ordinary network with running statistics.

    Args:
        weight: Weight of the mean distance over pairs of plates; see :func:`coral_distance`.

    Raises:
        ConfigError: The weight is negative.

    Source: Sun and Saenko, arXiv 1607.01719; the weight: docs/papers/cs_arm_bn.md section 1.2;
    pairs of plates instead of a source and a target: inferred.
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        if weight < 0:
            raise ConfigError(f"DeepCORAL.weight={weight} is negative.", "Give 0 or more.")
        self.weight = weight

    def training_outputs(
        self, network: nn.Module, batch: PlateBatch, context: Context, progress: float
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the mean distance of the covariances of two plates."""
        plates = _require_plates(batch, "DeepCORAL")
        features, logits = embed_and_classify(network, self.images(batch, context))
        groups = [features[plates == plate] for plate in torch.unique(plates)]
        if min(len(group) for group in groups) < 2:
            raise DataError(
                "DeepCORAL needs two queries of each plate in a batch, and one has a single query.",
                "Set data.init_args.episodes.plates to at most half of `queries`.",
            )
        distances = [coral_distance(a, b) for a, b in itertools.combinations(groups, 2)]
        return logits, self.weight * torch.stack(distances).mean()
