"""Linear classifiers on frozen embeddings, also normalised by each plate's controls (TVN).

Axes: L queries, N controls, K classes, D feature dim.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn.batchnorm import Context
from fulgurite.models.cs_arm_bn.embedding import embed, find_head
from fulgurite.models.cs_arm_bn.methods.base import Method
from fulgurite.models.cs_arm_bn.variation import TVNReference, fit_tvn, measure_spread, tvn

__all__ = ["TVN", "LinearProbe"]


class LinearProbe(Method):
    """A linear classifier on frozen embeddings of any network, such as a vision transformer.

    The embeddings are the inputs of the network's last linear layer, standardised by the mean and
    standard deviation of the training queries (1 for a number that is the same in all). The
    network is not trained and stays in evaluation mode.

    Source: docs/papers/cs_arm_bn.md section 1.6 (the classifier on embeddings); inferred.
    """

    train_source = "source"
    needs_batchnorm = False
    frozen = True

    def build(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        """Build the method's own parts: see :meth:`Method.build`."""
        size = find_head(network).in_features
        self.head = nn.Linear(size, num_classes)
        for name in ("center", "scale"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def _embed(self, network: nn.Module, batch: PlateBatch) -> tuple[Tensor, Tensor]:
        features = embed(network, batch.images if self.needs_controls else batch.query)
        return features[: batch.n_query], features[batch.n_query :]

    def _normalise_embeddings(self, query: Tensor, control: Tensor) -> Tensor:
        """Embeddings of queries for the classifier. Shape: (L, D) to the same, float64."""
        return query.double()

    def _fit(self, batches: list[tuple[int, Tensor, Tensor]]) -> None:
        """Fit the common part of the normalisation on the embeddings of one epoch."""

    @torch.no_grad()
    def begin(self, network: nn.Module, loader: Iterable[PlateBatch], training: bool) -> None:
        """Before training, measure the embeddings of one epoch."""
        name = type(self).__name__
        if not training:
            if not bool(self.scale.any()):  # type: ignore[operator]
                raise ConfigError(
                    f"{name} was not fitted.",
                    "Run `fulgurite fit` with it first, from ERM weights or of a network whose "
                    "weights are of elsewhere.",
                )
            return
        device = self.head.weight.device
        batches: list[tuple[int, Tensor, Tensor]] = []
        for batch in loader:
            query, control = self._embed(network, batch)
            batches.append((batch.domain, query.cpu(), control.cpu()))
        if not batches:
            raise DataError("There are no training batches.", "Give training plates.")
        self._fit(batches)
        queries = torch.cat(
            [self._normalise_embeddings(q.to(device), c.to(device)) for _, q, c in batches]
        )
        center, scale = measure_spread(queries)
        self.center.copy_(center)  # type: ignore[operator]
        self.scale.copy_(scale)  # type: ignore[operator]

    def logits(self, network: nn.Module, batch: PlateBatch, context: Context) -> Tensor:
        """Logits of the queries: see :meth:`Method.logits`."""
        normalised = self._normalise_embeddings(*self._embed(network, batch))
        standard = (normalised - self.center) / self.scale  # type: ignore[operator]
        return self.head(standard.to(self.head.weight.dtype))  # type: ignore[no-any-return]


class TVN(LinearProbe):
    """A linear classifier on frozen embeddings that are normalised by the plate's controls.

    The network comes from ``model.init_args.weights`` (trained by ERM) or from another library. It
    is not trained and needs no BatchNorm.

    Args:
        ridge: Constant added to the diagonal of covariances.

    Source: docs/papers/cs_arm_bn.md section 1.6 (TVN_train).
    """

    needs_controls = True

    def __init__(self, ridge: float = 0.5) -> None:
        super().__init__()
        self.ridge = ridge

    def build(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        """Build the method's own parts: see :meth:`Method.build`."""
        super().build(network, in_channels, num_classes)
        size = self.head.in_features
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        for name in ("rotation", "target"):
            self.register_buffer(name, torch.zeros(size, size, dtype=torch.float64))

    def _normalise_embeddings(self, query: Tensor, control: Tensor) -> Tensor:
        """Normalise by the plate's controls: see :meth:`LinearProbe._normalise_embeddings`."""
        reference = TVNReference(self.mean, self.std, self.rotation, self.target)  # type: ignore[arg-type]
        return tvn(reference, query, control, self.ridge)

    def _fit(self, batches: list[tuple[int, Tensor, Tensor]]) -> None:
        """Fit TVN on the controls: see :meth:`LinearProbe._fit`."""
        domains = torch.cat([torch.full((len(c),), d) for d, _, c in batches])
        fitted = fit_tvn(torch.cat([c for _, _, c in batches]), domains, self.ridge)
        for name, value in fitted._asdict().items():
            getattr(self, name).copy_(value)
