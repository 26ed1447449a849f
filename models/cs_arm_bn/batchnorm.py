"""BatchNorm whose statistics come from an explicit context: a plate's queries, controls, or both.

A converted network behaves as before until :func:`context` says where statistics come from. What a
context sets is not the training flag, no buffer and no parameter, so state dicts stay those of
``nn.BatchNorm2d``, and neither ``eval()`` nor another rank's buffers can change it.

Axes: M rows (queries first, then controls), L queries, N controls, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.errors import CheckpointError, ConfigError, DataError

__all__ = [
    "Context",
    "ContextBatchNorm1d",
    "ContextBatchNorm2d",
    "Group",
    "Source",
    "adapt",
    "adaptive_weight",
    "age_references",
    "checkpointed",
    "context",
    "context_layers",
    "convert_batchnorm",
    "hold",
    "load_reference",
    "load_statistics",
    "merge_groups",
    "reference_state",
    "revert_batchnorm",
    "stored_statistics",
]

Source = Literal["ordinary", "source", "batch", "union", "controls", "stored"]
_SOURCES = ("ordinary", "source", "batch", "union", "controls", "stored")

#: Share of a new training plate in the reference, once there are many.
_REFERENCE_MOMENTUM = 0.05


@dataclass
class Context:
    """Where the statistics of every BatchNorm come from.

    Args:
        source: ``ordinary``: as ``nn.BatchNorm2d`` does. ``source``: the running statistics.
            ``batch``: the queries (ARM-BN, AdaBN). ``union``: queries and controls (CS-ARM-BN).
            ``controls``: the controls. ``stored``: what :func:`adapt` found for ``domain``.
        n_query: L, rows of the batch that are queries; None: all.
        weight: Of the queries in ``union``: None is the count weight L/(L+N), the paper's; a number
            is fixed; ``"adaptive"`` is chosen at each layer, see :func:`adaptive_weight`.
        domain: Whose statistics ``stored`` are.
        prior: Share of the running statistics that is mixed into those of the context.
        detach: Stop the gradient at the statistics.
        record: Let layers learn what :func:`adaptive_weight` needs from this batch.
        used: Query weights chosen at the layers of the last forward passes.

    Raises:
        ConfigError: A value is unknown or out of range.

    Source: arXiv 2604.20824, card section 1.2; ``prior``: Schneider et al., NeurIPS 2020.
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

    def __post_init__(self) -> None:
        if self.source not in _SOURCES:
            raise ConfigError(
                f"The statistics source {self.source!r} is unknown.",
                f"Use one of {', '.join(_SOURCES)}.",
            )
        share = 0.0 if self.weight in (None, "adaptive") else self.weight
        if isinstance(share, str) or share is None or not 0 <= share <= 1:
            raise ConfigError(
                f"weight={self.weight!r} is no share of the queries.",
                "Give a number from 0 (controls only) to 1 (queries only), null or adaptive.",
            )
        if not 0 <= self.prior <= 1:
            raise ConfigError(f"prior={self.prior} is no share.", "Give a number from 0 to 1.")


class Group(NamedTuple):
    """Statistics of a group of images at a layer: queries or controls.

    Args:
        images: Number of images.
        mean: Mean over images and pixels. Shape: (C,).
        var: Biased variance over images and pixels. Shape: (C,).
        spread: Unbiased variance of the images' means; zero for one image. Shape: (C,).
    """

    images: int
    mean: Tensor
    var: Tensor
    spread: Tensor


def _groups(x: Tensor, n_query: int) -> tuple[Group | None, Group | None]:
    """Statistics of queries and controls, None where there are none. Shape: (M, C, ...)."""
    x = _wide(x)
    var, mean = _var_mean(x.flatten(2) if x.ndim > 2 else x[..., None])
    return _group(mean[:n_query], var[:n_query]), _group(mean[n_query:], var[n_query:])


