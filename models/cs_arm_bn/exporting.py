"""A plate classifier as an ordinary network: BatchNorm with the statistics of one plate.

Axes: L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.domains.cs_arm_bn import PixelStatistics, PlateBatch
from fulgurite.errors import ConfigError
from fulgurite.export.exportable import (
    ExportableNetwork,
    ExportRequest,
    Port,
    no_network_error,
)
from fulgurite.models.cs_arm_bn.adaptation import adapt
from fulgurite.models.cs_arm_bn.batchnorm import find_context_layers
from fulgurite.models.cs_arm_bn.conversion import revert_batchnorm
from fulgurite.models.cs_arm_bn.methods.base import Method

__all__ = ["EXPORT_OPTIONS", "export_classifier"]

#: Options of ``fulgurite export`` for plate classifiers.
EXPORT_OPTIONS = {
    "plate": "name of the plate whose controls give the statistics of BatchNorm",
}


class StandardisedClassifier(nn.Module):
    """A network that takes pixels in fractions of full scale.

    Args:
        network: Takes standardised images.
        statistics: How images are standardised.

    Shape: (L, C, H, W) float32 to (L, K).

    Example:
        >>> statistics = PixelStatistics(torch.tensor([0.5]), torch.tensor([0.25]), 255.0)
        >>> network = StandardisedClassifier(nn.Flatten(), statistics)
        >>> network(torch.ones(1, 1, 1, 2))
        tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, statistics: PixelStatistics) -> None:
        super().__init__()
        self.network, self.smallest = network, statistics.smallest
        self.by_image = statistics.mean is None
        if statistics.mean is not None and statistics.std is not None:
            self.register_buffer("mean", statistics.mean.float().view(-1, 1, 1).clone())
            self.register_buffer("std", statistics.std.float().view(-1, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        if self.by_image:
            std, mean = torch.std_mean(images, (2, 3), correction=0, keepdim=True)
            return self.network((images - mean) / std.clamp_min(self.smallest))  # type: ignore[no-any-return]
        return self.network((images - self.mean) / self.std)  # type: ignore[no-any-return]


def export_classifier(
    network: nn.Module, method: Method, request: ExportRequest, *, chunk: int
) -> ExportableNetwork:
    """Describe a plate classifier as an ordinary network.

    A method that is deployed by a plate's controls becomes the network of one plate, whose
    statistics are computed from all of its controls as in prediction; one that is tested with
    running statistics is an ordinary network already.

    Args:
        network: The converted network; it is copied.
        method: The adaptation method.
        request: The data of the run, and the option ``plate``.
        chunk: Controls in a forward pass of the adaptation.

    Raises:
        ConfigError: The method's logits are not those of the network, or depend on the images that
            are predicted together; or the plate is missing, unknown, or makes no difference.
    """
    data: Any = request.data
    if not callable(getattr(data, "pixel_statistics", None)):
        raise no_network_error(method, f"since {type(data).__name__} says nothing of its pixels")
    if method.frozen or (method.deploys and not method.predicts_by_network_alone):
        raise no_network_error(method, "since its logits are not those of the network alone")
    plate = request.options.get("plate")
    copied = copy.deepcopy(network).eval()
    number: int | None = None
    if method.deploys:
        request.prepare_data()
        number = _find_plate(plate, data.domains, method)
        batch: PlateBatch = data.read_plate_controls(number)
        chunks = torch.split(batch.control, chunk)
        adapt(copied, chunks, plate, weight=method.context(training=False).weight)
        revert_batchnorm(copied, plate)
    elif method.is_ordinary:
        if plate is not None:
            raise ConfigError(
                f"{type(method).__name__} predicts all plates with the same running statistics, so "
                f"that --plate={plate} makes no difference.",
                "Leave it out.",
            )
        request.restore_data()
        _check_running_statistics(copied)
        revert_batchnorm(copied)
    else:
        raise no_network_error(
            method, "since its predictions depend on the images that are predicted together"
        )
    statistics: PixelStatistics = data.pixel_statistics(number)
    return _describe(copied.eval(), data, statistics, plate)


def _check_running_statistics(network: nn.Module) -> None:
    """Refuse a network that would take statistics of each batch.

    Raises:
        ConfigError: A BatchNorm keeps no running statistics.
    """
    for name, layer in find_context_layers(network).items():
        if layer.running_mean is None:
            raise ConfigError(
                f"The BatchNorm {name} keeps no running statistics.",
                "Train the network with track_running_stats=True.",
            )


def _find_plate(plate: str | None, names: Sequence[str], method: Method) -> int:
    """Number of a plate by its name.

    Raises:
        ConfigError: None is named, or there is no such plate.
    """
    if plate in names:
        return names.index(plate)
    near = difflib.get_close_matches(plate or "", names, n=3, cutoff=0.3) or names[:3]
    hint = f"Give --plate='{near[0]}', for example; nearest of {len(names)}: {', '.join(near)}."
    if plate is None:
        raise ConfigError(
            f"{type(method).__name__} takes the statistics of BatchNorm from the controls of a "
            "plate, and no plate is named.",
            hint,
        )
    raise ConfigError(f"The data have no plate {plate!r}.", hint)


def _describe(
    network: nn.Module, data: Any, statistics: PixelStatistics, plate: str | None
) -> ExportableNetwork:
    channels, classes = list(data.source.channels), list(data.class_names)
    height, width = data.image_size

    def make_inputs(lengths: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (lengths["batch"], len(channels), height, width)
        return (torch.rand(shape, generator=generator),)

    return ExportableNetwork(
        StandardisedClassifier(network, statistics).eval(),
        inputs=(
            Port(
                "images",
                torch.float32,
                ("batch", len(channels), height, width),
                "pixels after the preprocessing of the run, in fractions of full scale (0 to 1)",
            ),
        ),
        outputs=(
            Port("logits", torch.float32, ("batch", len(classes)), "softmax gives probabilities"),
        ),
        axes={"batch": (2, 1, 5)},
        make_inputs=make_inputs,
        weights=network,
        facts={
            "classes": classes,
            "channels": channels,
            "plate": plate,
            "preprocessing": str(data.preprocess),
            "full_scale": statistics.full_scale,
            "normalisation": {
                **statistics.describe(),
                "unit": "fractions of full scale; inside the network, except in safetensors",
            },
        },
    )
