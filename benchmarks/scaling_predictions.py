"""What 8 and 64 devices would make of a step: a prediction from records, run by nobody."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness import RESULTS, report
from benchmarks.number_probing_backbones import BACKBONES, VOCABULARY
from fulgurite.layers.transformer import TransformerConfig
from fulgurite.models.number_probing import NumberLM
from fulgurite.models.number_probing.backbones import TransformerBackbone
from fulgurite.models.stream_cqsa import Decoder

RANKS = (8, 64)
GPU_FLOPS = 4e14  # [1/s] assumed, as in stream_predictions
NODE_BANDWIDTH, NETWORK_BANDWIDTH = 4.5e11, 5e10  # [B/s] assumed of a GPU: NVLink; 400 Gb/s
ETHERNET = 1.25e9  # [B/s] assumed of a machine: 10 Gb/s
SERVER = 1.25e8  # [B/s] assumed of a federation's server, each way: 1 Gb/s
#: Bytes that a rank sends in a step, in units of (n - 1)/n times those of the parameters.
PASSES = {"DDP": 2, "FSDP2": 3}


@dataclass(frozen=True)
class Training:
    """A training of which each rank takes the same batch.

    Args:
        label: What it is.
        parameters: Number of parameters, in float32.
        seconds: Of a step on one rank, which sends nothing.
        origin: Where the seconds are from.
        bandwidths: Of a rank among each of :data:`RANKS` [B/s].
    """

    label: str
    parameters: int
    seconds: float
    origin: str
    bandwidths: tuple[float, float]


def count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


def flops(
    parameters: int, tokens: int, length: int, config: TransformerConfig, *, recomputed: bool
) -> float:
    """Operations of a step: of the parameters, and of causal attention.

    Args:
        parameters: Number of parameters.
        tokens: In a step of a rank.
        length: Of a sequence.
        config: Sizes of the transformer.
        recomputed: Whether blocks are computed again in backward.
    """
    pairs = tokens * length / 2 * config.layers
    linear, attention = (8, 4.5) if recomputed else (6, 3.5)
    return linear * parameters * tokens + attention * 4 * config.width * pairs


def trainings() -> Iterator[Training]:
    """The language models: one that was measured on a core, two of the papers' size."""
    record = json.loads((RESULTS / "number_probing_backbones.json").read_text())
    small = NumberLM(BACKBONES["Transformer"](), vocab_size=VOCABULARY)
    seconds = statistics.median(record["text (16 x 256)"]["Transformer, step"])
    yield Training(
        "number_probing, width 128, 16 x 256 tokens, a core each", count(small), seconds,
        "measured", (ETHERNET, ETHERNET),
    )  # fmt: skip
    gpus = NODE_BANDWIDTH, NETWORK_BANDWIDTH
    with torch.device("meta"):
        backbone = TransformerBackbone(1024, layers=12, heads=16, kv_heads=4, hidden=3584)
        probed = NumberLM(backbone, vocab_size=128256)
        config = TransformerConfig(1024, layers=12, heads=16, kv_heads=4)
        streamed = Decoder(256, config)
    work = flops(count(probed), 32 * 1024, 1024, config, recomputed=False)
    yield Training(
        "number_probing/paper.yaml, 32 x 1,024 tokens, a GPU each", count(probed),
        work / GPU_FLOPS, "assumed", gpus,
    )  # fmt: skip
    work = flops(count(streamed), 2**20, 2**20, config, recomputed=True)
    yield Training(
        "stream_cqsa/paper.yaml, 1 x 1,048,576 tokens, a GPU each", count(streamed),
        work / GPU_FLOPS, "assumed", gpus,
    )  # fmt: skip


def training_rows() -> Iterator[dict[str, str]]:
    """A row for each training and way of dividing it."""
    for training in trainings():
        for way, passes in PASSES.items():
            row = {
                "training": training.label,
                "way": way,
                "parameters": f"{training.parameters:,}",
                "one rank [s]": f"{training.seconds:.3g}, {training.origin}",
            }
            for ranks, bandwidth in zip(RANKS, training.bandwidths, strict=True):
                sent = passes * (ranks - 1) / ranks * 4 * training.parameters
                total = training.seconds + sent / bandwidth
                row[f"{ranks} ranks [s]"] = f"{total:.3g}"
                row[f"of {ranks} times the speed"] = f"{100 * training.seconds / total:.1f} %"
            yield row


def federation_rows() -> Iterator[dict[str, str]]:
    """A row for each federation: a client on each rank, and a server that all of them talk to."""
    with (RESULTS.parents[1] / "results/fedsir/compare.csv").open() as file:
        run = next(row for row in csv.DictReader(file) if row["method"] == "fedavg")
    clients = float(run["fed/clients"])
    exchanges = float(run["cost/rounds"]) * clients
    sent = (float(run["cost/bytes_down"]) + float(run["cost/bytes_up"])) / 2 / exchanges
    record = json.loads((RESULTS / "fedsir_rounds.json").read_text())
    epoch = statistics.median(record["digits, DigitsNet"]["fit"]) / 10  # of its 10 clients
    yield _federation("fedsir on digits, an epoch of a client a round", sent, epoch)
    yield _federation("the exchange alone of ResNet-18's 11.2 million parameters", 4 * 11.2e6)


def _federation(label: str, size: float, seconds: float = 0.0) -> dict[str, str]:
    """A row of a federation whose clients exchange so many bytes each way."""
    row = {
        "training": label, "way": "rounds", "parameters": f"{size / 4:,.0f}",
        "one rank [s]": f"{seconds:.3g}, measured" if seconds else "left out",
    }  # fmt: skip
    for ranks in RANKS:
        total = seconds + 2 * ranks * size / SERVER
        row[f"{ranks} ranks [s]"] = f"{total:.3g}"
        row[f"of {ranks} times the speed"] = f"{100 * seconds / total:.1f} %" if seconds else "–"
    return row


def main() -> None:
    """Write the table."""
    raw: dict[str, Any] = {
        "GPU_FLOPS": GPU_FLOPS, "NODE_BANDWIDTH": NODE_BANDWIDTH,
        "NETWORK_BANDWIDTH": NETWORK_BANDWIDTH, "ETHERNET": ETHERNET, "SERVER": SERVER,
    }  # fmt: skip
    report(
        "scaling_predictions",
        "Predicted, not measured: 8 and 64 ranks",
        f"""
Nothing here was run. Seconds of a step = seconds of one rank + bytes that a rank sends / bandwidth,
with nothing hidden behind the computation. Each rank has the batch of one. With P parameters in
float32 and n ranks a rank sends 2 (n - 1)/n 4P bytes in a step with DDP (all-reduce of gradients)
and 3 (n - 1)/n 4P with FSDP2 (parameters are gathered twice, gradients scattered once); a
federation's server sends and takes 4P bytes for each of n clients in a round.

Measured: a step of the small model on one core (`number_probing_backbones.json`), a client's epoch
on digits (`fedsir_rounds.json`, a tenth of a round of 10 clients) and its bytes
(`results/fedsir/compare.csv`). Assumed: {GPU_FLOPS:.0e} operations per second of a GPU (6 for each
parameter and token, or 8 with blocks computed again, and those of causal attention),
{NODE_BANDWIDTH:.1e} B/s of each among 8 of a machine and {NETWORK_BANDWIDTH:.0e} B/s among 64,
{ETHERNET:.2e} B/s of each core's machine, {SERVER:.2e} B/s of the server in each direction.
""",
        [*training_rows(), *federation_rows()],
        raw=raw,
    )


if __name__ == "__main__":
    main()
