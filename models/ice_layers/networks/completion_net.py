"""The completion network: spatial encoder within layers, transformer across layers, head.

Axes: N traces, L layers, P physical fields, F features, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.graph import GraphKind, Track
from fulgurite.models.ice_layers.networks.features import (
    input_features,
    nearby_means,
    side_features,
)
from fulgurite.models.ice_layers.networks.spatial import Backend, SpatialEncoder, TraceAttention
from fulgurite.models.ice_layers.networks.temporal import LayerTransformer

__all__ = ["CompletionNet"]


class CompletionNet(nn.Module):
    """Normalised thickness of every entry, from what is visible and from physics.

    Args:
        layers: Number of layers, L.
        physics: Number of physical fields, P.
        width: Width of the network, D.
        spatial_depth: Number of SAGE layers.
        depth: Blocks of the transformer.
        heads: Heads of its attention.
        dropout: Dropout of the transformer.
        graph: Neighbours within a layer, see
            :func:`~fulgurite.models.ice_layers.data.graph.adjacency`.
        backend: How means over neighbours are computed; all give the same.
        neighbours: Traces on each side of ``graph=knn``.
        part: Traces of a part of ``graph=partition``.
        overlap: Traces that neighbouring parts share.
        encoding: How a token knows its layer.
        skip: Skip connections of the transformer.
        position: Whether latitude and longitude are inputs.
        use_physics: False replaces physics by 0, to measure what it is worth.
        scales: Length scales [m] of means over visible neighbours that are further inputs; none
            by default, as in the paper.
        reach: Distances [m] of the averages on each side of an entry that are further inputs, see
            :func:`~fulgurite.models.ice_layers.networks.features.side_features`; none by default.
        mixing: How layers look at each other, see
            :class:`~fulgurite.models.ice_layers.networks.temporal.LayerTransformer`.
        attention: Blocks of the transformer that are preceded by attention between traces, the
            first ones; 0 as in the paper.
        sums: Whether measured sums of missing layers are an input: what a layer's part of the sum
            would be in the usual proportions.

    Raises:
        ConfigError: A number is out of range or a name is unknown.

    Source: arXiv 2604.20783 (spatial equation, transformer encoder); card sections 1.1 to 1.4;
        ``scales`` and ``attention`` are inferred.
    """

    def __init__(
        self,
        layers: int,
        physics: int,
        width: int = 32,
        spatial_depth: int = 2,
        *,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        graph: GraphKind = "knn",
        backend: Backend = "dense",
        neighbours: int = 4,
        part: int = 16,
        overlap: int = 4,
        encoding: Literal["sin", "learned", "none"] = "sin",
        skip: Literal["none", "long_range"] = "none",
        position: bool = True,
        use_physics: bool = True,
        scales: Sequence[float] = (),
        reach: Sequence[float] = (),
        mixing: Literal["softmax", "free"] = "softmax",
        attention: int = 0,
        sums: bool = True,
    ) -> None:
        super().__init__()
        self.sizes = (layers, physics)
        prefix = "model.init_args.network.init_args"
        for name, value, minimum in (
            ("width", width, 2),
            ("spatial_depth", spatial_depth, 1),
            ("depth", depth, 0),
            ("heads", heads, 1),
            ("attention", attention, 0),
        ):
            if value < minimum:
                raise ConfigError(
                    f"{prefix}.{name}={value} is too small.", f"Give {minimum} or more."
                )
        if attention > depth:
            raise ConfigError(
                f"{prefix}.attention={attention} is more than depth={depth}.", "Give at most depth."
            )
        for name, lengths in (("scales", scales), ("reach", reach)):
            if any(not s > 0 for s in lengths):
                raise ConfigError(f"{prefix}.{name}={[*lengths]} holds 0 or less.", "Give metres.")
        self.position, self.use_physics, self.scales = position, use_physics, tuple(scales)
        self.reach, self.sums = tuple(reach), sums
        inputs = 2 * position + 2 + 2 * sums + physics + 2 * len(self.scales)
        inputs += 4 * len(self.reach) + 1 if self.reach else 0
        self.spatial = SpatialEncoder(
            inputs,
            width,
            spatial_depth,
            graph,
            backend=backend,
            neighbours=neighbours,
            part=part,
            overlap=overlap,
        )
        self.attention = nn.ModuleList(TraceAttention(width, heads) for _ in range(attention))
        self.temporal = LayerTransformer(
            layers,
            width,
            depth,
            heads,
            dropout=dropout,
            encoding=encoding,
            skip=skip,
            mixing=mixing,
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

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
        if not self.use_physics:
            physics = torch.zeros_like(physics)
        x = input_features(thickness, visible, physics, pos if self.position else None)
        visible_thickness = torch.where(visible, thickness, 0.0).to(x.dtype)
        if self.sums:
            part = torch.full_like(thickness, torch.nan) if shared is None else shared
            finite = part.isfinite()
            sum_features = torch.stack([torch.where(finite, part, 0.0), finite.to(part.dtype)], -1)
            x = torch.cat([x, sum_features.to(x.dtype)], -1)
        if self.scales:
            x = torch.cat(
                [x, nearby_means(visible_thickness, visible, track, distance, scales=self.scales)],
                -1,
            )
        if self.reach:
            x = torch.cat(
                [x, side_features(visible_thickness, visible, track, distance, reach=self.reach)],
                -1,
            )
        x = self.spatial(x, track, degrees)
        before = [
            partial(block, track=track, distance=distance, visible=visible)
            for block in self.attention
        ]
        return self.head(self.temporal(x, before)).squeeze(-1)  # type: ignore[no-any-return]