def _var_mean(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean over the last axis.

    On a CPU ``torch.var_mean`` takes 20 times as long as a sum; sums of squares are as good where
    the mean is not far larger than the deviation.
    """
    if pixels.device.type == "cpu" and not (torch.is_grad_enabled() and pixels.requires_grad):
        mean = pixels.mean(-1)
        square = mean.square()
        var = torch.linalg.vector_norm(pixels, dim=-1).square() / pixels.shape[-1] - square
        if bool((var >= 1e4 * torch.finfo(var.dtype).eps * square).all()):
            return var, mean
    return torch.var_mean(pixels, -1, correction=0)


def _group(mean: Tensor, var: Tensor) -> Group | None:
    """Statistics of a group from those of its images. Shapes: (n, C)."""
    if len(mean) == 0:
        return None
    spread = mean.var(0) if len(mean) > 1 else torch.zeros_like(mean[0])
    return Group(len(mean), mean.mean(0), var.mean(0) + mean.var(0, correction=0), spread)


def _wide(x: Tensor) -> Tensor:
    """Statistics of half-precision activations are taken in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def merge_groups(
    query: tuple[Tensor, Tensor], control: tuple[Tensor, Tensor], weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of queries and controls.

    Args:
        query: Mean and biased variance of the queries. Shapes: (C,).
        control: The same of the controls.
        weight: Share of the queries; L/(L+N) gives the statistics of the concatenation.

    Returns:
        Mean and variance. Shapes: (C,).

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [8.0]])
        >>> q, c = (x[:2].mean(0), x[:2].var(0, correction=0)), (x[2], torch.zeros(1))
        >>> mean, var = merge_groups(q, c, 2 / 3)
        >>> bool(torch.isclose(mean, x.mean(0))), bool(torch.isclose(var, x.var(0, correction=0)))
        (True, True)

    Source: card section 1.5.
    """
    mean = torch.lerp(control[0], query[0], weight)
    var = torch.lerp(control[1], query[1], weight)
    return mean, var + weight * (1 - weight) * (query[0] - control[0]).square()


class Reference(NamedTuple):
    """What training plates teach a layer about queries and controls, in units of the controls' std.

    Args:
        seen: Number of plates it was learned from.
        weight: Mean query weight of the training statistics, w₀.
        shift: Mean of (query mean − control mean). Shape: (C,).
        shift_var: Mean squared deviation of plates from it beyond sampling noise. Shape: (C,).
        query_var: Mean log(training variance / query variance). Shape: (C,).
        control_var: Mean log(training variance / control variance). Shape: (C,).
        spread: Mean log(query spread / control spread). Shape: (C,).
    """

    seen: float
    weight: float
    shift: Tensor
    shift_var: Tensor
    query_var: Tensor
    control_var: Tensor
    spread: Tensor

    def to(self, device: torch.device) -> Reference:
        """The reference with its tensors on a device."""
        return Reference(self.seen, self.weight, *(value.to(device) for value in self[2:]))

    def state(self) -> list[Tensor]:
        """Plain tensors of the CPU; the numbers in float64, which holds them exactly."""
        numbers = [torch.tensor(value, dtype=torch.float64) for value in self[:2]]
        return numbers + [value.cpu() for value in self[2:]]


_TINY = 1e-12


def _spreads(query: Group, control: Group, ratio: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spread of query and control image means; each from its own group where that has two images.

    Label shift narrows the queries' own spread, so the controls' is used where its usual
    ``ratio`` is known.
    """
    factor = 1.0 if ratio is None else ratio.exp()
    if control.images > 1:
        own = query.spread if ratio is None and query.images > 1 else control.spread * factor
        return own, control.spread
    if query.images > 1:
        return query.spread, query.spread / factor
    return query.var, control.var  # one image each: pixels are all there is


