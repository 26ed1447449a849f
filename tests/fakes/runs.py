"""What tests of any system do with runs of processes: wait for them, and read what they left."""

import time
from collections.abc import Callable
from pathlib import Path

import torch


def wait_until(
    condition: Callable[[], object], seconds: float = 60, explain: Callable[[], object] = str
) -> None:
    """Wait until a condition holds; the test fails where it does not in time.

    Args:
        condition: What is asked again and again.
        seconds: How long.
        explain: Says what the failure shows.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


def read_weights(run: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of a run, read without unpickling anything."""
    path = Path(run, "checkpoints", "last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]
