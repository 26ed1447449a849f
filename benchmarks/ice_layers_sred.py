"""What generated echograms of ``SyntheticSred`` are like, beside the published means of SRED."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import report
from fulgurite.datamodules.ice_layers import SyntheticSred
from fulgurite.datamodules.ice_layers.generator.sred import SredWorld

SEEDS = range(5)
#: Mean and deviation over SRED's complete echograms (docs/papers/ice_layers.md section 3.5).
PUBLISHED = {
    "thickness [range bins]": (56.08, 16.98),
    "`curr_smb`": (0.184, 0.052),
    "`curr_temp`": (244.6, 1.63),
    "`curr_RZ_vals`": (0.374, 1.70),
    "`curr_SHC_vals`": (9.4e-4, 4.4e-3),
    "`curr_SNHS_vals`": (25.64, 0.17),
    "`curr_dens`": (309.7, 4.12),
    "`Elevation`": (3390.9, 259.0),
    "latitude": (74.67, 1.57),
    "longitude": (-43.12, 4.64),
}

Values = NDArray[np.float64]


def generate_values(seed: int) -> dict[str, Values]:
    """All values of 140 echograms of 32 traces on 2 km, all layers of each, by feature."""
    world = SredWorld(stacks=140, traces=32, spacing=62.8, seed=seed)
    flights = SyntheticSred(world).load()
    stacks = flights.stacks
    values: dict[str, Values] = {
        "thickness [range bins]": np.concatenate(
            [stack.truth.ravel() for stack in stacks if stack.truth is not None]
        )
    }
    physics = np.concatenate([s.physics.reshape(-1, s.physics.shape[-1]) for s in stacks])
    for name, column in zip(flights.physics, physics.T, strict=True):
        values[f"`{name}`"] = column.astype(np.float64)
    positions = np.concatenate([stack.pos for stack in stacks])
    values["latitude"], values["longitude"] = positions.T.astype(np.float64)
    return values


def describe(name: str, by_seed: list[Values]) -> Iterator[tuple[str, str]]:
    """The cells of a feature, by column."""
    mean, std = PUBLISHED[name]
    together, means = np.concatenate(by_seed), [float(values.mean()) for values in by_seed]
    yield "feature", name
    yield "SRED, complete echograms", f"{mean:.4g} ± {std:.3g}"
    yield "generated, mean ± deviation", f"{together.mean():.4g} ± {together.std():.3g}"
    yield "means of the five seeds", f"{min(means):.4g} to {max(means):.4g}"


def main() -> None:
    """Generate all seeds, print and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FULGURITE_CACHE"] = folder
        seeds = [generate_values(seed) for seed in SEEDS]
    rows = [dict(describe(name, [values[name] for values in seeds])) for name in PUBLISHED]
    raw = {
        name: [[float(values[name].mean()), float(values[name].std())] for values in seeds]
        for name in PUBLISHED
    }
    report("ice_layers_sred", "Generated echograms beside those of SRED", NOTES, rows, raw=raw)


NOTES = """
Means and standard deviations over all values of 140 echograms of 32 traces on 2 km, all layers of
each, of seeds 0 to 4; those of SRED are published. The JSON file has both of each seed.
"""

if __name__ == "__main__":
    main()
