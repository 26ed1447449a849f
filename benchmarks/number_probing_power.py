"""What the mod-T probe can see: residues mod 10 planted into curves of other frequencies.

A table that learned addition consists of a few frequencies k/N. How much of its power must lie at
multiples of 1/10 before the probe reads n mod 10, with 100 numbers and with 1000?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from benchmarks.harness import report
from fulgurite.models.number_probing import FoldOptions, planted, probe

WIDTH, PERIOD, CURVES, NOISE = 128, 10, 10, 0.1
SHARES = (0.0, 0.01, 0.03, 0.1, 0.3)
SEEDS = range(5)


def table(size: int, fraction: float, harmonics: Sequence[int], seed: int) -> torch.Tensor:
    """Curves of other frequencies, with a share of the power in those of the period."""
    n = torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    frequencies = [k for k in range(1, size // 2) if (10 * k) % size]
    curves = torch.randperm(len(frequencies), generator=generator)[:CURVES].tolist()
    x = torch.zeros(size, WIDTH, dtype=torch.float64)
    for i, k in enumerate(curves):  # a plane of its own for each
        x += planted(
            n, 1, WIDTH, noise=0.0, seed=100 * seed + i, harmonics=(frequencies[k] / size,)
        )
    lines = planted(n, PERIOD, WIDTH, noise=0.0, seed=100 * seed + 99, harmonics=harmonics)
    parts = [part - part.mean(0) for part in (x, lines)]
    x, lines = (part / part.norm() for part in parts)
    noise = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    return math.sqrt(1 - fraction) * x + math.sqrt(fraction) * lines + NOISE * noise / noise.norm()


def main() -> None:
    """Measure κ for all shares, print and write the table."""
    rows, raw = [], {}
    for size in (100, 1000):
        for name, harmonics in (("3/10", (3,)), ("all k/10", (1, 2, 3, 4, 5))):
            for fraction in SHARES:
                tables = [table(size, fraction, harmonics, seed) for seed in SEEDS]
                row = {
                    "numbers": str(size),
                    "planted at": name,
                    "share of power": f"{fraction:.0%}",
                }
                for kind in ("shuffled", "contiguous"):
                    results = [
                        probe(x, [PERIOD], folds=FoldOptions(kind=kind), nonround=False)
                        for x in tables
                    ]
                    kappas = [result[PERIOD].kappa for result in results]
                    mean, std = statistics.mean(kappas), statistics.stdev(kappas)
                    row[f"κ, {kind} folds"] = f"{mean:.2f} ± {std:.2f}"
                    raw[f"{size} numbers, {name}, {fraction}, {kind}"] = kappas
                rows.append(row)
    report("number_probing_power", "What the mod-10 probe can see", NOTES, rows, raw=raw)


NOTES = f"""
Tables of width {WIDTH}: {CURVES} circles of other frequencies k/N in planes of their own, as
addition leaves them, noise of {NOISE**2:.0%} of the power, and the share planted at multiples of
1/{PERIOD}. Mean ± std over {len(SEEDS)} tables. κ = {-1 / (PERIOD - 1):.2f} means that no held-out
number is answered rightly.
"""

if __name__ == "__main__":
    main()