def adaptive_weight(
    query: Group, control: Group, importance: Tensor, reference: Reference | None
) -> Tensor:
    """Query weight of least mean squared error, from label-free evidence.

    The statistics wanted are those that a plate with the class mixture of training would have,
    μ_c + w₀(Δ + t): Δ is the usual shift of queries against controls, t a plate's own deviation
    with variance τ². Queries estimate it with bias b (label shift) and sampling variance s_L,
    controls with variance s_N, and

        MSE(w) = (w − w₀)²τ² + w²(b² + s_L) + (1 − w)² s_N

    is least at w* = (w₀τ² + s_N) / (τ² + b² + s_L + s_N). The observed shift D has
    E‖D − Δ‖² = τ² + b² + s_L + s_N, so that b² is what it has beyond the other three. Without label
    shift and τ this is the paper's count weight L/(L+N), under label shift it goes to 0.

    Args:
        query: Statistics of the queries at a layer.
        control: Statistics of the controls.
        importance: Of an error in each channel (the squared BatchNorm weight). Shape: (C,).
        reference: What training plates teach; without it every shift counts as label shift.

    Returns:
        A weight in [0, 1]. Shape: ().

    Example:
        >>> one = torch.ones(4)
        >>> controls = Group(50, 0 * one, one, one)
        >>> usual = Group(25, 0 * one, one, one)
        >>> round(float(adaptive_weight(usual, controls, one, None)), 4)  # 25 / (25 + 50)
        0.3333
        >>> shifted = Group(25, 2 * one, one, one)
        >>> bool(adaptive_weight(shifted, controls, one, None) < 0.01)
        True

    Source: beyond the paper; derived from the bias-variance trade of card section 1.5.
    """
    spread_q, spread_c = _spreads(query, control, reference.spread if reference else None)
    unit = control.var + _TINY
    s_l = (importance * spread_q / unit).sum() / query.images
    s_n = (importance * spread_c / unit).sum() / control.images
    shift = (query.mean - control.mean) / unit.sqrt()
    w_0, tau = 0.0, torch.zeros_like(s_n)
    if reference is not None:
        shift = shift - reference.shift
        w_0, tau = reference.weight, (importance * reference.shift_var).sum().clamp_min(0)
    observed = (importance * shift.square()).sum()
    # b² is no less than 0
    return (w_0 * tau + s_n) / (torch.maximum(observed, tau + s_l + s_n) + _TINY)


def _calibrated(
    query: Group | None, control: Group | None, weight: float | Tensor, reference: Reference | None
) -> tuple[Tensor, Tensor]:
    """Each group mapped to what training would have seen, then averaged with the weight."""
    if reference is None:
        both = [None if group is None else (group.mean, group.var) for group in (query, control)]
        if both[0] is None or both[1] is None:
            (only,) = (stats for stats in both if stats is not None)
            return only
        return merge_groups(both[0], both[1], weight)
    found: list[tuple[Tensor, Tensor]] = []
    if control is not None:
        std = control.var.sqrt()
        offset = reference.weight * reference.shift * std
        found.append((control.mean + offset, control.var * reference.control_var.exp()))
    if query is not None:
        if control is None:  # queries and controls are related through the training statistics
            std = (query.var * (reference.query_var - reference.control_var).exp()).sqrt()
        offset = (1 - reference.weight) * reference.shift * std
        found.append((query.mean - offset, query.var * reference.query_var.exp()))
    if len(found) == 1:
        return found[0]
    (mean_c, var_c), (mean_q, var_q) = found
    return torch.lerp(mean_c, mean_q, weight), torch.lerp(var_c, var_q, weight)


class _Reached(Exception):
    """Ends a forward pass at a layer whose statistics are being collected."""

    def __init__(self, layer: _ContextBatchNorm) -> None:
        self.layer = layer


