"""Linear recurrences with decay, a chunk of tokens at a time, and token by token for comparison.

In a chunk everything is a product of matrices; only the state goes from chunk to chunk. Decays are
logarithms, so that products become differences of sums and nothing is divided by a tiny number.

Axes: B batch, H heads, L tokens, K keys, V values, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.devices import running_sum
from fulgurite.models.number_probing.backbones.base import same_document

__all__ = [
    "Decays",
    "chunk_decays",
    "delta_rule",
    "delta_rule_by_token",
    "linear_recurrence",
    "linear_recurrence_by_token",
]


class Decays(NamedTuple):
    """Factors by which tokens and states have decayed, in every chunk.

    Attributes:
        pairs: Decay of token j at token i of the chunk, 0 for later j. Shape: (B, H, N, C, C).
        carried: Decay of the state before the chunk, at each token. Shape: (B, H, N, C).
        ending: Decay of each token at the end of the chunk. Shape: (B, H, N, C).
        across: Decay of the state before the chunk, at the chunk's end. Shape: (B, H, N).
    """

    pairs: Tensor
    carried: Tensor
    ending: Tensor
    across: Tensor


def chunk_decays(log_decay: Tensor, documents: Tensor | None = None) -> Decays:
    """Products of decays between the tokens of each chunk; 0 across documents.

    Args:
        log_decay: Logarithm of the decay of the state before each token is added.
            Shape: (B, H, N, C).
        documents: Shape: (B, N, C), equal ids neighbours.

    Example:
        >>> decays = chunk_decays(torch.tensor([0.5, 0.5]).log().view(1, 1, 1, 2))
        >>> decays.pairs[0, 0, 0]
        tensor([[1.0000, 0.0000],
                [0.5000, 1.0000]])
        >>> decays.carried, decays.across
        (tensor([[[[0.5000, 0.2500]]]]), tensor([[[0.2500]]]))

    Source: Mamba-2, arXiv 2405.21060, section 6; documents: inferred.
    """
    total = running_sum(log_decay)
    size = log_decay.shape[-1]
    visible = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    pairs = total[..., :, None] - total[..., None, :]
    ending = total[..., -1:] - total
    if documents is None:
        # before exp: a large positive difference would give inf · 0 in backward
        pairs = pairs.masked_fill(~visible, -torch.inf)
        return Decays(pairs.exp(), total.exp(), ending.exp(), total[..., -1].exp())
    before = torch.cat([documents[:, :1, :1], documents[:, :-1, -1:]], 1)  # first state is zero
    visible = (visible & (documents[..., :, None] == documents[..., None, :]))[:, None]
    carries = (documents == before)[:, None]
    ends = (documents == documents[..., -1:])[:, None]
    return Decays(
        pairs.masked_fill(~visible, -torch.inf).exp(),
        total.exp() * carries,
        ending.exp() * ends,
        total[..., -1].exp() * carries[..., -1],
    )


def _split_chunks(x: Tensor, chunk: int) -> Tensor:
    """Cut tokens into chunks, the last one filled up with zeros. Shape: (B, H, L, ...)."""
    missing = -x.shape[2] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return x.view(*x.shape[:2], -1, chunk, *x.shape[3:])


def _split_document_chunks(documents: Tensor | None, chunk: int) -> Tensor | None:
    if documents is None:
        return None
    missing = -documents.shape[1] % chunk
    filled = torch.cat([documents, documents[:, -1:].expand(-1, missing)], 1)
    return filled.view(len(filled), -1, chunk)


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """Read a decaying sum of outer products: S ← e^g S + k vᵀ, o = Sᵀ q.

    Args:
        query: Shape: (B, H, L, K), or (B, 1, L, K) for all heads alike.
        key: As query.
        value: Shape: (B, H, L, V).
        log_decay: g. Shape: (B, H, L).
        documents: The state is zero where one begins. Shape: (B, L).
        chunk: C.

    Returns:
        Shape: (B, H, L, V).

    Example:
        >>> one = torch.ones(1, 1, 3, 1)
        >>> linear_recurrence(one, one, one, torch.full((1, 1, 3), 0.5).log()).flatten()
        tensor([1.0000, 1.5000, 1.7500])

    Source: Mamba-2, arXiv 2405.21060, section 6 (chunks) and equation 16 (recurrence).
    """
    length = value.shape[2]
    chunk = min(chunk, length)
    q, k, v = (_split_chunks(x, chunk) for x in (query, key, value))
    decays = chunk_decays(_split_chunks(log_decay, chunk), _split_document_chunks(documents, chunk))
    inside = (q @ k.mT * decays.pairs) @ v
    if v.shape[2] == 1:
        return inside.flatten(2, 3)[:, :, :length]
    added = (k * decays.ending[..., None]).mT @ v  # (B, H, N, K, V)
    states = [torch.zeros_like(added[:, :, 0])]
    for i in range(v.shape[2] - 1):
        states.append(states[-1] * decays.across[:, :, i, None, None] + added[:, :, i])
    out = inside + (q * decays.carried[..., None]) @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :length]


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor,
    documents: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """Correct what the state remembers of each key: S ← e^g S, S += k β(v − Sᵀk)ᵀ, o = Sᵀ q.

    What the tokens of a chunk write, u = β(v − Sᵀk), depends on the earlier ones linearly: a
    triangular system gives all of it at once.

    Args:
        query: Shape: (B, H, L, K).
        key: Vectors of length 1. Shape: (B, H, L, K).
        value: Shape: (B, H, L, V).
        log_decay: g. Shape: (B, H, L).
        beta: Fraction of the error that is corrected. Shape: (B, H, L).
        documents: The state is zero where one begins. Shape: (B, L).
        chunk: C.

    Returns:
        Shape: (B, H, L, V).

    Example:
        >>> one, half = torch.ones(1, 1, 3, 1), torch.full((1, 1, 3), 0.5)
        >>> delta_rule(one, one, one, 0 * half, beta=half).flatten()
        tensor([0.5000, 0.7500, 0.8750])

    Source: Gated Delta Networks, arXiv 2412.06464, section 3.
    """
    length = value.shape[2]
    chunk = min(chunk, length)
    q, k, v = (_split_chunks(x, chunk) for x in (query, key, value))
    b = _split_chunks(beta, chunk)[..., None]
    decays = chunk_decays(_split_chunks(log_decay, chunk), _split_document_chunks(documents, chunk))
    system = (b * (k @ k.mT) * decays.pairs).tril(-1)
    several = v.shape[2] > 1
    right = torch.cat([b * v, b * decays.carried[..., None] * k], -1) if several else b * v
    solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    scores = q @ k.mT * decays.pairs
    if not several:
        return (scores @ solved).flatten(2, 3)[:, :, :length]
    free, reading = torch.split(solved, [v.shape[-1], k.shape[-1]], -1)
    q = q * decays.carried[..., None]
    write = (k * decays.ending[..., None]).mT
    state = torch.zeros_like(k[:, :, 0].mT @ v[:, :, 0])
    parts = []
    for i in range(v.shape[2]):
        written = free[:, :, i] - reading[:, :, i] @ state
        parts.append(q[:, :, i] @ state + scores[:, :, i] @ written)
        state = state * decays.across[:, :, i, None, None] + write[:, :, i] @ written
    return torch.cat(parts, 2)[:, :, :length]


def linear_recurrence_by_token(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, *, documents: Tensor | None = None
) -> Tensor:
    """:func:`linear_recurrence`, one token after the other; slow."""
    beta = torch.ones_like(log_decay)
    return _recur_by_token(
        query, key, value, log_decay, beta=beta, documents=documents, corrects=False
    )


def delta_rule_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor,
    documents: Tensor | None = None,
) -> Tensor:
    """:func:`delta_rule`, one token after the other; slow."""
    return _recur_by_token(
        query, key, value, log_decay, beta=beta, documents=documents, corrects=True
    )


def _recur_by_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor,
    documents: Tensor | None,
    corrects: bool,
) -> Tensor:
    heads = value.shape[1]
    query, key = (x.expand(-1, heads, -1, -1) for x in (query, key))
    state = torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None])
    parts = []
    for t in range(value.shape[2]):
        state = state * log_decay[:, :, t, None, None].exp()
        if documents is not None:
            state = state * same_document(documents, 1)[:, t, None, None, None]
        recalled = (state.mT @ key[:, :, t, :, None])[..., 0] if corrects else 0.0
        written = beta[:, :, t, None] * (value[:, :, t] - recalled)
        state = state + key[:, :, t, :, None] * written[:, :, None]
        parts.append((state.mT @ query[:, :, t, :, None])[..., 0])
    return torch.stack(parts, 2)
