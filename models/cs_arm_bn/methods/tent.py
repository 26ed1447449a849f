"""TENT: test-time steps to lower entropy.

Axes: L queries, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError
from fulgurite.models.cs_arm_bn.batchnorm import Context, context_layers
from fulgurite.models.cs_arm_bn.methods.statistics import ERM

__all__ = ["TENT"]


class TENT(ERM):
    """A network trained by ERM; at test, BatchNorm's affine parameters follow lower entropy.

    Statistics come from the queries. Each batch is predicted, then makes a step; a new plate starts
    from the trained parameters again.

    Args:
        lr: Learning rate of Adam.
        steps: Number of steps for each batch.

    Source: Wang et al., arXiv 2006.10726; docs/papers/cs_arm_bn.md section 1.2.
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
                    if p is not None and p.requires_grad
                ]
                if not affine:
                    raise ConfigError(
                        "TENT trains the weights of BatchNorm layers, and the network has none "
                        "that can be trained.",
                        "Give it affine BatchNorm layers that are not frozen, or another "
                        "model.init_args.method, such as AdaBN.",
                    )
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
                # a layer that the forward pass does not use stays as it is
                gradients = torch.autograd.grad(entropy, parameters, materialize_grads=True)
                for p, g in zip(parameters, gradients, strict=True):
                    p.grad = g
                self._adam.step()
                for p, old in zip(parameters, before, strict=True):
                    p.grad = old
        return out.detach()  # type: ignore[no-any-return]
