"""Which observed entries the network does not see, in training and to check it.

A network that sees what it is asked for learns to copy it, and fills gaps with garbage. Hiding has
the structure of real gaps: whole layers and contiguous segments.

Axes: B stacks, N traces of all of them, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.graph import Track

__all__ = ["StructuredHiding", "held_out"]


class StructuredHiding:
    """Hides whole layers and contiguous segments of observed entries.

    Args:
        layer: Probability that a layer of a stack is hidden altogether.
        segment: Probability that a segment of a layer is hidden; cyclic, so that it may take both
            ends.
        shortest: Least length of a segment, as a share of the stack's traces.
        longest: Greatest length.
        donor: Probability that a stack also hides what is missing in another stack of the batch:
            gaps as they really are.

    Raises:
        ConfigError: A probability or length is out of range.

    Example:
        >>> hiding = StructuredHiding(layer=0.0, segment=1.0, shortest=0.5, longest=0.5)
        >>> observed = torch.ones(8, 1, dtype=torch.bool)
        >>> hiding(observed, Track.of([8]), torch.Generator().manual_seed(0)).squeeze().int()
        tensor([0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.int32)

    Source: card section 1.5, tag M; ``donor`` is inferred.
    """

    def __init__(
        self,
        layer: float = 0.15,
        segment: float = 0.5,
        shortest: float = 0.125,
        longest: float = 0.5,
        donor: float = 0.0,
    ) -> None:
        where = "model.init_args.hiding.init_args"
        for name, value in (("layer", layer), ("segment", segment), ("donor", donor)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{where}.{name}={value} is no probability.", "Give 0 to 1.")
        if not 0 < shortest <= longest <= 1:
            raise ConfigError(
                f"{where} hides segments of {shortest} to {longest} of a stack.",
                "Set 0 < shortest <= longest <= 1.",
            )
        self.layer, self.segment, self.donor = layer, segment, donor
        self.shortest, self.longest = shortest, longest

    @property
    def hides(self) -> bool:
        """Whether anything is hidden at all."""
        return max(self.layer, self.segment, self.donor) > 0

    def __call__(self, observed: Tensor, track: Track, generator: torch.Generator) -> Tensor:
        """Draw what is hidden, a part of ``observed``.

        Args:
            observed: Shape: (N, L), bool.
            track: Which trace is of which stack.
            generator: On the CPU, so that every device hides the same.

        Shape: to (N, L), bool.
        """
        stacks, layers = len(track.sizes), observed.shape[1]
        draw = move(torch.rand(5, stacks, layers, generator=generator), observed.device)
        share = self.shortest + (self.longest - self.shortest) * draw[2]
        place = (track.place[:, None] / track.length[:, None] - draw[3][track.stack]) % 1
        # half a trace: a share of 1/2 hides 4 of 8 wherever it starts
        step = 0.5 / track.length[:, None]
        cut = (draw[1] < self.segment)[track.stack] & ((place + step) % 1 < share[track.stack])
        hidden = (draw[0] < self.layer)[track.stack] | cut
        if self.donor and stacks > 1:
            hidden |= self._donated(observed, track, draw[4, :, 0], generator)
        return hidden & observed

    def _donated(
        self, observed: Tensor, track: Track, draw: Tensor, generator: torch.Generator
    ) -> Tensor:
        """What is missing in another stack of the batch, at the same place of its length."""
        stacks = len(track.sizes)
        shift = int(torch.randint(1, stacks, (), generator=generator))
        other = (track.stack + shift) % stacks
        start, length = track.ptr[:-1][other], track.length
        theirs = track.length_of[other]
        place = (track.place * theirs / length).long().clamp(max=theirs.long() - 1)
        return ~observed[start + place] & (draw < self.donor)[track.stack][:, None]


_CHECK = StructuredHiding(layer=0.08, segment=0.25, shortest=0.125, longest=0.5)


def held_out(observed: Tensor, track: Track, names: Tensor, seed: int = 0) -> Tensor:
    """A fixed part of the observed entries, 10 to 20 %, to score a method on.

    It depends on the stack's number only, not on its batch, so that every epoch, method and number
    of ranks holds out the same.

    Args:
        observed: Shape: (N, L), bool.
        track: Which trace is of which stack.
        names: Number of each stack. Shape: (B,).
        seed: Another one holds out other entries.

    Shape: to (N, L), bool.

    Example:
        >>> observed = torch.ones(400, 10, dtype=torch.bool)
        >>> hidden = held_out(observed, Track.of([40] * 10), torch.arange(10))
        >>> bool((hidden.float().mean() > 0.1) & (hidden.float().mean() < 0.2))
        True

    Source: card section 6, check 13.
    """
    parts = []
    for rows, name in zip(torch.split(observed, track.sizes), names.tolist(), strict=True):
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + int(name))
        parts.append(_CHECK(rows, Track.of([len(rows)], rows.device), generator))
    return torch.cat(parts)
