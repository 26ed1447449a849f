"""Cross-entropy of the tokens that have a target, without logits of all of them at once.

Axes: B batch, L tokens, D width, V vocabulary, M tokens with a target.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORED", "rows_all_right", "token_losses"]

#: Target of tokens without one: ``ignore_index`` of PyTorch's cross-entropy.
IGNORED = -100


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token that has a target, and whether it is the most likely class.

    Args:
        hidden: Shape: (B, L, D).
        weight: Weight of the head. Shape: (V, D).
        targets: Class of each token; -100 where there is none. Shape: (B, L).
        chunk: Tokens whose logits exist at a time, also in backward.

    Returns:
        Losses [nats], in float32 at least, and hits, both in the order of the tokens.
        Shapes: (M,).

    Example:
        >>> losses, hits = token_losses(
        ...     9 * torch.eye(3)[None], torch.eye(3), torch.tensor([[0, 2, -100]]), chunk=8
        ... )
        >>> losses.round(decimals=1), hits
        (tensor([0., 9.]), tensor([ True, False]))

    Source: inferred; equal to :func:`torch.nn.functional.cross_entropy`.
    """
    # one wait for the device, for their number; two masks would take two
    rows = (targets != IGNORED).flatten().nonzero()[:, 0]
    hidden, targets = hidden.flatten(0, 1)[rows], targets.flatten()[rows]
    if len(targets) <= chunk:
        return _losses(hidden, weight, targets)
    parts: list[tuple[Tensor, Tensor]] = []
    for part, part_targets in zip(
        torch.split(hidden, chunk), torch.split(targets, chunk), strict=True
    ):
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(
                    _losses,
                    part,
                    weight,
                    part_targets,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        else:
            parts.append(_losses(part, weight, part_targets))
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def rows_all_right(hits: Tensor, targets: Tensor) -> Tensor:
    """Whether all tokens of a row that have a target were hit, for rows with any.

    Args:
        hits: From :func:`token_losses`. Shape: (M,), bool.
        targets: Shape: (B, L).

    Returns:
        Shape: (rows with a target,), bool.

    Example:
        >>> rows_all_right(torch.tensor([True, True, False]), torch.tensor([[1, 2], [-100, 3]]))
        tensor([ True, False])

    Source: inferred; exact match of answers.
    """
    right, counted = _right_rows(hits, targets)
    return right[counted]


def average_right_rows(hits: Tensor, targets: Tensor) -> Tensor:
    """Mean of :func:`rows_all_right`; NaN where no row has a target.

    Shape: to ().

    Example:
        >>> average_right_rows(torch.tensor([True, True, False]), torch.tensor([[1, 2], [-100, 3]]))
        tensor(0.5000)
    """
    right, counted = _right_rows(hits, targets)
    return (right & counted).sum() / counted.sum()


def _right_rows(hits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether no token of a row was missed, and whether the row has a target. Shapes: (B,)."""
    counted = targets != IGNORED
    return torch.ones_like(counted).masked_scatter(counted, hits).all(1), counted.any(1)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()  # sums over V need it
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
