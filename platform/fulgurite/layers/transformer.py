"""A pre-norm transformer whose attention can be exchanged, and whose activations can be bounded.

Everything but attention works on each token alone. ``chunk`` computes these parts a few tokens at
a time, and ``checkpoint`` recomputes blocks in backward; neither changes the result.

Axes: B batch, N tokens, E width, H query heads, G key/value heads (G divides H), D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from fulgurite.arithmetic import ceil_div
from fulgurite.attention import AttentionBackend, Documents, InCore
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.errors import ConfigError
from fulgurite.layers.rotary import apply_rotary, rotary
from fulgurite.options import PositiveFloat, PositiveInt, check_options

__all__ = [
    "Attention",
    "Block",
    "SwiGLU",
    "Transformer",
    "TransformerConfig",
    "in_chunks",
    "initialize",
]

_EPS = 1e-6  # of RMSNorm; its default would depend on the precision
_STD = 0.02  # of initial weights
_KEY = "--model.init_args.network.init_args.transformer"


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], chunk: int | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Apply a function that works on each token alone, a chunk of tokens at a time.

    With gradients, a chunk is recomputed in backward, so that only its inputs are kept.

    Args:
        function: Takes the index of the first token and the tensors' chunks; it draws no random
            numbers.
        chunk: Tokens at a time; None for all.
        tensors: Shape of each: (B, N, ...).

    Returns:
        What the function returns for all tokens. Shape of each: (B, N, ...).

    Example:
        >>> in_chunks(lambda start, x: (2 * x + start,), 2, torch.ones(1, 5))
        (tensor([[2., 2., 4., 4., 6.]]),)

    Source: inferred.
    """
    tokens = tensors[0].shape[1]
    if chunk is None or chunk >= tokens:
        return function(0, *tensors)
    parts: list[tuple[Tensor, ...]] = []
    results: tuple[Tensor, ...] = ()
    # split, not slices: each slice would have a gradient as long as the whole
    columns = zip(*(torch.split(x, chunk, dim=1) for x in tensors), strict=True)
    for start, pieces in zip(range(0, tokens, chunk), columns, strict=True):
        if torch.is_grad_enabled():
            part = recomputed(
                function, start, *pieces, use_reentrant=False, preserve_rng_state=False
            )
            parts.append(part)
            continue
        part = function(start, *pieces)  # written in place: all parts together are not needed
        results = results or tuple(x.new_empty(len(x), tokens, *x.shape[2:]) for x in part)
        for result, piece in zip(results, part, strict=True):
            result[:, start : start + chunk] = piece
    return results or tuple(torch.cat(column, 1) for column in zip(*parts, strict=True))


