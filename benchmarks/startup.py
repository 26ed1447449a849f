"""Time until the command line answers, and until ``fulgurite fit`` takes its first step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import report, spread

COMMANDS = {
    "`fulgurite --help`": ["--help"],
    "`fulgurite systems`": ["systems"],
    "`fulgurite fit` to the first local step": [
        "fit",
        "--config=fedsir/digits.yaml",
        "--model.init_args.method=fulgurite.models.fedsir.methods.FedAvg",
        "--trainer.callbacks+=benchmarks.harness.ExitAtFirstStep",
        "--trainer.accelerator=cpu",
    ],
}


def seconds(arguments: list[str], bytecode: Path) -> float:
    """Wall time of a process that reads and writes its bytecode in a folder."""
    script = shutil.which("fulgurite", path=str(Path(sys.executable).parent))
    command = [script] if script else [sys.executable, "-m", "fulgurite"]
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        if arguments[0] == "fit":
            arguments = [*arguments, f"--run.root={folder}"]
        begun = time.perf_counter()
        subprocess.run(
            [*command, *arguments],
            check=True,
            capture_output=True,
            env=inherited
            | {
                "PYTHONPYCACHEPREFIX": str(bytecode),
                "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
                "OMP_NUM_THREADS": "1",
            },
        )
        return time.perf_counter() - begun


def main() -> None:
    """Measure, print and write the table."""
    rows, raw = [], {}
    for name, arguments in COMMANDS.items():
        first, later = [], []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as bytecode:
                first.append(seconds(arguments, Path(bytecode)))
                later += [seconds(arguments, Path(bytecode)) for _ in range(3)]
        raw[name] = {"first": first, "later": later}
        rows.append({"command": name, "first [s]": spread(first), "later [s]": spread(later)})
    report("startup", "Start-up", NOTES, rows, raw=raw)


NOTES = """
Wall time of the whole process. `first`: no compiled bytecode yet, as right after installation;
`later`: with bytecode. Files are in the operating system's cache in both.
"""

if __name__ == "__main__":
    main()
