"""Memory, traffic and time of streamed attention in each step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fulgurite.attention import Streamed
from fulgurite.attention.budget import format_bytes, parse_budget
from fulgurite.devices import read_clock
from fulgurite.logging import log_figure
from fulgurite.plotting import new_figure, use_integer_ticks

__all__ = ["AttentionMonitor"]

_MIB = 2**20


class AttentionMonitor(Callback):
    """Logs memory and traffic of attention by training step, and draws a timeline.

    Logged at every step: ``attention/calls``, ``attention/moved_mib`` (what the plans of the
    forward passes load and store) and ``attention/peak_mib`` (what the plan of the last call holds
    at once); ``memory/step_mib`` (most memory that the step took on the device: on a GPU what
    torch allocated, on the CPU the anonymous memory of the process at the end of the step) and
    ``time/step`` [s], for which a GPU is waited for before and after each step. Without
    :class:`~fulgurite.strategies.StreamCQSAStrategy` only the last two.

    Args:
        explain: Print the plan of the first step.
        figure: Draw the timeline when training ends.

    Source: inferred.
    """

    def __init__(self, explain: bool = True, figure: bool = True) -> None:
        self.explain, self.figure = explain, figure
        self.history: list[dict[str, float]] = []
        self._before = (0, 0)
        self._begun = 0.0

    def _backend(self, trainer: Trainer) -> Streamed | None:
        backend = getattr(trainer.strategy, "backend", None)
        return backend if isinstance(backend, Streamed) else None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the counters before the step."""
        if backend := self._backend(trainer):
            self._before = backend.calls, backend.moved_bytes
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._begun = read_clock(pl_module.device)

    def on_train_batch_end(  # noqa: PLR0917 (Lightning's hook)
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log memory, traffic and time of the step."""
        facts = {
            "time/step": read_clock(pl_module.device) - self._begun,
            "memory/step_mib": _memory(pl_module.device) / _MIB,
        }
        backend = self._backend(trainer)
        if backend and backend.plan:
            facts |= {
                "attention/calls": float(backend.calls - self._before[0]),
                "attention/moved_mib": (backend.moved_bytes - self._before[1]) / _MIB,
                "attention/peak_mib": backend.plan.peak_bytes / _MIB,
            }
            if self.explain and not self.history and trainer.is_global_zero:
                print(backend.plan.explain())
        pl_module.log_dict(facts, on_step=True, on_epoch=False, batch_size=1)
        self.history.append(facts)

    def state_dict(self) -> dict[str, Any]:
        """Return the history of the steps so far."""
        return {"history": [dict(facts) for facts in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the timeline of the run."""
        self.history = [dict(facts) for facts in state_dict["history"]]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw memory, traffic and time by step."""
        if not (self.figure and self.history and trainer.is_global_zero):
            return
        titles = {
            "memory/step_mib": "memory of a step [MiB]",
            "attention/peak_mib": "held by attention at once [MiB]",
            "attention/moved_mib": "loaded and stored by attention [MiB]",
            "time/step": "time of a step [s]",
        }
        keys = [key for key in titles if key in self.history[0]]
        figure, axes = new_figure(1, len(keys))
        for ax, key in zip(axes[0], keys, strict=True):
            ax.plot([facts[key] for facts in self.history])
            ax.set(title=titles[key], xlabel="step")
            use_integer_ticks(ax)
        backend = self._backend(trainer)
        if backend and backend.memory_budget is not None:
            budget = parse_budget(backend.memory_budget, pl_module.device) or 0
            ax = axes[0][keys.index("attention/peak_mib")]
            ax.axhline(budget / _MIB, color="#8C8C8C", linestyle="--")
            ax.annotate(
                f"budget {format_bytes(budget)}", (0, budget / _MIB), xytext=(2, -3),
                textcoords="offset points", va="top", fontsize=8,
            )  # fmt: skip
        for ax in axes[0]:
            ax.set_ylim(bottom=0)
        log_figure(trainer, "attention", figure)


def _memory(device: torch.device) -> int:
    """Most memory allocated on a GPU, or that of the process on the CPU [bytes]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
