"""The report on one table of number embeddings: rows, verdict and figures.

Axes: N numbers, D embedding width, T period.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.probes.diagnosis import Diagnosis, diagnose
from fulgurite.models.number_probing.probes.probing import (
    ClassifierOptions,
    FoldKind,
    FoldOptions,
    Method,
    probe,
)
from fulgurite.models.number_probing.spectra.fisher import describe_singular, scatter
from fulgurite.models.number_probing.spectra.fourier import PERIODS, Spectrum, spectrum, spikes
from fulgurite.models.number_probing.tables.checks import (
    check_embeddings,
    check_periods,
    list_periods,
)
from fulgurite.plotting import heatmap, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMNS",
    "ProbeSettings",
    "Report",
    "kappa_figure",
    "measure",
    "spectrogram_figure",
    "spectrum_figure",
    "to_csv",
    "to_markdown",
]

#: Columns of a report that are numbers, in this order.
COLUMNS = (
    "kappa", "kappa_sd", "train_kappa", "accuracy", "band", "kappa_nonround", "kappa_decade",
    "kappa_contiguous", "kappa_permuted", "magnitude", "local_ratio", "phi", "eta2", "fisher",
    "cond", "bound_low", "bound_high",
)  # fmt: skip


@dataclass(frozen=True)
class ProbeSettings:
    """Options of :func:`measure`.

    Args:
        periods: T.
        method: ``lda``, or the slow ``logistic``.
        folds: Number of folds of the cross-validation.
        seeds: Number of seeds, each of which deals the folds anew.
        blocked: Further kinds of folds beside the shuffled ones: ``decade``, ``contiguous``.
        permuted: Number of permutations of the numbers that are probed as well; from 8 on, they
            give the null band.
        nonround: Probe the numbers that 5 does not divide by themselves as well.
        pca: Principal components used for the Fisher values, at most N/4; null for all.
        ridge: Added to S_W, in units of its mean eigenvalue.

    Raises:
        ConfigError: A kind of folds in ``blocked`` is unknown, periods are no whole numbers, or
            ``permuted`` is negative.
    """

    periods: Sequence[int] = PERIODS
    method: Method = "lda"
    folds: int = 5
    seeds: int = 2
    blocked: Sequence[FoldKind] = ("decade", "contiguous")
    permuted: int = 1
    nonround: bool = True
    pca: int | None = 50
    ridge: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "periods", list_periods(self.periods))
        object.__setattr__(self, "blocked", tuple(self.blocked))  # YAML has lists
        if unknown := [kind for kind in self.blocked if kind not in ("decade", "contiguous")]:
            raise ConfigError(
                f"blocked={unknown[0]!r} are no folds.", "Use decade, contiguous or both."
            )

        if self.permuted < 0:
            raise ConfigError(f"permuted={self.permuted} is negative.", "Give 0 or more.")

    def fold_options(self, kind: FoldKind = "shuffled") -> FoldOptions:
        """The folds of a kind."""
        return FoldOptions(self.folds, kind, self.seeds)


@dataclass(frozen=True)
class Report:
    """Measurements of one table, by :func:`measure`.

    Attributes:
        size: N.
        width: D.
        rows: For each period: ``period``, ``verdict`` and :data:`COLUMNS`; None for values that
            were not measured.
        spectrum: The spectrum of the table.
        diagnosis: The verdict with its reasons.
        settings: The settings of the measurement.
        notes: Sentences on values that could not be measured.
    """

    size: int
    width: int
    rows: list[dict[str, Any]]
    spectrum: Spectrum
    diagnosis: Diagnosis
    settings: ProbeSettings = field(repr=False)
    notes: tuple[str, ...] = ()

    def metrics(self, prefix: str = "probe/") -> dict[str, float]:
        """Numbers by name and period, such as ``probe/kappa_10``."""
        return {
            f"{prefix}{name}_{row['period']}": row[name]
            for row in self.rows
            for name in COLUMNS
            if row[name] is not None
        }


def measure(
    embeddings: Tensor,
    numbers: Sequence[int] | None = None,
    settings: ProbeSettings | None = None,
    *,
    allow_duplicates: bool = False,
) -> Report:
    """Spectrum, scatter, probes and verdict of a table.

    Args:
        embeddings: One row for each number. Shape: (N, D).
        numbers: Consecutive and ascending; by default from 0.
        settings: Options of the measurement; by default all of :class:`ProbeSettings`.
        allow_duplicates: As in :func:`check_embeddings`.

    Raises:
        ConfigError: A setting does not fit the table.
        DataError: The table fails :func:`check_embeddings`, or its numbers are not consecutive.

    Example:
        >>> import torch
        >>> from fulgurite.models.number_probing import planted
        >>> settings = ProbeSettings([2, 5, 10], blocked=(), permuted=0)
        >>> report = measure(planted(torch.arange(500), 10), settings=settings)
        >>> report.diagnosis.verdict, report.metrics()["probe/kappa_10"]
        ('geometric', 1.0)

    Source: docs/papers/number_probing.md section 6.
    """
    settings = settings or ProbeSettings()
    x, n = check_embeddings(embeddings, numbers, allow_duplicates=allow_duplicates)
    full_spectrum = spectrum(x, n, allow_duplicates=True)
    check_periods(settings.periods, len(x))
    lines = spikes(full_spectrum, settings.periods)
    classifier = ClassifierOptions(settings.method)
    common: dict[str, Any] = {"numbers": n, "classifier": classifier, "allow_duplicates": True}
    shuffled = probe(
        x, settings.periods, folds=settings.fold_options(), nonround=settings.nonround,
        null_draws=settings.permuted, **common,
    )  # fmt: skip
    blocked = {
        kind: probe(
            x, settings.periods, folds=settings.fold_options(kind), nonround=False, **common
        )
        for kind in settings.blocked
    }
    verdict = diagnose(shuffled, lines, next(iter(blocked.values()), None))
    pca = None if settings.pca is None else min(settings.pca, len(x) // 4)
    rows = []
    singular = []
    for t, result in shuffled.items():
        fisher = scatter(
            x, t, n, ridge=settings.ridge, pca=pca, allow_duplicates=True, allow_singular=True
        )
        if fisher.is_singular:
            singular.append(fisher)
        null = result.null_kappas
        rows.append({
            "period": t,
            "verdict": verdict.periods[t].verdict,
            "kappa": result.kappa,
            "kappa_sd": float(np.std(result.kappas)),
            "train_kappa": result.train_kappa,
            "accuracy": result.accuracy,
            "band": result.band,
            "kappa_nonround": result.kappa_nonround if settings.nonround else None,
            **{
                f"kappa_{kind}": blocked[kind][t].kappa if kind in blocked else None
                for kind in ("decade", "contiguous")
            },
            "kappa_permuted": sum(null) / len(null) if null else None,
            "magnitude": lines[t].magnitude,
            "local_ratio": lines[t].local_ratio,
            "phi": fisher.phi,
            "eta2": fisher.eta2,
            **(
                dict.fromkeys(("fisher", "cond", "bound_low", "bound_high"))
                if fisher.is_singular
                else {
                    "fisher": float(fisher.fisher[0]),
                    "cond": fisher.condition,
                    "bound_low": fisher.bounds[0],
                    "bound_high": fisher.bounds[1],
                }
            ),
        })  # fmt: skip
    notes: tuple[str, ...] = ()
    if singular:
        fewest = min(singular, key=lambda fisher: (fisher.regular, fisher.rank))
        periods = ", ".join(str(fisher.period) for fisher in singular)
        notes = (f"no Fisher values of T = {periods}: {' '.join(describe_singular(fewest))}",)
    return Report(len(x), x.shape[1], rows, full_spectrum, verdict, settings, notes)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Rows with a header line.

    Example:
        >>> to_csv([{"period": 2, "kappa": 0.5}])
        'period,kappa\n2,0.5\n'
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table of some columns, numbers with three digits, aligned; None is left empty.

    Example:
        >>> print(to_markdown([{"T": 2, "kappa": 0.5}], ["T", "kappa"]))
        | T | kappa |
        | - | ----- |
        | 2 | 0.5   |
    """
    cells = [
        [
            f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)
            for v in map(row.get, columns)
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def spectrum_figure(full_spectrum: Spectrum, periods: Sequence[int], title: str = "") -> Figure:
    """Normalised magnitude by frequency, with guides at k/10 and lines of the periods."""
    figure, axes = new_figure(width=7.5, height=3.0)
    ax = axes[0, 0]
    frequency, magnitude = (
        full_spectrum.frequency.cpu().numpy(),
        full_spectrum.normalised.cpu().numpy(),
    )
    ax.vlines(frequency, 0, magnitude, linewidth=0.8)
    for k in range(1, 6):
        ax.axvline(k / 10, color="0.8", linewidth=0.8, linestyle=":", zorder=0)
    for t in periods:
        ax.annotate(
            f"1/{t}", (1 / t, magnitude[full_spectrum.bin(1 / t)]), fontsize=7, ha="center",
            xytext=(0, 3), textcoords="offset points",
        )  # fmt: skip
    ax.set(
        title=title, xlabel="frequency ν [cycles per number]", ylabel="magnitude / median",
        xlim=(0, 0.505), ylim=(0, None),
    )  # fmt: skip
    return figure


def spectrogram_figure(spectra: Mapping[int, Tensor]) -> Figure:
    """Normalised magnitude by frequency and step, colours from 1 to 4.

    Args:
        spectra: Normalised magnitudes (:attr:`Spectrum.normalised`) by step. Shapes: (K,).

    Source: docs/papers/number_probing.md section 1.2, for the range of the colours.
    """
    figure, axes = new_figure(width=6.5)
    ax, steps = axes[0, 0], list(spectra)
    values = np.stack([spectra[step].cpu().numpy() for step in steps], 1)
    heatmap(ax, values, limits=(1.0, 4.0))
    ax.set(title="magnitude / median", xlabel="step", ylabel="frequency ν [cycles per number]")
    ax.invert_yaxis()
    ticks = [round(k / 10 * 2 * len(values)) - 1 for k in range(1, 6)]  # rows are ν = 1/N … 1/2
    ax.set_yticks(ticks, [f"0.{k}" for k in range(1, 6)])
    tick_indices = range(0, len(steps), max(1, len(steps) // 8))
    ax.set_xticks(list(tick_indices), [str(steps[i]) for i in tick_indices])
    return figure


def kappa_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Held-out κ by period, and by step where rows have one, as a heat map.

    Args:
        rows: Rows of reports; ``step`` tells several reports apart.
        title: Title above the map.
    """
    periods = sorted({row["period"] for row in rows})
    kinds = ("kappa", "kappa_nonround", "kappa_decade", "kappa_contiguous")
    if "step" in rows[0]:
        steps = sorted({row["step"] for row in rows})
        table = {(row["step"], row["period"]): row["kappa"] for row in rows}
        values = np.array([[table.get((s, t), math.nan) for s in steps] for t in periods])
        figure, axes = new_figure(width=6.5)
        ax, xlabel, ticks = axes[0, 0], "step", [str(s) for s in steps]
    else:
        by_period = {row["period"]: row for row in rows}
        values = np.array([[by_period[t][k] for k in kinds] for t in periods], dtype=float)
        figure, axes = new_figure(width=5.0, height=3.6)
        ax, xlabel, ticks = axes[0, 0], "", ["shuffled", "not round", "decades", "contiguous"]
    heatmap(ax, values, limits=(-1.0, 1.0))
    ax.set(title=title, xlabel=xlabel, ylabel="period T")
    ax.images[0].set_cmap("RdBu_r")  # 0, chance, is white
    ax.set_yticks(range(len(periods)), [str(t) for t in periods])
    tick_indices = range(0, len(ticks), max(1, len(ticks) // 8))
    ax.set_xticks(list(tick_indices), [ticks[i] for i in tick_indices])
    if values.size <= 60:
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    return figure
