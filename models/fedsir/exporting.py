"""The global network on its own: from pixels to logits.

Axes: B images, C channels, H, W image, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.export.exportable import ExportableNetwork, Port

__all__ = ["export_classifier"]


class PixelClassifier(nn.Module):
    """A network that takes pixels.

    Args:
        network: Takes normalised images.
        scale: Factor of each channel. Shape: (C,).
        offset: What is added to each channel then. Shape: (C,).

    Shape: (B, C, H, W) uint8 to (B, K).

    Example:
        >>> network = PixelClassifier(nn.Flatten(), torch.tensor([0.5]), torch.tensor([1.0]))
        >>> network(torch.full((1, 1, 1, 2), 4, dtype=torch.uint8))
        tensor([[3., 3.]])
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("scale", scale.detach().clone().view(-1, 1, 1))
        self.register_buffer("offset", offset.detach().clone().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of pixels."""
        normalised = images.to(torch.float32) * self.scale + self.offset
        return self.network(normalised)  # type: ignore[no-any-return]


def export_classifier(
    network: nn.Module, data: Any, *, num_classes: int, in_channels: int
) -> ExportableNetwork:
    """Describe the global network with the normalisation of its training images.

    Args:
        network: The global network; it is copied.
        data: The DataModule, with ``trained_inputs`` and ``image_size``.
        num_classes: K.
        in_channels: C.

    Raises:
        ConfigError: The DataModule does not say what the network's inputs mean.
    """
    if not callable(getattr(data, "trained_inputs", None)):
        raise ConfigError(
            f"{type(data).__name__} does not say how images are normalised for the network.",
            "Use data.class_path=fulgurite.datamodules.fedsir.FederatedDataModule, or give yours a "
            "method trained_inputs that returns its TrainedInputs.",
        )
    inputs = data.trained_inputs()
    height, width = data.image_size
    copied = copy.deepcopy(network).eval()

    def make_inputs(lengths: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (lengths["batch"], in_channels, height, width)
        return (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),)

    return ExportableNetwork(
        PixelClassifier(copied, inputs.scale, inputs.offset).eval(),
        inputs=(
            Port(
                "images",
                torch.uint8,
                ("batch", in_channels, height, width),
                "pixels from 0 to 255, not normalised",
            ),
        ),
        outputs=(
            Port("logits", torch.float32, ("batch", num_classes), "softmax gives probabilities"),
        ),
        axes={"batch": (2, 1, 5)},
        make_inputs=make_inputs,
        weights=copied,
        facts={
            "classes": list(inputs.class_names),
            "normalisation": {
                **inputs.describe(),
                "unit": "fractions of 255; inside the network, except in safetensors",
            },
        },
    )
