"""A hundred small clients trained in one pass, against one after the other."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import ratios, report, spread, take_turns
from benchmarks.plain_fedavg import PlainFedAvg, Problem
from fulgurite.datamodules.fedsir import Digits, Dirichlet, FederatedDataModule, Iid, Npz
from fulgurite.datamodules.fedsir.options import ImageOptions
from fulgurite.models.fedsir.federation import Federation, LogitLoss
from fulgurite.models.fedsir.network import DigitsNet, SmallCNN

CLIENTS = 100
ADAM = {"lr": 1e-3, "fused": True}


def digits(copies: int, alpha: float | None = None) -> FederatedDataModule:
    """Scikit-learn's digits dealt to many clients."""
    partition = Dirichlet(alpha) if alpha else Iid()
    return FederatedDataModule(
        Digits(copies), partition, clients=CLIENTS, images=ImageOptions("shift")
    )


def random_images(size: int, number: int) -> FederatedDataModule:
    """Random RGB images: the time does not depend on what they show."""
    import tempfile

    random = np.random.default_rng(0)
    shape = (number, 3, size, size)
    file = f"{tempfile.mkdtemp()}/random.npz"
    images, labels = random.integers(0, 256, shape, dtype=np.uint8), np.arange(number) % 10
    np.savez(
        file, train_images=images, train_labels=labels,
        test_images=images[:10], test_labels=labels[:10],
    )  # fmt: skip
    return FederatedDataModule(Npz(file), Iid(), clients=CLIENTS, images=ImageOptions("crop_flip"))


def measure(
    data: FederatedDataModule, network: nn.Module, batch_size: int, *, group: int, repetitions: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds per round of each contestant, and the largest difference between the results."""
    data.setup()
    federations = {
        name: Federation(
            data, copy.deepcopy(network), partial(torch.optim.Adam, **ADAM),
            batch_size=batch_size, vectorize=vectorize,
        )
        for name, vectorize in (("engine loop", 0), ("one pass", group))
    }  # fmt: skip
    results: dict[str, dict[int, Any]] = {}

    def train(name: str) -> None:
        fed = federations[name]
        results[name] = fed.train_local(range(CLIENTS), lambda client: LogitLoss(), purpose=0)
        fed.average(results[name], fed.size_weights(range(CLIENTS)))

    padding = {"shift": 1, "crop_flip": 4}[data.image_options.augment]
    model = SimpleNamespace(local=SimpleNamespace(batch_size=batch_size))
    trainer = SimpleNamespace(datamodule=data, lightning_module=model)
    problem = Problem.of(trainer, padding, data.image_options.augment == "crop_flip", **ADAM)
    contestants = {name: partial(train, name) for name in federations}
    contestants["plain loop"] = PlainFedAvg(network, problem).round
    seconds = take_turns(contestants, repetitions)
    one, other = results["engine loop"], results["one pass"]
    return seconds, max(float((one[k] - other[k]).abs().max()) for k in one)


def main() -> None:
    """Measure all settings, print and write the table."""
    torch.set_num_threads(1)
    settings = {
        "SmallCNN(16), 8×8, 13 images each, B = 8": (digits(1), SmallCNN(1, 10, 16), 8, 50),
        "SmallCNN(32), 8×8, 13 images each, B = 8": (digits(1), SmallCNN(1, 10, 32), 8, 50),
        "SmallCNN(16), 8×8, 130 images each, B = 32": (digits(10), SmallCNN(1, 10, 16), 32, 25),
        "SmallCNN(16), 8×8, Dirichlet 2, B = 32": (digits(10, 2.0), SmallCNN(1, 10, 16), 32, 25),
        "SmallCNN(8), 32×32, 18 images each, B = 8": (
            random_images(32, 2000), SmallCNN(3, 10, 8), 8, 10,
        ),
        "DigitsNet, 130 images each, B = 32": (digits(10), DigitsNet(1, 10), 32, 100),
    }  # fmt: skip
    rows, raw = [], {}
    for name, (data, network, batch_size, group) in settings.items():
        seconds, difference = measure(data, network, batch_size, group=group, repetitions=5)
        raw[name] = seconds
        rows.append(
            {
                "setting": name,
                "group": str(group),
                **{f"{n} [s]": f"{statistics.median(t):.3g}" for n, t in seconds.items()},
                "one pass vs engine loop": spread(
                    ratios(seconds["engine loop"], seconds["one pass"])
                ),
                "one pass vs plain loop": spread(
                    ratios(seconds["plain loop"], seconds["one pass"])
                ),
                "largest difference": f"{difference:.0e}",
            }
        )
    report("fedsir_vectorized", "100 clients in one pass (torch.func)", NOTES, rows, raw=raw)


NOTES = """
A round of 100 clients, one local epoch with fused Adam, on one core; medians with quartiles over
5 rounds taken in turns. `group` is `model.init_args.local.vectorize`. The largest difference is
that of any entry of any client's model between both ways, in float32.
"""

if __name__ == "__main__":
    main()
