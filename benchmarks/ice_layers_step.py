"""Ice layers: time of a training step with each backend of the spatial encoder.

``python -m benchmarks ice_layers_step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import ratios, report, spread, take_turns
from fulgurite.models.ice_layers import (
    CompletionNet,
    SpatialOptions,
    Track,
    TransformerOptions,
    masked_robust_loss,
)

LAYERS, TRACES, WIDTH, PHYSICS = 20, 256, 64, 5
CONTESTANTS: dict[str, dict[str, Any]] = {
    "full, pyg": {"graph": "full", "backend": "pyg"},
    "full, dense": {"graph": "full", "backend": "dense"},
    "full, closed": {"graph": "full", "backend": "closed"},
    "knn 8, pyg": {"graph": "knn", "neighbours": 8, "backend": "pyg"},
    "knn 8, dense": {"graph": "knn", "neighbours": 8, "backend": "dense"},
    "inverse, dense": {"graph": "inverse", "backend": "dense"},
    "none": {"graph": "none"},
    "knn 8, dense, 2 blocks of attention by distance": {
        "graph": "knn", "neighbours": 8, "attention": 2,
    },
}  # fmt: skip


def stepper(stacks: int, options: dict[str, Any]) -> Callable[[], None]:
    """Forward, backward and an AdamW step on random stacks."""
    g = torch.Generator().manual_seed(0)
    n = stacks * TRACES
    track = Track.of([TRACES] * stacks)
    distance = 50.0 * track.offset
    pos = torch.stack([70 + distance / 111_195, -40.0 + 0.1 * track.stack], 1).double()
    thickness = torch.randn(n, LAYERS, generator=g)
    visible = torch.rand(n, LAYERS, generator=g) < 0.6
    physics = torch.randn(n, LAYERS, PHYSICS, generator=g)
    network = CompletionNet(
        LAYERS,
        PHYSICS,
        width=WIDTH,
        spatial=SpatialOptions(**{k: v for k, v in options.items() if k != "attention"}),
        transformer=TransformerOptions(attention=options.get("attention", 0)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        out = network(
            thickness, visible, physics, pos.float(), pos, distance, Track.of(track.sizes)
        )
        loss = masked_robust_loss(out, thickness, visible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    rows, raw = [], {}
    for stacks, repetitions in ((1, 5), (4, 3)):
        contestants = {name: stepper(stacks, options) for name, options in CONTESTANTS.items()}
        seconds = take_turns(contestants, repetitions)
        raw[f"{stacks} stacks"] = seconds
        for name, values in seconds.items():
            rows.append(
                {
                    "graph and backend": name,
                    "stacks": str(stacks),
                    "step [ms]": spread([1000 * s for s in values]),
                    "full graph by PyG / this": spread(ratios(seconds["full, pyg"], values)),
                }
            )
    report(
        "ice_layers_step",
        "Ice layers: time of a training step",
        f"Forward, backward and AdamW, one thread; L = {LAYERS}, N = {TRACES}, d = {WIDTH}, 2 SAGE "
        "and 2 transformer layers; median and quartiles. Backends give equal results (tests).",
        rows,
        raw=raw,
    )


if __name__ == "__main__":
    main()