class Attention(nn.Module):
    """Attention with rotary positions and grouped query heads.

    Args:
        width: E.
        heads: H, a divisor of E.
        kv_heads: G, a divisor of H; H by default.
        is_causal: Tokens see earlier ones only.
        window: Tokens see so many tokens only, themselves included; needs ``is_causal``.
        rope_base: See :func:`~fulgurite.layers.rotary.rotary`; None for no positions at all.

    Attributes:
        attention_backend: Computes attention; a strategy may put another one there.

    Shape: (B, N, E) to (B, N, E).

    Raises:
        ConfigError: The sizes do not fit together.

    Example:
        >>> Attention(16, heads=4, kv_heads=2)(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: GQA, arXiv 2305.13245; window: arXiv 2310.06825, section 2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        is_causal: bool = True,
        window: int | None = None,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check(width, heads, kv_heads)
        _check_positions(width // heads, is_causal=is_causal, window=window, rope_base=rope_base)
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.is_causal, self.window, self.rope_base = is_causal, window, rope_base
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.attention_backend: AttentionBackend = InCore()

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of tokens from ``start`` on.

        Shape: (B, N, E) to (B, N, H, D), (B, N, G, D) and (B, N, G, D).
        """
        parts = self.qkv(x).unflatten(-1, (-1, self.size))
        query, key, value = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.rope_base is None:
            return query, key, value
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        cos, sin = rotary(positions, self.size, self.rope_base, accumulator_dtype(x.dtype))
        cos, sin = cos[:, None], sin[:, None]
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        documents: Documents | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Attention by the backend.

        Shape: (B, N, H, D), (B, N, G, D) and (B, N, G, D) to (B, N, H, D).
        """
        return self.attention_backend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=self.is_causal,
            window=self.window,
            prefix=prefix,
            documents=documents,
        ).transpose(1, 2)

    def merge(self, attended: Tensor) -> Tensor:
        """Join the heads. Shape: (B, N, H, D) to (B, N, E)."""
        return self.out(attended.flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, documents: Documents | None = None, prefix: int = 0) -> Tensor:
        """Attention of a sequence on itself.

        Args:
            x: Shape: (B, N, E).
            documents: First tokens of the documents, or their ids (B, N); tokens see only their
                own. Positions run on, as only their differences count.
            prefix: All tokens see the first so many; needs ``is_causal``.
        """
        attended = self.attend(*self.project(x), documents=documents, prefix=prefix)
        return self.merge(attended)


def _check(width: int, heads: int, kv_heads: int) -> None:
    """Check that the heads fit together.

    Raises:
        ConfigError: A size is out of range, or one is not a multiple of another.
    """
    for name, value in (("width", width), ("heads", heads), ("kv_heads", kv_heads)):
        if value < 1:
            raise ConfigError(f"{name}={value} is too small.", f"Give {_KEY}.{name} of at least 1.")
    if width % heads:
        raise ConfigError(
            f"A width of {width} cannot be divided into {heads} heads.",
            f"Make {_KEY}.width a multiple of {_KEY}.heads.",
        )
    if heads % kv_heads:
        raise ConfigError(
            f"{heads} query heads cannot share {kv_heads} key/value heads evenly.",
            f"Make {_KEY}.kv_heads a divisor of {_KEY}.heads.",
        )


def _check_positions(
    size: int, *, is_causal: bool, window: int | None, rope_base: float | None
) -> None:
    """Check what a head of a size sees, and how it tells positions apart.

    Raises:
        ConfigError: An option is out of range, or two contradict each other.
    """
    if rope_base is not None and size % 2:
        raise ConfigError(
            f"Rotary positions rotate pairs, and the head size {size} is odd.",
            f"Make {_KEY}.width an even multiple of {_KEY}.heads.",
        )
    if window is not None and (window < 1 or not is_causal):
        raise ConfigError(
            f"A window of {window} tokens does not fit (is_causal={is_causal}).",
            f"Give {_KEY}.window of at least 1 to a causal network, or null.",
        )
    if rope_base is not None and not 0 < rope_base < math.inf:
        raise ConfigError(
            f"rope_base={rope_base} gives no wavelengths.",
            f"Give a positive {_KEY}.rope_base, such as 10000.",
        )


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer, what its tokens see, and what bounds its memory.

    Args:
        width: E.
        layers: Blocks.
        heads: H, a divisor of E.
        kv_heads: G, a divisor of H; H by default.
        hidden: Width inside :class:`SwiGLU`; see there.
        window: Tokens see so many tokens only, themselves included; in causal networks alone.
        chunk: Tokens at a time in everything but attention; None for all.
        checkpoint: Keep only the inputs of blocks for backward, and compute them again there.
        rope_base: See :func:`~fulgurite.layers.rotary.rotary`; None for no positions at all.

    Raises:
        ConfigError: A number is out of range.
    """

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    hidden: PositiveInt | None = None
    window: PositiveInt | None = None
    chunk: PositiveInt | None = None
    checkpoint: bool = False
    rope_base: PositiveFloat | None = 10000.0

    def __post_init__(self) -> None:
        check_options(self, _KEY.removeprefix("--"))


