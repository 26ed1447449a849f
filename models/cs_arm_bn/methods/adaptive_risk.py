"""Adaptive risk minimisation by a learned context (ARM-CML) and by a learned loss (ARM-LL).

Axes: L queries, N controls, M = L + N, C input channels, H W image, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError
from fulgurite.models.cs_arm_bn.batchnorm import Context, Source, use_context
from fulgurite.models.cs_arm_bn.conversion import convert_batchnorm
from fulgurite.models.cs_arm_bn.methods.base import Method
from fulgurite.stateless import call_with_tensors

__all__ = ["ARMCML", "ARMLL"]

Rows = Literal["queries", "union", "controls"]


class ContextNet(nn.Sequential):
    """Three 5×5 convolutions that compute the context channels of an image.

    Shape: (M, C, H, W) to (M, channels, H, W).

    Source: docs/papers/cs_arm_bn.md section 1.2 (ARM-CML).
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

    Source: Zhang et al., arXiv 2007.02931; docs/papers/cs_arm_bn.md section 1.2; ``rows``:
    inferred. Its authors train on batches of several domains, and never put the context network in
    evaluation mode.
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

    Source: Zhang et al., arXiv 2007.02931; docs/papers/cs_arm_bn.md section 1.2; ``rows``:
    inferred.
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
        out, _ = call_with_tensors(network, adapted, images)
        return out[: batch.n_query]  # type: ignore[no-any-return]
