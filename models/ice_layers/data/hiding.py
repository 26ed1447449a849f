"""Which picked boundaries the network does not see, in training and to check it.

A network that sees what it is asked for learns to copy it, and fills gaps with garbage. Hiding has
the structure of real gaps: whole boundaries and contiguous segments of them. As in real gaps, the
two layers that a hidden boundary divides are missing, and their sum may be known.

A layer stands for its lower boundary; the surface is never hidden.

Axes: B stacks, N traces of all of them, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.options import ClosedUnitInterval, LeftOpenUnitInterval, check_options

__all__ = ["StructuredHiding", "held_out"]


@dataclass(frozen=True)
class StructuredHiding:
    """Hides whole boundaries and contiguous segments of picks.

    Args:
        layer: Probability that the lower boundary of a layer is hidden in the whole stack.
        segment: Probability that a segment of a boundary is hidden; cyclic, so that it may take
            both ends.
        shortest: Least length of a segment, as a fraction of the stack's traces.
        longest: Greatest length of a segment, as a fraction of the stack's traces.
        donor: Probability that a stack also hides the picks that are missing in another stack of
            the batch: gaps as they really are.

    Raises:
        ConfigError: A probability or length is out of range.

    Example:
        >>> hiding = StructuredHiding(layer=0.0, segment=1.0, shortest=0.5, longest=0.5)
        >>> picked = torch.ones(8, 1, dtype=torch.bool)
        >>> hiding(picked, Track.of([8]), torch.Generator().manual_seed(0)).squeeze().int()
        tensor([0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.int32)

    Source: docs/papers/ice_layers.md section 1.5, tag M; ``donor`` is inferred.
    """

    layer: ClosedUnitInterval = 0.15
    segment: ClosedUnitInterval = 0.5
    shortest: LeftOpenUnitInterval = 0.125
    longest: LeftOpenUnitInterval = 0.5
    donor: ClosedUnitInterval = 0.0

    def __post_init__(self) -> None:
        option = "model.init_args.inputs.hiding"
        check_options(self, option)
        if self.shortest > self.longest:
            raise ConfigError(
                f"{option} hides segments of {self.shortest} to {self.longest} of a stack.",
                "Set 0 < shortest <= longest <= 1.",
            )

    @property
    def hides(self) -> bool:
        """Whether anything is hidden at all."""
        return max(self.layer, self.segment, self.donor) > 0

    def __call__(self, picked: Tensor, track: Track, generator: torch.Generator) -> Tensor:
        """Draw which picks are hidden, a part of ``picked``.

        Args:
            picked: Whether the lower boundary of each layer is picked. Shape: (N, L), bool.
            track: Which trace is of which stack.
            generator: On the CPU, so that every device hides the same.

        Shape: to (N, L), bool.
        """
        stacks, layers = len(track.sizes), picked.shape[1]
        draw = move(torch.rand(5, stacks, layers, generator=generator), picked.device)
        fraction = self.shortest + (self.longest - self.shortest) * draw[2]
        offset = (track.offset[:, None] / track.length[:, None] - draw[3][track.stack]) % 1
        # half a trace: a fraction of 1/2 hides 4 of 8 wherever it starts
        step = 0.5 / track.length[:, None]
        cut = (draw[1] < self.segment)[track.stack] & ((offset + step) % 1 < fraction[track.stack])
        hidden = (draw[0] < self.layer)[track.stack] | cut
        if self.donor and stacks > 1:
            hidden |= self._hide_like_donor(picked, track, draw[4, :, 0], generator)
        return hidden & picked

    def _hide_like_donor(
        self, picked: Tensor, track: Track, draw: Tensor, generator: torch.Generator
    ) -> Tensor:
        """What is missing in another stack of the batch, at the same fraction of its length."""
        stacks = len(track.sizes)
        shift = int(torch.randint(1, stacks, (), generator=generator))
        other = (track.stack + shift) % stacks
        start, length = track.ptr[:-1][other], track.length
        theirs = track.length_of[other]
        index = (track.offset * theirs / length).long().clamp(max=theirs.long() - 1)
        return ~picked[start + index] & (draw < self.donor)[track.stack][:, None]


_CHECK = StructuredHiding(layer=0.08, segment=0.25, shortest=0.125, longest=0.5)


def held_out(picked: Tensor, track: Track, names: Tensor, seed: int = 0) -> Tensor:
    """A fixed part of the picks, 10 to 20 %, to score a method on the layers beside them.

    It depends on the stack's number only, not on its batch, so that every epoch, method and number
    of ranks holds out the same. A stack of few layers, of which none is drawn, holds out a quarter
    of the picks of one: without any there would be nothing to score.

    Args:
        picked: Whether the lower boundary of each layer is picked. Shape: (N, L), bool.
        track: Which trace is of which stack.
        names: Number of each stack. Shape: (B,).
        seed: Seed of the choice of picks.

    Shape: to (N, L), bool.

    Example:
        >>> picked = torch.ones(400, 10, dtype=torch.bool)
        >>> hidden = held_out(picked, Track.of([40] * 10), torch.arange(10))
        >>> bool((hidden.float().mean() > 0.1) & (hidden.float().mean() < 0.2))
        True

    Source: docs/papers/ice_layers.md section 6, check 13.
    """
    parts = []
    for rows, name in zip(torch.split(picked, track.sizes), names.tolist(), strict=True):
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + int(name))
        drawn = _CHECK(rows, Track.of([len(rows)], rows.device), generator)
        parts.append(_hold_out_any(drawn, rows))
    return torch.cat(parts)


def _hold_out_any(drawn: Tensor, picked: Tensor) -> Tensor:
    """What was drawn of a stack, or a quarter of a boundary's picks if no observed layer is beside.

    It is taken of the layer that is observed most, without asking a device.

    Args:
        drawn: Picks that were drawn. Shape: (N, L), bool.
        picked: All picks. Shape: (N, L), bool.

    Shape: to (N, L), bool.
    """
    # the surface above the first layer is taken to be picked
    observed = picked & torch.cat([torch.ones_like(picked[:, :1]), picked[:, :-1]], 1)
    below = torch.cat([observed[:, 1:], torch.zeros_like(picked[:, :1])], 1)
    count = observed.sum(0)
    position = (observed.cumsum(0) - 0.5) / count.clamp_min(1)
    quarter = observed & ((position - 0.5).abs() <= torch.clamp(0.5 / count.clamp_min(1), 0.125))
    is_most_observed = torch.arange(picked.shape[1], device=picked.device) == count.argmax()
    return torch.where((drawn & (observed | below)).any(), drawn, quarter & is_most_observed)
