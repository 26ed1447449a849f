"""Many small clients trained in one pass.

A step of a small network on a small batch is mostly the cost of starting its operations. Here the
clients' parameters are stacked, :func:`torch.func.vmap` runs all of them through each operation,
and one optimizer steps them together, on the mini-batches that they would see alone.

Clients are independent, so the gradient of the sum of their losses holds the gradient of each: an
ordinary backward pass after a mapped forward pass is enough.

Axes: G clients of a group still training, B mini-batch, C classes, P flat state size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn, optim
from torch.func import vmap

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation.objectives import LogitLoss, MiniBatch, Objective
from fulgurite.models.fedsir.federation.states import ClientStates
from fulgurite.models.fedsir.federation.training import LocalTrainer, OptimizerFactory
from fulgurite.models.fedsir.losses import logit_adjusted_cross_entropy
from fulgurite.stateless import call_with_tensors, find_tensor_paths

__all__ = ["train_group", "vectorizable"]

# In these each entry of a parameter moves by its own gradient and state alone, so that one
# optimizer of stacked parameters does what an optimizer per client would.
_ELEMENTWISE = (
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad,
    optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip


def vectorizable(objective: Objective) -> bool:
    """Tell whether clients with this local loss can train in one pass.

    Example:
        >>> vectorizable(LogitLoss()), vectorizable(lambda network, batch: None)
        (True, False)
    """
    return type(objective) is LogitLoss


def train_group(
    trainer: LocalTrainer,
    clients: Sequence[int],
    objective: Callable[[int], Objective],
    purpose: int | str,
    *,
    start: Tensor,
    epochs: int,
    make_optimizer: OptimizerFactory,
) -> ClientStates:
    """Train clients side by side; equal to one after the other up to floating-point rounding.

    Mini-batches, augmentation and losses are those of each client alone. Clients that cannot be
    stacked (dropout, or an optimizer that mixes the entries of a parameter) train one by one.

    Args:
        trainer: The trainer; its ``loss_sum`` is set and its ``on_step`` called as by the loop.
        clients: Clients of the group.
        objective: Gives the loss of a client; each must be :func:`vectorizable`.
        purpose: Key of the random numbers.
        start: Flat state from which all clients start. Shape: (P,).
        epochs: Local epochs of a client.
        make_optimizer: Makes the optimizer from the stacked parameters.

    Returns:
        Flat state of each client after training. Shape of each: (P,).

    Raises:
        ConfigError: The network has an operation that cannot be mapped over clients.

    Source: inferred; FedAvg's local training (McMahan et al., AISTATS 2017) for many clients.
    """
    # the longest first: those that still train are then the first rows of every stacked tensor
    order = sorted(clients, key=lambda k: -int(trainer.sizes[k]))
    trainer.state.write(start)
    stack = _Stack(trainer.network, len(order))
    optimizer = make_optimizer(stack.parameters.values())
    if len(order) == 1 or type(optimizer) not in _ELEMENTWISE or _has_own_state(trainer.network):
        return {
            k: trainer.train_one(
                k, objective(k), purpose, start, epochs=epochs, make=make_optimizer
            )
            for k in clients
        }
    loss = _StackedLoss([objective(k) for k in order], stack)
    queues = [trainer.batches(k, purpose, epochs) for k in order]
    total = torch.zeros(len(order), device=trainer.device)
    steps = 0
    done: ClientStates = {}
    while queues:
        drawn = [batch for queue in queues if (batch := next(queue, None)) is not None]
        if len(drawn) < len(queues):  # fewer samples, fewer steps: the last rows are done
            states = stack.drop(len(drawn), optimizer)
            for row, state in enumerate(states, len(drawn)):
                done[order[row]] = state
                trainer.loss_sum[order[row]] = total[row] / max(steps, 1)
            del queues[len(drawn) :]
        if drawn:
            optimizer.zero_grad()
            total[: len(drawn)] += _gradients(trainer, stack, loss, drawn)
            optimizer.step()
            steps += 1
            for _ in drawn:
                trainer.on_step()
    trainer.network.train()
    return done


def _has_own_state(network: nn.Module) -> bool:
    """Whether a module draws random numbers, or counts steps, which are of one client alone."""
    return any(
        (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
        or (isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None)
        for m in network.modules()
    )


class _Stack:
    """Parameters and floating buffers of G copies of a network, each tensor with a first axis G.

    Args:
        network: Network to copy.
        copies: Number of copies G.
    """

    def __init__(self, network: nn.Module, copies: int) -> None:
        def repeat(tensor: Tensor) -> Tensor:
            return tensor.detach().expand(copies, *tensor.shape).clone()

        self.parameters = {
            n: nn.Parameter(repeat(p), requires_grad=p.requires_grad)
            for n, p in network.named_parameters()
        }
        self.buffers = {n: repeat(b) for n, b in network.named_buffers() if b.is_floating_point()}
        # tied tensors have several names in the flat state, but only one here
        names = {id(p): n for n, p in network.named_parameters()}
        names |= {id(b): n for n, b in network.named_buffers()}
        entries = network.state_dict(keep_vars=True).values()
        self.entries = [names[id(t)] for t in entries if t.is_floating_point()]
        self.paths = find_tensor_paths(network)

    @torch.no_grad()
    def drop(self, rows: int, optimizer: optim.Optimizer) -> list[Tensor]:
        """Keep the first rows, also in the optimizer's state, and return the other flat states.

        Args:
            rows: Number of rows to keep.
            optimizer: Optimizer of the stacked parameters.
        """
        tensors = self.parameters | self.buffers
        flat = torch.cat([_flatten_rows(tensors[n][rows:]) for n in self.entries], 1)
        for parameter in self.parameters.values():
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = value[:rows]
            parameter.grad = None
            parameter.data = parameter.data[:rows]
        self.buffers = {n: b[:rows] for n, b in self.buffers.items()}
        return list(flat)


def _flatten_rows(stacked: Tensor) -> Tensor:
    """Turn a stack of tensors, which may be scalars, into rows. Shape: (G, …) to (G, M)."""
    return stacked.flatten(1) if stacked.ndim > 1 else stacked[:, None]


class _StackedLoss:
    """The losses of :class:`LogitLoss`, for rows of a stack.

    Args:
        losses: The loss of each row.
        stack: The stacked parameters.
    """

    def __init__(self, losses: Sequence[Objective], stack: _Stack) -> None:
        logit_losses = [x for x in losses if type(x) is LogitLoss]
        assert len(logit_losses) == len(losses), (
            "train_group was given a loss that is not vectorizable"
        )
        self.log_prior: Tensor | None = None  # (G, 1, C)
        prior = next((x.log_prior for x in logit_losses if x.log_prior is not None), None)
        if prior is not None:
            none = torch.zeros_like(prior)
            priors = [none if x.log_prior is None else x.log_prior for x in logit_losses]
            self.log_prior = torch.stack(priors)[:, None]
        self.strength: Tensor | None = None  # (G,)
        self.anchor: dict[str, Tensor] = {}  # (G, …), or (1, …) where all have the same
        anchors = [x.anchor for x in logit_losses if x.anchor]
        if not anchors:
            return
        strength = [x.proximal if x.anchor else 0.0 for x in logit_losses]
        for name, parameter in stack.parameters.items():
            self.strength = move(torch.tensor(strength, dtype=parameter.dtype), parameter.device)
            several = len({a[name].data_ptr() for a in anchors}) > 1
            row_anchors = (
                [(x.anchor or anchors[0])[name] for x in logit_losses]
                if several
                else [anchors[0][name]]
            )
            self.anchor[name] = torch.stack(row_anchors)

    def __call__(
        self, rows: Tensor | slice, parameters: Mapping[str, Tensor], logits: Tensor, labels: Tensor
    ) -> Tensor:
        """Loss of each of some rows. Shapes: (G, B, C), (G, B) to (G,)."""
        prior = logits.new_zeros(()) if self.log_prior is None else self.log_prior[rows]
        loss = logit_adjusted_cross_entropy(logits, labels, prior)
        if self.strength is None:
            return loss
        anchor = {n: a if len(a) == 1 else a[rows] for n, a in self.anchor.items()}
        drift = [_flatten_rows((p - anchor[n]).square()).sum(1) for n, p in parameters.items()]
        return loss + self.strength[rows] / 2 * torch.stack(drift).sum(0)


def _gradients(
    trainer: LocalTrainer, stack: _Stack, loss: _StackedLoss, batches: Sequence[MiniBatch]
) -> Tensor:
    """Set the gradient of every row from its mini-batch and return the losses. Shape: (G,)."""
    groups: dict[int, list[int]] = {}
    for row, batch in enumerate(batches):
        groups.setdefault(len(batch.labels), []).append(row)
    if len(groups) == 1:
        every = slice(0, len(batches))
        return _backward(
            trainer, loss, every, stack.parameters, buffers=stack.buffers, batches=batches,
            paths=stack.paths,
        )  # fmt: skip
    # tail batches differ in size, and BatchNorm must see each as it is: one pass per size
    values = torch.empty(len(batches), device=trainer.device)
    for rows in groups.values():
        at = move(torch.tensor(rows), trainer.device)
        parameters = {
            n: p.detach()[at].requires_grad_(p.requires_grad) for n, p in stack.parameters.items()
        }
        buffers = {n: b[at] for n, b in stack.buffers.items()}
        row_batches = [batches[row] for row in rows]
        values[at] = _backward(
            trainer, loss, at, parameters, buffers=buffers, batches=row_batches, paths=stack.paths
        ).to(values)
        for name, buffer in stack.buffers.items():
            buffer[at] = buffers[name]
        for name, parameter in stack.parameters.items():
            gradient = parameters[name].grad
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad[at] = gradient
    return values


def _backward(
    trainer: LocalTrainer,
    loss: _StackedLoss,
    rows: Tensor | slice,
    parameters: Mapping[str, Tensor],
    *,
    buffers: Mapping[str, Tensor],
    batches: Sequence[MiniBatch],
    paths: Mapping[str, str],
) -> Tensor:
    """Run mini-batches of one size through their rows' models, and back. Shape: (G,)."""
    images = torch.stack([b.images for b in batches])
    labels = torch.stack([b.labels for b in batches])
    # BatchNorm has no variance of one sample; the loop does the same
    trainer.network.train(labels.shape[1] > 1)

    def forward(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, assigned = call_with_tensors(trainer.network, tensors, x, paths=paths)
        return logits, {n: t for n, t in assigned.items() if n in buffers}

    try:
        with trainer.autocast():
            logits, assigned = vmap(forward)({**parameters, **buffers}, images)
            values = loss(rows, parameters, logits, labels)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation that vmap does not know, in words of any kind
        raise ConfigError(
            f"{type(trainer.network).__name__} cannot train many clients in one pass: "
            f"{str(error).splitlines()[0]}",
            "Set --model.init_args.local.vectorize=0.",
        ) from error
    for name, buffer in assigned.items():
        buffers[name].copy_(buffer.detach())
    values.sum().backward()  # type: ignore[no-untyped-call]
    return values.detach()
