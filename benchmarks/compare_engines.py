"""Cells per minute of ``fulgurite compare``: two processes of this machine against Ray.

Both engines run the same short trainings, each comparison from an empty folder and as a command of
its own; what a cluster costs to start is part of its time. Their tables must be equal to the byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import rate_rows, report

CELLS, TURNS = 8, 2
COMPARISON = f"""\
title: Engines
config: fedsir/smoke.yaml
metric: test/acc
mode: max
baseline: fedavg
after_fit: test
methods:
  fedavg:
    label: FedAvg
    args: {{model.init_args.method: fulgurite.models.fedsir.methods.FedAvg}}
seeds: {list(range(CELLS))}
seed_keys: [seed_everything, data.init_args.seed]
"""


def run_comparison(file: Path, out: Path, *options: str) -> float:
    """Run a comparison in two processes, and return how long it took [s].

    Raises:
        RuntimeError: It failed.
    """
    command = Path(sys.executable).parent / "fulgurite"
    begun = time.perf_counter()
    done = subprocess.run(
        [str(command), "compare", str(file), f"--out={out}", "--workers=2", *options],
        capture_output=True, text=True, check=False, cwd=file.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - begun


def read_results(out: Path) -> list[list[str]]:
    """Read the table of a comparison without its times."""
    lines = [line.split(",") for line in (out / "table.csv").read_text().splitlines()]
    results = [i for i, name in enumerate(lines[0]) if name != "seconds"]
    return [[line[i] for i in results] for line in lines]


def main() -> None:
    """Measure both engines in turns, and write the report.

    Raises:
        RuntimeError: Their tables differ.
    """
    seconds: dict[str, list[float]] = {"pool": [], "ray": []}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "engines.yaml"
        file.write_text(COMPARISON)
        tables = []
        for turn in range(TURNS):
            for engine, times in seconds.items():
                out = Path(temporary) / f"{engine}{turn}"
                times.append(run_comparison(file, out, f"--engine={engine}"))
                tables.append(read_results(out))
    if any(table != tables[0] for table in tables):
        raise RuntimeError("The engines' tables differ.")
    named = {f"`--engine {engine}`": times for engine, times in seconds.items()}
    rows = rate_rows(named, "engine", amount=CELLS, things="cells", reference="pool")
    notes = (
        f"{CELLS} trainings and tests of `fedsir/smoke.yaml` in two processes, from an empty "
        "folder, start of the command and of Ray's own cluster included; both tables are equal."
    )
    report("compare_engines", "Engines of a comparison", notes, rows, raw=seconds)


if __name__ == "__main__":
    main()
