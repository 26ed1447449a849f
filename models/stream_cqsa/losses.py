"""Losses of long sequences, without logits of all tokens at once, and masking.

Axes: B batch, N tokens, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fulgurite.devices import move
from fulgurite.errors import ConfigError

__all__ = ["IGNORED", "Head", "chunked_cross_entropy", "mask_tokens", "token_scores"]

#: Target of tokens without one: ``ignore_index`` of PyTorch's cross-entropy.
IGNORED = -100

#: Weight of a linear head (V, E), or what maps hidden states (..., E) to logits (..., V).
Head = Tensor | Callable[[Tensor], Tensor]


def chunked_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy, computed a chunk of tokens at a time, also in backward.

    Args:
        hidden: Shape: (B, N, E).
        head: Weight (V, E), or a function from hidden states to logits.
        targets: Class of each token; -100 where there is none. Shape: (B, N).
        chunk: Tokens of each sequence at a time.

    Returns:
        Mean over the tokens with a target, 0 if there are none; in float32, or float64 for float64.
        Shape: ().

    Raises:
        ConfigError: ``chunk`` is below 1.

    Example:
        >>> hidden, weight = torch.eye(4)[None], torch.eye(4)
        >>> targets = torch.tensor([[0, 1, 2, -100]])
        >>> chunked_cross_entropy(hidden, weight, targets, chunk=3)
        tensor(0.7437)

    Source: inferred; equal to :func:`torch.nn.functional.cross_entropy`.
    """
    _check_chunk(chunk)
    total = torch.zeros((), device=hidden.device)
    # split, not slices: each slice would have a gradient as long as the whole
    for part, part_targets in zip(
        torch.split(hidden, chunk, 1), torch.split(targets, chunk, 1), strict=True
    ):
        arguments = part, head, part_targets
        if torch.is_grad_enabled():
            loss = checkpoint(
                _sum_losses, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            loss = _sum_losses(*arguments)
        total = total + loss
    return total / (targets != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def token_scores(hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and most likely class of each token, computed a chunk at a time.

    Args:
        hidden: Shape: (B, N, E).
        head: See :func:`chunked_cross_entropy`.
        targets: Shape: (B, N).
        chunk: Tokens of each sequence at a time.

    Returns:
        Losses in nats, 0 where there is no target, and classes. Shapes: (B, N).

    Raises:
        ConfigError: ``chunk`` is below 1.

    Example:
        >>> hidden, targets = 9 * torch.eye(4)[None], torch.tensor([[0, 1, 3, -100]])
        >>> losses, predicted = token_scores(hidden, torch.eye(4), targets, chunk=3)
        >>> losses.round(decimals=1), predicted
        (tensor([[0., 0., 9., 0.]]), tensor([[0, 1, 2, 3]]))
    """
    _check_chunk(chunk)
    losses, predicted = [], []
    for start in range(0, targets.shape[1], chunk):
        part = slice(start, start + chunk)
        logits = _compute_logits(hidden[:, part], head)
        part_targets = targets[:, part]
        # as rows: CUDA knows the loss of a (B, V, N) tensor by another kernel, which it may refuse
        loss = F.cross_entropy(
            logits.flatten(0, 1), part_targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses.append(loss.view_as(part_targets))
        predicted.append(logits.argmax(-1))
    return torch.cat(losses, 1), torch.cat(predicted, 1)


def mask_tokens(
    tokens: Tensor, fraction: float, mask_token: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hide a fraction of the tokens of each sequence, at least one.

    Args:
        tokens: Shape: (B, N), N at least 1.
        fraction: Fraction of the tokens to hide, between 0 and 1.
        mask_token: Token that replaces hidden tokens.
        generator: Generator on the CPU, so that every device hides the same tokens.

    Returns:
        Tokens with some hidden, and targets: the hidden tokens, else -100. Shapes: (B, N).

    Example:
        >>> tokens, generator = torch.arange(4)[None], torch.Generator().manual_seed(0)
        >>> mask_tokens(tokens, 0.5, 9, generator)
        (tensor([[9, 9, 2, 3]]), tensor([[   0,    1, -100, -100]]))

    Source: BERT, arXiv 1810.04805, section 3.1; a fixed number, always the mask token: inferred.
    """
    count = max(1, round(fraction * tokens.shape[1]))
    hidden_indices = torch.rand(tokens.shape, generator=generator).topk(count, dim=1).indices
    is_hidden = move(
        torch.zeros(tokens.shape, dtype=torch.bool).scatter_(1, hidden_indices, True), tokens.device
    )
    return tokens.masked_fill(is_hidden, mask_token), tokens.masked_fill(~is_hidden, IGNORED)


def _sum_losses(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    logits = _compute_logits(hidden, head).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _compute_logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits, at least in float32: sums over a vocabulary need it."""
    logits = F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ConfigError(
            f"loss_chunk={chunk} is too small.",
            "Give --model.init_args.loss_chunk of at least 1.",
        )
