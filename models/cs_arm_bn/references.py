"""The reference statistics of training plates: in checkpoints, over epochs and over ranks.

Axes: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulgurite.errors import CheckpointError
from fulgurite.models.cs_arm_bn.batch_statistics import TrainingReference
from fulgurite.models.cs_arm_bn.batchnorm import find_context_layers
from fulgurite.sampling import rank_and_world

__all__ = ["age_references", "average_over_ranks", "load_reference", "reference_state"]


def reference_state(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the training reference of each layer as plain tensors."""
    return {
        name: layer.reference.state()
        for name, layer in find_context_layers(model).items()
        if layer.reference is not None
    }


def age_references(model: nn.Module) -> None:
    """Reduce the weight of each layer's training reference to that of at most two plates."""
    for layer in find_context_layers(model).values():
        if layer.reference is not None:
            layer.reference = layer.reference._replace(plates=min(layer.reference.plates, 2.0))


def load_reference(model: nn.Module, state: Mapping[str, Sequence[Tensor]]) -> None:
    """Restore the references of :func:`reference_state`.

    Raises:
        CheckpointError: The references are of another network.
    """
    layers = find_context_layers(model)
    if not isinstance(state, Mapping):
        raise CheckpointError(
            "The checkpoint's reference of the layers is none.", "Use a checkpoint of the run."
        )
    for name, values in state.items():
        if name not in layers or not _is_reference(values, layers[name].num_features):
            raise CheckpointError(
                f"The checkpoint's reference of layer {name} does not fit the network.",
                "Use the network of the run.",
            )
        layers[name].reference = TrainingReference(float(values[0]), float(values[1]), *values[2:])


def _is_reference(values: object, features: int) -> bool:
    """Tell whether values have the form of a layer's reference in :func:`reference_state`."""
    if not isinstance(values, list | tuple) or len(values) != len(TrainingReference._fields):
        return False
    return all(isinstance(value, Tensor) for value in values) and all(
        value.numel() == 1 if index < 2 else value.shape == (features,)
        for index, value in enumerate(values)
    )


def average_over_ranks(network: nn.Module, device: torch.device) -> None:
    """Average running statistics and references over the ranks, which have different plates.

    Args:
        network: The network of this rank, whose layers are changed.
        device: Device of the network.
    """
    world = rank_and_world()[1]
    if world == 1:
        return
    for layer in find_context_layers(network).values():
        values = [b for b in layer.buffers() if b.is_floating_point()]
        reference = layer.reference and layer.reference.to(device)
        if reference is not None:
            numbers = torch.tensor(reference[:2], dtype=torch.float64, device=device)
            values += [numbers, *reference[2:]]
        for value in values:
            dist.all_reduce(value)
            value /= world
        if reference is not None:
            plates, weight = numbers.tolist()
            layer.reference = TrainingReference(plates, weight, *reference[2:])
