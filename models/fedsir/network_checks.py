"""What a network must be for federated rounds.

Axes: B images, C classes, D feature dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fulgurite.base import check_layer_sizes
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation import Federation
from fulgurite.models.fedsir.federation.randomness import keyed_randomness
from fulgurite.modes import keep_modes

__all__ = ["check_forward", "check_layers"]

_TOLERANCE = 0.02  # of the largest logit; weights may be of half precision


def check_layers(network: nn.Module) -> None:
    """Refuse a network whose models cannot be averaged.

    Raises:
        ConfigError: The network lacks ``features`` or ``head``, has no trained parameters, one
            without a shape yet, complex ones, or a state that is no tensor.
    """
    title = f"The network {type(network).__name__}"
    if not callable(getattr(network, "features", None)) or not hasattr(network, "head"):
        raise ConfigError(
            f"{title} has no `features` method or no `head`.",
            "Give it both, so that forward(x) == head(features(x)).",
        )
    check_layer_sizes(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(
            f"{title} has no parameters that are trained.",
            "Give one that has, with requires_grad=True.",
        )
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{title} keeps {name}, a {type(value).__name__}, which clients' models cannot be "
                "averaged over.",
                "Keep it in a buffer, or leave it out of get_extra_state.",
            )
        if value.is_complex():
            raise ConfigError(
                f"{title} has complex numbers in {name}, and models are averaged as real ones.",
                "Keep the real and the imaginary part as tensors of their own, and join them by "
                "torch.complex.",
            )


def check_forward(federation: Federation) -> None:
    """Refuse a network whose logits are not those of its head on its features.

    Two images of the first client are tried, in evaluation mode; nothing that a run depends on
    changes. Where no client has an image here, there is nothing to try.

    Args:
        federation: The clients of this process.

    Raises:
        ConfigError: Features or logits have another shape than methods need, or they disagree.
    """
    client = next((k for k in range(federation.num_clients) if len(federation.index[k])), None)
    if client is None:
        return
    network = federation.network
    title = f"The network {type(network).__name__}"
    images = federation.data.client_images(client)[:2].to(federation.device)
    inputs = federation.data.plain_batch(images)
    randomness = keyed_randomness(federation.device, federation.seed, "check")
    try:
        with torch.no_grad(), randomness, keep_modes(network):
            network.eval()
            # `forward` itself, so that nothing is compiled for two images
            logits, features = network.forward(inputs.clone()), network.features(inputs)  # type: ignore[operator]
            expected = None
            if isinstance(features, Tensor) and features.ndim == 2:
                expected = network.head(features)  # type: ignore[operator]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"{title} cannot take images of {tuple(inputs.shape[1:])} (channels, height, width): "
            f"{str(error).splitlines()[0]}.",
            "Make it for this size, as DigitsNet is by its `image_size`, or let the source resize "
            "its images.",
        ) from error
    wanted = (len(images), federation.num_classes)
    if not isinstance(logits, Tensor) or logits.shape != wanted:
        raise ConfigError(
            f"{title} gives {_describe(logits)} for {len(images)} images and "
            f"{federation.num_classes} classes.",
            "Let its `forward` return the logits alone, one row for each image.",
        )
    if expected is None:
        raise ConfigError(
            f"`features` of {title[0].lower()}{title[1:]} gives {_describe(features)} for "
            f"{len(images)} images.",
            "Let it return one vector for each image.",
        )
    largest = logits.abs().max().clamp_min(1)
    if expected.shape != logits.shape or bool(
        (expected - logits).abs().max() > _TOLERANCE * largest
    ):
        raise ConfigError(
            f"{title} gives other logits than its `head` gives on its `features`.",
            "Make forward(x) == head(features(x)): methods look at both.",
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
