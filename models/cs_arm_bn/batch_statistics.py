"""Statistics of groups of images at a layer, and the query weight computed from them.

Axes: n images, M rows (queries first, then controls), L queries, N controls, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Group",
    "TrainingReference",
    "adaptive_weight",
    "calibrate_statistics",
    "join_groups",
    "mean_and_variance",
    "merge_groups",
    "split_groups",
    "to_float32",
]


class Group(NamedTuple):
    """Statistics of a group of images at a layer: queries or controls.

    Args:
        images: Number of images.
        mean: Mean over images and pixels. Shape: (C,).
        var: Biased variance over images and pixels. Shape: (C,).
        between_image_var: Unbiased variance of the images' means; zero for one image.
            Shape: (C,).
    """

    images: int
    mean: Tensor
    var: Tensor
    between_image_var: Tensor


def split_groups(x: Tensor, n_query: int) -> tuple[Group | None, Group | None]:
    """Statistics of queries and of controls; None for an empty group. Shape: (M, C, ...)."""
    x = to_float32(x)
    var, mean = _var_mean(x.flatten(2) if x.ndim > 2 else x[..., None])
    return group_of_images(mean[:n_query], var[:n_query]), group_of_images(
        mean[n_query:], var[n_query:]
    )


def _var_mean(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean over the last axis.

    On a CPU ``torch.var_mean`` takes 20 times as long as a sum; sums of squares are as accurate
    unless the mean is far larger than the standard deviation.
    """
    if pixels.device.type == "cpu" and not (torch.is_grad_enabled() and pixels.requires_grad):
        mean = pixels.mean(-1)
        square = mean.square()
        var = torch.linalg.vector_norm(pixels, dim=-1).square() / pixels.shape[-1] - square
        if bool((var >= 1e4 * torch.finfo(var.dtype).eps * square).all()):
            return var, mean
    return torch.var_mean(pixels, -1, correction=0)


def group_of_images(mean: Tensor, var: Tensor) -> Group | None:
    """Statistics of a group from those of its images. Shapes: (n, C)."""
    if len(mean) == 0:
        return None
    between_image_var = mean.var(0) if len(mean) > 1 else torch.zeros_like(mean[0])
    return Group(
        len(mean), mean.mean(0), var.mean(0) + mean.var(0, correction=0), between_image_var
    )


def to_float32(x: Tensor) -> Tensor:
    """Convert half-precision activations to float32, in which statistics are computed."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def merge_groups(
    query: tuple[Tensor, Tensor], control: tuple[Tensor, Tensor], weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of queries and controls.

    Args:
        query: Mean and biased variance of the queries. Shapes: (C,).
        control: Mean and biased variance of the controls. Shapes: (C,).
        weight: Weight of the queries; L/(L+N) gives the statistics of the concatenation.

    Returns:
        Mean and variance. Shapes: (C,).

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [8.0]])
        >>> q, c = (x[:2].mean(0), x[:2].var(0, correction=0)), (x[2], torch.zeros(1))
        >>> mean, var = merge_groups(q, c, 2 / 3)
        >>> bool(torch.isclose(mean, x.mean(0))), bool(torch.isclose(var, x.var(0, correction=0)))
        (True, True)

    Source: docs/papers/cs_arm_bn.md section 1.5.
    """
    mean = torch.lerp(control[0], query[0], weight)
    var = torch.lerp(control[1], query[1], weight)
    return mean, var + weight * (1 - weight) * (query[0] - control[0]).square()


class TrainingReference(NamedTuple):
    """Statistics of a layer learned from training plates, in units of the controls' std.

    Args:
        plates: Number of training plates.
        weight: Mean query weight of the training statistics, w₀.
        shift: Mean of (query mean − control mean). Shape: (C,).
        shift_var: Variance of the shift between plates beyond sampling noise. Shape: (C,).
        query_var: Mean log(training variance / query variance). Shape: (C,).
        control_var: Mean log(training variance / control variance). Shape: (C,).
        between_image_ratio: Mean log(query variance / control variance) of the image means.
            Shape: (C,).
    """

    plates: float
    weight: float
    shift: Tensor
    shift_var: Tensor
    query_var: Tensor
    control_var: Tensor
    between_image_ratio: Tensor

    def to(self, device: torch.device) -> TrainingReference:
        """Return the reference with its tensors on a device."""
        return TrainingReference(
            self.plates, self.weight, *(value.to(device) for value in self[2:])
        )

    def state(self) -> list[Tensor]:
        """Return plain CPU tensors, with the numbers in float64, which is exact."""
        numbers = [torch.tensor(value, dtype=torch.float64) for value in self[:2]]
        return numbers + [value.cpu() for value in self[2:]]


TINY = 1e-12


