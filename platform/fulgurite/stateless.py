"""Calls of a network with other tensors in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["call_with_tensors", "find_tensor_paths"]


def find_tensor_paths(module: nn.Module) -> dict[str, str]:
    """Return where each parameter and buffer of a module is, and the name of the tensor there.

    A tensor that several modules share is at several paths, and has one name, that of
    ``named_parameters`` or ``named_buffers``. A module that is registered twice has one path.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> other = nn.Linear(1, 1, bias=False)
        >>> other.weight = layer.weight
        >>> find_tensor_paths(nn.Sequential(layer, layer, other))
        {'0.weight': '0.weight', '2.weight': '0.weight'}
    """
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    names |= {id(tensor): name for name, tensor in module.named_buffers()}
    return {
        f"{prefix}.{key}".lstrip("."): names[id(tensor)]
        for prefix, owner in module.named_modules()
        for key, tensor in (
            *owner.named_parameters(recurse=False, remove_duplicate=False),
            *owner.named_buffers(recurse=False, remove_duplicate=False),
        )
    }


def call_with_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *inputs: Any,
    paths: Mapping[str, str] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module with other parameters and buffers, and leave its own as they are.

    ``torch.func.functional_call`` leaves the other tensors in a module that is registered twice.

    Args:
        module: The module.
        tensors: Parameters and buffers by name; those that are left out are the module's own.
        *inputs: Arguments of the call.
        paths: What :func:`find_tensor_paths` gives, where it is known already.

    Returns:
        What the call returns, and by name the tensors that it put in the place of given ones, such
        as buffers that the forward pass assigns anew.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> call_with_tensors(layer, {"weight": torch.tensor([[2.0]])}, torch.ones(1))[0]
        tensor([2.])
    """
    paths = find_tensor_paths(module) if paths is None else paths
    values = {path: tensors[name] for path, name in paths.items() if name in tensors}
    result = functional_call(module, values, inputs, tie_weights=False)
    assigned = {
        paths[path]: value for path, value in values.items() if value is not tensors[paths[path]]
    }
    return result, assigned
