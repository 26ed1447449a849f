"""Networks that expose penultimate features, as FedSIR needs them.

The paper uses ResNet-18 with ImageNet weights and stem; the platform's networks can be used
unchanged.

Each ends in a ReLU before the linear head: features that are never negative share a positive
mean, which is what lets the spectral score see label noise.

Axes: B mini-batch, I input channels, H, W image, C classes, D feature dim.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.layers.resnet import ResNet18, ResNet34, ResNet50

__all__ = ["DigitsNet", "FeatureNetwork", "ResNet18", "ResNet34", "ResNet50", "SmallCNN"]


class FeatureNetwork(Protocol):
    """Interface of a network: ``forward(x) == head(features(x))``."""

    @property
    def head(self) -> nn.Linear:
        """The linear layer from features to classes."""
        ...

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features. Shape: (B, I, H, W) to (B, D)."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Logits. Shape: (B, I, H, W) to (B, C)."""
        ...


class DigitsNet(nn.Module):
    """Two fully connected layers with BatchNorm, for images of a few pixels.

    Args:
        in_channels: Number of image channels I.
        num_classes: Number of classes C.
        image_size: Height and width of the images, H = W.
        hidden: Width of the first layer.
        width: Feature dimension D.

    Shape: (B, I, H, W) to (B, C).

    Example:
        >>> import torch
        >>> network = DigitsNet(1, 10)
        >>> network(torch.zeros(2, 1, 8, 8)).shape, network.head.in_features
        (torch.Size([2, 10]), 64)

    Source: docs/papers/fedsir.md section 3d (digits, 64-128-64 with BatchNorm); inferred.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: int = 8,
        hidden: int = 128,
        *,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features. Shape: (B, I, H, W) to (B, D)."""
        return self.body(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.head(self.features(x))  # type: ignore[no-any-return]


class SmallCNN(nn.Module):
    """Convolution, BatchNorm and ReLU, thrice, with pooling between, then a global average.

    Args:
        in_channels: Number of image channels I.
        num_classes: Number of classes C.
        width: Channels of the first layer; D is four times as many.

    Shape: (B, I, H, W) to (B, C), for H, W of at least 4.

    Example:
        >>> import torch
        >>> SmallCNN(3, 5).features(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])

    Source: inferred; a network for CPU runs.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        channels = (in_channels, width, 2 * width, 4 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )
            for inputs, outputs in pairwise(channels)
        )
        self.head = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features. Shape: (B, I, H, W) to (B, D)."""
        for index, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if index else x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.head(self.features(x))  # type: ignore[no-any-return]