class _ContextBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What :class:`ContextBatchNorm1d` and :class:`ContextBatchNorm2d` share."""

    context: Context | None = None
    reference: Reference | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stored: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._collected: list[tuple[str, Group]] = []

    def forward(self, input: Tensor) -> Tensor:
        """Normalise all rows with the statistics of the context."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        y = self._normalise(input)
        for module in self.children():  # see _converted
            y = module(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        setting = self.context
        if setting is None or setting.source == "ordinary":
            if setting is not None and setting._again and self.training:
                # a recomputation must not move running statistics twice
                mean = None if self.running_mean is None else self.running_mean.clone()
                var = None if self.running_var is None else self.running_var.clone()
                return F.batch_norm(x, mean, var, self.weight, self.bias, True, 0.0, self.eps)
            return super().forward(x)
        if setting.source == "stored":
            return self._stored_pass(x, setting)
        if setting.source == "source":
            if self.running_mean is None or self.running_var is None:
                raise ConfigError(
                    "A BatchNorm keeps no running statistics.",
                    "Build the network with track_running_stats=True, or use another method.",
                )
            return self._with_statistics(x, self.running_mean, self.running_var)
        n_query = len(x) if setting.n_query is None else setting.n_query
        if not 0 <= n_query <= len(x):
            raise DataError(
                f"n_query={n_query} of {len(x)} rows.", "Give the number of leading query rows."
            )
        if setting.record and not setting._again:
            self._learn(x.detach(), n_query, setting)
        plain = setting.weight is None and not (setting.detach or setting.prior or setting._store)
        everything = setting.source == "union" or (setting.source == "batch" and n_query == len(x))
        if everything and plain and x.numel() > x.shape[1]:
            return self._native(x)
        with torch.no_grad() if setting.detach else nullcontext():
            mean, var = self._statistics(x, n_query, setting)
            if setting.prior:
                assert self.running_mean is not None
                assert self.running_var is not None
                mean = torch.lerp(mean, self.running_mean.to(mean), setting.prior)
                var = torch.lerp(var, self.running_var.to(var), setting.prior)
        if setting._store:
            self._keep(setting.domain, mean, var)
        return self._affine(x, mean, var)

    def _statistics(self, x: Tensor, n_query: int, setting: Context) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the context. Shapes: (C,)."""
        n_control = len(x) - n_query
        if setting.source == "controls" and n_control == 0:
            raise DataError(
                "A batch without controls reached statistics of controls.",
                "Give controls (data.init_args.controls), or choose another method.",
            )
        if setting.source == "batch" and n_query == 0:
            raise DataError(
                "A batch without queries reached statistics of queries.",
                "Give queries, or choose another method.",
            )
        weight = setting.weight
        if setting.source == "union" and weight == "adaptive":
            return self._adaptive(*_groups(x, n_query), setting)
        if n_query == 0 or n_control == 0:
            weight = None  # one group is all there is
        if setting.source == "union" and weight is not None:
            assert not isinstance(weight, str)
            query_stats, control_stats = _moments(x[:n_query]), _moments(x[n_query:])
            return merge_groups(query_stats, control_stats, weight)
        rows = {"batch": x[:n_query], "controls": x[n_query:]}.get(setting.source, x)
        return _moments(rows)

    def _known(self, like: Tensor) -> Reference | None:
        """The reference, on the device of another tensor from now on."""
        if self.reference is not None and self.reference.shift.device != like.device:
            self.reference = self.reference.to(like.device)
        return self.reference

    def _adaptive(
        self, query: Group | None, control: Group | None, setting: Context
    ) -> tuple[Tensor, Tensor]:
        """Statistics with the weight of least estimated error; one group alone is calibrated."""
        some = query or control
        assert some is not None
        reference = self._known(some.mean)
        if query is None or control is None:
            return _calibrated(query, control, 0.0, reference)
        importance = torch.ones_like(some.mean) if self.weight is None else self.weight.square()
        chosen = adaptive_weight(query, control, importance, reference)
        setting.used.append(chosen.detach())
        return _calibrated(query, control, chosen, reference)

    @torch.no_grad()
    def _learn(self, x: Tensor, n_query: int, setting: Context) -> None:
        """Move the reference towards a training plate."""
        query, control = _groups(x, n_query)
        if query is None or control is None:
            return
        weight = _query_share(setting, n_query, len(x))
        _, var = merge_groups((query.mean, query.var), (control.mean, control.var), weight)
        std = (control.var + _TINY).sqrt()
        shift = (query.mean - control.mean) / std
        old = self._known(shift)
        noise = (query.spread / query.images + control.spread / control.images) / std.square()
        deviation = torch.zeros_like(shift)
        if old is not None:
            deviation = (shift - old.shift).square() - noise
        new = Reference(
            1.0,
            weight,
            shift,
            deviation,
            ((var + _TINY) / (query.var + _TINY)).log(),
            ((var + _TINY) / (control.var + _TINY)).log(),
            ((query.spread + _TINY) / (control.spread + _TINY)).log(),
        )
        if old is None:
            self.reference = new
            return
        share = max(_REFERENCE_MOMENTUM, 1 / (1 + old.seen))
        values = [torch.lerp(a, b, share) for a, b in zip(old[2:], new[2:], strict=True)]
        weight = old.weight + share * (weight - old.weight)
        self.reference = Reference(old.seen + 1, weight, *values)

    def _stored_pass(self, x: Tensor, setting: Context) -> Tensor:
        known = self.stored.get(setting.domain)
        if known is not None:
            return self._with_statistics(x, *known)
        if setting._collect is None:
            raise DataError(
                f"There are no stored statistics of the domain {setting.domain!r}.",
                "Adapt to its controls first.",
            )
        group, _ = _groups(x, len(x))
        assert group is not None
        self._collected.append((setting._collect, group))
        raise _Reached(self)

    def _keep(self, domain: Hashable | None, mean: Tensor, var: Tensor) -> None:
        if domain in self.stored:
            raise ConfigError(
                "A BatchNorm is used twice in one forward pass: it has no one set of statistics.",
                "Give each place a BatchNorm of its own.",
            )
        self.stored[domain] = mean.detach(), var.detach()

    def _native(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    def _with_statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        dtype = _wide(x[:0]).dtype
        mean, var = mean.to(x.device, dtype), var.to(x.device, dtype)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _affine(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """As :meth:`_with_statistics`, with gradients to the statistics."""
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        offset = -mean * scale
        if self.bias is not None:
            offset = offset + self.bias
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x * scale.view(shape) + offset.view(shape)).to(x.dtype)


def _query_share(setting: Context, n_query: int, rows: int) -> float:
    """Weight of the queries in the training statistics."""
    if setting.source == "union":
        fixed = not isinstance(setting.weight, str) and setting.weight is not None
        return float(setting.weight) if fixed else n_query / rows  # type: ignore[arg-type]
    return float(setting.source == "batch")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over rows and pixels. Shape: (M, C, ...) to (C,)."""
    x = _wide(x)
    if x.ndim > 2 and not (torch.is_grad_enabled() and x.requires_grad):
        group = _group(*reversed(_var_mean(x.flatten(2))))
        assert group is not None
        return group.mean, group.var
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, var


class ContextBatchNorm2d(_ContextBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics come from a context; see :func:`context`.

    Parameters, buffers and state dict are those of ``nn.BatchNorm2d``; without a context so is what
    it computes. Statistics are taken in float32 under autocast, and are differentiable through
    every row that they come from. Statistics of single plates (``stored``) and what training
    plates teach (``reference``) are plain attributes.

    Shape: (M, C, H, W) to the same.

    Example:
        >>> layer = ContextBatchNorm2d(3)
        >>> query, control = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 4, 4)
        >>> with context(layer, "union", n_query=2):
        ...     y = layer(torch.cat([query, control]))
        >>> bool(y.mean((0, 2, 3)).abs().max() < 1e-6)
        True

    Source: arXiv 2604.20824, card sections 1.2 and 7.3.
    """


class ContextBatchNorm1d(_ContextBatchNorm, nn.BatchNorm1d):
    """As :class:`ContextBatchNorm2d`, for feature vectors or sequences.

    Shape: (M, C) or (M, C, W) to the same.
    """


_KINDS: tuple[tuple[type[nn.Module], type[_ContextBatchNorm]], ...] = (
    (nn.BatchNorm2d, ContextBatchNorm2d),
    (nn.BatchNorm1d, ContextBatchNorm1d),
)


def context_layers(model: nn.Module) -> dict[str, _ContextBatchNorm]:
    """The converted layers of a network by name.

    Raises:
        ConfigError: There is none.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, _ContextBatchNorm)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no BatchNorm with a context.",
            "Convert it with fulgurite.models.cs_arm_bn.convert_batchnorm.",
        )
    return found


