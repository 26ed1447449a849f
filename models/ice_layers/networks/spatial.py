"""Spatial context within a layer: GraphSAGE with three equal backends, and attention by distance.

Axes: B stacks, N traces of all of them, M traces of the longest, L layers, D width, H heads.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.models.ice_layers.data.graph import GraphKind, Track, adjacency, check_graph, edges

__all__ = ["Backend", "Neighbourhood", "SageLayer", "SpatialEncoder", "TraceAttention"]

Backend = Literal["dense", "pyg", "closed"]


class Neighbourhood:
    """The graph of a batch, and the mean over each trace's neighbours.

    Args:
        track: The stacks.
        pos: Latitude and longitude [degrees]. Shape: (N, 2).
        kind: Kind of graph, see :func:`~fulgurite.models.ice_layers.data.graph.adjacency`.
        backend: ``dense`` multiplies by a matrix; ``closed`` uses that the mean over all others is
            the sum less the trace itself (``full`` only); ``pyg`` passes messages over edges, the
            reference.
        neighbours: Traces on each side of ``knn``.
        part: Traces of a part of ``partition``.
        overlap: Traces that neighbouring parts share.

    Raises:
        ConfigError: The backend does not know the graph.
        MissingExtraError: ``pyg`` without torch-geometric.

    Source: docs/papers/ice_layers.md sections 1.2 and 4.4; the closed form is its trap 2.
    """

    def __init__(
        self,
        track: Track,
        pos: Tensor,
        kind: GraphKind,
        backend: Backend = "dense",
        *,
        neighbours: int = 4,
        part: int = 16,
        overlap: int = 4,
    ) -> None:
        check_backend(kind, backend)
        self.track, self.kind, self.backend = track, kind, backend
        self.weights = self.edges = None
        if backend != "closed" and kind != "none":
            weights = adjacency(track, pos, kind, neighbours, part=part, overlap=overlap)
            if backend == "dense":
                self.weights = weights
            else:
                self.edges = edges(track, weights)

    def mean(self, x: Tensor) -> Tensor:
        """Weighted mean over the neighbours; 0 where there are none. Shape: (N, L, D), kept."""
        if self.kind == "none":
            return torch.zeros_like(x)
        if self.edges is not None:
            summed: Tensor = _pyg().SimpleConv(aggr="sum")(x.flatten(1), *self.edges)
            return summed.view_as(x)
        padded = self.track.pad(x)
        if self.weights is None:
            others = (self.track.length_of - 1).clamp_min(1)[:, None, None, None]
            mean = (padded.sum(1, keepdim=True) - padded) / others
        else:
            mean = (self.weights.to(x.dtype) @ padded.flatten(2)).view_as(padded)
        return self.track.unpad(mean)


def check_backend(kind: str, backend: str) -> None:
    """Refuse a backend that is unknown or does not know the graph.

    Raises:
        ConfigError: The backend is unknown or does not know the graph.
    """
    prefix = "model.init_args.network.init_args.spatial"
    if backend not in get_args(Backend):
        raise ConfigError(
            f"{prefix}.backend={backend} is unknown.", f"Use {', '.join(get_args(Backend))}."
        )
    if backend == "closed" and kind != "full":
        raise ConfigError(
            f"{prefix}.backend=closed knows graph=full only, not {kind}.",
            f"Set {prefix}.backend=dense, or graph=full.",
        )


def _pyg() -> Any:
    return optional_import("torch_geometric.nn", "ice", "backend=pyg", "use backend=dense")


class SageLayer(nn.Module):
    """GraphSAGE with the mean: ``x W1 + mean(neighbours) W2 + b``, one graph for all layers.

    Its parameters are those of PyG's ``SAGEConv`` by the same names, so that states are
    exchangeable, and so are the backends.

    Args:
        inputs: Features in.
        width: Features out.

    Shape: (N, L, inputs) to (N, L, width).

    Example:
        >>> track = Track.of([3])
        >>> around = Neighbourhood(track, torch.zeros(3, 2), "full")
        >>> SageLayer(2, 5)(torch.ones(3, 4, 2), around).shape
        torch.Size([3, 4, 5])

    Source: arXiv 2604.20783, equation of the spatial part; docs/papers/ice_layers.md section 1.3.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.lin_l = nn.Linear(inputs, width)
        self.lin_r = nn.Linear(inputs, width, bias=False)

    def forward(self, x: Tensor, around: Neighbourhood) -> Tensor:
        """Combine each trace with its neighbours."""
        if around.kind == "none":
            return self.lin_r(x) + self.lin_l.bias  # type: ignore[no-any-return]
        if around.edges is not None and around.kind != "inverse":
            return self._reference(x, around.edges[0])
        return self.lin_l(around.mean(x)) + self.lin_r(x)  # type: ignore[no-any-return]

    def _reference(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """PyG's own layer with these parameters; it takes no weights."""
        conv = _pyg().SAGEConv(x.shape[-1], self.lin_l.out_features, node_dim=0)
        conv.lin_l, conv.lin_r = self.lin_l, self.lin_r
        return conv(x, edge_index)  # type: ignore[no-any-return]


class SpatialEncoder(nn.Module):
    """SAGE layers with an activation after each.

    Args:
        inputs: Features in.
        width: Width, D.
        depth: Number of SAGE layers.
        graph: Kind of graph, see :func:`~fulgurite.models.ice_layers.data.graph.adjacency`.
        backend: How means over neighbours are computed, see :class:`Neighbourhood`.
        neighbours: Traces on each side of ``knn``.
        part: Traces of a part of ``partition``.
        overlap: Traces that neighbouring parts share.

    Shape: (N, L, inputs) to (N, L, D).

    Source: arXiv 2604.20783 (equation); docs/papers/ice_layers.md section 1.3, widths and depth
    inferred.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int = 2,
        graph: GraphKind = "knn",
        *,
        backend: Backend = "dense",
        neighbours: int = 4,
        part: int = 16,
        overlap: int = 4,
    ) -> None:
        super().__init__()
        check_graph(graph, neighbours, part, overlap)
        check_backend(graph, backend)
        self.graph, self.backend = graph, backend
        self.neighbours, self.part, self.overlap = neighbours, part, overlap
        sizes = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(SageLayer(a, b) for a, b in itertools.pairwise(sizes))

    def around(self, track: Track, pos: Tensor) -> Neighbourhood:
        """The graph of a batch."""
        return Neighbourhood(
            track,
            pos,
            self.graph,
            self.backend,
            neighbours=self.neighbours,
            part=self.part,
            overlap=self.overlap,
        )

    def forward(self, x: Tensor, track: Track, pos: Tensor) -> Tensor:
        """Encode each trace within its layer.

        Args:
            x: Shape: (N, L, inputs).
            track: The stacks.
            pos: Latitude and longitude [degrees]. Shape: (N, 2).
        """
        around = self.around(track, pos)
        for layer in self.layers:
            x = F.hardswish(layer(x, around))
        return x


class TraceAttention(nn.Module):
    """Attention between the traces of a layer that falls off with distance (pre-norm, residual).

    A trace's weight is a gate of its own, less where it is not visible, times
    ``exp(-distance / reach)``, with a learned reach for each head. Since weights do not depend on
    who looks, a layer needs matrix products only, and no softmax over pairs of traces.

    Args:
        width: Width, D.
        heads: Number of heads, H.
        reach: Distances over which the first and the last head look before training [m]; those of
            the others are spaced geometrically.

    Shape: (N, L, D), kept.

    Source: inferred; the issue's idea of graph attention with distance. The form is that of the
        attention-free transformer (arXiv 2105.14103) with the decay of ALiBi (arXiv 2108.12409).
    """

    def __init__(
        self, width: int, heads: int = 4, reach: tuple[float, float] = (150.0, 3000.0)
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"{heads} heads do not divide a width of {width}.",
                "Set model.init_args.network.init_args.transformer.heads to a divisor of width.",
            )
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.value, self.query = nn.Linear(width, width), nn.Linear(width, width)
        self.gate, self.out = nn.Linear(width, heads), nn.Linear(width, width)
        first, last = (math.log(r) for r in reach)
        self.log_reach = nn.Parameter(torch.linspace(first, last, heads))
        self.unseen = nn.Parameter(torch.full((heads,), 2.0))

    def forward(self, x: Tensor, track: Track, distance: Tensor, visible: Tensor) -> Tensor:
        """Let traces of a layer look at each other.

        Args:
            x: Shape: (N, L, D).
            track: The stacks.
            distance: Along the track [m]. Shape: (N,).
            visible: Shape: (N, L), bool.
        """
        h = self.norm(x)
        logit = self.gate(h) - self.unseen * ~visible[..., None]
        # bounded: weights of a stack may differ by a factor of e^16, and never overflow
        gate = (8 * torch.tanh(logit / 8)).exp()[..., None]  # (N, L, H, 1)
        value = self.value(h).unflatten(-1, (self.heads, -1)) * gate
        parts = track.pad(torch.cat([value, gate], -1))  # (B, M, L, H, D/H + 1)
        position = track.pad(distance)
        apart = (position[:, :, None] - position[:, None, :]).abs().to(x.dtype)  # (B, M, M)
        near = (-apart[:, None] * (-self.log_reach).exp()[:, None, None]).exp()  # (B, H, M, M)
        mixed = near @ parts.permute(0, 3, 1, 2, 4).flatten(3)  # (B, H, M, L (D/H + 1))
        mixed = track.unpad(mixed.transpose(1, 2))
        mixed = mixed.reshape(*mixed.shape[:2], x.shape[1], -1)
        total = mixed[..., :-1] / mixed[..., -1:].clamp_min(1e-12)  # (N, H, L, D/H)
        looked = total.transpose(1, 2).flatten(2) * self.query(h).sigmoid()
        added: Tensor = self.out(looked)
        return x + added
