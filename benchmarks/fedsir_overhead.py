"""What FedSIR costs over FedAvg, and where the time goes."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch

from benchmarks.harness import TakeTurns, report, spread

ROUNDS = 20
METHODS = "fulgurite.models.fedsir.methods"
spent: dict[str, float] = defaultdict(float)


def timed(owner: Any, name: str, key: str) -> None:
    """Book the time of a method under a key."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[key] += time.perf_counter() - begun

    setattr(owner, name, outer)


def fit(method: str) -> list[float]:
    """Seconds of each round of a fit on digits."""
    from fulgurite.cli import run

    TakeTurns.prepare = None
    spent.clear()
    method_option = [] if method == "FedSIR" else [f"--model.init_args.method={METHODS}.{method}"]
    with tempfile.TemporaryDirectory() as folder:
        run(
            [
                "fit",
                "--config=fedsir/digits.yaml",
                *method_option,
                f"--trainer.max_epochs={ROUNDS + 1}",
                "--trainer.callbacks+=benchmarks.harness.TakeTurns",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_checkpointing=false",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                "--trainer.accelerator=cpu",
                f"--run.root={folder}",
            ]
        )
    return TakeTurns.seconds["fit"]


def main() -> None:
    """Alternate fits of both methods, print and write the table."""
    torch.set_num_threads(1)
    from fulgurite.models.fedsir import federation
    from fulgurite.models.fedsir.methods import FedSIR, SpectralIdentification

    timed(SpectralIdentification, "__call__", "stage I (once, before round 0)")
    timed(FedSIR, "relabel_noisy_clients", "relabeling")
    timed(FedSIR, "weights", "DaAgg weights")
    timed(federation.Federation, "average", "averaging")
    frozen = federation.Federation.frozen

    def timed_teacher(fed: Any, state: Any) -> Any:
        network = frozen(fed, state)
        if not network._forward_hooks:
            begun = [0.0]
            network.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
            network.register_forward_hook(
                lambda *_: spent.__setitem__(
                    "KD teacher", spent["KD teacher"] + time.perf_counter() - begun[0]
                )
            )
        return network

    federation.Federation.frozen = timed_teacher  # type: ignore[method-assign]
    rounds: dict[str, list[float]] = {"FedAvg": [], "FedSIR": []}
    parts: list[dict[str, float]] = []
    for _ in range(2):
        for method, seconds in rounds.items():
            seconds += fit(method)
            if method == "FedSIR":
                parts.append(dict(spent))
    plain = statistics.median(rounds["FedAvg"])
    rows = [
        {
            "part": f"a round of {m}",
            "ms": spread([1e3 * s for s in t]),
            "of a FedAvg round": f"{statistics.mean(t) / statistics.mean(rounds['FedAvg']):.2f}",
        }
        for m, t in rounds.items()
    ]
    for part in parts[0]:
        once = part.startswith("stage I")
        seconds = [p[part] / (1 if once else ROUNDS + 1) for p in parts]
        ratio = statistics.median(seconds) / plain
        label = part if once else f"of FedSIR's round: {part}"
        rows.append(
            {
                "part": label,
                "ms": spread([1e3 * s for s in seconds]),
                "of a FedAvg round": f"{ratio:.2f}",
            }
        )
    raw = {"rounds": rounds, "parts": parts}
    report("fedsir_overhead", "FedSIR's cost over FedAvg", NOTES, rows, raw=raw)


NOTES = """
Digits, 10 clients, `fedsir/digits.yaml` without validation, on one core; two fits of each method in
turns. Rounds: median with quartiles, and the ratio of means (relabeling happens in every fourth
round only). Parts are means over all rounds.
"""

if __name__ == "__main__":
    main()
