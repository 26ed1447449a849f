"""A completion of ice layers on its own: one stack in, its thickness out, in metres.

Axes: N traces of a stack, L layers, P physical fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.domains.ice_layers.codes import METRES
from fulgurite.errors import CheckpointError
from fulgurite.export.exportable import ExportableNetwork, Port
from fulgurite.models.ice_layers.networks.spatial import SpatialEncoder

__all__ = ["export_predictor"]


class StackPredictor(nn.Module):
    """A module of ice layers that is called with the arrays of one stack.

    Args:
        module: Predicts the thickness of a batch.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(  # noqa: PLR0917  # what an exported network is called with
        self,
        thickness: Tensor,
        physics: Tensor,
        pos: Tensor,
        distance: Tensor,
        span_start: Tensor,
        span_path: Tensor,
        refraction: Tensor,
    ) -> Tensor:
        """Predicted thickness of all entries. Shape: to (N, L), float64."""
        traces = thickness.shape[0]
        zero = torch.zeros((), dtype=torch.int64)
        batch = SimpleNamespace(
            thickness=thickness,
            observed=thickness.isfinite(),
            physics=physics,
            pos=pos,
            distance=distance,
            span_start=span_start,
            span_path=span_path,
            refraction=refraction,
            stack=torch.zeros(1, dtype=torch.int64),
            ptr=torch.stack([zero, zero + traces]),
            traces=[traces],
        )
        return self.module(batch)  # type: ignore[no-any-return]


def export_predictor(
    module: nn.Module,
    *,
    sizes: tuple[int, int] | None,
    data_state: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> ExportableNetwork:
    """Describe a completion or a deep-layer prediction with all that belongs to it.

    Normalisation, the prior, the mean over members and measured sums are inside.

    Args:
        module: Predicts the thickness of a batch (N, L); it is changed, so give a copy.
        sizes: Layers and physical fields; None where the module was not made.
        data_state: What the checkpoint holds of the DataModule.
        notes: What a user should know.

    Raises:
        CheckpointError: The networks were not made.
    """
    if sizes is None:
        raise CheckpointError(
            "The networks of ice layers were not made yet.", "Export a trained checkpoint."
        )
    layers, fields = sizes
    for part in module.modules():
        if isinstance(part, SpatialEncoder) and part.backend == "pyg":
            part.backend = "dense"  # the same means, by a matrix
    names = list(data_state.get("physics", [])) or [str(number) for number in range(fields)]
    unit = str(data_state.get("unit", METRES))
    ports = _ports(layers, fields, unit, names)

    def make_inputs(lengths: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        return _make_stack(lengths["traces"], module, (layers, fields), generator)

    return ExportableNetwork(
        StackPredictor(module).eval(),
        inputs=ports,
        outputs=(
            Port(
                "predicted",
                torch.float64,
                ("traces", layers),
                f"predicted thickness of all layers [{unit}], the measured ones too",
            ),
        ),
        axes={"traces": (12, 2, 1, 33)},
        make_inputs=make_inputs,
        weights=module,
        facts={"physics": names, "unit": unit, "stacks": "one in each call"},
        notes=notes,
    )


def _ports(layers: int, fields: int, unit: str, names: list[str]) -> tuple[Port, ...]:
    entries = ("traces", layers)
    return (
        Port("thickness", torch.float64, entries, f"measured [{unit}], NaN where missing"),
        Port("physics", torch.float32, ("traces", layers, fields), ", ".join(names)),
        Port("pos", torch.float64, ("traces", 2), "latitude and longitude [degrees]"),
        Port("distance", torch.float64, ("traces",), "along the track [m]"),
        Port(
            "span_start",
            torch.int64,
            entries,
            "number of the first layer between the picked boundaries around each layer; its own "
            "number (0, 1, ...) where it is measured itself, or nothing is known",
        ),
        Port(
            "span_path",
            torch.float64,
            entries,
            f"what the layers between these boundaries add up to, times refraction [{unit}]; NaN "
            "where nothing is known",
        ),
        Port("refraction", torch.float64, entries, "index of each layer; 1 for thickness itself"),
    )


def _make_stack(
    traces: int, module: Any, sizes: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """A stack like those of training, a third of whose entries is missing, with sums of some."""
    layers, fields = sizes
    normaliser = module.normaliser

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    usual = normaliser.thickness_mean + normaliser.thickness_std * noise(traces, layers)
    thickness = usual.abs() + 0.01
    physics = normaliser.physics_mean + normaliser.physics_std * noise(traces, layers, fields)
    pos = normaliser.pos_mean + normaliser.pos_std * noise(traces, 2)
    distance = 50.0 * torch.arange(traces, dtype=torch.float64)
    numbers = torch.arange(layers).expand(traces, layers).clone()
    path, missing = thickness.clone(), torch.rand(traces, layers, generator=generator) < 0.2
    if layers > 1:  # of the first trace, a boundary between two layers was not picked
        numbers[0, 1], missing[0, :2] = 0, True
        path[0, :2] = thickness[0, :2].sum()
        missing_alone = missing.clone()
        missing_alone[0, :2] = False
        path[missing_alone] = torch.nan
    thickness[missing] = torch.nan
    return (
        thickness,
        physics.float(),
        pos,
        distance,
        numbers,
        path,
        torch.ones(traces, layers, dtype=torch.float64),
    )
