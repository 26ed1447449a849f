"""Weights of a run, or of a network alone, from which a classifier starts."""

from __future__ import annotations

from torch import nn

from fulgurite.errors import CheckpointError
from fulgurite.models.cs_arm_bn.references import load_reference
from fulgurite.tensor_files import read_state_dict

__all__ = ["load_network"]


def load_network(network: nn.Module, path: str) -> None:
    """Load the network of a checkpoint of ``PlateClassifier``, or a state dict of the network.

    Raises:
        CheckpointError: The file cannot be read or does not fit.
    """
    checkpoint, state = read_state_dict(path, "model.init_args.weights")
    prefix = "network."
    network_state = {
        k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
    } or state
    try:
        network.load_state_dict(network_state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.init_args.weights={path} does not fit the network: {reason}",
            "Use the network and the data of the run.",
        ) from error
    load_reference(network, checkpoint.get("context_reference", {}))
