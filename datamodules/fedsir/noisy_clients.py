"""Which clients of a federation have noisy labels, and what labels they get.

Shapes: N samples, K clients, C classes, H W image.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.noise import AsymmetricMap, LabelNoise
from fulgurite.datamodules.fedsir.samples import Samples
from fulgurite.errors import ConfigError
from fulgurite.options import check_arguments

__all__ = [
    "ClientSelection",
    "Corruption",
    "FederationNoise",
    "NoisyClients",
    "clean_cover_clients",
]

log = logging.getLogger(__name__)


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

    Source: docs/papers/fedsir.md section 2.

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
        *,
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

    Source: docs/papers/fedsir.md section 2; ranges of rates and fractional covers are
    inferred.

    Example:
        >>> from fulgurite.datamodules.fedsir.noise import Symmetric
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
        *,
        clean_cover: int | float | None = 450,
    ) -> None:
        check_arguments(NoisyClients.__init__, locals(), "data.init_args.noise.init_args")
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
        *,
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
                samples.take(parts[k]), float(rates[k]), num_classes, generator, images=pixels
            )
        self._warn_of_rounding(labels != samples.labels, parts, rates)
        return Corruption(labels, noisy, rates)

    def _warn_of_rounding(self, wrong: Tensor, parts: list[Tensor], rates: Tensor) -> None:
        """Warn where clients have so few samples of a class that rounding changes the rate."""
        if isinstance(self.noise, AsymmetricMap):  # some of its classes have no noise
            return
        noisy = [k for k in range(len(parts)) if rates[k] > 0]
        size = sum(len(parts[k]) for k in noisy)
        if not size:
            return
        configured_rate = sum(float(rates[k]) * len(parts[k]) for k in noisy) / size
        actual_rate = sum(int(wrong[parts[k]].sum()) for k in noisy) / size
        if abs(actual_rate - configured_rate) > 0.005 + 0.05 * configured_rate:
            log.warning(
                "%.1f %% of the labels of noisy clients are wrong, and %.1f %% were asked for: "
                "each class of a client has a rounded number of wrong labels, which is another "
                "share where it has few samples. Take fewer clients or more samples.",
                100 * actual_rate,
                100 * configured_rate,
            )
