"""In-place conversion of BatchNorm layers to layers with a context, and back.

A layer changes its class and stays the same object, with its parameters, buffers, hooks and shared
uses. All layers are checked before the first one changes.

Axes: C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn.batchnorm import (
    ContextBatchNorm1d,
    ContextBatchNorm2d,
    ContextLayer,
    find_context_layers,
)

__all__ = ["convert_batchnorm", "has_batchnorm", "revert_batchnorm"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_KINDS: tuple[type[ContextLayer], ...] = (ContextBatchNorm2d, ContextBatchNorm1d)


def has_batchnorm(model: nn.Module) -> bool:
    """Tell whether a network has a BatchNorm1d or BatchNorm2d, of torch or with a context."""
    return any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


def convert_batchnorm(model: nn.Module) -> nn.Module:
    """Give every BatchNorm a context; layers, parameters, buffers and hooks are the same objects.

    Args:
        model: Network to convert in place; an error leaves it unchanged.

    Returns:
        The network.

    Raises:
        ConfigError: The network has no BatchNorm, or one that cannot be converted.

    Example:
        >>> net = convert_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
        >>> type(net[1]).__name__, type(revert_batchnorm(net)[1]).__name__
        ('ContextBatchNorm2d', 'BatchNorm2d')

    Source: docs/papers/cs_arm_bn.md section 7.3.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, layer in layers.items():
        _check_convertible(name, layer)
    if not layers:
        norms = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
        having = f" (it has {', '.join(sorted(norms))})" if norms else ""
        raise ConfigError(
            f"{type(model).__name__} has no BatchNorm whose statistics could be adapted{having}.",
            "Set model.init_args.network to a network with BatchNorm, such as "
            "fulgurite.models.cs_arm_bn.SmallResNet, or model.init_args.method to one that needs "
            "none, such as TVN or LinearProbe.",
        )
    for name, layer in layers.items():
        if not isinstance(layer, ContextLayer):
            layer.__class__ = _get_context_class(type(layer))
            assert isinstance(layer, ContextLayer)
            layer.prepare(name)
        layer.name = name
    return model


def _check_convertible(name: str, layer: nn.Module) -> None:
    """Refuse a BatchNorm whose conversion would change more than its statistics."""
    kind, label = type(layer), name or "The network"
    if isinstance(layer, ContextLayer):
        return
    if isinstance(layer, nn.SyncBatchNorm):
        raise ConfigError(
            f"{label} is a SyncBatchNorm, which mixes the plates of the ranks.",
            "Leave out --trainer.sync_batchnorm, and convert no layer to SyncBatchNorm.",
        )
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise ConfigError(
            f"{label} is a {kind.__name__}, which does not know its channels yet.",
            "Call the network on one batch before it is converted.",
        )
    if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        raise ConfigError(
            f"{label} is a {kind.__name__}, which cannot take its statistics from a context.",
            "Use a network with BatchNorm1d or BatchNorm2d.",
        )
    _refuse_parametrized(label, layer)
    if "forward" in vars(layer) or kind.__call__ is not nn.Module.__call__:
        raise ConfigError(
            f"The forward pass of {label} ({kind.__name__}) was replaced by another function.",
            "Convert the network before a library wraps its layers.",
        )
    if _has_own_forward(kind) and not _is_fused(layer):
        raise ConfigError(
            f"{label} is a {kind.__name__}: a BatchNorm with a forward pass of its own, which is "
            "no normalisation that only its modules `drop` and `act` follow.",
            "Use a network with torch's own BatchNorm, or let the layer's other operations be "
            "modules after it.",
        )


def _refuse_parametrized(label: str, layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer):
        tensors = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        raise ConfigError(
            f"{label} has a parametrisation of its {tensors}.",
            "Bake it in first: torch.nn.utils.parametrize.remove_parametrizations.",
        )


def _has_own_forward(kind: type[nn.Module]) -> bool:
    return kind.forward is not _BatchNorm.forward


