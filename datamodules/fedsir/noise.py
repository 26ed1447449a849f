"""Label noise of known kind and exact amount.

Shapes: N samples, C classes, H W image, D pixels of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.samples import Samples
from fulgurite.datamodules.fedsir.selection import choose_per_class, is_integer_vector
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "CIFAR10_MAP",
    "AsymmetricMap",
    "InstanceDependent",
    "LabelNoise",
    "Pair",
    "Symmetric",
    "flip_counts",
]

#: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse.
CIFAR10_MAP = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


def flip_counts(labels: Tensor, rate: float, num_classes: int) -> Tensor:
    """Return round(rate · N_c), the exact number of labels of each class to flip.

    Shape:
        - labels: (N,) int64 -> (C,) int64.

    Source: docs/papers/fedsir.md section 2.

    Example:
        >>> flip_counts(torch.tensor([0, 0, 0, 1]), 0.5, 2).tolist()
        [2, 0]
    """
    sizes = torch.bincount(labels, minlength=num_classes)
    return (sizes.double() * rate).round().long()


class LabelNoise(ABC):
    """A kind of label noise."""

    needs_images = False

    def __call__(
        self,
        samples: Samples | Tensor,
        rate: float,
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Tensor | None = None,
    ) -> Tensor:
        """Return labels of which exactly round(rate · N_c) of each class are wrong.

        Args:
            samples: Samples to corrupt, or their true labels (N,).
            rate: Fraction of wrong labels.
            num_classes: Number of classes C.
            generator: Generator of the random numbers.
            images: Images of the samples, if :attr:`needs_images`.

        Shape:
            - images: (N, ., H, W) uint8.
            - returns: (N,) int64, a new tensor.

        Raises:
            ConfigError: The rate is outside [0, 1].
            DataError: A noise of one's own gave something else than labels.
        """
        if not 0 <= rate <= 1:
            raise ConfigError(
                f"The noise rate {rate} is outside [0, 1].",
                "Set `--data.init_args.noise.init_args.rate` to a fraction.",
            )
        if num_classes < 2:
            raise ConfigError("Labels of one class cannot be wrong.", "Set the noise to `null`.")
        if isinstance(samples, Tensor):
            samples = Samples.of(samples)
        labels = self.corrupt(samples, rate, num_classes, generator, images=images)
        if not is_integer_vector(labels, len(samples)):
            raise DataError(
                f"{type(self).__name__} gave no label for each of {len(samples)} samples.",
                "Correct its `corrupt` method: it returns an int64 tensor of labels.",
            )
        return labels.to(torch.int64)

    @abstractmethod
    def corrupt(
        self,
        samples: Samples,
        rate: float,
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Tensor | None,
    ) -> Tensor:
        """Return noisy labels (N,); the arguments of the call have been checked.

        Samples come in a random order; ``samples.rows`` is their order in the source.
        """


class _ClassMapNoise(LabelNoise):
    """Noise that maps each class to one other class, or to itself."""

    @abstractmethod
    def target(self, num_classes: int) -> Tensor:
        """Return the wrong class of each class (C,), itself where it is never flipped."""

    def corrupt(
        self,
        samples: Samples,
        rate: float,
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Tensor | None,
    ) -> Tensor:
        """Return noisy labels: see :meth:`LabelNoise.corrupt`."""
        labels, target = samples.labels, self.target(num_classes)
        counts = flip_counts(labels, rate, num_classes) * (target != torch.arange(num_classes))
        flipped = choose_per_class(labels, counts, generator)
        return labels.index_copy(0, flipped, target[labels[flipped]])


class Symmetric(LabelNoise):
    """A wrong label is any of the other classes with equal probability.

    Source: docs/papers/fedsir.md section 2.

    Example:
        >>> labels = torch.arange(100) % 10
        >>> noisy = Symmetric()(labels, 0.3, 10, torch.Generator().manual_seed(0))
        >>> int((noisy != labels).sum())
        30
    """

    def corrupt(
        self,
        samples: Samples,
        rate: float,
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Tensor | None,
    ) -> Tensor:
        """Return noisy labels: see :meth:`LabelNoise.corrupt`."""
        labels = samples.labels
        flipped = choose_per_class(labels, flip_counts(labels, rate, num_classes), generator)
        offset = torch.randint(1, num_classes, (len(flipped),), generator=generator)
        return labels.index_copy(0, flipped, (labels[flipped] + offset) % num_classes)


class Pair(_ClassMapNoise):
    """A wrong label is the next class.

    Source: docs/papers/fedsir.md section 5, check 3 (pair-flip).

    Example:
        >>> Pair()(torch.tensor([0, 1, 2]), 1.0, 3, torch.Generator()).tolist()
        [1, 2, 0]
    """

    def target(self, num_classes: int) -> Tensor:
        """Return the wrong class of each class: see :meth:`_ClassMapNoise.target`."""
        return (torch.arange(num_classes) + 1) % num_classes


class AsymmetricMap(_ClassMapNoise):
    """Some classes are mistaken for one similar class; the others have no noise.

    Args:
        mapping: Wrong class of each true class; the usual five pairs of CIFAR-10 by default.

    Raises:
        ConfigError: A class maps to itself or is not among the data's classes.

    Source: docs/papers/fedsir.md section 5, check 10.

    Example:
        >>> AsymmetricMap({0: 2})(torch.tensor([0, 1, 2]), 1.0, 3, torch.Generator()).tolist()
        [2, 1, 2]
    """

    def __init__(self, mapping: dict[int, int] | None = None) -> None:
        self.mapping = dict(CIFAR10_MAP if mapping is None else mapping)
        numbers: list[object] = [*self.mapping, *self.mapping.values()]
        if names := [c for c in numbers if not isinstance(c, int)]:
            raise ConfigError(
                f"The noise maps the class {names[0]!r}, which is no number of one.",
                "Give numbers of classes from 0 in "
                "`--data.init_args.noise.init_args.noise.init_args.mapping`, as {true: wrong}.",
            )
        if loops := [c for c, wrong in self.mapping.items() if c == wrong]:
            raise ConfigError(
                f"The noise maps class {loops[0]} to itself.",
                "Remove it from `--data.init_args.noise.init_args.noise.init_args.mapping`.",
            )

    def target(self, num_classes: int) -> Tensor:
        """Return the wrong class of each class: see :meth:`_ClassMapNoise.target`."""
        names = {*self.mapping, *self.mapping.values()}
        if outside := sorted(c for c in names if not 0 <= c < num_classes):
            raise ConfigError(
                f"The noise maps class {outside[0]}, and there are {num_classes} classes.",
                "Give a `mapping` of classes of this data, as {true: wrong}.",
            )
        target = torch.arange(num_classes)
        target[list(self.mapping)] = torch.tensor(list(self.mapping.values()), dtype=torch.int64)
        return target


class InstanceDependent(LabelNoise):
    """Wrong labels that depend on the image.

    Each class has one random linear map from pixels to class scores. The images with the highest
    scores for other classes (after Gumbel noise) are flipped, exactly round(rate · N_c) of them,
    each to a class drawn from the softmax of its scores.

    Args:
        temperature: Divisor of the scores; large values approach symmetric noise.

    Source: inferred, after Xia et al., NeurIPS 2020 (part-dependent noise); theirs draws rates per
    image, here counts are exact.

    Example:
        >>> images = torch.arange(80 * 4).remainder(256).byte().view(80, 1, 2, 2)
        >>> labels = torch.arange(80) % 4
        >>> generator = torch.Generator().manual_seed(0)
        >>> noisy = InstanceDependent()(labels, 0.5, 4, generator, images=images)
        >>> int((noisy != labels).sum())
        40
    """

    needs_images = True

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ConfigError(
                f"The temperature of the noise is {temperature}.", "Set a positive `temperature`."
            )
        self.temperature = temperature

    def corrupt(
        self,
        samples: Samples,
        rate: float,
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Tensor | None,
    ) -> Tensor:
        """Return noisy labels: see :meth:`LabelNoise.corrupt`."""
        if images is None:
            raise ConfigError("Instance-dependent noise was given no images.", "Pass `images`.")
        labels = samples.labels
        noisy = labels.clone()
        counts = flip_counts(labels, rate, num_classes).tolist()
        for c in range(num_classes):  # one D x C map at a time
            maps = torch.randn(images[0].numel(), num_classes, generator=generator)
            members = (labels == c).nonzero()[:, 0]
            draws = torch.rand(2, len(members), num_classes, generator=generator)
            if not counts[c]:
                continue
            pixels = images[members].flatten(1).float()
            pixels = pixels - pixels.mean(0)
            pixels /= pixels.norm(dim=1, keepdim=True).clamp_min(1e-6)
            scores = pixels @ maps / self.temperature
            scores[:, c] = -torch.inf
            gumbel = -draws.double().clamp(1e-300, 1 - 1e-16).log().neg().log()
            propensity = scores.logsumexp(1) + gumbel[0, :, 0]
            flipped = propensity.topk(counts[c]).indices
            noisy[members[flipped]] = (scores[flipped] + gumbel[1, flipped]).argmax(1)
        return noisy
