"""Networks for plate images, all with BatchNorm.

Axes: M rows, I input channels, H, W image, K classes, D feature dim.
"""

from __future__ import annotations

import copy
import pkgutil
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.errors import ConfigError, FulguriteError
from fulgurite.layers import resnet
from fulgurite.models.cs_arm_bn.batchnorm import ContextBatchNorm2d
from fulgurite.models.cs_arm_bn.checkpointing import run_checkpointed

__all__ = [
    "Backbone",
    "InputNorm",
    "PlateResNet18",
    "PlateResNet50",
    "PooledBottleneck",
    "SmallResNet",
]

InputNorm = Literal["none", "context"]


def _make_input_norm(kind: InputNorm, channels: int) -> nn.Module:
    """Make the layer that standardises input channels by the context, or an identity."""
    if kind not in ("none", "context"):
        raise ConfigError(f"input_norm {kind!r} is unknown.", "Use none or context.")
    # a small eps: the gain of a plate is undone exactly only as far as eps is small beside it
    return ContextBatchNorm2d(channels, 1e-8, affine=False) if kind == "context" else nn.Identity()


def _run_block(block: nn.Module, x: Tensor, checkpoint: bool) -> Tensor:
    return run_checkpointed(block, x) if checkpoint and x.requires_grad else block(x)