def convert_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every BatchNorm by one with a context; parameters and buffers are the same objects.

    Args:
        model: Any network; changed in place unless it is itself a BatchNorm.

    Returns:
        The network.

    Raises:
        ConfigError: It has no BatchNorm, or one that statistics of a context cannot replace.

    Example:
        >>> net = convert_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
        >>> type(net[1]).__name__, sorted(revert_batchnorm(net).state_dict()) == sorted(
        ...     net.state_dict()
        ... )
        ('ContextBatchNorm2d', True)

    Source: card section 7.3.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"{name or 'The network'} is a SyncBatchNorm, which mixes the plates of the ranks.",
                "Leave out --trainer.sync_batchnorm, and convert no layer to SyncBatchNorm.",
            )
    model = _replace(model, _converted)
    if not any(isinstance(m, _ContextBatchNorm) for m in model.modules()):
        norms = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
        having = f" (it has {', '.join(sorted(norms))})" if norms else ""
        raise ConfigError(
            f"{type(model).__name__} has no BatchNorm whose statistics could be adapted{having}.",
            "Set model.init_args.network to a network with BatchNorm, such as "
            "fulgurite.models.cs_arm_bn.SmallResNet.",
        )
    return model


def _converted(module: nn.Module) -> nn.Module:
    if isinstance(module, _ContextBatchNorm):
        return module
    for kind, ours in _KINDS:
        if not isinstance(module, kind):
            continue
        tail = {n: m for n, m in module.named_children() if n in ("drop", "act")}
        if type(module) is not kind and not tail:
            raise ConfigError(
                f"{type(module).__name__} is a BatchNorm with a forward pass of its own.",
                "Use a network with torch's own BatchNorm.",
            )
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        new = ours(module.num_features, module.eps, module.momentum, module.affine)
        new.track_running_stats = module.track_running_stats
        new._parameters, new._buffers = module._parameters, module._buffers
        new.training = module.training
        for name, child in tail.items():  # timm's BatchNormAct2d: dropout, then an activation
            new.add_module(name, child)
        new.__dict__["_original"] = module
        return new
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ConfigError(
            f"{type(module).__name__} cannot take its statistics from a context.",
            "Use a network with BatchNorm1d or BatchNorm2d.",
        )
    return module


