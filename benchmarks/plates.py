"""CS-ARM-BN: time of a training step, throughput of the loader, and peak memory.

``python -m benchmarks plates``; ``python -m benchmarks.plates memory`` for one part.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.harness import ratios, report, spread
from fulgurite.callbacks.cs_arm_bn import ControlContext
from fulgurite.datamodules.cs_arm_bn import (
    EpisodeOptions,
    HoldOut,
    PixelOptions,
    PlateDataModule,
    PlateWorld,
    Preprocess,
    SyntheticPlates,
)
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.models.cs_arm_bn import (
    CSARMBN,
    ERM,
    AdaptiveWeight,
    PlateClassifier,
    PlateResNet50,
    SmallResNet,
)

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
}  # fmt: skip


class StepTimes(Callback):
    """Seconds of each step but the first, and how much of them passed before its batch was there.

    Attributes:
        steps: From one step's end to the next one's end.
        waits: From one step's end to the start of the next.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.ended = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Note how long the batch took to come."""
        if self.ended:
            self.waits.append(time.perf_counter() - self.ended)

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the whole step."""
        now = time.perf_counter()
        if self.ended:
            self.steps.append(now - self.ended)
        self.ended = now


def episode(queries: int, controls: int, size: int) -> PlateBatch:
    """A plate of noise."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(queries + controls, 5, size, size, generator=draw)
    return PlateBatch.from_images(images[:queries], images[queries:], torch.arange(queries) % 8)


def steps_of(module: PlateClassifier, batch: PlateBatch, steps: int) -> list[float]:
    """Seconds of training steps on one batch."""
    times = StepTimes()
    trainer = Trainer(max_epochs=1, callbacks=[ControlContext(), times], **QUIET)
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    return times.steps


def step_time() -> None:
    """A step of CS-ARM-BN against one of ERM on as many images."""
    settings = {
        "SmallResNet(8), 24 + 48 of 5×32²": (SmallResNet, {"width": 8}, 24, 48, 32, 40),
        "SmallResNet(16), 24 + 48 of 5×64²": (SmallResNet, {"width": 16}, 24, 48, 64, 16),
        "ResNet50, 4 + 8 of 5×128²": (PlateResNet50, {}, 4, 8, 128, 4),
    }
    rows, raw = [], {}
    for name, (network, options, queries, controls, size, steps) in settings.items():
        contestants = {
            "ERM": (ERM, episode(queries + controls, 0, size)),
            "CS-ARM-BN": (CSARMBN, episode(queries, controls, size)),
            "adaptive weight": (AdaptiveWeight, episode(queries, controls, size)),
        }
        modules = {
            key: PlateClassifier(lambda c, k, n=network, o=options: n(c, k, **o), method())
            for key, (method, _) in contestants.items()
        }
        seconds: dict[str, list[float]] = {key: [] for key in contestants}
        for _ in range(6):
            for key, (_, batch) in contestants.items():
                seconds[key].append(statistics.median(steps_of(modules[key], batch, steps)))
        raw[name] = seconds
        rows += [
            {
                "setting": name,
                "method": key,
                "ms/image": spread([1000 * t / (queries + controls) for t in times[1:]]),
                "time, ERM = 1": spread(ratios(times[1:], seconds["ERM"][1:])),
            }
            for key, times in seconds.items()
        ]
    report("plates_step", "CS-ARM-BN: a training step against ERM", STEP_NOTES, rows, raw=raw)


