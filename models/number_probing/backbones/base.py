"""Common parts of backbones: the protocol, documents, and the block around a token mixer.

A backbone turns embedded tokens into hidden states, causally. ``documents`` keeps packed pieces of
a sequence apart: a token sees only earlier tokens with its own id, and recurrent state starts anew
where the id changes.

Axes: B batch, L tokens, D width, W taps of a convolution.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.layers.transformer import SwiGLU

__all__ = [
    "EPS",
    "CausalBackbone",
    "CausalConv",
    "MixerBlock",
    "check_minimum",
    "draw_weights",
    "same_document",
]

EPS = 1e-6  # of RMSNorm
_STD = 0.02  # of initial weights, as in fulgurite.layers.transformer
KEY = "--model.init_args.backbone.init_args"


class CausalBackbone(Protocol):
    """Hidden states from embedded tokens, each from its own and earlier ones only.

    Attributes:
        width: D.

    One that goes through a sequence by a loop says ``traces_one_length = True``: what is exported
    of it is for sequences of one length.
    """

    width: int

    def __call__(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Compute hidden states.

        Args:
            x: Shape: (B, L, D).
            documents: Id of the piece that each token belongs to; equal ids are neighbours.
                Shape: (B, L), int64.

        Returns:
            Shape: (B, L, D).
        """
        ...


def check_minimum(minimum: int, **sizes: int) -> None:
    """Check that all sizes are at least ``minimum``.

    Raises:
        ConfigError: A size is below the minimum.
    """
    for name, size in sizes.items():
        if size < minimum:
            raise ConfigError(
                f"The backbone's {name}={size} is too small.", f"Give {KEY}.{name} of {minimum} up."
            )


def same_document(documents: Tensor, lag: int) -> Tensor:
    """Whether the token ``lag`` tokens earlier belongs to the same document.

    Args:
        documents: Shape: (B, L).
        lag: At least 1.

    Returns:
        False where there is no such token. Shape: (B, L), bool.

    Example:
        >>> same_document(torch.tensor([[0, 0, 1, 1, 1]]), 1)
        tensor([[False,  True, False,  True,  True]])

    Source: inferred.
    """
    same = torch.zeros_like(documents, dtype=torch.bool)
    same[:, lag:] = documents[:, lag:] == documents[:, :-lag]
    return same


class CausalConv(nn.Module):
    """A short convolution of each channel over its own past.

    Args:
        channels: D.
        taps: W.

    Shape: (B, L, D) to (B, L, D).

    Example:
        >>> CausalConv(3)(torch.zeros(1, 5, 3)).shape
        torch.Size([1, 5, 3])

    Source: Mamba, arXiv 2312.00752, section 3.4.
    """

    def __init__(self, channels: int, taps: int = 4) -> None:
        super().__init__()
        check_minimum(1, conv=taps)
        bound = 1 / math.sqrt(taps)  # as nn.Conv1d draws
        self.weight = nn.Parameter(torch.empty(taps, channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Weigh each token and the W-1 before it in its document."""
        out = x * self.weight[0]
        for lag in range(1, min(len(self.weight), x.shape[1])):
            past = F.pad(x[:, :-lag], (0, 0, lag, 0))
            if documents is not None:
                past = past * same_document(documents, lag)[..., None]
            out = out + past * self.weight[lag]
        return out


class MixerBlock(nn.Module):
    """A token mixer and two layers, each behind a norm and beside a shortcut.

    Args:
        width: D.
        mixer: Mixes tokens: (B, L, D), documents to (B, L, D).
        hidden: Width inside the two layers, see :class:`~fulgurite.layers.transformer.SwiGLU`;
            0 for no such layers.

    Shape: (B, L, D) to (B, L, D).

    Source: Llama, arXiv 2302.13971, section 2.2, with another mixer in attention's place.
    """

    def __init__(self, width: int, mixer: nn.Module, hidden: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, EPS)
        self.mixer = mixer
        self.norm2 = None if hidden == 0 else nn.RMSNorm(width, EPS)
        self.mlp = None if hidden == 0 else SwiGLU(width, hidden)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Add the outputs of the mixer and of the two layers to the shortcut."""
        x = x + self.mixer(self.norm1(x), documents)
        if self.norm2 is None or self.mlp is None:
            return x
        return cast("Tensor", x + self.mlp(self.norm2(x)))


def draw_weights(network: nn.Module, into_shortcut: list[nn.Linear]) -> None:
    """Draw the weights of linear layers anew, in place.

    Args:
        network: The network that holds the layers.
        into_shortcut: Layers that write into a shortcut; their weights are drawn smaller, so that
            the variance does not grow with depth.

    Source: GPT-2 technical report, section 2.3: 0.02, and 1/√(number of shortcuts) of it.
    """
    small = {id(layer) for layer in into_shortcut}
    for part in network.modules():
        if isinstance(part, nn.Linear):
            scale = 1 / math.sqrt(len(small)) if id(part) in small else 1.0
            nn.init.normal_(part.weight, std=_STD * scale)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
