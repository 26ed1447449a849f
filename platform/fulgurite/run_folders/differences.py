"""Options in which two resolved configurations differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "LINKS",
    "Difference",
    "describe",
    "differences",
    "identity_differences",
    "training_differences",
]


#: Options of the data that change how fast samples come, not which.
_SPEED = {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor"}
#: Options of the trainer that decide which training it is. How long it takes, how often it is
#: looked at and on which devices may change when it goes on.
_TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
    "sync_batchnorm",
)
#: Callbacks that look at a training and leave it alone.
_OBSERVERS = re.compile(
    r"lightning\.pytorch\.callbacks\..*(Checkpoint|ProgressBar|Monitor|Summary|Timer|Throughput"
    r"|EarlyStopping)$"
)
#: Arguments of a model that are taken from the data.
LINKS = ("num_classes", "in_channels", "vocab_size")
Difference = tuple[str, Any, Any]


def differences(before: Any, now: Any, key: str = "") -> Iterator[Difference]:
    """Options in which two resolved configurations differ: name, first and second value.

    A constructor argument that only one of them knows is no difference: the class has got it, or
    lost it, since the first was recorded.

    Example:
        >>> one = {"class_path": "A", "init_args": {"lr": 0.1, "old": 1}}
        >>> two = {"class_path": "A", "init_args": {"lr": 0.2}}
        >>> list(differences(one, two, "model"))
        [('model.init_args.lr', 0.1, 0.2)]
        >>> list(differences(one, {"class_path": "B"}, "model"))
        [('model', 'A', 'B')]
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        classes = before.get("class_path"), now.get("class_path")
        if classes[0] != classes[1]:
            yield key, classes[0] or dict(before), classes[1] or dict(now)
            return
        for name in dict.fromkeys([*before, *now]):
            if name in before and name in now:
                yield from differences(before[name], now[name], f"{key}.{name}".lstrip("."))
            elif not key.endswith("init_args") and name != "init_args":
                yield f"{key}.{name}".lstrip("."), before.get(name), now.get(name)
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple):
        if len(before) != len(now):
            yield key, before, now
            return
        for i, (one, two) in enumerate(zip(before, now, strict=True)):
            parts = isinstance(one, Mapping) and isinstance(two, Mapping)
            yield from differences(one, two, f"{key}[{i}]" if parts else key)
    elif before != now and not (before != before and now != now):  # NaN is NaN
        yield key, before, now


def identity_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Options of model, data and seed in which two resolved configurations differ."""
    differing: list[Difference] = []
    for part in ("model", "data", "seed_everything"):
        differing += differences(before.get(part), now.get(part), part)
    linked = {f"model.init_args.{name}" for name in LINKS}
    return [
        difference
        for difference in differing
        if difference[0].rpartition(".")[2] not in _SPEED and difference[0] not in linked
    ]


def training_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Options in which two resolved configurations are of different trainings."""
    trainers = [config.get("trainer") or {} for config in (before, now)]
    differing = identity_differences(before, now)
    for name in _TRAINER:
        if all(name in trainer for trainer in trainers):
            differing += differences(trainers[0][name], trainers[1][name], f"trainer.{name}")
    callbacks = [
        {
            str(callback.get("class_path")): callback
            for callback in _as_list(trainer.get("callbacks"))
            if not _OBSERVERS.match(str(callback.get("class_path")))
        }
        for trainer in trainers
    ]
    for name in dict.fromkeys([*callbacks[0], *callbacks[1]]):
        one, two = (part.get(name) for part in callbacks)
        if one is None or two is None:
            differing.append(("trainer.callbacks", one and name, two and name))
        else:
            key = f"trainer.callbacks.{name.rpartition('.')[2]}"
            differing += differences(one, two, key)
    return differing


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def describe(differing: Iterable[Difference]) -> str:
    """Differences as text: ``model.init_args.lr is 0.1 there and 0.2 here``."""
    return "; ".join(f"{key} is {before} there and {now} here" for key, before, now in differing)
