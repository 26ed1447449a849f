"""Label noise of known kind and exact amount, and the selection of noisy clients.

Shapes: N samples, K clients, C classes, H W image, D pixels of an image.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.samples import Samples
from fulgurite.datamodules.fedsir.selection import choose_per_class
from fulgurite.errors import ConfigError

__all__ = [
    "CIFAR10_MAP",
    "AsymmetricMap",
    "ClientSelection",
    "Corruption",
    "FederationNoise",
    "InstanceDependent",
    "LabelNoise",
    "NoisyClients",
    "Pair",
    "Symmetric",
    "clean_cover_clients",
    "flip_counts",
]

log = logging.getLogger(__name__)

#: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse.
CIFAR10_MAP = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


def flip_counts(labels: Tensor, rate: float, num_classes: int) -> Tensor:
    """Return round(rate · N_c), the exact number of labels of each class to flip.

    Shape:
        - labels: (N,) int64 -> (C,) int64.

    Source: FedSIR, arXiv 2604.20825, card section 2.

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
        return self.corrupt(samples, rate, num_classes, generator, images)

    @abstractmethod
    def corrupt(
        self,
        samples: Samples,
        rate: float,
        num_classes: int,
        generator: torch.Generator,
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
        images: Tensor | None,
    ) -> Tensor:
        """Return noisy labels: see :meth:`LabelNoise.corrupt`."""
        labels, target = samples.labels, self.target(num_classes)
        counts = flip_counts(labels, rate, num_classes) * (target != torch.arange(num_classes))
        flipped = choose_per_class(labels, counts, generator)
        return labels.index_copy(0, flipped, target[labels[flipped]])


