"""Rounds per second of FedAvg: this engine, a plain PyTorch loop, pfl and Flower's simulation.

Engine, loops and pfl, if it is installed, take turns round by round, in one process, on one core.
Flower gets one core for its clients too, beside its own processes, and is run if ``flwr`` is
installed here or ``FULGURITE_FLOWER_PYTHON`` names a Python that has it (and this package: ``pip
install --no-deps .``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import TakeTurns, ratios, report, spread
from benchmarks.pfl_fedavg import PflFedAvg, check_first_round
from benchmarks.plain_fedavg import PlainFedAvg, Problem

ALONE = ("fit, vectorized", "fit, with validation and checkpoints", "flower")


def fit(arguments: list[str], prepare: Callable[[Any], dict[str, Callable[[], Any]]]) -> None:
    """``fulgurite fit`` with other contestants between its rounds."""
    from fulgurite.cli import run

    TakeTurns.prepare = prepare
    with tempfile.TemporaryDirectory() as folder:
        run(
            [
                "fit",
                "--config=fedsir/digits.yaml",
                "--model.init_args.method=fulgurite.models.fedsir.methods.FedAvg",
                "--trainer.callbacks+=benchmarks.harness.TakeTurns",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                "--trainer.accelerator=cpu",
                f"--run.root={folder}",
                *arguments,
            ]
        )


def measure(
    arguments: list[str], rounds: int, *, pad: int, flip: bool, group: int = 10
) -> dict[str, list[float]]:
    """Seconds per round of each contestant."""
    problem_file = Path(tempfile.mkdtemp()) / "problem.pt"

    def prepare(trainer: Any) -> dict[str, Callable[[], Any]]:
        problem = Problem.of(trainer, pad, flip, lr=1e-3, weight_decay=5e-4, fused=True)
        model = trainer.lightning_module.network
        torch.save((model, problem), problem_file)
        contestants: dict[str, Callable[[], Any]] = {
            "loop": PlainFedAvg(model, problem).round,
            "tensor loop": PlainFedAvg(model, problem, loader=False).round,
        }
        if importlib.util.find_spec("pfl"):
            check_first_round(model, problem)
            contestants["pfl"] = PflFedAvg(model, problem).round
        else:
            print("pfl: skipped, it is not installed (see pfl_fedavg.py).", file=sys.stderr)
        return contestants

    lean = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    fit([f"--trainer.max_epochs={rounds + 2}", *lean, *arguments], prepare)
    seconds = dict(TakeTurns.seconds)
    short = f"--trainer.max_epochs={max(rounds // 2, 3) + 2}"
    for name, more in zip(
        ALONE, ([*lean, f"--model.init_args.local.vectorize={group}"], []), strict=False
    ):
        fit([short, *arguments, *more], lambda trainer: {})
        seconds[name] = TakeTurns.seconds["fit"]
    if flower := flower_python():
        seconds["flower"] = run_flower(flower, problem_file, max(4, rounds // 3))
    return seconds


def flower_python() -> str | None:
    """A Python with Flower, or None."""
    if named := os.environ.get("FULGURITE_FLOWER_PYTHON"):
        return named
    if importlib.util.find_spec("flwr") and importlib.util.find_spec("ray"):
        return sys.executable
    print(
        "flower: skipped, flwr is not installed. Install fulgurite[bench], or name a Python that "
        "has flwr[simulation] in FULGURITE_FLOWER_PYTHON.",
        file=sys.stderr,
    )
    return None


def run_flower(python: str, problem: Path, rounds: int) -> list[float]:
    """Seconds of Flower's rounds but the first."""
    done = subprocess.run(
        [python, "-m", "benchmarks.flower_fedavg", str(problem), str(rounds + 1), "1"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("SECONDS ")), None)
    if line is None:
        print("flower: failed\n" + done.stderr[-2000:], file=sys.stderr)
        return []
    return list(json.loads(line.removeprefix("SECONDS ")))[1:]


def main() -> None:
    """Measure both settings, print and write the table."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, number in (("train", 2000), ("test", 100)):
        arrays[f"{split}_images"] = random.integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(number) % 10
    np.savez(folder / "random.npz", **arrays)
    cifar = [
        "--data.init_args.source=fulgurite.datamodules.fedsir.Npz",
        f"--data.init_args.source.init_args.path={folder / 'random.npz'}",
        "--data.init_args.images.augment=crop_flip",
        "--model.init_args.network=fulgurite.models.fedsir.network.SmallCNN",
        "--model.init_args.network.init_args.width=16",
    ]
    small = [
        "--data.init_args.source.init_args.copies=1",
        "--data.init_args.partition=fulgurite.datamodules.fedsir.Iid",
        "--data.init_args.clients=100",
        "--model.init_args.local.batch_size=8",
        "--model.init_args.network=fulgurite.models.fedsir.network.SmallCNN",
        "--model.init_args.network.init_args.width=16",
    ]
    settings = {
        "digits, DigitsNet": measure([], 12, pad=1, flip=False),
        "32×32 RGB, SmallCNN(16)": measure(cifar, 6, pad=4, flip=True),
        "digits, 100 clients, SmallCNN(16), B = 8": measure(small, 8, pad=1, flip=False, group=50),
    }
    rows = []
    for name, seconds in settings.items():
        for contestant, times in seconds.items():
            if not times:
                continue
            alone = contestant in ALONE
            paired = (
                [statistics.median(times) / statistics.median(seconds["fit"])]
                if alone
                else ratios(times, seconds["fit"])
            )
            rows.append(
                {
                    "setting": name,
                    "contestant": {"fit": "`fulgurite fit`"}.get(contestant, contestant),
                    "rounds": str(len(times)),
                    "rounds/s": spread([1 / t for t in times]),
                    "time, `fit` = 1": spread(paired),
                }
            )
    report("fedsir_rounds", "FedAvg: rounds per second", NOTES, rows, raw=settings)


NOTES = """
10 clients and batches of 64 unless said, one local epoch, fused Adam, one core; medians with
quartiles over steady rounds. The last column is a contestant's time per round in units of
`fulgurite fit`'s: above 1 it is slower. `fulgurite fit` is the command as a user runs it, with its
CSV log, without validation. `loop` has a DataLoader per client, deep copies of models and state
dicts and per-image augmentation. `tensor loop` is the hardest opponent: the same on resident
tensors with batched augmentation. `pfl` is Apple's pfl-research with the batches of
`tensor loop`, whose first round it repeats to rounding. All these take turns round by round in one
process and are compared turn by turn; the others run alone afterwards and are compared by medians.
`fit, vectorized` trains 10 (of 100: 50) clients in one pass. Flower (`flwr[simulation]` on Ray)
runs the same clients with the code of `loop`, one at a time; its own processes may use a second
core.
"""

if __name__ == "__main__":
    main()