def _between_image_variances(
    query: Group, control: Group, ratio: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Variances of query and control image means, each from its group if that has two images.

    Label shift reduces the variance of the queries, so that of the controls times the usual
    ``ratio`` is used where the ratio is known.
    """
    factor = 1.0 if ratio is None else ratio.exp()
    if control.images > 1:
        query_var = (
            query.between_image_var
            if ratio is None and query.images > 1
            else control.between_image_var * factor
        )
        return query_var, control.between_image_var
    if query.images > 1:
        return query.between_image_var, query.between_image_var / factor
    return query.var, control.var  # with one image per group, fall back to the pixel variance


def adaptive_weight(
    query: Group, control: Group, importance: Tensor, reference: TrainingReference | None
) -> Tensor:
    """Query weight of least mean squared error, estimated without labels.

    The target statistics are those of the plate under the class mixture of training,
    μ_c + w₀(Δ + t): Δ is the usual shift of queries against controls, t a plate's own deviation
    with variance τ². Queries estimate the target with bias b (label shift) and sampling variance
    s_L, controls with variance s_N, and

        MSE(w) = (w − w₀)²τ² + w²(b² + s_L) + (1 − w)² s_N

    is least at w* = (w₀τ² + s_N) / (τ² + b² + s_L + s_N). The observed shift D has
    E‖D − Δ‖² = τ² + b² + s_L + s_N, so b² is the excess over the other three. Without label
    shift and τ this is the paper's count weight L/(L+N), under label shift it goes to 0.

    Args:
        query: Statistics of the queries at a layer.
        control: Statistics of the controls.
        importance: Weight of an error in each channel (the squared BatchNorm weight). Shape: (C,).
        reference: Statistics of training plates; without it every shift counts as label shift.

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

    Source: beyond the paper; derived from the bias-variance trade of docs/papers/cs_arm_bn.md
    section 1.5.
    """
    query_var, control_var = _between_image_variances(
        query, control, reference.between_image_ratio if reference else None
    )
    unit = control.var + TINY
    s_l = (importance * query_var / unit).sum() / query.images
    s_n = (importance * control_var / unit).sum() / control.images
    shift = (query.mean - control.mean) / unit.sqrt()
    w_0, tau = 0.0, torch.zeros_like(s_n)
    if reference is not None:
        shift = shift - reference.shift
        w_0, tau = reference.weight, (importance * reference.shift_var).sum().clamp_min(0)
    observed = (importance * shift.square()).sum()
    # b² is at least 0
    return (w_0 * tau + s_n) / (torch.maximum(observed, tau + s_l + s_n) + TINY)


def calibrate_statistics(
    query: Group | None,
    control: Group | None,
    weight: float | Tensor,
    reference: TrainingReference | None,
) -> tuple[Tensor, Tensor]:
    """Map the statistics of each group to those of training, and average them by the weight."""
    if reference is None:
        statistics = [
            None if group is None else (group.mean, group.var) for group in (query, control)
        ]
        if statistics[0] is None or statistics[1] is None:
            (only,) = (stats for stats in statistics if stats is not None)
            return only
        return merge_groups(statistics[0], statistics[1], weight)
    calibrated: list[tuple[Tensor, Tensor]] = []
    if control is not None:
        std = control.var.sqrt()
        offset = reference.weight * reference.shift * std
        calibrated.append((control.mean + offset, control.var * reference.control_var.exp()))
    if query is not None:
        if control is None:  # queries and controls are related through the training statistics
            std = (query.var * (reference.query_var - reference.control_var).exp()).sqrt()
        offset = (1 - reference.weight) * reference.shift * std
        calibrated.append((query.mean - offset, query.var * reference.query_var.exp()))
    if len(calibrated) == 1:
        return calibrated[0]
    (mean_c, var_c), (mean_q, var_q) = calibrated
    return torch.lerp(mean_c, mean_q, weight), torch.lerp(var_c, var_q, weight)


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over rows and pixels. Shape: (M, C, ...) to (C,)."""
    x = to_float32(x)
    if x.ndim > 2 and not (torch.is_grad_enabled() and x.requires_grad):
        group = group_of_images(*reversed(_var_mean(x.flatten(2))))
        assert group is not None
        return group.mean, group.var
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, var


def join_groups(groups: Sequence[Group]) -> Group:
    """Statistics of all images from those of chunks."""
    counts = groups[0].mean.new_tensor([g.images for g in groups])[:, None]
    means = torch.stack([g.mean for g in groups])
    variances = torch.stack([g.var for g in groups])
    between_image_vars = torch.stack([g.between_image_var for g in groups])
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    between = (means - mean).square()
    var = ((variances + between) * counts).sum(0) / total
    between_image_var = (between_image_vars * (counts - 1) + between * counts).sum(0) / (
        total - 1
    ).clamp_min(1)
    return Group(sum(g.images for g in groups), mean, var, between_image_var)
