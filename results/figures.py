"""Draw the figures of pages that are made from records: ``python results/figures.py``.

Other figures of ``docs/`` are the ``figure.png`` of a comparison or of a run.
"""

from __future__ import annotations

import re
from pathlib import Path

from tables import ROOT, read_record

from fulgurite.plotting import new_figure, save_figure

_UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30}


def read_bytes(text: str) -> float:
    """Read a number of bytes as benchmarks print it, such as ``1.5 MiB``.

    Raises:
        ValueError: The text is no number of bytes.
    """
    if not (match := re.fullmatch(r"([\d.]+) (B|KiB|MiB|GiB)", text)):
        raise ValueError(f"{text!r} is no number of bytes")
    return float(match[1]) * 2 ** _UNITS[match[2]]


def draw_stream_memory(file: Path) -> None:
    """Draw the memory of streamed attention against the length of the sequence.

    Args:
        file: PNG to write.
    """
    rows = read_record(ROOT / "benchmarks" / "results" / "stream_memory.md")
    lengths = [int(row["N"]) for row in rows]
    figure, axes = new_figure(width=6.2, height=3.6)
    ax = axes[0, 0]
    curves = {
        "Q, K, V and out": "o-",
        "growth of anonymous memory": "s-",
        "planned peak": "^-",
        "budget": "k--",
    }
    for name, style in curves.items():
        ax.plot(lengths, [read_bytes(row[name]) / 2**20 for row in rows], style, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.set_yticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    ax.minorticks_off()
    ax.set(xlabel="tokens N", ylabel="memory [MiB]", title="Exact attention in a budget of 1 MiB")
    ax.legend(frameon=False)
    save_figure(figure, file)


def main() -> None:
    """Draw all figures into ``docs/``."""
    draw_stream_memory(ROOT / "docs" / "stream_cqsa_memory.png")


if __name__ == "__main__":
    main()