def revert_batchnorm(model: nn.Module, domain: Hashable | None = None) -> nn.Module:
    """Put ordinary BatchNorm layers back.

    Args:
        model: A converted network; changed in place unless it is itself a BatchNorm.
        domain: If given, the stored statistics of this plate become the running statistics: the
            network in ``eval()`` is then an ordinary one for this plate, ready for export.

    Returns:
        The network.

    Raises:
        DataError: There are no statistics of the plate.
    """

    def back(module: nn.Module) -> nn.Module:
        if not isinstance(module, _ContextBatchNorm):
            return module
        old: Any = module.__dict__.get("_original")
        if old is None:  # made as a context layer
            kind: Any = next(kind for kind, ours in _KINDS if isinstance(module, ours))
            old = kind(module.num_features, module.eps, module.momentum, module.affine)
            old.track_running_stats = module.track_running_stats
        old._parameters, old._buffers = module._parameters, module._buffers
        old.training = module.training
        if domain is not None:
            if domain not in module.stored:
                raise DataError(
                    f"There are no stored statistics of the domain {domain!r}.",
                    "Adapt to its controls first.",
                )
            mean, var = module.stored[domain]
            with torch.no_grad():
                old.running_mean.copy_(mean)
                old.running_var.copy_(var)
        return old  # type: ignore[no-any-return]

    return _replace(model, back)