class Symmetric(LabelNoise):
    """A wrong label is any of the other classes with equal probability.

    Source: FedSIR, arXiv 2604.20825, card section 2.

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
        images: Tensor | None,
    ) -> Tensor:
        """Return noisy labels: see :meth:`LabelNoise.corrupt`."""
        labels = samples.labels
        flipped = choose_per_class(labels, flip_counts(labels, rate, num_classes), generator)
        offset = torch.randint(1, num_classes, (len(flipped),), generator=generator)
        return labels.index_copy(0, flipped, (labels[flipped] + offset) % num_classes)


class Pair(_ClassMapNoise):
    """A wrong label is the next class.

    Source: FedSIR, arXiv 2604.20825, card section 5, check 3 (pair-flip).

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

    Source: FedSIR, arXiv 2604.20825, card section 5, check 10.

    Example:
        >>> AsymmetricMap({0: 2})(torch.tensor([0, 1, 2]), 1.0, 3, torch.Generator()).tolist()
        [2, 1, 2]
    """

    def __init__(self, mapping: dict[int, int] | None = None) -> None:
        self.mapping = dict(CIFAR10_MAP if mapping is None else mapping)
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
        >>> noisy = InstanceDependent()(labels, 0.5, 4, torch.Generator().manual_seed(0), images)
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


class Corruption(NamedTuple):
    """Given labels (N,) int64, noisy clients (K,) bool, and rates of noise (K,) float64.

    A client without a known true label counts as clean, and its rate is NaN.
    """

    labels: Tensor
    noisy: Tensor
    rates: Tensor


def clean_cover_clients(counts: Tensor, threshold: Tensor) -> Tensor:
    """Choose few clients so that each class has enough samples at one of them.

    Greedy: the client that covers most uncovered classes comes first, the lowest number in a tie.
    A class of which no client has enough samples stays uncovered.

    Shape:
        - counts: (K, C) samples; threshold: (C,) samples that cover a class.
        - returns: (K,) bool.

    Source: FedSIR, arXiv 2604.20825, card section 2.

    Example:
        >>> counts = torch.tensor([[9, 0, 0], [9, 9, 0], [0, 0, 9]])
        >>> clean_cover_clients(counts, torch.tensor([5, 5, 5])).tolist()
        [False, True, True]
    """
    enough = counts >= threshold
    open_classes = enough.any(0)
    clean = torch.zeros(len(counts), dtype=torch.bool)
    while open_classes.any():
        best = int((enough & open_classes).sum(1).argmax())
        clean[best] = True
        open_classes &= ~enough[best]
    return clean


class FederationNoise(ABC):
    """The rule by which clients of a federation get their labels."""

    def annotate(self, samples: Samples) -> Samples:
        """Return all training samples with the labels that are known before the partition.

        Called once, with the samples in the order of the source, validation included. By default
        the labels of the source are the true ones.
        """
        return samples

    @abstractmethod
    def __call__(
        self,
        samples: Samples,
        parts: list[Tensor],
        num_classes: int,
        generator: torch.Generator,
        images: Callable[[int], Tensor] | None = None,
    ) -> Corruption:
        """Return the labels of the clients.

        Args:
            samples: Training samples from :meth:`annotate`, in a random order.
            parts: Positions of each client's samples, K tensors (N_k,).
            num_classes: Number of classes C.
            generator: Generator of the random numbers.
            images: Gives the images of a client, (N_k, ., H, W) uint8.
        """


class ClientSelection(FederationNoise):
    """Selection of noisy clients by their number and a cover by clean ones.

    Attributes:
        option_names: Names of the three arguments in a subclass.

    Args:
        fraction: Fraction of clients that are noisy (rounded).
        count: Number of noisy clients, instead of ``fraction``.
        clean_cover: Samples of each class at clean clients; see :class:`NoisyClients`.

    Raises:
        ConfigError: ``fraction`` or ``clean_cover`` is out of range.
    """

    option_names: tuple[str, str, str] = ("fraction", "count", "clean_cover")

    def __init__(self, fraction: float, count: int | None, clean_cover: int | float | None) -> None:
        if not 0 <= fraction <= 1:
            raise ConfigError(
                f"The fraction of noisy clients {fraction} is outside [0, 1].",
                f"Set `--data.init_args.noise.init_args.{self.option_names[0]}` to a fraction.",
            )
        if clean_cover is not None and not (
            0 < clean_cover <= 1 if isinstance(clean_cover, float) else clean_cover >= 1
        ):
            raise ConfigError(
                f"The clean cover {clean_cover} is neither a count nor a fraction in (0, 1].",
                f"Set `--data.init_args.noise.init_args.{self.option_names[2]}` to 450, 0.09 or "
                "null.",
            )
        self.fraction = fraction
        self.count = count
        self.clean_cover = clean_cover

    @property
    def selects_clients(self) -> bool:
        """Whether some clients may stay clean."""
        return self.fraction < 1 or self.count is not None or self.clean_cover is not None

    def choose(
        self, labels: Tensor, parts: list[Tensor], num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return which clients are noisy, (K,) bool.

        Raises:
            ConfigError: ``count`` is negative or above the number of clients.
        """
        clients = len(parts)
        num_noisy = round(self.fraction * clients) if self.count is None else self.count
        if not 0 <= num_noisy <= clients:
            raise ConfigError(
                f"{num_noisy} of {clients} clients cannot be noisy.",
                f"Set `--data.init_args.noise.init_args.{self.option_names[1]}` between 0 and "
                f"{clients}.",
            )
        clean = torch.zeros(clients, dtype=torch.bool)
        if self.clean_cover is not None:
            counts = torch.stack([torch.bincount(labels[p], minlength=num_classes) for p in parts])
            sizes = counts.sum(0)
            if isinstance(self.clean_cover, float):
                threshold = (self.clean_cover * sizes.double()).ceil().long().clamp_min(1)
            else:
                threshold = torch.full_like(sizes, self.clean_cover)
            clean = clean_cover_clients(counts, threshold)
            if uncovered := int((~(counts >= threshold).any(0)).sum()):
                log.warning(
                    "%s=%s: no client has enough samples of %d of %d classes, so no clean "
                    "client covers them; a fraction of the class size (0.09) fits small classes.",
                    self.option_names[2],
                    self.clean_cover,
                    uncovered,
                    num_classes,
                )
        candidates = (~clean).nonzero()[:, 0]
        noisy = candidates[torch.randperm(len(candidates), generator=generator)[:num_noisy]]
        return torch.zeros(clients, dtype=torch.bool).index_fill(0, noisy, value=True)


