"""Adaptation methods: sources of BatchNorm statistics in training and test, and further steps.

A method is configured by ``model.init_args.method.class_path`` and belongs to one module. State
dicts of methods without own parameters are compatible, so one checkpoint can be tested by several
of them.

Axes: L queries, N controls, M = L + N, C input channels, H W image, K classes, D feature dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn.batchnorm import Context, Source, context_layers, use_context
from fulgurite.models.cs_arm_bn.conversion import convert_batchnorm
from fulgurite.models.cs_arm_bn.embedding import embed, find_head
from fulgurite.models.cs_arm_bn.variation import TVNReference, fit_tvn, tvn

__all__ = [
    "ARMBN",
    "ARMCML",
    "ARMLL",
    "CSARMBN",
    "ERM",
    "TENT",
    "TVN",
    "AdaBN",
    "AdaptiveWeight",
    "ControlsOnly",
    "LinearProbe",
    "Method",
    "Weighted",
]

Rows = Literal["queries", "union", "controls"]


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
        return network(self.images(batch, context))[: batch.n_query]  # type: ignore[no-any-return]

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


class ERM(Method):
    """Ordinary BatchNorm: statistics of the mini-batch in training, running ones at test.

    Training batches should mix plates (``data.init_args.mixed=true``).

    Source: card section 1.2.
    """

    needs_batchnorm = False


class AdaBN(ERM):
    """A network trained by ERM; at test, statistics come from a plate's queries.

    Source: Li et al., arXiv 1603.04779; card section 1.2 (per chunk of queries).
    """

    test_source = "batch"
    needs_batchnorm = True


class ARMBN(Method):
    """Statistics come from a plate's queries, in training and test.

    Source: Zhang et al., arXiv 2007.02931; card section 1.2.
    """

    train_source = test_source = "batch"


class CSARMBN(Method):
    """Statistics come from queries and controls of a plate together; the paper's method.

    Args:
        test_source: ``"union"`` as in training (the paper's) or ``"controls"``, with which a
            prediction does not depend on other queries.
        test_weight: Weight of the queries at test in the union; None is the count weight L/(L+N),
            the paper's; about 0.1 is safe where classes are skewed.

    Source: arXiv 2604.20824; card sections 1.2 to 1.4; ``test_weight``: card section 6.2.
    """

    train_source = "union"
    needs_controls = False
    deploys = True

    def __init__(
        self,
        test_source: Literal["union", "controls"] = "union",
        test_weight: float | None = None,
    ) -> None:
        super().__init__()
        if test_source not in ("union", "controls"):
            raise ConfigError(f"test_source {test_source!r} is unknown.", "Use union or controls.")
        self.test_source = test_source
        self.train_weight: float | None = None
        self.test_weight: float | Literal["adaptive"] | None = test_weight
        self.context(training=False)  # checks the weight

    def context(self, training: bool) -> Context:
        """Return a new context: see :meth:`Method.context`."""
        if training:
            return Context(self.train_source, weight=self.train_weight)
        return Context(self.test_source, weight=self.test_weight)


class AdaptiveWeight(CSARMBN):
    """CS-ARM-BN whose query weight at test is estimated for each plate, without labels.

    Training is the paper's; it also records the usual difference of queries and controls, from
    which :func:`~fulgurite.models.cs_arm_bn.adaptive_weight` detects label shift.

    Source: beyond the paper; see models/cs_arm_bn/README.md.
    """

    def __init__(self) -> None:
        super().__init__()
        self.test_weight = "adaptive"


class Weighted(CSARMBN):
    """CS-ARM-BN with a fixed weight of the queries, in training too.

    Args:
        weight: Weight in training: 0 for controls only, 1 for queries only.
        test_weight: Weight at test; None for that of training.

    Source: card section 1.5.
    """

    def __init__(self, weight: float = 0.1, test_weight: float | None = None) -> None:
        super().__init__(test_weight=weight if test_weight is None else test_weight)
        self.train_weight = weight
        self.context(training=True)


class ControlsOnly(Method):
    """Statistics come from the controls only: predictions do not depend on other queries.

    Args:
        gradient: Whether the gradient passes through the statistics into the controls; without it
            (BEN in the authors' code) accuracy is far lower.

    Source: card sections 1.2 and 6.2.
    """

    train_source = test_source = "controls"
    needs_controls = True
    deploys = True

    def __init__(self, gradient: bool = True) -> None:
        super().__init__()
        self.gradient = gradient

    def context(self, training: bool) -> Context:
        """Return a new context: see :meth:`Method.context`."""
        return Context("controls", detach=training and not self.gradient)


class ContextNet(nn.Sequential):
    """Three 5×5 convolutions that compute the context channels of an image.

    Shape: (M, C, H, W) to (M, channels, H, W).

    Source: card section 1.2 (ARM-CML).
    """

    def __init__(self, in_channels: int, channels: int, hidden: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((in_channels, hidden), (hidden, hidden)):
            layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(hidden, channels, 5, padding=2))


class ARMCML(Method):
    """A learned context: the mean of a small network's output over the plate joins the input.

    Do not combine it with ``input_norm: context``, which would remove what it adds.

    Args:
        channels: Number of context channels.
        hidden: Hidden channels of the context network.
        rows: Images of the plate over which the context is averaged.
        adapt_bn: Whether BatchNorm of both networks uses the statistics of these rows, in training
            and test alike; without it, training has the statistics of the batch and testing running
            ones, which agree only where a batch mixes plates.

    Source: Zhang et al., arXiv 2007.02931; card section 1.2; ``rows``: inferred. Its authors train
    on batches of several domains, and never put the context network in evaluation mode.
    """

    needs_batchnorm = False

    def __init__(
        self,
        channels: int = 12,
        hidden: int = 64,
        rows: Rows = "queries",
        adapt_bn: bool = True,
    ) -> None:
        super().__init__()
        if rows not in ("queries", "union", "controls"):
            raise ConfigError(f"rows {rows!r} is unknown.", "Use queries, union or controls.")
        self.extra_channels, self.hidden, self.rows = channels, hidden, rows
        self.needs_controls = rows == "controls"
        if adapt_bn:
            sources: dict[str, Source] = {"queries": "batch", "union": "union"}
            self.train_source = self.test_source = sources.get(rows, "controls")
        self.adapt_bn = adapt_bn

    def build(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        """Build the method's own parts: see :meth:`Method.build`."""
        self.context_net = ContextNet(in_channels, self.extra_channels, self.hidden)
        convert_batchnorm(self.context_net)

    def logits(self, network: nn.Module, batch: PlateBatch, context: Context) -> Tensor:
        """Logits of the queries: see :meth:`Method.logits`."""
        rows = {"queries": batch.query, "controls": batch.control}.get(self.rows, batch.images)
        with use_context(self.context_net, Context("batch" if self.adapt_bn else context.source)):
            described = self.context_net(rows)
        images = self.images(batch, context)
        mean = described.mean(0, keepdim=True).expand(len(images), -1, -1, -1)
        return network(torch.cat([images, mean], 1))[: batch.n_query]  # type: ignore[no-any-return]


class ARMLL(Method):
    """A learned loss: one gradient step on it adapts the weights to the plate's queries.

    The loss is the norm of a small network's output for the logits; training differentiates
    through the step.

    Args:
        inner_lr: Step size [1].
        hidden: Width of the loss network.
        rows: Images of the plate on which the loss is computed.

    Source: Zhang et al., arXiv 2007.02931; card section 1.2; ``rows``: inferred.
    """

    train_source: Source = "batch"
    test_source: Source = "batch"
    needs_batchnorm = False
    own_gradients = True

    def __init__(
        self, inner_lr: float = 0.1, hidden: int = 32, rows: Literal["queries", "union"] = "queries"
    ) -> None:
        super().__init__()
        if rows not in ("queries", "union"):
            raise ConfigError(f"rows {rows!r} is unknown.", "Use queries or union.")
        if rows == "union":
            self.train_source = self.test_source = "union"
        self.inner_lr, self.hidden = inner_lr, hidden

    def build(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        """Build the method's own parts: see :meth:`Method.build`."""
        self.loss_net = nn.Sequential(
            nn.Linear(num_classes, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, 1),
        )

    def logits(self, network: nn.Module, batch: PlateBatch, context: Context) -> Tensor:
        """Logits of the queries: see :meth:`Method.logits`."""
        training = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            images = self.images(batch, context)
            images = images if training else images.clone()  # it may be an inference tensor
            parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
            inner = torch.linalg.vector_norm(self.loss_net(network(images)))
            gradients = torch.autograd.grad(
                inner, [*parameters.values()], create_graph=training, materialize_grads=True
            )
            adapted = {
                name: p - self.inner_lr * g
                for (name, p), g in zip(parameters.items(), gradients, strict=True)
            }
        out = torch.func.functional_call(network, adapted, (images,))
        return out[: batch.n_query]  # type: ignore[no-any-return]


class TENT(ERM):
    """A network trained by ERM; at test, BatchNorm's affine parameters follow lower entropy.

    Statistics come from the queries. Each batch is predicted, then makes a step; a new plate starts
    from the trained parameters again.

    Args:
        lr: Learning rate of Adam.
        steps: Number of steps for each batch.

    Source: Wang et al., arXiv 2006.10726; card section 1.2.
    """

    test_source = "batch"
    needs_batchnorm = True
    own_gradients = True

    def __init__(self, lr: float = 1e-3, steps: int = 1) -> None:
        super().__init__()
        if steps < 1:
            raise ConfigError(f"TENT.steps={steps} is too small.", "Give 1 or more.")
        self.lr, self.steps = lr, steps
        self._domain: int | None = None
        self._trained: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, network: nn.Module, loader: Iterable[PlateBatch], training: bool) -> None:
        """Save the trained parameters."""
        if not training:
            with torch.inference_mode(False):
                affine = [
                    p
                    for layer in context_layers(network).values()
                    for p in (layer.weight, layer.bias)
                    if p is not None
                ]
                self._trained = [(p, p.detach().clone()) for p in affine]
            self._domain = None

    def end(self, network: nn.Module) -> None:
        """Restore the trained parameters."""
        with torch.inference_mode(False), torch.no_grad():
            for parameter, value in self._trained:
                parameter.copy_(value)

    def logits(self, network: nn.Module, batch: PlateBatch, context: Context) -> Tensor:
        """Logits of the queries: see :meth:`Method.logits`."""
        if context.source != self.test_source:
            return super().logits(network, batch, context)
        with torch.inference_mode(False), torch.enable_grad():
            if batch.domain != self._domain:
                self._domain = batch.domain
                self.end(network)
                self._adam = torch.optim.Adam([p for p, _ in self._trained], self.lr)
            images = batch.query.clone()  # it may be an inference tensor
            for _ in range(self.steps):
                out = network(images)
                entropy = -(out.softmax(1) * out.log_softmax(1)).sum(1).mean()
                parameters = [p for p, _ in self._trained]
                before = [p.grad for p in parameters]
                for p, g in zip(parameters, torch.autograd.grad(entropy, parameters), strict=True):
                    p.grad = g
                self._adam.step()
                for p, old in zip(parameters, before, strict=True):
                    p.grad = old
        return out.detach()  # type: ignore[no-any-return]


class LinearProbe(Method):
    """A linear classifier on frozen embeddings of any network, such as a vision transformer.

    The embeddings are the inputs of the network's last linear layer, standardised by the mean and
    standard deviation of the training queries. The network is not trained and stays in evaluation
    mode.

    Source: card section 1.6 (the classifier on embeddings); inferred.
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
        self.center.copy_(queries.mean(0))  # type: ignore[operator]
        self.scale.copy_(queries.std(0, correction=0).clamp_min(1e-9))  # type: ignore[operator]

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

    Source: card section 1.6 (TVN_train).
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


def query_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the queries; controls have no labels and are not included.

    Example:
        >>> round(float(query_loss(torch.zeros(2, 4), torch.tensor([0, 3]))), 4)  # log 4
        1.3863

    Source: card section 1.3.
    """
    return F.cross_entropy(logits.float(), labels)
