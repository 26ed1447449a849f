"""The processes of a run on several ranks: which one this is, and none left behind."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def is_first_process() -> bool:
    """Whether this is the process of rank 0, also before there is a process group."""
    return not any(
        int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    )


def end_launched_ranks(trainer: Trainer, patience: float = 5.0) -> None:
    """End the ranks that this process has launched, which wait for it in vain after an error.

    Lightning ends them at Ctrl-C and when one of them fails, but not when rank 0 alone fails.

    Args:
        trainer: Whose strategy launched them.
        patience: How long they may take to end by themselves [s].
    """
    # here, since the commands that train nothing start without Lightning
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    processes = [*launcher.procs]
    launcher.procs.clear()  # Lightning's observer of the list would kill this process too
    for process in processes:
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
