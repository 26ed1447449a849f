"""BatchNorm whose statistics come from an explicit context: a plate's queries, controls, or both.

A converted network behaves as before until :func:`context` sets the source of its statistics. A
context is not the training flag, a buffer or a parameter, so state dicts stay those of
``nn.BatchNorm2d``, and neither ``eval()`` nor another rank's buffers change it.

Axes: M rows (queries first, then controls), L queries, N controls, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn.batch_statistics import (
    TINY,
    Group,
    TrainingReference,
    adaptive_weight,
    calibrate_statistics,
    mean_and_variance,
    merge_groups,
    split_groups,
    to_float32,
)

__all__ = [
    "Context",
    "ContextBatchNorm1d",
    "ContextBatchNorm2d",
    "ContextLayer",
    "Source",
    "context",
    "context_layers",
    "find_context_layers",
    "use_context",
]

Source = Literal["ordinary", "source", "batch", "union", "controls", "stored"]
_SOURCES = ("ordinary", "source", "batch", "union", "controls", "stored")

#: Smallest weight of a new training plate in the reference.
_MIN_REFERENCE_RATE = 0.05


@dataclass
class Context:
    """Source of the statistics of every BatchNorm.

    Args:
        source: Images or buffers of the statistics. ``ordinary``: as in ``nn.BatchNorm2d``.
            ``source``: the running statistics. ``batch``: the queries (ARM-BN, AdaBN). ``union``:
            queries and controls (CS-ARM-BN). ``controls``: the controls. ``stored``: the statistics
            that :func:`adapt` stored for ``domain``.
        n_query: Number L of rows of the batch that are queries; None for all rows.
        weight: Weight of the queries in ``union``: None is the count weight L/(L+N), the paper's; a
            number is fixed; ``"adaptive"`` is computed per layer, see :func:`adaptive_weight`.
        domain: Plate of the ``stored`` statistics.
        prior: Fraction of the running statistics that is mixed into those of the context.
        detach: Stop the gradient at the statistics.
        record: Update the training references, which :func:`adaptive_weight` needs, on this batch.
        used: Query weights at the layers of the last forward passes.

    Raises:
        ConfigError: ``source`` is unknown, or ``weight`` or ``prior`` is outside [0, 1].

    Source: docs/papers/cs_arm_bn.md section 1.2; ``prior``: Schneider et al., NeurIPS 2020.
    """

    source: Source = "union"
    n_query: int | None = None
    weight: float | Literal["adaptive"] | None = None
    domain: Hashable | None = None
    prior: float = 0.0
    detach: bool = False
    record: bool = False
    used: list[Tensor] = field(default_factory=list, repr=False)
    _store: bool = field(default=False, repr=False)
    _collect: str | None = field(default=None, repr=False)
    _again: bool = field(default=False, repr=False)
    _passed: set[int] | None = field(default=None, repr=False)  # layers of this forward pass

    def __post_init__(self) -> None:
        if self.source not in _SOURCES:
            raise ConfigError(
                f"The statistics source {self.source!r} is unknown.",
                f"Use one of {', '.join(_SOURCES)}.",
            )
        weight = 0.0 if self.weight in (None, "adaptive") else self.weight
        if isinstance(weight, str) or weight is None or not 0 <= weight <= 1:
            raise ConfigError(
                f"weight={self.weight!r} is no share of the queries.",
                "Give a number from 0 (controls only) to 1 (queries only), null or adaptive.",
            )
        if not 0 <= self.prior <= 1:
            raise ConfigError(f"prior={self.prior} is no share.", "Give a number from 0 to 1.")


class StopForward(Exception):
    """Ends a forward pass at a layer whose statistics are being collected."""

    def __init__(self, layer: ContextLayer) -> None:
        self.layer = layer


class ContextLayer(nn.modules.batchnorm._BatchNorm):
    """Base of :class:`ContextBatchNorm1d` and :class:`ContextBatchNorm2d`.

    Attributes:
        original: Class of the layer without a context.
        is_fused: Whether its children ``drop`` and ``act`` follow the normalisation.
        context: Current source of the statistics.
        reference: Statistics learned from training plates.
        stored: Mean and biased variance by plate. Shapes: (C,).
        name: Name of the layer in its network, for messages.
    """

    original: type[nn.modules.batchnorm._BatchNorm] = nn.modules.batchnorm._BatchNorm
    is_fused: bool = False
    context: Context | None = None
    reference: TrainingReference | None = None
    name: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepare()

    def prepare(self, name: str = "") -> None:
        """Set the name, and start without stored statistics."""
        self.name = name
        self.stored: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._collected: list[tuple[str, Group]] = []

    def forward(self, input: Tensor) -> Tensor:
        """Normalise all rows with the statistics of the context."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        y = self._normalise(input)
        if self.is_fused:
            for name in ("drop", "act"):
                if name in self._modules:
                    y = getattr(self, name)(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        setting = self.context
        if setting is None or setting.source == "ordinary":
            if setting is not None and self.training and x.numel() == x.shape[1]:
                raise ConfigError(
                    f"The BatchNorm {self.name or 'layer'} gets one value of each channel, which "
                    "has no variance.",
                    "Set `--data.init_args.episodes.queries` to 2 or more.",
                )
            if setting is not None and setting._again and self.training:
                # a recomputation must not move running statistics twice
                mean = None if self.running_mean is None else self.running_mean.clone()
                var = None if self.running_var is None else self.running_var.clone()
                return F.batch_norm(x, mean, var, self.weight, self.bias, True, 0.0, self.eps)
            return nn.modules.batchnorm._BatchNorm.forward(self, x)
        if setting.source == "stored":
            return self._normalise_with_stored(x, setting)
        if setting.source == "source":
            if self.running_mean is None or self.running_var is None:
                raise ConfigError(
                    f"The BatchNorm {self.name or 'layer'} keeps no running statistics.",
                    "Build the network with track_running_stats=True, or use another method.",
                )
            return self._normalise_with(x, self.running_mean, self.running_var)
        n_query = len(x) if setting.n_query is None else setting.n_query
        if not 0 <= n_query <= len(x):
            raise DataError(
                f"n_query={n_query} of {len(x)} rows.", "Give the number of leading query rows."
            )
        if setting.record and not setting._again:
            self._update_reference(x.detach(), n_query, setting)
        plain = setting.weight is None and not (setting.detach or setting.prior or setting._store)
        everything = setting.source == "union" or (setting.source == "batch" and n_query == len(x))
        if everything and plain and x.numel() > x.shape[1]:
            return self._normalise_with_batch(x)
        with torch.no_grad() if setting.detach else nullcontext():
            mean, var = self._context_statistics(x, n_query, setting)
            if setting.prior:
                assert self.running_mean is not None
                assert self.running_var is not None
                mean = torch.lerp(mean, self.running_mean.to(mean), setting.prior)
                var = torch.lerp(var, self.running_var.to(var), setting.prior)
        if setting._store:
            self._check_single_use(setting)
            self.store_statistics(setting.domain, mean, var)
        return self._normalise_differentiably(x, mean, var)

    def _context_statistics(
        self, x: Tensor, n_query: int, setting: Context
    ) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the context. Shapes: (C,)."""
        n_control = len(x) - n_query
        if setting.source == "controls" and n_control == 0:
            raise DataError(
                "A batch without controls reached statistics of controls.",
                "Give controls (data.init_args.episodes.controls), or choose another method.",
            )
        if setting.source == "batch" and n_query == 0:
            raise DataError(
                "A batch without queries reached statistics of queries.",
                "Give queries, or choose another method.",
            )
        weight = setting.weight
        if setting.source == "union" and weight == "adaptive":
            return self._adaptive_statistics(*split_groups(x, n_query), setting)
        if n_query == 0 or n_control == 0:
            weight = None  # there is only one group
        if setting.source == "union" and weight is not None:
            assert not isinstance(weight, str)
            query_stats, control_stats = (
                mean_and_variance(x[:n_query]),
                mean_and_variance(x[n_query:]),
            )
            return merge_groups(query_stats, control_stats, weight)
        rows = {"batch": x[:n_query], "controls": x[n_query:]}.get(setting.source, x)
        return mean_and_variance(rows)

    def _get_reference(self, like: Tensor) -> TrainingReference | None:
        """Return the reference, after moving it to the device of another tensor."""
        if self.reference is not None and self.reference.shift.device != like.device:
            self.reference = self.reference.to(like.device)
        return self.reference

    def _adaptive_statistics(
        self, query: Group | None, control: Group | None, setting: Context
    ) -> tuple[Tensor, Tensor]:
        """Statistics with the weight of least estimated error; a single group is calibrated."""
        group = query or control
        assert group is not None
        reference = self._get_reference(group.mean)
        if query is None or control is None:
            return calibrate_statistics(query, control, 0.0, reference)
        importance = torch.ones_like(group.mean) if self.weight is None else self.weight.square()
        weight = adaptive_weight(query, control, importance, reference)
        setting.used.append(weight.detach())
        return calibrate_statistics(query, control, weight, reference)

    @torch.no_grad()
    def _update_reference(self, x: Tensor, n_query: int, setting: Context) -> None:
        """Move the reference towards a training plate."""
        self._check_single_use(setting)
        query, control = split_groups(x, n_query)
        if query is None or control is None:
            return
        weight = _training_query_weight(setting, n_query, len(x))
        _, var = merge_groups((query.mean, query.var), (control.mean, control.var), weight)
        std = (control.var + TINY).sqrt()
        shift = (query.mean - control.mean) / std
        old = self._get_reference(shift)
        noise = (
            query.between_image_var / query.images + control.between_image_var / control.images
        ) / std.square()
        deviation = torch.zeros_like(shift)
        if old is not None:
            deviation = (shift - old.shift).square() - noise
        new = TrainingReference(
            1.0,
            weight,
            shift,
            deviation,
            ((var + TINY) / (query.var + TINY)).log(),
            ((var + TINY) / (control.var + TINY)).log(),
            ((query.between_image_var + TINY) / (control.between_image_var + TINY)).log(),
        )
        if old is None:
            self.reference = new
            return
        rate = max(_MIN_REFERENCE_RATE, 1 / (1 + old.plates))
        values = [torch.lerp(a, b, rate) for a, b in zip(old[2:], new[2:], strict=True)]
        weight = old.weight + rate * (weight - old.weight)
        self.reference = TrainingReference(old.plates + 1, weight, *values)

    def _normalise_with_stored(self, x: Tensor, setting: Context) -> Tensor:
        self._check_single_use(setting)
        statistics = self.stored.get(setting.domain)
        if statistics is not None:
            return self._normalise_with(x, *statistics)
        if setting._collect is None:
            raise DataError(
                f"There are no stored statistics of the domain {setting.domain!r}.",
                "Adapt to its controls first.",
            )
        group, _ = split_groups(x, len(x))
        assert group is not None
        self._collected.append((setting._collect, group))
        raise StopForward(self)

    def _check_single_use(self, setting: Context) -> None:
        """Refuse a second use of the layer in one forward pass, which would mix two statistics."""
        if setting._passed is None:
            return
        if id(self) in setting._passed:
            raise ConfigError(
                f"The BatchNorm {self.name or 'layer'} is used twice in one forward pass: it has "
                "no one set of statistics.",
                "Give each place a BatchNorm of its own.",
            )
        setting._passed.add(id(self))

    def store_statistics(self, domain: Hashable | None, mean: Tensor, var: Tensor) -> None:
        """Store a plate's statistics. Shapes: (C,)."""
        self.stored[domain] = mean.detach(), var.detach()

    def _normalise_with_batch(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    def _normalise_with(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise with given statistics, in float32 for half-precision activations."""
        dtype = to_float32(x[:0]).dtype
        mean, var = mean.to(x.device, dtype), var.to(x.device, dtype)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _normalise_differentiably(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise as :meth:`_normalise_with` does, with gradients to the statistics."""
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        offset = -mean * scale
        if self.bias is not None:
            offset = offset + self.bias
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x * scale.view(shape) + offset.view(shape)).to(x.dtype)


def _training_query_weight(setting: Context, n_query: int, rows: int) -> float:
    """Weight of the queries in the training statistics."""
    if setting.source == "union":
        fixed = not isinstance(setting.weight, str) and setting.weight is not None
        return float(setting.weight) if fixed else n_query / rows  # type: ignore[arg-type]
    return float(setting.source == "batch")


class ContextBatchNorm2d(ContextLayer, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics come from a context; see :func:`context`.

    Parameters, buffers and state dict are those of ``nn.BatchNorm2d``; so is the output without a
    context. Statistics are computed in float32 under autocast, and are differentiable with respect
    to all rows they come from. Statistics of single plates (``stored``) and of training plates
    (``reference``) are plain attributes.

    Shape: (M, C, H, W) to the same.

    Example:
        >>> layer = ContextBatchNorm2d(3)
        >>> query, control = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 4, 4)
        >>> with context(layer, "union", n_query=2):
        ...     y = layer(torch.cat([query, control]))
        >>> bool(y.mean((0, 2, 3)).abs().max() < 1e-6)
        True

    Source: docs/papers/cs_arm_bn.md sections 1.2 and 7.3.
    """

    original = nn.BatchNorm2d


class ContextBatchNorm1d(ContextLayer, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose statistics come from a context, for feature vectors or sequences.

    Shape: (M, C) or (M, C, W) to the same.
    """

    original = nn.BatchNorm1d


def find_context_layers(model: nn.Module) -> dict[str, ContextLayer]:
    """Return the converted layers of a network by name, which may be none."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ContextLayer)}


def context_layers(model: nn.Module) -> dict[str, ContextLayer]:
    """Return the converted layers of a network by name.

    Raises:
        ConfigError: The network has no converted layer.
    """
    layers = find_context_layers(model)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no BatchNorm with a context.",
            "Convert it with fulgurite.models.cs_arm_bn.convert_batchnorm.",
        )
    return layers


@contextmanager
def context(
    model: nn.Module,
    source: Source = "union",
    n_query: int | None = None,
    weight: float | Literal["adaptive"] | None = None,
    *,
    domain: Hashable | None = None,
    prior: float = 0.0,
    detach: bool = False,
    record: bool = False,
) -> Iterator[Context]:
    """Set the source of a converted network's statistics until the block ends.

    The arguments are those of :class:`Context`, which is yielded and may be changed inside the
    block.

    Raises:
        ConfigError: An argument is invalid, or the network was not converted.

    Example:
        >>> from fulgurite.models.cs_arm_bn import context, convert_batchnorm
        >>> net = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(1)))
        >>> rows = torch.tensor([0.0, 2.0, 8.0]).view(3, 1, 1, 1)  # a query, then two controls
        >>> with context(net, "controls", n_query=1):
        ...     y = net(rows)
        >>> [round(v, 2) for v in y.flatten().tolist()]
        [-1.67, -1.0, 1.0]
    """
    context_layers(model)
    with use_context(
        model, Context(source, n_query, weight, domain, prior, detach, record)
    ) as setting:
        yield setting


@contextmanager
def use_context(model: nn.Module, setting: Context) -> Iterator[Context]:
    """Set the context of every converted layer of a network until the block ends.

    Unlike :func:`context` it accepts networks without such layers.
    """
    layers = find_context_layers(model).values()
    old_settings = [layer.context for layer in layers]
    for layer in layers:
        layer.context = setting
    try:
        yield setting
    finally:
        for layer, old in zip(layers, old_settings, strict=True):
            layer.context = old
