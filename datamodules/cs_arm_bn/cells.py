"""Images of generated cells under perturbations, before any batch effect.

Shapes: R sites, M cells, C = 5 channels [RNA, ER, AGP, Mito, DNA], S side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CELLS_PER_AREA", "PHENOTYPES", "Phenotype", "render_cells"]

Floats = NDArray[np.floating[Any]]

#: Mean number of cells in an image of 32² pixels.
CELLS_PER_AREA = 7.0
_AREA = 32.0**2
_MAX_CELLS = 2_000  # cells rendered at once, to bound memory


@dataclass(frozen=True)
class Phenotype:
    """Appearance of cells under one perturbation; defaults are those of the negative control.

    Attributes:
        density: Factor on the number of cells.
        cell: Mean radius of a cell [pixels at 32²].
        nucleus: Mean radius of a nucleus [pixels at 32²].
        split: Fraction of cells with two nuclei.
        rna: Brightness of RNA.
        er: Brightness of ER.
        agp: Brightness of AGP.
        mito: Brightness of mitochondria.
        dna: Brightness of DNA.
        rim: Fraction of AGP at the rim of a cell; the other part fills the cell.
        spots: Mean number of mitochondrial spots of a cell; their total brightness is constant.

    Source: docs/papers/cs_arm_bn.md section 6.3; the values are inferred.
    """

    density: float = 1.0
    cell: float = 4.6
    nucleus: float = 2.0
    split: float = 0.05
    rna: float = 1.0
    er: float = 1.0
    agp: float = 1.0
    mito: float = 1.0
    dna: float = 1.0
    rim: float = 0.4
    spots: float = 8.0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(field.name for field in fields(cls))


#: One phenotype for each positive control of JUMP, each 1 to 3 parameters off the negative one.
#: Quinidine differs in brightness only, aloxistatin in texture only.
PHENOTYPES: Mapping[str, Phenotype] = {
    "JCP2022_012818": Phenotype(nucleus=2.7),
    "JCP2022_025848": Phenotype(cell=5.8),
    "JCP2022_035095": Phenotype(rim=0.8, agp=0.85),
    "JCP2022_037716": Phenotype(split=0.85, cell=5.0, dna=1.4),
    "JCP2022_046054": Phenotype(density=0.6, mito=0.5),
    "JCP2022_050797": Phenotype(er=1.5, rna=1.5),
    "JCP2022_064022": Phenotype(rim=0.1, cell=4.0),
    "JCP2022_085227": Phenotype(spots=2.6),
}


def _smooth_step(distance: Floats, width: float) -> Floats:
    """Return 1 inside and 0 outside, with a smooth edge of ``width``."""
    smooth: Floats = 1 / (1 + np.exp(np.clip(distance / width, -30.0, 30.0)))
    return smooth


def render_cells(
    phenotypes: Mapping[str, Floats], size: int, scale: float, generator: np.random.Generator
) -> Floats:
    """Draw the cells of R sites.

    Args:
        phenotypes: R values of each field of :class:`Phenotype`.
        size: Side S of an image [pixels].
        scale: Magnification: 1 draws cells of the phenotypes' sizes, 0.85 smaller and more of them.
        generator: Generator of the random numbers.

    Shape:
        - (R, C, S, S), about 0 to 1.5, without noise.

    Source: docs/papers/cs_arm_bn.md section 6.3 (cells).

    Example:
        >>> values = {name: np.ones(2) * getattr(Phenotype(), name) for name in Phenotype.names()}
        >>> render_cells(values, 16, 1.0, np.random.default_rng(0)).shape
        (2, 5, 16, 16)
    """
    sites = len(phenotypes["density"])
    mean = CELLS_PER_AREA * size**2 / _AREA / scale**2
    counts = generator.poisson(mean * phenotypes["density"])
    # a wide and stretched cell; still wider ones are made smaller
    half = int(np.ceil(float(np.max(phenotypes["cell"])) * scale * 1.45)) + 1
    side = size + 2 * half
    canvas = np.zeros((5, sites, side, side), np.float32)
    last = 0
    while last < sites:
        first, total = last, 0
        while last < sites and (last == first or total + counts[last] <= _MAX_CELLS):
            total += int(counts[last])
            last += 1
        if total:
            site = np.repeat(np.arange(first, last), counts[first:last])
            values = {name: values[site] for name, values in phenotypes.items()}
            _draw_cells(
                canvas, site, values, size=size, half=half, scale=scale, generator=generator
            )
    images: Floats = canvas[:, :, half : half + size, half : half + size].transpose(1, 0, 2, 3)
    return np.ascontiguousarray(images)


class _Canvas:
    """Padded images to which patches are added without clipping."""

    def __init__(self, site: NDArray[np.int64], half: int, image: NDArray[np.float32]) -> None:
        self.site, self.half, self.side = site, half, image.shape[-1]
        self.start = int(site[0]) * self.side**2
        self.stop = (int(site[-1]) + 1) * self.side**2

    def pixel_indices(self, site: NDArray[np.int64], corner: NDArray[np.int64], reach: int) -> Any:
        """Return the flat indices of the pixels of square patches."""
        offset = np.arange(-reach, reach + 1) + self.half
        row = np.clip(corner[0][:, None] + offset, 0, self.side - 1)
        col = np.clip(corner[1][:, None] + offset, 0, self.side - 1)
        flat = (site[:, None, None] * self.side + row[:, :, None]) * self.side + col[:, None, :]
        return flat.reshape(-1) - self.start

    def add(self, plane: NDArray[np.float32], indices: Any, weight: Any) -> None:
        """Add patches to one channel."""
        added = np.bincount(indices, weight.reshape(-1), self.stop - self.start)
        plane.reshape(-1)[self.start : self.stop] += added.astype(np.float32)


def _draw_cells(
    canvas: NDArray[np.float32],
    site: NDArray[np.int64],
    values: Mapping[str, Floats],
    *,
    size: int,
    half: int,
    scale: float,
    generator: np.random.Generator,
) -> None:
    """Add M cells to the canvas, each on its own patch."""
    cells = len(site)
    target = _Canvas(site, half, canvas)

    def jitter(sigma: float, count: int = cells) -> Floats:
        return np.exp(generator.normal(0, sigma, count))

    def column(array: Floats) -> NDArray[np.float32]:
        return array.astype(np.float32)[:, None, None]

    centre = generator.uniform(0, size, (2, cells))
    corner = np.floor(centre).astype(np.int64)
    offset = np.arange(-half, half + 1, dtype=np.float32)
    y = offset[None, :, None] - column(centre[0] - corner[0])
    x = offset[None, None, :] - column(centre[1] - corner[1])
    angle = generator.uniform(0, np.pi, cells)
    stretch = 1 + generator.uniform(0, 0.3, cells)
    along = y * column(np.cos(angle)) + x * column(np.sin(angle))
    across = x * column(np.cos(angle)) - y * column(np.sin(angle))
    distance = np.sqrt((along / column(stretch)) ** 2 + (across * column(stretch)) ** 2)
    radius = np.minimum(values["cell"] * scale * jitter(0.1), (half - 1) / 1.25)
    core_radius = values["nucleus"] * scale * jitter(0.08)
    cell, core = column(radius), column(core_radius)
    two = generator.uniform(size=cells) < values["split"]
    if two.any():  # two smaller nuclei
        pair = np.sqrt((np.abs(along[two]) - 0.75 * core[two]) ** 2 + across[two] ** 2) / 0.72
        from_core = distance.copy()
        from_core[two] = pair
    else:
        from_core = distance
    nucleus = _smooth_step(from_core - core, 0.4)
    inside = _smooth_step(distance - cell, 0.5)
    body = inside * (1 - nucleus)
    rim = np.exp(-(((distance - cell) / np.float32(0.8 * scale)) ** 2))
    fraction = column(values["rim"])
    depth = np.maximum(distance - core, 0) / np.maximum(np.float32(0.6) * (cell - core), 0.5)
    light = jitter(0.12)
    brightness = {
        name: values[name] * light * jitter(0.12) for name in ("rna", "er", "agp", "mito", "dna")
    }
    indices = target.pixel_indices(site, corner, half)
    for c, name, plane in (
        (0, "rna", 0.45 * body + 0.3 * nucleus),
        (1, "er", 1.1 * body * np.exp(-depth)),
        (2, "agp", 1.2 * fraction * rim + 0.6 * (1 - fraction) * inside),
        (3, "mito", 0.08 * body),
        (4, "dna", 0.9 * nucleus),
    ):
        target.add(canvas[c], indices, plane * column(brightness[name]))

    def spots(
        channel: int,
        counts: NDArray[np.int64],
        between: tuple[Floats, Floats],
        *,
        width: float,
        bright: Floats,
    ) -> None:
        """Add ``counts`` round spots to each cell, between two distances from its centre."""
        inner, outer = between
        owner = np.repeat(np.arange(cells), counts)
        far = inner[owner] + (outer - inner)[owner] * generator.uniform(0, 1, len(owner))
        turn = generator.uniform(0, 2 * np.pi, len(owner))
        position = centre[:, owner] + far * np.stack([np.sin(turn), np.cos(turn)])
        position = np.clip(position, 1 - half, size + half - 2)
        reach = int(np.ceil(2.5 * width))
        pixel = np.floor(position).astype(np.int64)
        axis = np.arange(-reach, reach + 1, dtype=np.float32)
        dy = np.exp(-((axis - (position[0] - pixel[0])[:, None]) ** 2) / (2 * width**2))
        dx = np.exp(-((axis - (position[1] - pixel[1])[:, None]) ** 2) / (2 * width**2))
        patch = dy[:, :, None] * dx[:, None, :] * bright[owner][:, None, None]
        target.add(canvas[channel], target.pixel_indices(site[owner], pixel, reach), patch)

    pairs = np.full(cells, 2)
    between = 0 * core_radius, 0.55 * core_radius
    spots(0, pairs, between, width=0.7 * scale, bright=0.6 * brightness["rna"])
    count = np.maximum(1, generator.poisson(values["spots"]))
    between = core_radius, 0.9 * radius
    spots(3, count, between, width=0.9 * scale, bright=3.2 * brightness["mito"] / count)
