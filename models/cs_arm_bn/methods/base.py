"""Base of the adaptation methods: sources of BatchNorm statistics, and further steps.

A method is configured by ``model.init_args.method.class_path`` and belongs to one module. State
dicts of methods without own parameters are compatible, so one checkpoint can be tested by several
of them.

Axes: L queries, N controls, M = L + N, C input channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.models.cs_arm_bn.batchnorm import Context, Source

__all__ = ["Method", "query_loss"]


class Method(nn.Module):
    """Empirical risk minimisation; other methods override the hooks in which they differ.

    Attributes:
        train_source: Source of BatchNorm statistics in training.
        test_source: Source of BatchNorm statistics in validation, test and prediction.
        extra_channels: Channels that the method adds to the network's input.
        needs_batchnorm: Whether a network without BatchNorm is an error.
        needs_controls: Whether a batch without controls is an error.
        deploys: Whether a plate's statistics can be stored once and used query by query.
        frozen: Whether the network's weights are not trained.
        own_gradients: Whether the method computes gradients itself, which the Trainer does not
            scale.
    """

    train_source: Source = "ordinary"
    test_source: Source = "source"
    extra_channels: int = 0
    needs_batchnorm: bool = True
    needs_controls: bool = False
    deploys: bool = False
    frozen: bool = False
    own_gradients: bool = False

    @property
    def is_ordinary(self) -> bool:
        """Whether prediction is the network alone, with running statistics."""
        return self.test_source == "source" and self.predicts_by_network_alone

    @property
    def predicts_by_network_alone(self) -> bool:
        """Whether logits are those of the network, whose images the method does not change."""
        cls = type(self)
        return (
            not self.extra_channels and cls.logits is Method.logits and cls.images is Method.images
        )

    def build(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        """Build the parts that depend on the sizes; called once, by the module's constructor."""

    def context(self, training: bool) -> Context:
        """Return a new context with the source of the statistics."""
        return Context(self.train_source if training else self.test_source)

    def images(self, batch: PlateBatch, context: Context) -> Tensor:
        """Rows of the forward pass: with controls if statistics come from them."""
        return batch.images if context.source in ("union", "controls") else batch.query

    def logits(self, network: nn.Module, batch: PlateBatch, context: Context) -> Tensor:
        """Logits of the queries. Shape: (L, K)."""
        out = network(self.images(batch, context))
        return out[: batch.n_query] if isinstance(out, Tensor) else out

    def training_outputs(
        self, network: nn.Module, batch: PlateBatch, context: Context, progress: float
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a training batch, and a penalty for the loss, if any.

        Args:
            network: Network of the module.
            batch: Training batch.
            context: Source of the statistics.
            progress: Finished fraction of the training.
        """
        return self.logits(network, batch, context), None

    def prepare_domains(self, count: int) -> None:
        """Build the parts that depend on the number of plates; called before training."""

    def begin(self, network: nn.Module, loader: Iterable[PlateBatch], training: bool) -> None:
        """Called before training and before each evaluation."""

    def end(self, network: nn.Module) -> None:
        """Called after each evaluation."""


def query_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the queries; controls have no labels and are not included.

    Example:
        >>> import torch
        >>> round(float(query_loss(torch.zeros(2, 4), torch.tensor([0, 3]))), 4)  # log 4
        1.3863

    Source: docs/papers/cs_arm_bn.md section 1.3.
    """
    return F.cross_entropy(logits.float(), labels)