class NoisyClients(ClientSelection):
    """Chooses the clients with wrong labels and corrupts them; the others stay clean.

    Args:
        noise: Kind of noise.
        rate: Fraction of wrong labels in [0, 1]: one for all noisy clients, or the ends of a range
            from which each noisy client draws its own.
        fraction: Fraction of clients that are noisy (rounded).
        count: Number of noisy clients, instead of ``fraction``.
        clean_cover: Number of samples of each class at one of the clean clients. These are chosen
            first, and noisy clients are drawn from the others, of which there may be too few.
            An integer counts samples; a fraction in (0, 1] is relative to the class size and fits
            any data set (450 is 0.09 for CIFAR-10). ``null``: all clients may be noisy.

    Raises:
        ConfigError: ``rate``, ``fraction`` or ``clean_cover`` is out of range.

    Source: FedSIR, arXiv 2604.20825, card section 2; ranges of rates and fractional covers are
    inferred.

    Example:
        >>> labels = torch.arange(400) % 2
        >>> parts = list(torch.arange(400).split(100))
        >>> noisy = NoisyClients(Symmetric(), 0.5, fraction=0.5, clean_cover=50)
        >>> done = noisy(labels, parts, 2, torch.Generator().manual_seed(0))
        >>> int(done.noisy.sum()), int((done.labels != labels).sum())
        (2, 100)
    """

    def __init__(
        self,
        noise: LabelNoise,
        rate: float | tuple[float, float],
        fraction: float = 0.9,
        count: int | None = None,
        clean_cover: int | float | None = 450,
    ) -> None:
        super().__init__(fraction, count, clean_cover)
        low, high = rate if isinstance(rate, tuple | list) else (rate, rate)
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                f"The noise rate {rate} is outside [0, 1] or its range is reversed.",
                "Set `--data.init_args.noise.init_args.rate` to a fraction or to [low, high].",
            )
        self.noise = noise
        self.low, self.high = low, high

    def __call__(
        self,
        samples: Samples | Tensor,
        parts: list[Tensor],
        num_classes: int,
        generator: torch.Generator,
        images: Callable[[int], Tensor] | None = None,
    ) -> Corruption:
        """Choose noisy clients and corrupt their labels.

        Args:
            samples: Training samples, or their true labels (N,).
            parts: Positions of each client's samples, K tensors (N_k,).
            num_classes: Number of classes C.
            generator: Generator of the random numbers.
            images: Gives the images of a client, (N_k, ., H, W) uint8, for noise that needs them.

        Raises:
            ConfigError: There are fewer clients than noisy ones, or the noise does not fit the
                classes.
        """
        if isinstance(samples, Tensor):
            samples = Samples.of(samples)
        noisy = self.choose(samples.labels, parts, num_classes, generator)
        rates = torch.zeros(len(parts), dtype=torch.float64)
        draws = torch.rand(len(parts), generator=generator, dtype=torch.float64)
        rates[noisy] = (self.low + (self.high - self.low) * draws)[noisy]
        labels = samples.labels.clone()
        for k in noisy.nonzero()[:, 0].tolist():
            pixels = images(k) if images is not None and self.noise.needs_images else None
            labels[parts[k]] = self.noise(
                samples.take(parts[k]), float(rates[k]), num_classes, generator, pixels
            )
        return Corruption(labels, noisy, rates)
