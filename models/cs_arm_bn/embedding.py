"""Embeddings of images: inputs of the last linear layer of a classifier, or rows of a file.

Axes: M images, D feature dim, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from fulgurite.errors import ConfigError

__all__ = ["EmbeddingHead", "embed", "embed_and_classify", "find_head"]


def find_head(network: nn.Module) -> nn.Linear:
    """Return the linear layer that computes the logits: ``head`` or ``fc``, else the last one.

    Raises:
        ConfigError: The network has no linear layer.
    """
    for name in ("head", "fc"):
        if isinstance(layer := getattr(network, name, None), nn.Linear):
            return layer
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"The network {type(network).__name__} has no linear layer whose input would be the "
            "embedding.",
            "Give one that ends in a torch.nn.Linear, such as "
            "fulgurite.models.cs_arm_bn.SmallResNet or Backbone.",
        )
    return layers[-1]


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Return the input of the head for each image. Shape: (M, C, H, W) to (M, D).

    Raises:
        ConfigError: The head is not called once with one vector for each image.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> embed(network, torch.arange(8.0).view(2, 1, 2, 2)).shape
        torch.Size([2, 4])
    """
    return embed_and_classify(network, images)[0]


def embed_and_classify(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of one forward pass. Shape: (M, C, H, W) to (M, D) and (M, K).

    Raises:
        ConfigError: The head is not called once with one vector for each image.
    """
    embeddings: list[Tensor] = []
    head = find_head(network)
    with head.register_forward_pre_hook(lambda _, inputs: embeddings.append(inputs[0])):
        logits = network(images)
    if len(embeddings) != 1 or embeddings[0].shape != (len(images), head.in_features):
        shapes = ", ".join(str(tuple(x.shape)) for x in embeddings) or "nothing"
        raise ConfigError(
            f"The last linear layer of {type(network).__name__} gets {shapes} for {len(images)} "
            "images, not one vector for each.",
            "Give a network whose `head` is the linear layer on the embedding.",
        )
    return embeddings[0], logits


class EmbeddingHead(nn.Module):
    """A classifier on embeddings of another network, such as CA-MAE or DINO.

    Args:
        in_channels: Dimension D of an embedding
            (``fulgurite.datamodules.cs_arm_bn.EmbeddedPlates`` serves it as channels).
        num_classes: Number of classes K.
        hidden: Width of a hidden layer with BatchNorm, whose statistics the methods adapt; 0 for a
            linear classifier without BatchNorm.

    Shape: (M, D) or (M, D, 1, 1) to (M, K).

    Raises:
        ConfigError: ``hidden`` is negative.

    Example:
        >>> import torch
        >>> EmbeddingHead(384, 8, hidden=64)(torch.zeros(3, 384, 1, 1)).shape
        torch.Size([3, 8])

    Source: docs/papers/cs_arm_bn.md section 1.6; the hidden layer: inferred.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 0) -> None:
        super().__init__()
        if hidden < 0:
            raise ConfigError(
                f"model.init_args.network.init_args.hidden={hidden} is negative.",
                "Give 0 for a linear layer alone, or the width of a hidden one.",
            )
        layers: list[nn.Module] = []
        if hidden:
            layers = [nn.Linear(in_channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(hidden or in_channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Input of the last layer."""
        return self.hidden(x.flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all rows."""
        return self.head(self.features(x))  # type: ignore[no-any-return]