def _is_fused(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    """Tell whether forward is BatchNorm, then the modules ``drop`` and ``act``, as in timm.

    The function itself is called, on numbers that distinguish such operations.
    """
    tail = [child for name, child in layer.named_children() if name in ("drop", "act")]
    if not tail:
        return False
    twin: Any = copy.deepcopy(layer)
    twin = twin.to_empty(device="cpu") if next(_floating_tensors(twin)).is_meta else twin.cpu()
    twin = twin.float()
    steps = torch.linspace(0.5, 1.5, twin.num_features)
    with torch.no_grad():
        for tensor, offset in zip(_floating_tensors(twin), (0.0, -0.5, -1.0, 0.1), strict=False):
            tensor.copy_(steps + offset)
    shape = (4, twin.num_features) + (3, 3) * isinstance(layer, nn.BatchNorm2d)
    x = torch.linspace(-2, 3, 4 * twin.num_features * 9)[: torch.Size(shape).numel()]
    x = 2 * x.square().sin().view(shape) + 0.2
    try:
        with torch.no_grad():
            return all(_matches_fused_batchnorm(twin, x, training) for training in (False, True))
    except Exception:  # whatever a foreign forward pass raises, it is not BatchNorm's
        return False


def _floating_tensors(layer: nn.Module) -> Any:
    """Yield the floating point tensors of a layer, without those of its children."""
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if tensor.is_floating_point():
            yield tensor


def _matches_fused_batchnorm(layer: Any, x: Tensor, training: bool) -> bool:
    layer.train(training)
    for child in layer.children():
        child.eval()
    plain = nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d
    expected_layer = plain(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    keys = dict(expected_layer.state_dict())
    expected_layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k in keys})
    expected = expected_layer.train(training)(x)
    for name in ("drop", "act"):
        if name in layer._modules:
            expected = getattr(layer, name)(expected)
    return torch.allclose(layer.forward(x.clone()), expected, atol=1e-5)


_CLASSES: dict[type[nn.Module], type[ContextLayer]] = {c.original: c for c in _KINDS}


def _get_context_class(original: type[nn.Module]) -> type[ContextLayer]:
    """Return the context class of a layer class; a subclass of both is made if needed."""
    if original not in _CLASSES:
        (base,) = (ours for ours in _KINDS if issubclass(original, ours.original))
        attributes = {
            "original": original,
            "is_fused": _has_own_forward(original),
            "__reduce_ex__": _reduce_layer,
        }
        _CLASSES[original] = type(f"Context{original.__name__}", (base, original), attributes)
    return _CLASSES[original]


def _reduce_layer(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle a layer of a class that no module defines."""
    return _make_blank_layer, (layer.original,), layer.__getstate__()


def _make_blank_layer(original: type[nn.Module]) -> nn.Module:
    kind = _get_context_class(original)
    return kind.__new__(kind)


def revert_batchnorm(model: nn.Module, domain: Hashable | None = None) -> nn.Module:
    """Convert layers with a context back to ordinary BatchNorm layers.

    Args:
        model: Converted network, changed in place; an error leaves it unchanged.
        domain: Plate whose stored statistics become the running statistics, if any: the network in
            ``eval()`` is then an ordinary one for this plate, ready for export. Layers without
            running statistics get them; layers that the forward pass does not use are unchanged.

    Returns:
        The network.

    Raises:
        DataError: There are no stored statistics of the plate.
        ConfigError: A layer was parametrised after the conversion.
    """
    layers = find_context_layers(model)
    for name, layer in layers.items():
        _refuse_parametrized(name or "The network", layer)
    if domain is not None and not any(domain in layer.stored for layer in layers.values()):
        raise DataError(
            f"There are no stored statistics of the domain {domain!r}.",
            "Adapt to its controls first.",
        )
    for layer in layers.values():
        if domain is not None and domain in layer.stored:
            _set_running_statistics(layer, *layer.stored[domain])
        layer.__class__ = layer.original  # type: ignore[assignment]
        for attribute in ("context", "reference", "stored", "_collected", "name"):
            vars(layer).pop(attribute, None)
    return model


@torch.no_grad()
def _set_running_statistics(layer: ContextLayer, mean: Tensor, var: Tensor) -> None:
    if layer.running_mean is None or layer.running_var is None:
        like = mean if layer.weight is None else layer.weight
        layer.track_running_stats = True
        layer.running_mean, layer.running_var = torch.empty_like(like), torch.empty_like(like)
        layer.num_batches_tracked = torch.tensor(0, device=like.device)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
