"""Tokens per second of each backbone: a training step of NumberLM, and what a step is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import report, spread
from fulgurite.models.number_probing.backbones import (
    GatedDeltaNetBackbone,
    LSTMBackbone,
    Mamba2Backbone,
    TransformerBackbone,
)
from fulgurite.models.number_probing.language_models.losses import token_losses
from fulgurite.models.number_probing.language_models.module import NumberLM
from fulgurite.models.number_probing.language_models.optimizer import MuonAdamW, parameter_groups

WIDTH, VOCABULARY = 128, 1024
BACKBONES: dict[str, Callable[[], Any]] = {
    "Transformer": lambda: TransformerBackbone(WIDTH, 2, 4, kv_heads=2),
    "LSTM": lambda: LSTMBackbone(WIDTH, 2),
    "Gated DeltaNet": lambda: GatedDeltaNetBackbone(WIDTH, 2, 4),
    "Mamba-2": lambda: Mamba2Backbone(WIDTH, 4, head_size=32, state_size=32),
}
SHAPES = {"addition (512 x 7)": (512, 7), "text (16 x 256)": (16, 256)}
REPETITIONS = 5


def step(make: Callable[[], Any], shape: tuple[int, int], packed: bool) -> Callable[[], None]:
    """A training step with Muon and AdamW."""
    torch.manual_seed(0)
    model = NumberLM(make(), vocab_size=VOCABULARY)
    optimizer = MuonAdamW(parameter_groups(model, model.backbone))
    tokens = torch.randint(VOCABULARY, shape)
    documents = torch.arange(shape[1]).div(8, rounding_mode="floor").expand(shape)

    def run() -> None:
        hidden = model.hidden(tokens, documents if packed else None)
        losses, _ = token_losses(hidden, model.head_weight, tokens, 1 << 14)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    return run


def forward(make: Callable[[], Any], shape: tuple[int, int]) -> Callable[[], None]:
    """The backbone alone, without gradients."""
    backbone, x = make(), torch.randn(*shape, WIDTH)

    def run() -> None:
        with torch.no_grad():
            backbone(x)

    return run


def take_turns(contestants: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Processor seconds of each, all run once before: other processes must not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(REPETITIONS + 1):
        for name, run in contestants.items():
            begun = time.process_time()
            run()
            if repetition:
                seconds[name].append(time.process_time() - begun)
    return seconds


def main() -> None:
    """Let the backbones take turns, print and write the table."""
    torch.set_num_threads(1)
    rows, raw = [], {}
    for label, shape in SHAPES.items():
        contestants = {
            f"{name}, step": step(make, shape, False) for name, make in BACKBONES.items()
        }
        if shape[1] > 8:
            packed = {f"{n}, packed": step(make, shape, True) for n, make in BACKBONES.items()}
            contestants |= packed
        contestants |= {f"{n}, forward": forward(make, shape) for n, make in BACKBONES.items()}
        seconds = take_turns(contestants)
        raw[label] = seconds
        for name, make in BACKBONES.items():
            speeds = {
                part: spread([shape[0] * shape[1] / s / 1e3 for s in seconds[f"{name}, {part}"]])
                if f"{name}, {part}" in seconds
                else ""
                for part in ("step", "packed", "forward")
            }
            count = sum(p.numel() for p in make().parameters())
            rows.append(
                {
                    "data": label,
                    "backbone": name,
                    "parameters": f"{count:,}",
                    "training [1000 tokens/s]": speeds["step"],
                    "documents of 8 [1000 tokens/s]": speeds["packed"],
                    "forward [1000 tokens/s]": speeds["forward"],
                }
            )
    title = "Backbones of number_probing on one core"
    report("number_probing_backbones", title, NOTES, rows, raw=raw)


NOTES = """
Width 128, two blocks (Mamba-2: four without further layers), 1,024 tokens in the vocabulary, tied
embeddings, float32. Training: forward, loss, backward and a step of MuonAdamW; forward: the
backbone alone. Seconds are the processor's. Median with quartiles of five turns, in which all
backbones follow each other. "Documents of 8": pieces of eight tokens that do not see each other.
"""

if __name__ == "__main__":
    main()