class SwiGLU(nn.Module):
    """Two layers with a gate.

    Args:
        width: E.
        hidden: Width of the gate; by default 8/3 E, rounded up to a multiple of 64.

    Shape: (..., E) to (..., E).

    Source: arXiv 2002.05202, equation 6; hidden width: Llama, arXiv 2302.13971, section 2.2.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = ceil_div(8 * width, 3 * 64) * 64 if hidden is None else hidden
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate, multiply, and project back."""
        gate, values = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * values)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and two layers, each behind a norm and beside a shortcut.

    Args:
        config: Sizes of the transformer that the block is of.
        is_causal: Tokens see earlier ones only.

    Shape: (B, N, E) to (B, N, E).

    Raises:
        ConfigError: The sizes do not fit together.

    Source: Llama, arXiv 2302.13971, section 2.2; chunks: inferred.
    """

    def __init__(self, config: TransformerConfig, *, is_causal: bool = True) -> None:
        super().__init__()
        self.chunk = config.chunk
        self.norm1 = nn.RMSNorm(config.width, _EPS)
        self.attention = Attention(
            config.width,
            config.heads,
            config.kv_heads,
            is_causal=is_causal,
            window=config.window,
            rope_base=config.rope_base,
        )
        self.norm2 = nn.RMSNorm(config.width, _EPS)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, documents: Documents | None = None, prefix: int = 0) -> Tensor:
        """See :meth:`Attention.forward`."""
        query, key, value = in_chunks(self._before, self.chunk, x)
        attended = self.attention.attend(query, key, value, documents=documents, prefix=prefix)
        return in_chunks(self._after, self.chunk, x, attended)[0]

    def _before(self, start: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.norm1(x), start)

    def _after(self, start: int, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        x = x + self.attention.merge(attended)
        return (x + self.mlp(self.norm2(x)),)


class Transformer(nn.Module):
    """Blocks, and a norm at the end.

    Args:
        config: Sizes, and what bounds the memory.
        is_causal: Tokens see earlier ones only.

    Shape: (B, N, E) to (B, N, E).

    Raises:
        ConfigError: The sizes do not fit together.

    Example:
        >>> config = TransformerConfig(16, layers=2, heads=4, kv_heads=2, chunk=2)
        >>> Transformer(config)(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])

    Source: Llama, arXiv 2302.13971, section 2.2; checkpoints: arXiv 1604.06174.
    """

    def __init__(self, config: TransformerConfig, *, is_causal: bool = True) -> None:
        super().__init__()
        self.chunk, self.checkpoint = config.chunk, config.checkpoint
        self.blocks = nn.ModuleList(
            Block(config, is_causal=is_causal) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, _EPS)
        initialize(self)

    def forward(self, x: Tensor, documents: Documents | None = None, prefix: int = 0) -> Tensor:
        """See :meth:`Attention.forward`."""
        for block in self.blocks:
            if self.checkpoint and torch.is_grad_enabled():
                x = recomputed(
                    block, x, documents, prefix, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, documents, prefix)
        return in_chunks(lambda _, x: (self.norm(x),), self.chunk, x)[0]


def initialize(network: nn.Module) -> None:
    """Draw the weights of linear layers and embeddings anew, in place.

    All come from a normal distribution; those that write into the shortcut are made smaller, so
    that its variance does not grow with depth.

    Args:
        network: Holds any number of :class:`Block`.

    Example:
        >>> network = Transformer(TransformerConfig(64, layers=8, heads=2))
        >>> round(network.blocks[0].mlp.down.weight.std().item(), 3)
        0.005

    Source: GPT-2 technical report, section 2.3: 0.02, and 1/√(2·layers) of it.
    """
    blocks = [part for part in network.modules() if isinstance(part, Block)]
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=_STD)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
    for block in blocks:
        for layer in (block.attention.out, block.mlp.down):
            nn.init.normal_(layer.weight, std=_STD / math.sqrt(2 * len(blocks)))