class SmallResNet(nn.Module):
    """A stem and three residual blocks, for small images and CPUs.

    Args:
        in_channels: Number of input channels I.
        num_classes: Number of classes K.
        width: Channels of the stem; D is four times as many.
        input_norm: Input standardisation: ``"context"`` standardises each input channel by the
            statistics of the context first, which undoes gains and offsets of a plate exactly;
            ``"none"`` as in the paper.
        checkpoint: Recompute activations in the backward pass instead of storing them.

    Shape: (M, I, H, W) to (M, K), for H, W of at least 4.

    Example:
        >>> import torch
        >>> SmallResNet(5, 8, width=8).features(torch.zeros(2, 5, 32, 32)).shape
        torch.Size([2, 32])

    Source: docs/papers/cs_arm_bn.md section 6.2 (the tiny network of its runs); ``input_norm``:
    section 6.1.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int = 16,
        input_norm: InputNorm = "none",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.input_norm = _make_input_norm(input_norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            resnet.BasicBlock(width, width, 2),
            resnet.BasicBlock(width, 2 * width, 2),
            resnet.BasicBlock(2 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Features after average pooling. Shape: (M, I, H, W) to (M, D)."""
        x = F.relu(self.bn1(self.conv1(self.input_norm(x))))
        for block in self.blocks:
            x = _run_block(block, x, self.checkpoint)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all rows."""
        return self.head(self.features(x))  # type: ignore[no-any-return]


class PooledBottleneck(resnet.Bottleneck):
    """A bottleneck with convolutions of stride 1 and average pooling in place of strides.

    Args:
        inputs: Input channels.
        width: Channels of the 3×3 convolution; four times as many come out.
        stride: Size of the pooling before the last convolution and in the shortcut.

    Shape: (M, inputs, H, W) to (M, 4·width, H/stride, W/stride).

    Source: docs/papers/cs_arm_bn.md section 2.5; Radford et al., arXiv 2103.00020.
    """

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__(inputs, width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        outputs = width * self.expansion
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual to the shortcut."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class _PlateResNet(resnet.ResNet):
    """A platform ResNet with input standardisation and activation checkpointing."""

    def _add_options(self, input_norm: InputNorm, in_channels: int, checkpoint: bool) -> None:
        self.checkpoint = checkpoint
        self.input_norm = _make_input_norm(input_norm, in_channels)

    def features(self, x: Tensor) -> Tensor:
        """Features after average pooling. Shape: (M, I, H, W) to (M, D)."""
        x = F.relu(self.bn1(self.conv1(self.input_norm(x))))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = _run_block(block, x, self.checkpoint)
        return self.pool_features(x)

    def pool_features(self, x: Tensor) -> Tensor:
        """Global average. Shape: (M, D, H, W) to (M, D)."""
        return x.mean((2, 3))


class PlateResNet50(_PlateResNet):
    """The paper's ResNet-50: average pooling in place of strides, from scratch (D = 2048).

    Args:
        in_channels: Number of input channels I.
        num_classes: Number of classes K.
        stem: First layers: ``"imagenet"`` (7×7, stride 2, max-pooling; the paper's) or ``"cifar"``.
        input_norm: Input standardisation: ``"context"`` standardises the input channels first;
            ``"none"`` as in the paper.
        checkpoint: Recompute activations in the backward pass instead of storing them.
        weights: State dict file to start from.

    Shape: (M, I, H, W) to (M, K).

    Example:
        >>> sum(p.numel() for p in PlateResNet50(5, 8).parameters())
        23530696

    Source: docs/papers/cs_arm_bn.md section 2.5.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        stem: resnet.Stem = "imagenet",
        input_norm: InputNorm = "none",
        checkpoint: bool = False,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(
            PooledBottleneck, resnet.RESNETS[50][1], in_channels, num_classes, stem=stem
        )
        self._add_options(input_norm, in_channels, checkpoint)
        if weights is not None:
            resnet.load_weights(self, weights)

    def pool_features(self, x: Tensor) -> Tensor:
        """A 7×7 average with stride 1, then the global one. Shape: (M, D, H, W) to (M, D)."""
        x = F.avg_pool2d(x, (min(7, x.shape[2]), min(7, x.shape[3])), 1)
        return x.mean((2, 3))


class PlateResNet18(_PlateResNet):
    """ResNet-18 (D = 512), for images of medium size.

    Args:
        in_channels: Number of input channels I.
        num_classes: Number of classes K.
        stem: First layers: ``"cifar"`` (3×3, stride 1) or ``"imagenet"``.
        input_norm: Input standardisation: ``"context"`` standardises the input channels first.
        checkpoint: Recompute activations in the backward pass instead of storing them.
        weights: State dict file to start from.

    Shape: (M, I, H, W) to (M, K).

    Source: He et al., arXiv 1512.03385.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        stem: resnet.Stem = "cifar",
        input_norm: InputNorm = "none",
        checkpoint: bool = False,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(*resnet.RESNETS[18], in_channels, num_classes, stem=stem)
        self._add_options(input_norm, in_channels, checkpoint)
        if weights is not None:
            resnet.load_weights(self, weights)


class Backbone(nn.Module):
    """An image classifier with BatchNorm, made by a function of another library.

    Its first convolution is replaced by one with I channels, which starts from the mean over the
    old channels (so that pretrained weights stay useful), and its last linear layer by one
    with K outputs. If several layers may be heads (a teacher's, auxiliary ones), the function must
    make them for K classes itself.

    Args:
        in_channels: Number of input channels I.
        num_classes: Number of classes K.
        factory: Function or class by its dotted path, such as ``timm.create_model``,
            ``torchvision.models.resnet50`` or
            ``transformers.AutoModelForImageClassification.from_pretrained``.
        arguments: Keyword arguments of the function.
        input_norm: Input standardisation: ``"context"`` standardises the input channels first.

    Shape: (M, I, H, W) to (M, K).

    Raises:
        ConfigError: The function cannot be found or called, or does not make such a network.

    Example:
        >>> import torch
        >>> sizes = {"in_channels": 3, "num_classes": 10}
        >>> network = Backbone(5, 8, "fulgurite.layers.ResNet18", sizes)
        >>> network.features(torch.zeros(2, 5, 32, 32)).shape
        torch.Size([2, 512])

    Source: inferred.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        factory: str,
        arguments: dict[str, Any] | None = None,
        *,
        input_norm: InputNorm = "none",
    ) -> None:
        super().__init__()
        self.input_norm = _make_input_norm(input_norm, in_channels)
        self.num_classes = num_classes
        self.inner = _build_network(factory, arguments or {})
        layers = dict(self.inner.named_modules())
        first = next((n for n, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
        last = next((n for n in reversed(layers) if isinstance(layers[n], nn.Linear)), None)
        if first is None or last is None:
            raise ConfigError(
                f"What {factory} makes has no {'Linear' if first else 'Conv2d'} layer to exchange.",
                "Set model.init_args.network.init_args.factory to an image classifier.",
            )
        before: int = layers[first].in_channels
        _replace_module(self.inner, first, _convert_channels(layers[first], in_channels))
        for layer in layers.values():  # transformers checks images against it
            if getattr(layer, "num_channels", None) == before:
                layer.num_channels = in_channels
        self._last = self._replace_head(layers, last, factory)

    def _replace_head(self, layers: dict[str, nn.Module], last: str, factory: str) -> str:
        """Replace a single head; require that several heads fit already."""
        old = layers[last]
        assert isinstance(old, nn.Linear)
        heads = [
            name
            for name, layer in layers.items()
            if isinstance(layer, nn.Linear) and layer.out_features == old.out_features
        ]
        if len(heads) == 1:
            _replace_module(self.inner, last, nn.Linear(old.in_features, self.num_classes))
        elif old.out_features != self.num_classes:
            raise ConfigError(
                f"What {factory} makes has {len(heads)} linear layers with {old.out_features} "
                f"outputs, which may all be heads: {', '.join(heads[:5])}.",
                f"Let it make them for the {self.num_classes} classes itself, by its own argument "
                "in model.init_args.network.init_args.arguments: num_labels of transformers, "
                "num_classes of timm and torchvision (whose auxiliary heads are left out by "
                "aux_logits: false). If it makes no head, as transformers.AutoModel, name a "
                "classifier, such as transformers.AutoModelForImageClassification.from_pretrained.",
            )
        return last

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        return self.inner.get_submodule(self._last)  # type: ignore[return-value]

    def features(self, x: Tensor) -> Tensor:
        """Input of the last layer. Shape: (M, I, H, W) to (M, D)."""
        embeddings: list[Tensor] = []
        with self.head.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0])):
            self(x)
        return embeddings[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all rows."""
        out = self.inner(self.input_norm(x))
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape != (len(x), self.num_classes):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
            raise ConfigError(
                f"{type(self.inner).__name__} gives {shape} for {len(x)} images and "
                f"{self.num_classes} classes.",
                "Set model.init_args.network.init_args.factory to an image classifier whose last "
                "linear layer gives the logits.",
            )
        return logits


def _build_network(factory: str, arguments: dict[str, Any]) -> nn.Module:
    option = "model.init_args.network.init_args.factory"
    try:
        function = pkgutil.resolve_name(factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{option}={factory} cannot be found ({error}).",
            "Install the library, or correct the path: PACKAGE.MODULE.FUNCTION.",
        ) from error
    try:
        network = function(**arguments)
    except FulguriteError:
        raise
    except Exception as error:  # libraries and their clients of the network raise nearly any
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"{factory} cannot make a network from {arguments} ({reason}).",
            "Correct model.init_args.network.init_args.arguments: names must exist, and weights "
            "that are not on this machine need a connection.",
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{factory} makes a {type(network).__name__}, no network.", f"Correct {option}."
        )
    return network


def _convert_channels(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Convert a convolution to another number of channels, equal on images without colour."""
    if channels == layer.in_channels:
        return layer
    if layer.groups != 1:
        raise ConfigError(
            f"The network's first convolution has {layer.groups} groups of channels.",
            f"Use one whose first convolution mixes channels, or makes it for {channels} itself.",
        )
    converted = copy.deepcopy(layer)
    mean = layer.weight.detach().sum(1, keepdim=True) / channels
    converted.in_channels, converted.weight = channels, nn.Parameter(mean.repeat(1, channels, 1, 1))
    return converted


def _replace_module(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, layer)