def loader() -> None:
    """Images per second from TIFFs and from the cache, and the share of training that waits."""
    small: dict[str, Any] = {
        "source": SyntheticPlates(), "split": HoldOut(new_labs=["source_8"]),
        "episodes": EpisodeOptions(24, 48, steps_per_epoch=40),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = SyntheticPlates(
            PlateWorld((1,), (2,), sites=1, size=1080, wells_per_class=1, controls=8),
            path=folder,
        )
        large: dict[str, Any] = {
            "source": source, "split": HoldOut(new_batches=0, val_batches=0, in_domain=0),
            "episodes": EpisodeOptions(8, 8, steps_per_epoch=10),
        }  # fmt: skip
        rows, raw = [], {}
        for name, options, network in (
            ("32², SmallResNet(8)", small, {"width": 8}),
            ("1080² cut to 256², SmallResNet(16)", large, {"width": 16}),
        ):
            for cache in (False, True):
                pixels = PixelOptions(mean=[0.1] * 5, std=[0.1] * 5, cache=cache)
                if options is large:
                    pixels = replace(pixels, crop=256, preprocess=Preprocess(2, "percentile"))
                data = PlateDataModule(**options, pixels=pixels, num_workers=2)
                data.prepare_data()
                data.setup()
                images = data.episodes.queries + data.episodes.controls
                rates = [images / t for t in batch_times(data)]
                module = PlateClassifier(
                    lambda c, k, o=network: SmallResNet(c, k, **o), AdaptiveWeight()
                )
                times = StepTimes()
                trainer = Trainer(max_epochs=2, callbacks=[ControlContext(), times], **QUIET)
                trainer.fit(module, data)
                raw[f"{name}, {'cache' if cache else 'TIFF'}"] = {
                    "images_per_second": rates,
                    "steps": times.steps,
                    "waits": times.waits,
                }
                waited = sum(times.waits) / sum(times.steps)
                rows.append(
                    {
                        "images": name,
                        "from": "cache" if cache else "TIFF",
                        "images/s, 2 workers": spread(rates),
                        "images/s in training": spread([images / t for t in times.steps]),
                        "share of training that waits": f"{waited:.1%}",
                    }
                )
    report("plates_loader", "CS-ARM-BN: loading plates", LOADER_NOTES, rows, raw=raw)


def batch_times(data: PlateDataModule) -> list[float]:
    """Seconds per batch of a steady loader, for several epochs."""
    seconds = []
    for _ in range(5):
        batches = iter(data.train_dataloader())
        for _ in range(2):  # workers start
            next(batches)
        begun, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
        seconds.append((time.perf_counter() - begun) / count)
    return seconds


MEMORY = """
import json, sys, torch
from fulgurite.models.cs_arm_bn import PlateResNet50, convert_batchnorm, context
images, checkpoint = json.loads(sys.argv[1])
torch.set_num_threads(2)
network = convert_batchnorm(PlateResNet50(5, 8, checkpoint=checkpoint)).train()
x = torch.randn(images, 5, 256, 256)

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

network(x[:2]).sum().backward()
before = peak()
queries = images // 3
with context(network, "union", n_query=queries):
    logits = network(x)[:queries]
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(queries, dtype=torch.long))
loss.backward()
print("PEAK", peak() - before)
"""


def memory() -> None:
    """Peak memory of a training step of ResNet-50, measured from outside its process."""
    rows, raw = [], {}
    for images, checkpoint in ((24, False), (24, True), (96, False), (96, True), (192, True)):
        setting = json.dumps([images, checkpoint])
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, setting], capture_output=True, text=True, check=False
        )
        line = next((x for x in done.stdout.splitlines() if x.startswith("PEAK")), None)
        raw[setting] = int(line.split()[1]) if line else None
        rows.append(
            {
                "images": f"{images} of 5×256²",
                "checkpointing": "yes" if checkpoint else "no",
                "peak": f"{raw[setting] / 2**30:.1f} GiB" if line else "out of memory",
            }
        )
    title = "CS-ARM-BN: peak memory of a ResNet-50 step"
    report("plates_memory", title, MEMORY_NOTES, rows, raw=raw)


STEP_NOTES = """
Training through the Trainer, one thread, on one batch in memory: ERM sees all images as queries,
the others a third of them as queries and the rest as controls. The contestants take turns of a few
steps; each turn counts by its median step, the first turn is left out. The last column compares
turn by turn; medians with quartiles. CS-ARM-BN and the adaptive weight train alike; both record the
reference of their layers, in epochs as short as these at every step.
"""
LOADER_NOTES = """
16-bit TIFFs of five channels, one file per channel, as the generator writes them in JUMP's layout.
`TIFF` reads, scales and crops each time (`cache: false`); `cache` maps the images that were read
once. The first rate is the loader's alone after its two workers have started; the next is that of
training on the same two cores. A step waits from the end of the one before to its own start, which
includes the Trainer's own work.
"""
MEMORY_NOTES = """
Highest resident memory of a process during forward and backward, above that after a step with two
images (network, its gradients and the input are in both). CPU, two threads; statistics of a union
of which a third are queries; float32. Without checkpointing, 192 images need twice the memory of
96 and did not fit the machine.
"""

PARTS = {"step": step_time, "loader": loader, "memory": memory}


def main(names: list[str]) -> None:
    """Run the named parts, or all."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for name in names or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    # workers import this module again
    main(sys.argv[1:])