def _replace(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    new = change(model)
    if new is not model:
        return new
    for name, child in model.named_children():
        changed = _replace(child, change)
        if changed is not child:
            setattr(model, name, changed)
    return model


@contextmanager
def context(
    model: nn.Module,
    source: Source = "union",
    n_query: int | None = None,
    weight: float | Literal["adaptive"] | None = None,
    domain: Hashable | None = None,
    *,
    prior: float = 0.0,
    detach: bool = False,
    record: bool = False,
) -> Iterator[Context]:
    """Say where a converted network's statistics come from, until the block ends.

    Arguments: see :class:`Context`, which is yielded and may be changed inside the block.

    Raises:
        ConfigError: A value is unknown, or the network was not converted.

    Example:
        >>> net = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(1)))
        >>> rows = torch.tensor([0.0, 2.0, 8.0]).view(3, 1, 1, 1)  # a query, then two controls
        >>> with context(net, "controls", n_query=1):
        ...     y = net(rows)
        >>> [round(v, 2) for v in y.flatten().tolist()]
        [-1.67, -1.0, 1.0]
    """
    with hold(model, Context(source, n_query, weight, domain, prior, detach, record)) as held:
        yield held


@contextmanager
def hold(model: nn.Module, held: Context) -> Iterator[Context]:
    """Give a context to every layer of a network, until the block ends; see :func:`context`."""
    layers = [*context_layers(model).values()]
    before = [layer.context for layer in layers]
    for layer in layers:
        layer.context = held
    try:
        yield held
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.context = old


@torch.no_grad()
def adapt(
    model: nn.Module,
    controls: Sequence[Tensor],
    domain: Hashable,
    *,
    queries: Sequence[Tensor] = (),
    weight: float | Literal["adaptive"] | None = None,
) -> dict[str, Tensor]:
    """Store a plate's statistics at every layer, exactly, in the memory of one chunk.

    Statistics of a layer depend on those of all layers before it, and the variance of a plate is
    more than the mean of its chunks' variances. So with several chunks, layers are finished one
    after the other, each from a pass over all chunks that ends at it. With one chunk of each kind
    a single forward pass does.

    Args:
        model: A converted network.
        controls: Chunks of control images. Shapes: (N_i, C, H, W).
        domain: Name under which ``context(model, "stored", domain=...)`` finds them.
        queries: Chunks of query images, if they are to take part.
        weight: Of the queries; None is the count weight.

    Returns:
        The statistics, see :func:`stored_statistics`.

    Raises:
        DataError: There are no images.

    Example:
        >>> net = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(1)))
        >>> images = torch.arange(6.0).view(6, 1, 1, 1)
        >>> adapt(net, images.split(4), "plate 1")
        {'0.mean': tensor([2.5000]), '0.var': tensor([2.9167])}

    Source: card sections 1.4, 1.7.2 and 6.1 (chunked adapt).
    """
    chunks = [("query", x) for x in queries if len(x)] + [
        ("control", x) for x in controls if len(x)
    ]
    if not chunks:
        raise DataError(
            f"There are no images to adapt to for the domain {domain!r}.",
            "Give its control images.",
        )
    layers = context_layers(model)
    for layer in layers.values():
        layer.stored.pop(domain, None)
    n_query = sum(len(x) for kind, x in chunks if kind == "query")
    setting = Context("union", n_query, weight, domain)
    if len({kind for kind, _ in chunks}) == len(chunks):
        setting._store = True
        with hold(model, setting):
            model(torch.cat([x for _, x in chunks]))
        return stored_statistics(model, domain)
    passes = Context("stored", domain=domain)
    with hold(model, passes):
        for _ in layers:
            reached = None
            for kind, x in chunks:
                passes._collect = kind
                try:
                    model(x)
                except _Reached as stop:
                    reached = stop.layer
            if reached is None:
                break
            _finish(reached, setting)
    return stored_statistics(model, domain)


def _finish(layer: _ContextBatchNorm, setting: Context) -> None:
    """Statistics of a layer from those of all chunks."""
    groups = {
        kind: _join([g for k, g in layer._collected if k == kind])
        for kind in ("query", "control")
        if any(k == kind for k, _ in layer._collected)
    }
    layer._collected = []
    query, control = groups.get("query"), groups.get("control")
    if setting.weight == "adaptive":
        layer._keep(setting.domain, *layer._adaptive(query, control, setting))
    elif query is None or control is None:
        (group,) = groups.values()
        layer._keep(setting.domain, group.mean, group.var)
    else:
        count = query.images / (query.images + control.images)
        weight = count if setting.weight is None else setting.weight
        merged = merge_groups((query.mean, query.var), (control.mean, control.var), weight)
        layer._keep(setting.domain, *merged)


def _join(groups: Sequence[Group]) -> Group:
    """Statistics of all images from those of chunks of them."""
    counts = groups[0].mean.new_tensor([g.images for g in groups])[:, None]
    means = torch.stack([g.mean for g in groups])
    variances = torch.stack([g.var for g in groups])
    spreads = torch.stack([g.spread for g in groups])
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    between = (means - mean).square()
    var = ((variances + between) * counts).sum(0) / total
    spread = (spreads * (counts - 1) + between * counts).sum(0) / (total - 1).clamp_min(1)
    return Group(sum(g.images for g in groups), mean, var, spread)


def stored_statistics(model: nn.Module, domain: Hashable) -> dict[str, Tensor]:
    """A plate's statistics as plain tensors: ``<layer>.mean`` and ``<layer>.var``.

    Raises:
        DataError: There are none of this plate.
    """
    found = {}
    for name, layer in context_layers(model).items():
        if domain not in layer.stored:
            continue  # a layer that the forward pass does not use
        for part, value in zip(("mean", "var"), layer.stored[domain], strict=True):
            found[f"{name}.{part}".lstrip(".")] = value
    if not found:
        raise DataError(
            f"There are no stored statistics of the domain {domain!r}.",
            "Adapt to its controls first.",
        )
    return found


def load_statistics(model: nn.Module, domain: Hashable, tensors: Mapping[str, Tensor]) -> None:
    """Take up what :func:`stored_statistics` gave.

    Raises:
        CheckpointError: It is of another network.
    """
    layers = context_layers(model)
    names = {key.rpartition(".")[0] for key in tensors}
    fits = names <= layers.keys() and all(
        (found := tensors.get(f"{name}.{part}".lstrip("."))) is not None
        and found.shape == (layers[name].num_features,)
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


def reference_state(model: nn.Module) -> dict[str, list[Tensor]]:
    """What training plates taught each layer, as plain tensors."""
    return {
        name: layer.reference.state()
        for name, layer in context_layers(model).items()
        if layer.reference is not None
    }


def age_references(model: nn.Module) -> None:
    """Let what earlier weights taught each layer count no more than two plates from now on."""
    for layer in context_layers(model).values():
        if layer.reference is not None:
            layer.reference = layer.reference._replace(seen=min(layer.reference.seen, 2.0))


def load_reference(model: nn.Module, state: Mapping[str, Sequence[Tensor]]) -> None:
    """Take up what :func:`reference_state` gave.

    Raises:
        CheckpointError: It is of another network.
    """
    layers = context_layers(model)
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
        layers[name].reference = Reference(float(values[0]), float(values[1]), *values[2:])


def _is_reference(values: object, features: int) -> bool:
    """Whether values are what :func:`reference_state` gives of a layer."""
    if not isinstance(values, list | tuple) or len(values) != len(Reference._fields):
        return False
    return all(isinstance(value, Tensor) for value in values) and all(
        value.numel() == 1 if place < 2 else value.shape == (features,)
        for place, value in enumerate(values)
    )


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block without keeping its activations; the backward pass computes them again.

    The second computation sees the context of the first, even if that has ended, and moves no
    running statistics.

    Source: card section 7.7.
    """
    from torch.utils.checkpoint import checkpoint

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Recomputation(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


class _Recomputation(AbstractContextManager[None]):
    """The contexts of a block's layers as they are now, to be entered later."""

    def __init__(self, block: nn.Module) -> None:
        self.layers = [m for m in block.modules() if isinstance(m, _ContextBatchNorm)]
        self.settings = [copy(m.context) or Context("ordinary") for m in self.layers]
        for setting in self.settings:
            setting._again, setting.used = True, []

    def __enter__(self) -> None:
        self.before = [layer.context for layer in self.layers]
        for layer, setting in zip(self.layers, self.settings, strict=True):
            layer.context = setting

    def __exit__(self, *_: object) -> None:
        for layer, setting in zip(self.layers, self.before, strict=True):
            layer.context = setting
