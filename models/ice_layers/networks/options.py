"""Options of the completion network: its inputs, its spatial part and its transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.graph import GraphKind
from fulgurite.models.ice_layers.networks.spatial import Backend
from fulgurite.options import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_options,
)

__all__ = ["InputOptions", "SpatialOptions", "TransformerOptions"]

_OPTION = "model.init_args.network.init_args"


@dataclass(frozen=True)
class InputOptions:
    """What the network sees beside thickness.

    Attributes:
        position: Whether latitude and longitude are inputs.
        physics: False replaces physics by 0, to measure what it is worth.
        scales: Length scales [m] of means over visible neighbours that are further inputs; none
            by default, as in the paper.
        reach: Distances [m] of the averages on each side of an entry that are further inputs, see
            :func:`~fulgurite.models.ice_layers.networks.features.side_features`; none by default.
        sums: Whether measured sums of missing layers are an input: what a layer's part of the sum
            would be in the usual proportions.

    Raises:
        ConfigError: A length is not above 0.
    """

    position: bool = True
    physics: bool = True
    scales: tuple[PositiveFloat, ...] = ()
    reach: tuple[PositiveFloat, ...] = ()
    sums: bool = True

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION}.inputs")


@dataclass(frozen=True)
class SpatialOptions:
    """The part that looks along the track, within a layer.

    Attributes:
        depth: Number of SAGE layers.
        graph: Neighbours within a layer, see
            :func:`~fulgurite.models.ice_layers.data.graph.adjacency`.
        backend: How means over neighbours are computed; all give the same.
        neighbours: Traces on each side of ``graph=knn``.
        part: Traces of a part of ``graph=partition``.
        overlap: Traces that neighbouring parts share.

    Raises:
        ConfigError: A number is out of range or a word is unknown.
    """

    depth: PositiveInt = 2
    graph: GraphKind = "knn"
    backend: Backend = "dense"
    neighbours: PositiveInt = 4
    part: PositiveInt = 16
    overlap: NonNegativeInt = 4

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION}.spatial")


@dataclass(frozen=True)
class TransformerOptions:
    """The part that looks across layers.

    Attributes:
        depth: Blocks of the transformer.
        heads: Heads of its attention.
        dropout: Dropout of the transformer.
        encoding: How a token knows its layer.
        skip: Skip connections of the transformer.
        mixing: How layers look at each other, see
            :class:`~fulgurite.models.ice_layers.networks.temporal.LayerTransformer`.
        attention: Blocks that are preceded by attention between traces, the first ones; 0 as in
            the paper.

    Raises:
        ConfigError: A number is out of range or a word is unknown.
    """

    depth: NonNegativeInt = 2
    heads: PositiveInt = 4
    dropout: ClosedUnitInterval = 0.0
    encoding: Literal["sin", "learned", "none"] = "sin"
    skip: Literal["none", "long_range"] = "none"
    mixing: Literal["softmax", "free"] = "softmax"
    attention: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION}.transformer")
        if self.attention > self.depth:
            raise ConfigError(
                f"{_OPTION}.transformer.attention={self.attention} is more than "
                f"depth={self.depth}.",
                "Give at most depth.",
            )
