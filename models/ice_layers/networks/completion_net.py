"""The completion network: spatial encoder within layers, transformer across layers, head.

Axes: N traces, L layers, P physical fields, F features, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.networks.features import (
    input_features,
    nearby_means,
    side_features,
)
from fulgurite.models.ice_layers.networks.options import (
    InputOptions,
    SpatialOptions,
    TransformerOptions,
)
from fulgurite.models.ice_layers.networks.spatial import SpatialEncoder, TraceAttention
from fulgurite.models.ice_layers.networks.temporal import LayerTransformer

__all__ = ["CompletionNet"]


class CompletionNet(nn.Module):
    """Normalised thickness of every entry, from what is visible and from physics.

    Args:
        layers: Number of layers, L.
        physics: Number of physical fields, P.
        width: Width of the network, D.
        inputs: What the network sees beside thickness.
        spatial: The part that looks along the track.
        transformer: The part that looks across layers.

    Raises:
        ConfigError: A number is out of range or a name is unknown.

    Source: arXiv 2604.20783 (spatial equation, transformer encoder); docs/papers/ice_layers.md
        sections 1.1 to 1.4; ``scales`` and ``attention`` are inferred.
    """

    def __init__(
        self,
        layers: int,
        physics: int,
        width: int = 32,
        *,
        inputs: InputOptions = InputOptions(),
        spatial: SpatialOptions = SpatialOptions(),
        transformer: TransformerOptions = TransformerOptions(),
    ) -> None:
        super().__init__()
        self.sizes = (layers, physics)
        if width < 2:
            raise ConfigError(
                f"model.init_args.network.init_args.width={width} is too small.", "Give 2 or more."
            )
        self.inputs = inputs
        features = 2 * inputs.position + 2 + 2 * inputs.sums + physics + 2 * len(inputs.scales)
        features += 4 * len(inputs.reach) + 1 if inputs.reach else 0
        self.spatial = SpatialEncoder(
            features,
            width,
            spatial.depth,
            spatial.graph,
            backend=spatial.backend,
            neighbours=spatial.neighbours,
            part=spatial.part,
            overlap=spatial.overlap,
        )
        self.attention = nn.ModuleList(
            TraceAttention(width, transformer.heads) for _ in range(transformer.attention)
        )
        self.temporal = LayerTransformer(
            layers,
            width,
            transformer.depth,
            transformer.heads,
            dropout=transformer.dropout,
            encoding=transformer.encoding,
            skip=transformer.skip,
            mixing=transformer.mixing,
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    @property
    def sums(self) -> bool:
        """Whether measured sums of missing layers are an input."""
        return self.inputs.sums

    def forward(  # noqa: PLR0917  # what any network is called with
        self,
        thickness: Tensor,
        visible: Tensor,
        physics: Tensor,
        pos: Tensor,
        degrees: Tensor,
        distance: Tensor,
        track: Track,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Predict all entries.

        Args:
            thickness: Normalised; anything where not visible. Shape: (N, L).
            visible: Shape: (N, L), bool.
            physics: Normalised. Shape: (N, L, P).
            pos: Normalised latitude and longitude. Shape: (N, 2).
            degrees: Latitude and longitude [degrees], float64. Shape: (N, 2).
            distance: Along the track [m]. Shape: (N,).
            track: The stacks.
            shared: Normalised thickness that missing layers of a measured sum would have in the
                usual proportions, NaN elsewhere; None for no such sum. Shape: (N, L).

        Returns:
            Normalised thickness. Shape: (N, L).
        """
        if not self.inputs.physics:
            physics = torch.zeros_like(physics)
        x = input_features(thickness, visible, physics, pos if self.inputs.position else None)
        visible_thickness = torch.where(visible, thickness, 0.0).to(x.dtype)
        if self.sums:
            part = torch.full_like(thickness, torch.nan) if shared is None else shared
            finite = part.isfinite()
            sum_features = torch.stack([torch.where(finite, part, 0.0), finite.to(part.dtype)], -1)
            x = torch.cat([x, sum_features.to(x.dtype)], -1)
        if self.inputs.scales:
            x = torch.cat(
                [
                    x,
                    nearby_means(
                        visible_thickness, visible, track, distance, scales=self.inputs.scales
                    ),
                ],
                -1,
            )
        if self.inputs.reach:
            x = torch.cat(
                [
                    x,
                    side_features(
                        visible_thickness, visible, track, distance, reach=self.inputs.reach
                    ),
                ],
                -1,
            )
        x = self.spatial(x, track, degrees)
        before = [
            partial(block, track=track, distance=distance, visible=visible)
            for block in self.attention
        ]
        return self.head(self.temporal(x, before)).squeeze(-1)  # type: ignore[no-any-return]
