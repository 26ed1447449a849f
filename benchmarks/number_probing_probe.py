"""The mod-T probe against scikit-learn's cross-validated LDA, on the same folds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.harness import report
from fulgurite.models.number_probing import FoldOptions, make_folds, planted, probe
from fulgurite.models.number_probing.reports.report import ProbeSettings, measure

SIZE, FOLDS, SEEDS = 1000, 5, 2
PERIODS = tuple(range(2, 11))
WIDTHS = (64, 384, 1024)
TURNS = {64: 9, 384: 3, 1024: 1}  # scikit-learn takes minutes for the widest


def table(width: int) -> torch.Tensor:
    """Common factors, parity, residues and noise: κ is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(width)
    n = torch.arange(SIZE)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(SIZE, width) + 0.5 * normal(SIZE, 20) @ normal(20, width)
    for period in (2, 5, 10):
        x += 1.2 / width**0.5 * normal(period, width)[n % period]
    return x + planted(n, 100, width, noise=0.0)


def by_sklearn(x: np.ndarray[Any, Any]) -> dict[int, float]:
    """κ of every period, mean over seeds, as its users would compute it."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import cohen_kappa_score
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = torch.arange(SIZE)
    kappa_by_period = {}
    for period in PERIODS:
        labels = (n % period).numpy()
        kappas = []
        for seed in range(SEEDS):
            model = make_pipeline(
                StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
            )
            split = PredefinedSplit(make_folds(n, period, FOLDS, seed=seed).numpy())
            kappas.append(cohen_kappa_score(labels, cross_val_predict(model, x, labels, cv=split)))
        kappa_by_period[period] = statistics.mean(kappas)
    return kappa_by_period


def ours(x: torch.Tensor) -> dict[int, float]:
    """The same κ, and train κ with it."""
    results = probe(x, PERIODS, folds=FoldOptions(FOLDS, seeds=SEEDS), nonround=False)
    return {period: result.kappa for period, result in results.items()}


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and processor seconds of a call, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    """Measure all widths, print and write the table."""
    torch.set_num_threads(1)
    rows, raw = [], {}
    for width in WIDTHS:
        x = table(width)
        fast, slow = partial(ours, x), partial(by_sklearn, x.numpy())
        fast()
        times: dict[str, list[tuple[float, float]]] = {"ours": [], "scikit-learn": []}
        kappas: dict[str, dict[int, float]] = {}
        for _ in range(TURNS[width]):
            for name, run in (("scikit-learn", slow), ("ours", fast), ("ours", fast)):
                wall, cpu, kappas[name] = timed(run)
                times[name].append((wall, cpu))
        everything = timed(partial(measure, x, settings=ProbeSettings(PERIODS)))
        wall = {name: statistics.median(t[0] for t in ts) for name, ts in times.items()}
        cpu = {name: statistics.median(t[1] for t in ts) for name, ts in times.items()}
        apart = max(abs(kappas["ours"][t] - kappas["scikit-learn"][t]) for t in PERIODS)
        raw[str(width)] = {"seconds": times, "kappa": kappas, "everything": everything[:2]}
        rows.append(
            {
                "d": str(width),
                "scikit-learn [s]": f"{wall['scikit-learn']:.3g}",
                "ours [s]": f"{wall['ours']:.3g}",
                "faster": f"{wall['scikit-learn'] / wall['ours']:.0f}×",
                "faster by processor time": f"{cpu['scikit-learn'] / cpu['ours']:.0f}×",
                "largest difference of κ": f"{apart:.4f}",
                "κ of T = 2, 5, 10": ", ".join(f"{kappas['ours'][t]:.3f}" for t in (2, 5, 10)),
                "with all controls [s]": f"{everything[0]:.3g}",
            }
        )
    report("number_probing_probe", "The mod-T probe against scikit-learn", NOTES, rows, raw=raw)


NOTES = f"""
κ of T = 2 … 10 for {SIZE} numbers, {FOLDS} shuffled stratified folds, {SEEDS} seeds: 90 fits.
scikit-learn: `cross_val_predict` of `StandardScaler` and
`LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")` on the same folds. One thread each,
in turns on the same core; medians. Ours takes means, variances and deviations in float64, and
shrinkage intensities, the scores of flat discriminants and, above 128 dimensions, conjugate
gradients between near classes in float32. `with all controls` is one call of `measure`: the same
with decade and contiguous folds, the numbers that 5 does not divide by themselves, a permutation,
spectrum and Fisher values.
"""

if __name__ == "__main__":
    main()
