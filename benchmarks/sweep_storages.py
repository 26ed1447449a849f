"""Trials per minute of ``fulgurite sweep``: two workers of one command, two commands, PostgreSQL.

The same grid of short trainings, each sweep from an empty folder. Two commands share the storage as
two machines would; what the commands cost to start is part of their time. Every sweep must have
run each point once, with the same values.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import rate_rows, report
from fulgurite.testing.postgresql import run_postgresql

TURNS = 2
RATES, NOISE = (0.001, 0.002, 0.003, 0.004), (0.3, 0.7)
TRIALS = len(RATES) * len(NOISE)
SWEEP = f"""\
method: grid
metric: {{name: val/acc, goal: maximize}}
command: ["${{env}}", fulgurite, fit, --config, fedsir/smoke.yaml, "${{args}}"]
parameters:
  model.init_args.optimizer.init_args.lr: {{values: {list(RATES)}}}
  data.init_args.noise.init_args.rate: {{values: {list(NOISE)}}}
"""


def run_sweep(folder: Path, commands: int, storage: str) -> tuple[float, list[tuple[str, ...]]]:
    """Run a sweep by one command of two workers, or by two commands of one.

    Args:
        folder: An empty folder.
        commands: 1 or 2.
        storage: Address of the database.

    Returns:
        How long it took [s], and the points with their values, sorted.

    Raises:
        RuntimeError: A command failed, or a point is missing.
    """
    folder.mkdir()
    (folder / "grid.yaml").write_text(SWEEP)
    command = [str(Path(sys.executable).parent / "fulgurite"), "sweep", "grid.yaml"]
    options = [f"--storage={storage}", f"--name={folder.name}", f"--workers={2 // commands}"]
    begun = time.perf_counter()
    processes = [
        subprocess.Popen(
            [*command, *options, f"--out=out{number}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for number in range(commands)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    seconds = time.perf_counter() - begun
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(output[-2000:] for output in outputs))
    with (folder / "out0" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name == "val/acc" or name.endswith((".lr", ".rate"))]
    results = sorted(tuple(row[name] for name in columns) for row in rows)
    if len(set(results)) != TRIALS or len(rows) != TRIALS:
        raise RuntimeError(f"{folder.name} has {len(rows)} trials, not {TRIALS} different ones.")
    return seconds, results


def main() -> None:
    """Measure the storages in turns, and write the report.

    Raises:
        RuntimeError: Two sweeps differ.
    """
    contestants = {
        "one command, two workers, SQLite": (1, "sqlite"),
        "one command, two workers, PostgreSQL": (1, "postgresql"),
        "two commands, a worker each, PostgreSQL": (2, "postgresql"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    all_results = []
    with tempfile.TemporaryDirectory() as temporary, run_postgresql() as postgresql:
        for turn in range(TURNS):
            for number, (name, (commands, kind)) in enumerate(contestants.items()):
                folder = Path(temporary) / f"sweep{number}{turn}"
                file = Path(temporary) / f"{folder.name}.db"
                storage = postgresql if kind == "postgresql" else f"sqlite:///{file}"
                taken, results = run_sweep(folder, commands, storage)
                seconds[name].append(taken)
                all_results.append(results)
    if any(results != all_results[0] for results in all_results):
        raise RuntimeError("The sweeps' values differ.")
    rows = rate_rows(seconds, "sweep", amount=TRIALS, things="trials", reference="first")
    notes = (
        f"A grid of {TRIALS} trainings of `fedsir/smoke.yaml`, two at a time, from an empty "
        "folder, start of the commands included; all have the same values at the same points."
    )
    report("sweep_storages", "Storages of a sweep", notes, rows, raw=seconds)


if __name__ == "__main__":
    main()
