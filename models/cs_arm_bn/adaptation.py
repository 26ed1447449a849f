"""Stored statistics of single plates.

Axes: L queries, N controls, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.errors import CheckpointError, DataError
from fulgurite.models.cs_arm_bn.batch_statistics import join_groups, merge_groups
from fulgurite.models.cs_arm_bn.batchnorm import (
    Context,
    ContextLayer,
    StopForward,
    context_layers,
    use_context,
)
from fulgurite.modes import keep_modes

__all__ = [
    "adapt",
    "load_statistics",
    "missing_controls_error",
    "stored_statistics",
]


@torch.no_grad()
def adapt(
    model: nn.Module,
    controls: Iterable[Tensor],
    domain: Hashable,
    *,
    queries: Iterable[Tensor] = (),
    weight: float | Literal["adaptive"] | None = None,
) -> dict[str, Tensor]:
    """Compute and store the exact statistics of a plate at every layer, with the memory of a chunk.

    Statistics of a layer depend on those of all layers before it, and the variance of a plate is
    more than the mean of its chunks' variances. So with several chunks, layers are finished one
    after the other, each from a pass over all chunks that ends at it. With one chunk of each kind
    a single forward pass does.

    The network is in evaluation mode meanwhile, so dropout is off. An error restores the statistics
    stored before.

    Args:
        model: Converted network.
        controls: Chunks of control images, such as ``[images]`` or ``images.split(64)``. Shapes:
            (N_i, C, H, W).
        domain: Name of the statistics for ``context(model, "stored", domain=...)``.
        queries: Chunks of query images that contribute to the statistics, if any.
        weight: Weight of the queries; None is the count weight.

    Returns:
        The statistics; see :func:`stored_statistics`.

    Raises:
        DataError: There are no images, the chunks differ in shape, or the statistics are not
            finite.
        ConfigError: A BatchNorm is used twice in one forward pass.

    Example:
        >>> from fulgurite.models.cs_arm_bn import adapt, convert_batchnorm
        >>> net = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(1)))
        >>> images = torch.arange(6.0).view(6, 1, 1, 1)
        >>> adapt(net, images.split(4), "plate 1")
        {'0.mean': tensor([2.5000]), '0.var': tensor([2.9167])}

    Source: docs/papers/cs_arm_bn.md sections 1.4, 1.7.2 and 6.1 (chunked adapt).
    """
    chunks = _check_chunks("query", queries) + _check_chunks("control", controls)
    if not chunks:
        raise DataError(
            f"There are no images to adapt to for the domain {domain!r}.",
            "Give its control images.",
        )
    if len(shapes := {tuple(x.shape[1:]) for _, x in chunks}) > 1:
        raise DataError(
            f"The images to adapt to have several shapes: {', '.join(map(str, sorted(shapes)))}.",
            "Give images of one size.",
        )
    layers = context_layers(model)
    earlier = {name: layer.stored.pop(domain, None) for name, layer in layers.items()}
    n_query = sum(len(x) for kind, x in chunks if kind == "query")
    setting = Context("union", n_query, weight, domain)
    try:
        with keep_modes(model):
            model.eval()
            if len({kind for kind, _ in chunks}) == len(chunks):
                _adapt_at_once(model, torch.cat([x for _, x in chunks]), setting)
            else:
                _adapt_by_layer(model, chunks, setting)
        _check_finite(layers, domain)
    except BaseException:
        for name, layer in layers.items():
            layer._collected = []
            layer.stored.pop(domain, None)
            if (statistics := earlier[name]) is not None:
                layer.stored[domain] = statistics
        raise
    return stored_statistics(model, domain)


def _check_chunks(kind: str, chunks: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """Return the chunks that are not empty, with their kind.

    Raises:
        DataError: ``chunks`` is one tensor, or a chunk is not a batch.
    """
    if isinstance(chunks, Tensor):
        raise DataError(
            f"The {kind} images are one tensor of shape {tuple(chunks.shape)}, not a sequence of "
            "chunks.",
            "Give [images], or images.split(64) to save memory.",
        )
    chunks = list(chunks)  # of a generator, too
    for x in chunks:
        if not isinstance(x, Tensor) or x.ndim < 2:
            description = f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DataError(
                f"A chunk of {kind} images is no batch of a network ({description}).",
                "Give tensors of shape (N, C, H, W), or (N, C) for feature vectors.",
            )
    return [(kind, x) for x in chunks if len(x)]


def _adapt_at_once(model: nn.Module, images: Tensor, setting: Context) -> None:
    setting._store, setting._passed = True, set()
    with use_context(model, setting):
        model(images)


def _adapt_by_layer(
    model: nn.Module, chunks: Sequence[tuple[str, Tensor]], setting: Context
) -> None:
    """Finish one layer after the other, each from a pass over all chunks that ends at it."""
    passes = Context("stored", domain=setting.domain)
    with use_context(model, passes):
        while True:
            reached = None
            for kind, x in chunks:
                passes._collect, passes._passed = kind, set()
                try:
                    model(x)
                except StopForward as stop:
                    reached = stop.layer
            if reached is None:
                return
            _finish_layer(reached, setting)


def _check_finite(layers: Mapping[str, ContextLayer], domain: Hashable) -> None:
    for name, layer in layers.items():
        if domain in layer.stored and not all(v.isfinite().all() for v in layer.stored[domain]):
            raise DataError(
                f"The statistics of the domain {domain!r} at {name or 'the layer'} are not finite.",
                "Use weights without NaN, leave out images with NaN or infinite pixels, and use "
                "--trainer.precision=32-true or bf16-mixed if the activations are too large for "
                "half precision.",
            )


def _finish_layer(layer: ContextLayer, setting: Context) -> None:
    """Store the statistics of a layer from those of all chunks."""
    groups = {
        kind: join_groups([g for k, g in layer._collected if k == kind])
        for kind in ("query", "control")
        if any(k == kind for k, _ in layer._collected)
    }
    layer._collected = []
    query, control = groups.get("query"), groups.get("control")
    if setting.weight == "adaptive":
        layer.store_statistics(setting.domain, *layer._adaptive_statistics(query, control, setting))
    elif query is None or control is None:
        (group,) = groups.values()
        layer.store_statistics(setting.domain, group.mean, group.var)
    else:
        count = query.images / (query.images + control.images)
        weight = count if setting.weight is None else setting.weight
        merged = merge_groups((query.mean, query.var), (control.mean, control.var), weight)
        layer.store_statistics(setting.domain, *merged)


def stored_statistics(model: nn.Module, domain: Hashable) -> dict[str, Tensor]:
    """Return a plate's statistics as plain tensors: ``<layer>.mean`` and ``<layer>.var``.

    Raises:
        DataError: There are no stored statistics of this plate.
    """
    statistics = {}
    for name, layer in context_layers(model).items():
        if domain not in layer.stored:
            continue  # a layer that the forward pass does not use
        for part, value in zip(("mean", "var"), layer.stored[domain], strict=True):
            statistics[f"{name}.{part}".lstrip(".")] = value
    if not statistics:
        raise DataError(
            f"There are no stored statistics of the domain {domain!r}.",
            "Adapt to its controls first.",
        )
    return statistics


def load_statistics(model: nn.Module, domain: Hashable, tensors: Mapping[str, Tensor]) -> None:
    """Restore the statistics of :func:`stored_statistics`.

    Raises:
        CheckpointError: The statistics are of another network.
    """
    layers = context_layers(model)
    names = {key.rpartition(".")[0] for key in tensors}
    fits = names <= layers.keys() and all(
        (tensor := tensors.get(f"{name}.{part}".lstrip("."))) is not None
        and tensor.shape == (layers[name].num_features,)
        for name in names
        for part in ("mean", "var")
    )
    if not fits:
        raise CheckpointError(
            f"The statistics of the domain {domain!r} are of another network.",
            "Adapt again with this one.",
        )
    for name in names:
        mean, var = (tensors[f"{name}.{part}".lstrip(".")] for part in ("mean", "var"))
        layers[name].stored[domain] = mean, var


def missing_controls_error(name: str) -> DataError:
    """Return the error for a plate that is to be predicted before its controls were seen."""
    return DataError(
        f"A chunk of plate {name} came before its controls.",
        "Predict with --trainer.devices=1, or name the folder of an earlier prediction's "
        "statistics in ControlContext.statistics.",
    )
