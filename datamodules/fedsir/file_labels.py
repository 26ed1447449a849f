"""Labels from a file, instead of synthetic noise.

Shapes: N samples, K clients, R training images of the source, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.annotations import AnnotationFile, file_kind
from fulgurite.datamodules.fedsir.label_files import (
    MISSING,
    LabelsAre,
    array_labels,
    label_numbers,
    read_label_arrays,
)
from fulgurite.datamodules.fedsir.noisy_clients import ClientSelection, Corruption, FederationNoise
from fulgurite.datamodules.fedsir.samples import UNKNOWN, Samples
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path
from fulgurite.options import check_options, make_options

__all__ = ["FileLabels", "LabelColumns", "SourceLabels"]

log = logging.getLogger(__name__)

_OPTION = "--data.init_args.noise.init_args"
_CLEAN = "clean_label"  # array of true labels in CIFAR-10N and CIFAR-100N
_Integers = npt.NDArray[np.int64]


def measure_noise(labels: Tensor, samples: Samples, parts: Sequence[Tensor]) -> Corruption:
    """Return given labels with the fraction of wrong ones per client, where true ones are known.

    Shape:
        - labels: (N,) int64; parts: K tensors (N_k,) of positions.

    Example:
        >>> samples = Samples.of(torch.tensor([0, 1, 1, 0]))
        >>> done = measure_noise(torch.tensor([0, 1, 0, 0]), samples, [*torch.arange(4).split(2)])
        >>> done.noisy.tolist(), done.rates.tolist()
        ([False, True], [0.0, 0.5])
    """
    has_truth = samples.true != UNKNOWN
    wrong = has_truth & (labels != samples.true)
    rates = torch.stack([wrong[part].double().sum() / has_truth[part].sum() for part in parts])
    return Corruption(labels, rates > 0, rates)


@dataclass(frozen=True)
class LabelColumns:
    """What a file with labels calls labels and images.

    Args:
        label: Column or array with the given labels, such as ``worse_label``.
        true_label: Column or array with true labels, empty or -1 where unknown.
        path: Column with the name of the image.
        row: Column with the row of the image.

    Raises:
        ConfigError: A value is of another type.
    """

    label: str = "label"
    true_label: str | None = None
    path: str = "path"
    row: str = "row"

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.columns")


class FileLabels(ClientSelection):
    """Given labels from a file: human annotations, such as CIFAR-10N's, or your own.

    The file is a table (``.csv``, ``.tsv``, ``.parquet``) with a column ``label`` and a column
    ``path`` (the image as the source names it) or ``row`` (its number in the source, from 0); a
    list of lines ``path label`` (``.txt``, as ``noisy_label_kv.txt`` of Clothing1M); or one label
    for each training image in the order of the source (``.npy``, ``.npz``, ``.pt``), which for
    CIFAR is that of the official archive, as in ``CIFAR-10_human.pt``. Labels are names of classes
    or their numbers from 0.

    Args:
        path: The file, absolute or relative to ``FULGURITE_DATA``.
        columns: What the file calls labels and images.
        truth: Origin of true labels: ``source``, with which those of ``columns.true_label`` (and
            of ``clean_label`` in a ``.pt`` file) must agree; ``file``; or ``unknown``: metrics
            that need them are left out.
        labels_are: Whether labels are ``names`` or ``numbers`` of classes; ``auto`` takes what
            fits all of them.
        unknown: Action for images that the source does not train on: ``error`` or ``ignore``.
        noisy_fraction: Fraction of clients that have the given labels; the others have true ones.
        noisy_count: Number of those clients, instead of ``noisy_fraction``.
        cover: Samples of each class at clean clients, as ``clean_cover`` of
            :class:`~fulgurite.datamodules.fedsir.NoisyClients`.

    Raises:
        ConfigError: Arguments do not fit together, or the kind of the file is unknown.
        DataError: The file cannot be read, does not name each image once, or disagrees with the
            source.

    Source: files as in Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022 (CIFAR-N), and
    Xiao et al., CVPR 2015 (Clothing1M).
    """

    option_names = ("noisy_fraction", "noisy_count", "cover")

    def __init__(
        self,
        path: str,
        columns: LabelColumns = LabelColumns(),
        *,
        truth: Literal["source", "file", "unknown"] = "source",
        labels_are: LabelsAre = "auto",
        unknown: Literal["error", "ignore"] = "error",
        noisy_fraction: float = 1.0,
        noisy_count: int | None = None,
        cover: int | float | None = None,
    ) -> None:
        super().__init__(noisy_fraction, noisy_count, cover)
        columns = make_options(LabelColumns, columns)
        true_label = columns.true_label
        self.kind = file_kind(path, f"{_OPTION}.path", "table", "list", "array")
        fits = {"source": True, "file": true_label is not None, "unknown": true_label is None}
        if not fits.get(truth, False):
            raise ConfigError(
                f"True labels cannot come from truth={truth} with true_label={true_label}.",
                f"Set `{_OPTION}.truth` to source, to file (with `columns.true_label`), or to "
                "unknown (without it).",
            )
        if true_label is not None and self.kind == "list":
            raise ConfigError(
                f"The list {path} has one label for each image, and true_label={true_label}.",
                f"Set `{_OPTION}.columns.true_label=null`, or give a table.",
            )
        self.path, self.label, self.true_label, self.truth = path, columns.label, true_label, truth
        self.labels_are = labels_are
        self.file = AnnotationFile(
            path, _OPTION, path_column=columns.path, row_column=columns.row, unknown=unknown
        )

    def annotate(self, samples: Samples) -> Samples:
        """Annotate samples: see :meth:`FederationNoise.annotate`."""
        path = data_path(self.path)
        by_row, true_by_row = self._read(samples, path)
        labels = torch.from_numpy(by_row)[samples.rows]
        missing = (labels == MISSING).nonzero()[:, 0]
        if len(missing):
            raise DataError(
                f"The file {path} has no label for {samples.describe(missing)}.",
                "Give each training image a label.",
            )
        true = samples.true if self.truth == "source" else torch.full_like(labels, UNKNOWN)
        if true_by_row is not None:
            in_file = torch.from_numpy(true_by_row)[samples.rows].clamp_min(UNKNOWN)
            if self.truth == "file":
                true = in_file
            else:
                _check_agreement(in_file, samples, path)
        if self.truth == "source" and self.kind == "array":
            _warn_of_chance(labels, true, samples, path)
        return replace(samples, labels=labels, true=true)

    def _read(self, samples: Samples, path: Path) -> tuple[_Integers, _Integers | None]:
        """Read the given labels and, if the file has them, true ones of each row of the source."""
        listing, names = samples.listing, samples.class_names
        if self.kind == "array":
            arrays = read_label_arrays(path)
            labels = array_labels(
                arrays, self.label, listing, names, path=path, option=f"{_OPTION}.columns.label",
                labels_are=self.labels_are,
            )  # fmt: skip
            true = self.true_label
            if true is None and self.truth == "source" and _CLEAN in arrays:
                true = _CLEAN
            if true is None:
                return labels, None
            if "" in arrays:
                raise ConfigError(
                    f"The file {path} has one array, and true={true}.",
                    f"Set `{_OPTION}.columns.true_label=null`.",
                )
            option = f"{_OPTION}.columns.true_label"
            return labels, array_labels(
                arrays, true, listing, names, path=path, option=option,
                labels_are=self.labels_are, gaps=True,
            )  # fmt: skip
        columns = [self.label, *([self.true_label] if self.true_label else [])]
        cells = self.file.read(listing, *columns)
        if self.true_label:
            cells[self.true_label] = _without_unknown(cells[self.true_label], names)
        texts = [text for name in columns for text in cells[name] if text]
        number = label_numbers(texts, names, self.labels_are, path, option=_OPTION)
        as_number: dict[str | None, int] = {None: MISSING, "": MISSING}
        as_number.update(number)
        table = {n: np.array([as_number[t] for t in cells[n]], np.int64) for n in columns}
        return table[self.label], table[self.true_label] if self.true_label else None

    def __call__(
        self,
        samples: Samples,
        parts: list[Tensor],
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Callable[[int], Tensor] | None = None,
    ) -> Corruption:
        """Return the labels of clients: see :meth:`FederationNoise.__call__`."""
        labels = samples.labels
        if self.selects_clients:
            unknown = (samples.true == UNKNOWN).nonzero()[:, 0]
            if len(unknown):
                raise DataError(
                    f"Clients without the given labels need true ones, and those of "
                    f"{samples.describe(unknown)} are unknown.",
                    f"Set `{_OPTION}.noisy_fraction=1` without `noisy_count` and `cover`.",
                )
            noisy = self.choose(samples.true, parts, num_classes, generator)
            labels = samples.true.clone()
            for k in noisy.nonzero()[:, 0].tolist():
                labels[parts[k]] = samples.labels[parts[k]]
        return measure_noise(labels, samples, parts)


class SourceLabels(FederationNoise):
    """Labels of the source as given labels that may be wrong, such as those of Clothing1M.

    True labels are unknown except for images in a file.

    Args:
        truth_path: Table or list with true labels of some images, as for
            :class:`FileLabels`; ``null`` if none are known.
        true_label: Column with true labels.
        labels_are: Whether the file has ``names`` or ``numbers`` of classes; ``auto`` takes what
            fits all of them.
        path_column: Column with the name of the image.
        row_column: Column with the row of the image.
        unknown: Action for images that the source does not train on: ``error`` or ``ignore``.

    Raises:
        ConfigError: The kind of the file is unknown.
        DataError: The file cannot be read, or names images twice or unknown ones.

    Source: inferred.
    """

    def __init__(
        self,
        truth_path: str | None = None,
        true_label: str = "true_label",
        labels_are: LabelsAre = "auto",
        path_column: str = "path",
        *,
        row_column: str = "row",
        unknown: Literal["error", "ignore"] = "error",
    ) -> None:
        if truth_path is not None:
            file_kind(truth_path, f"{_OPTION}.truth_path", "table", "list")
        self.path, self.true_label, self.labels_are = truth_path, true_label, labels_are
        self.file = AnnotationFile(truth_path or "", _OPTION, path_column, row_column, unknown)

    def annotate(self, samples: Samples) -> Samples:
        """Annotate samples: see :meth:`FederationNoise.annotate`."""
        true = torch.full_like(samples.labels, UNKNOWN)
        if self.path is not None:
            texts = self.file.read(samples.listing, self.true_label)[self.true_label]
            texts = _without_unknown(texts, samples.class_names)
            number = label_numbers(
                [text for text in texts if text],
                samples.class_names,
                self.labels_are,
                data_path(self.path),
                option=_OPTION,
            )
            by_row = [number[text] if text else UNKNOWN for text in texts]
            true = torch.tensor(by_row, dtype=torch.int64)[samples.rows]
        return replace(samples, true=true)

    def __call__(
        self,
        samples: Samples,
        parts: list[Tensor],
        num_classes: int,
        generator: torch.Generator,
        *,
        images: Callable[[int], Tensor] | None = None,
    ) -> Corruption:
        """Return the labels of clients: see :meth:`FederationNoise.__call__`."""
        return measure_noise(samples.labels, samples, parts)


def _without_unknown(texts: Sequence[str | None], class_names: Sequence[str]) -> list[str | None]:
    """Return true labels with None for -1, unless a class is called so."""
    unknown = {"-1", "-1.0"} - set(class_names)
    return [None if text in unknown else text for text in texts]


def _check_agreement(in_file: Tensor, samples: Samples, path: Path) -> None:
    differs = ((in_file != UNKNOWN) & (in_file != samples.true)).nonzero()[:, 0]
    if len(differs):
        first = int(differs[0])
        raise DataError(
            f"The true labels of {path} are not those of the source for {len(differs)} of "
            f"{len(samples)} images, such as {samples.describe(differs[:1])}: "
            f"{samples.class_names[int(in_file[first])]!r} and "
            f"{samples.class_names[int(samples.true[first])]!r}.",
            "Give labels in the order of the source, such as those of the official archive, or set "
            f"`{_OPTION}.truth=file` with `columns.true_label` if the source is wrong.",
        )


def _warn_of_chance(labels: Tensor, true: Tensor, samples: Samples, path: Path) -> None:
    """Warn if labels without names agree with the source no better than by chance."""
    classes = len(samples.class_names)
    frequencies = torch.stack(
        [torch.bincount(x, minlength=classes) / len(x) for x in (labels, true)]
    )
    chance, agreement = float(frequencies.prod(0).sum()), float((labels == true).double().mean())
    if agreement < chance + 0.05:
        log.warning(
            "%s agrees with the source on %.1f %% of the images, and labels in another order would "
            "on %.1f %%: is it in the order of the source?",
            path,
            100 * agreement,
            100 * chance,
        )
