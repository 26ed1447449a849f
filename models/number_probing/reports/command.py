"""``fulgurite probe SOURCE``: what a saved table of number embeddings encodes."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fulgurite import plotting
from fulgurite.commands import check_filled
from fulgurite.errors import ConfigError
from fulgurite.io import write_text
from fulgurite.models.number_probing.probes.controls import gaussian, row_shuffled
from fulgurite.models.number_probing.probes.probing import ClassifierOptions, probe
from fulgurite.models.number_probing.reports.options import OneLineParser, parse_integers
from fulgurite.models.number_probing.reports.report import (
    ProbeSettings,
    kappa_figure,
    measure,
    spectrum_figure,
    to_csv,
    to_markdown,
)
from fulgurite.models.number_probing.spectra.fourier import LOWEST, PERIODS, spectrum
from fulgurite.models.number_probing.tables import NumberTable, parse_numbers, read_table
from fulgurite.models.number_probing.tables.checks import describe_numbers

__all__ = ["main"]

_COLUMNS = (
    "period", "kappa", "kappa_nonround", "kappa_decade", "kappa_contiguous", "kappa_permuted",
    "train_kappa", "band", "local_ratio", "phi", "eta2", "cond", "fisher", "verdict",
)  # fmt: skip


def _make_parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="fulgurite probe",
        description="At which periods are numbers encoded in a table of embeddings, can n mod T be "
        "read off linearly, and do parity or roundness explain it?",
    )
    add = p.add_argument
    add("source", help="glove, minilm, a checkpoint folder, a .npy, .txt or .vec file")
    add("--numbers", help="e.g. 0:1000; by default 0 to the first gap, at most 1000 numbers")
    add("--periods", default=",".join(map(str, PERIODS)), help="default: %(default)s")
    add("--method", choices=("lda", "logistic"), default="lda", help="default: %(default)s")
    add("--folds", type=int, default=5, help="of the cross-validation; default: %(default)s")
    add("--seeds", type=int, default=2, help="ways to deal the folds; default: %(default)s")
    add("--permuted", type=int, default=1, help="permutations probed; 8 or more give the null band")
    add("--pca", type=int, default=50, help="components for Fisher values; default: %(default)s")
    add("--ridge", type=float, default=0.0, help="added to S_W; default: %(default)s")
    add("--words", help="of a .npy file: the word of each row, one a line")
    add("--tensor", help="of a checkpoint: name of the embedding")
    add(
        "--spelling", choices=("auto", "bare", "spaced"), default="auto",
        help="of a checkpoint, or with --words: '7' or ' 7'",
    )  # fmt: skip
    add("--out", help="folder of the report; default: runs/number_probing/probe-NAME/TIME")
    return p


def _probe_controls(table: NumberTable, settings: ProbeSettings) -> list[dict[str, Any]]:
    """Probe controls without periods, and the frequency rank alone where the table has it."""
    controls = {
        "rows shuffled": row_shuffled(table.embeddings),
        "random": gaussian(table.embeddings),
    }
    if table.rank is not None:
        controls["log rank"] = (table.rank.double() + 1).log()[:, None]
    rows = []
    for name, x in controls.items():
        results = probe(
            x, settings.periods, numbers=table.numbers, folds=settings.fold_options(),
            classifier=ClassifierOptions(settings.method), nonround=False, allow_duplicates=True,
        )  # fmt: skip
        control_spectrum = spectrum(x, table.numbers, allow_duplicates=True)
        # a drift over n is no line
        lines = control_spectrum.normalised[control_spectrum.frequency >= LOWEST]
        rows.append(
            {"control": name, "max magnitude": float(lines.max())}
            | {f"kappa_{t}": result.kappa for t, result in results.items()}
        )
    return rows


def main(argv: list[str]) -> int:
    """Probe a table, print the report, and write it to a folder.

    The folder gets ``report.json``, ``probe.csv``, ``controls.csv`` and ``figures/``.

    Args:
        argv: The command line after ``fulgurite probe``.

    Returns:
        0.

    Raises:
        FulguriteError: The table or an option is invalid.
    """
    check_filled(argv)
    args = _make_parser().parse_args(argv)
    settings = ProbeSettings(
        tuple(parse_integers(args.periods, "--periods")), args.method, args.folds, args.seeds,
        permuted=args.permuted, pca=args.pca, ridge=args.ridge,
    )  # fmt: skip
    numbers = parse_numbers(args.numbers) if args.numbers else None
    table = read_table(
        args.source, numbers, words=args.words, tensor=args.tensor, spelling=args.spelling
    )
    folder = Path(
        args.out or f"runs/number_probing/probe-{table.source}/{time.strftime('%Y%m%d-%H%M%S')}"
    )
    if (folder / "report.json").exists():
        raise ConfigError(f"--out {folder} already holds a report.", "Name another folder.")
    begun = time.perf_counter()
    report = measure(table.embeddings, table.numbers, settings)
    controls = _probe_controls(table, settings)
    seconds = time.perf_counter() - begun
    note = f" ({table.note})" if table.note else ""
    print(
        f"{table.source}: {report.size} numbers, {table.numbers[0]} to {table.numbers[-1]}, "
        f"{report.width} dimensions{note}\n"
    )
    print(to_markdown(report.rows, _COLUMNS), end="\n\n")
    for sentence in report.notes:
        print(sentence, end="\n\n")
    print(to_markdown(controls, list(controls[0])), end="\n\n")
    print(f"verdict: {report.diagnosis.verdict}")
    for reason in report.diagnosis.reasons:
        print(f"  {reason}")
    _write_report(folder, {
        "source": table.source,
        "note": table.note,
        "numbers": describe_numbers(table.numbers, 2),
        "size": report.size,
        "width": report.width,
        "seconds": round(seconds, 3),
        "settings": asdict(settings),
        "verdict": report.diagnosis.verdict,
        "reasons": report.diagnosis.reasons,
        "notes": report.notes,
        "rows": report.rows,
        "controls": controls,
        "spectrum": {
            "frequency": report.spectrum.frequency.tolist(),
            "magnitude": report.spectrum.magnitude.tolist(),
        },
    })  # fmt: skip
    for name, figure in {
        "spectrum": spectrum_figure(report.spectrum, settings.periods, table.source),
        "kappa": kappa_figure(report.rows, f"κ, {table.source}"),
    }.items():
        plotting.save_figure(figure, folder / "figures" / f"{name}.png")
    print(f"\nprobe: recorded in {folder} ({seconds:.1f} s)")
    return 0


def _write_report(folder: Path, content: dict[str, Any]) -> None:
    for name, text in {
        "probe.csv": to_csv(content["rows"]),
        "controls.csv": to_csv(content["controls"]),
        "report.json": json.dumps(content, indent=2) + "\n",
    }.items():
        write_text(folder / name, text)
