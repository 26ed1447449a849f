"""ResNet-18, -34 and -50 with torchvision's parameter names, without torchvision.

Axes: B mini-batch, I input channels, H, W image, C classes, D feature dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.weights import load_weights

__all__ = [
    "RESNETS",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "Stem",
    "load_weights",
]

Stem = Literal["imagenet", "cifar"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the first convolution.

    Shape: (B, inputs, H, W) to (B, width, H/stride, W/stride).
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the stride is on the 3×3 (v1.5).

    Args:
        inputs: Input channels.
        width: Channels of the 3×3 convolution; four times as many come out.
        stride: Stride of the 3×3 convolution.

    Shape: (B, inputs, H, W) to (B, 4·width, H/stride, W/stride).
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network whose penultimate features can be asked for.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: Blocks in each of the four stages.
        in_channels: I.
        num_classes: C.
        stem: ``"imagenet"``: 7×7 with stride 2, then max-pooling; ``"cifar"``: 3×3 with stride 1,
            for small images.
        weights: A file to start from, such as torchvision's ``state_dict``, a ``.safetensors`` or a
            checkpoint; see :func:`~fulgurite.weights.load_weights`.

    Shape: (B, I, H, W) to (B, C).

    Raises:
        ConfigError: ``stem`` is unknown, or the weights do not fit.
        CheckpointError: The weights cannot be read.

    Example:
        >>> import torch
        >>> network = ResNet(BasicBlock, (1, 1, 1, 1), 1, 10, stem="cifar")
        >>> network.features(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 512])

    Source: He et al., arXiv 1512.03385; CIFAR stem as commonly used for small images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        in_channels: int,
        num_classes: int,
        *,
        stem: Stem = "imagenet",
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ConfigError(f"stem {stem!r} is unknown.", "Use imagenet or cifar.")
        self.stem = stem
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        else:
            self.conv1 = _conv(in_channels, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        stages = []
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(inputs, width, stride))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if weights is not None:
            load_weights(self, weights)

    @property
    def head(self) -> nn.Linear:
        """The linear layer from features to classes."""
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        """Features after global average pooling, never negative.

        Shape: (B, I, H, W) to (B, D).
        """
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.fc(self.features(x))  # type: ignore[no-any-return]


#: Block and number of blocks in each stage of the ResNets, by their number of layers.
RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class _StandardResNet(ResNet):
    """A ResNet of :data:`RESNETS`, by its number of layers.

    Args:
        in_channels: I.
        num_classes: C.
        stem: ``"imagenet"`` or ``"cifar"``; from scratch on small images the latter is better.
        weights: State dict file to start from, such as torchvision's ``resnet18-f37072fd.pth``.

    Attributes:
        depth: Number of layers.

    Source: He et al., arXiv 1512.03385.
    """

    depth: int

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stem: Stem = "imagenet",
        weights: str | Path | None = None,
    ) -> None:
        block, depths = RESNETS[self.depth]
        super().__init__(block, depths, in_channels, num_classes, stem=stem, weights=weights)


class ResNet18(_StandardResNet):
    """ResNet-18 (D = 512).

    Example:
        >>> sum(p.numel() for p in ResNet18(3, 10).parameters())
        11181642
    """

    depth = 18


class ResNet34(_StandardResNet):
    """ResNet-34 (D = 512)."""

    depth = 34


class ResNet50(_StandardResNet):
    """ResNet-50 (D = 2048)."""

    depth = 50
