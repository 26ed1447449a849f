"""Pretrained weights of a local file, for any network: what fits is loaded, what does not is told.

Shapes: as in the network.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.extras import optional_import
from fulgurite.foreign import reading
from fulgurite.tensor_files import read_state_dict

__all__ = ["head_name", "load_weights", "read_weights"]

log = logging.getLogger(__name__)

_BATCHES = "num_batches_tracked"  # a counter that nothing depends on


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors of a file; nothing in it is executed.

    Args:
        path: A ``.safetensors`` file; or what ``torch.save`` wrote: a state dict, or a checkpoint
            with one under ``state_dict``.

    Raises:
        CheckpointError: The file does not exist, is damaged, or holds other types.
        MissingExtraError: The file needs safetensors, which is not installed.
    """
    if Path(path).suffix != ".safetensors":
        return read_state_dict(path, "weights")[1]
    if not Path(path).is_file():
        raise CheckpointError(f"weights={path} is not a file.", "Name a file, or give null.")
    safetensors = optional_import("safetensors.torch", "federated", "Reading .safetensors")
    hint = "It may be truncated: fetch it again, or use another."
    fault = "cannot be read as safetensors"
    with reading(path, "The weights", hint, error=CheckpointError, fault=fault):
        tensors: dict[str, Tensor] = safetensors.load_file(path)
        if not tensors:
            raise ValueError("it holds no tensor")
        return tensors


def head_name(network: nn.Module) -> str:
    """Return the name of the layer that a network calls its ``head``.

    Example:
        >>> from fulgurite.layers.resnet import ResNet18
        >>> head_name(ResNet18(1, 2, "cifar"))
        'fc'
    """
    head = getattr(network, "head", None)
    return next((name for name, module in network.named_modules() if module is head), "head")


def load_weights(network: nn.Module, path: str | Path, head: str = "fc") -> None:
    """Load weights of a file into a network; a head of another size is left, with a warning.

    Names may all begin with something that the network's do not (``module.``, ``network.``,
    ``backbone.``); what begins otherwise then belongs to other parts, and is left out with a note.

    Args:
        network: The network to fill, in place; after an error it is as before.
        path: A file as :func:`read_weights` takes it.
        head: Name of the layer that may differ or be absent.

    Raises:
        CheckpointError: The file cannot be read by :func:`read_weights`.
        ConfigError: A tensor other than the head's is missing, unknown, of another shape or kind,
            or not finite; or the file holds two such networks.

    Example:
        >>> import tempfile, torch
        >>> source, target = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save(source.state_dict(), file.name)
        ...     load_weights(target, file.name)
        >>> bool((source.weight == target.weight).all())
        True
    """
    expected = {name: value for name, value in network.state_dict().items() if _is_tensor(value)}
    state = _without_prefix(read_weights(path), expected, path)
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    unlike = {
        name for name in expected.keys() & state.keys() if _differs(expected[name], state[name])
    }
    of_head = {name for name in missing | unknown | unlike if name.startswith(f"{head}.")}
    if of_head:
        warnings.warn(
            f"{path}: the head ({', '.join(sorted(of_head))}) is absent or has another size; it "
            "starts untrained.",
            stacklevel=2,
        )
    counters = {name for name in missing | unknown if name.endswith(_BATCHES)}
    faults = {
        "missing": sorted(missing - of_head - counters),
        "unknown": sorted(unknown - of_head - counters),
        "of another shape or kind": [
            f"{name} ({_describe(state[name])}, not {_describe(expected[name])})"
            for name in sorted(unlike - of_head)
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise ConfigError(
            f"weights={path} does not fit the network: {told}.",
            "Choose the network, stem and in_channels that the weights were saved from.",
        )
    fitting = {name: state[name] for name in expected.keys() & state.keys() - of_head}
    if broken := sorted(n for n, v in fitting.items() if not torch.isfinite(v).all()):
        raise ConfigError(
            f"weights={path} holds values that are not finite: {_some(broken)}.",
            "Use weights of a training that did not diverge.",
        )
    network.load_state_dict(fitting, strict=False)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _without_prefix(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Take from names what precedes those of the network."""
    prefixes = {""}
    for name in expected:
        prefixes |= {n.removesuffix(name) for n in state if n.endswith(f".{name}")}
    counts = {prefix: sum(prefix + name in state for name in expected) for prefix in prefixes}
    best = max(counts.values())
    best_prefixes = sorted(prefix for prefix in prefixes if counts[prefix] == best)
    if best == 0 or "" in best_prefixes:
        return dict(state)
    if len(best_prefixes) > 1:
        raise ConfigError(
            f"weights={path} holds {len(best_prefixes)} networks that fit, under "
            f"{_some(best_prefixes)}.",
            "Save the one that is meant alone: torch.save(network.state_dict(), path).",
        )
    (prefix,) = best_prefixes
    others = sorted(name for name in state if not name.startswith(prefix))
    if others:
        log.warning(
            "weights=%s: what begins with %s is loaded, and %d other tensors are left out (%s).",
            path,
            prefix,
            len(others),
            _some(others),
        )
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _differs(expected: Tensor, stored: Tensor) -> bool:
    """Whether a tensor cannot take the place of another; half precision can."""
    return (
        expected.shape != stored.shape or expected.is_floating_point() != stored.is_floating_point()
    )


def _describe(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {tuple(tensor.shape)}"


def _some(names: Iterable[str], limit: int = 4) -> str:
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more
