"""Run folders: ``runs/<system>/<name>/<stamp>/`` holds all that a run leaves behind.

========================  ==========================================================
``config.yaml``           the resolved configuration; ``--config`` takes it as it is
``environment.json``      versions, devices, seed, command line, checkpoint that was read
``metrics.csv``           every logged metric
``summary.json``          the last value of each metric of a fit that has ended
``test_metrics.json``     the result of ``fulgurite test`` (likewise ``validate``)
``figures/``              every figure as PNG
``checkpoints/``          ``last.ckpt`` and, with a monitored metric, ``best.ckpt``
``config.1.yaml`` …       the records of the command that a resumed run began with
========================  ==========================================================

A run is the training of one model on one data set with one seed. A fit that is resumed goes on in
its folder, under a lock, with the options of its training; ``--run.new`` begins another run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.io import atomic_write

__all__ = [
    "RunLock",
    "RunOptions",
    "differences",
    "environment",
    "find_checkpoint",
    "find_run",
    "holds_run",
    "new_run_folder",
    "recorded_config",
    "run_folder_of",
    "set_records_aside",
    "training_differences",
    "write_json",
]

RUN_DIR_VARIABLE = (
    "FULGURITE_RUN_DIR"  # tells the processes that a strategy launches where to write
)
CHECKPOINT_VARIABLE = "FULGURITE_CHECKPOINT"  # and which checkpoint the first of them has found

LAST = Path("checkpoints") / "last.ckpt"


@dataclass
class RunOptions:
    """Where a run is recorded.

    Args:
        root: Folder of all runs.
        system: First level below it; by default the system of the first ``--config``, or the
            folder that it lies in.
        name: Second level; by default the stem of the first ``--config``.
        dir: The exact run folder instead of ``root/system/name/<time>``; with ``--ckpt_path`` the
            run that is meant.
        new: Go on from ``--ckpt_path`` in a new folder, which may be with other options.
    """

    root: str = "runs"
    system: str | None = None
    name: str | None = None
    dir: str | None = None
    new: bool = False

    @property
    def parent(self) -> Path:
        """The folder in which the runs of this name lie side by side."""
        return Path(self.root) / (self.system or "custom") / (self.name or "run")


# --- what a run is ------------------------------------------------------------------------------

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


# --- folders ------------------------------------------------------------------------------------


def holds_run(folder: Path) -> bool:
    """Whether a command has recorded itself in a folder."""
    return (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()


def recorded_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a run has recorded.

    Raises:
        ConfigError: The recorded configuration cannot be read.
    """
    file = folder / "config.yaml"
    try:
        content = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The record {file} cannot be read ({reason}).", "Name another run with --run.dir."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"The record {file} is no configuration.", "Name another run.")
    return content


def recorded_environment(folder: Path) -> dict[str, Any]:
    """What ``environment.json`` of a run says; empty if it cannot be read."""
    try:
        content = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_free_dir(folder: Path) -> Path:
    """``folder`` itself, or the first of ``folder-2``, ``folder-3`` … that does not exist."""
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not folder.parent.is_dir():
                raise
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def new_run_folder(options: RunOptions, command: str, *, resumed: Path | None = None) -> Path:
    """Make the folder of a command; never one that another run has written.

    Processes that a distributed strategy launches get the folder of the process that launched
    them. ``fit`` takes the folder of the run that it resumes, else an explicit ``dir``, which
    must be new or hold a run that was ended before its first checkpoint; the other commands take
    a folder of their own inside an explicit ``dir``.

    Args:
        options: Where.
        command: Which.
        resumed: The run that ``fit`` goes on with, in its folder.

    Raises:
        ConfigError: If ``dir`` already holds a run, or is missing under torchrun.
    """
    if (inherited := os.environ.get(RUN_DIR_VARIABLE)) and "LOCAL_RANK" in os.environ:
        return Path(inherited)
    explicit = None if options.dir is None or options.new else Path(options.dir)
    if int(os.environ.get("RANK", "0")) and "TORCHELASTIC_RUN_ID" in os.environ:
        if resumed is None and explicit is None:
            raise ConfigError(
                "Processes that torchrun starts cannot agree on a new run folder.",
                "Name it: --run.dir=FOLDER.",
            )
        return resumed or explicit or Path()  # rank 0 makes it
    if explicit is not None and explicit.exists() and not explicit.is_dir():
        raise ConfigError(f"--run.dir={explicit} is a file.", "Name a folder.")
    if resumed is not None:
        folder = resumed
    elif explicit is None:
        suffix = "" if command == "fit" else f"-{command}"
        folder = _find_free_dir(options.parent / (time.strftime("%Y%m%d-%H%M%S") + suffix))
    elif command != "fit":
        folder = _find_free_dir(explicit / command)
    else:
        folder = explicit
        if (folder / "config.yaml").exists():
            _check_restart(folder)
        folder.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_DIR_VARIABLE] = str(folder.resolve())
    return folder


def _check_restart(folder: Path) -> None:
    """Whether a fit may start over in a folder: nothing of the first one can be lost.

    Raises:
        ConfigError: The folder holds a run with a checkpoint, or a run that has ended.
    """
    if (folder / LAST).is_file():
        raise ConfigError(
            f"--run.dir={folder} already holds a run.",
            "Name another folder, or resume it with --ckpt_path=last.",
        )
    if (folder / "summary.json").exists() or any(folder.glob("checkpoints/*.ckpt")):
        raise ConfigError(
            f"--run.dir={folder} already holds a run, which has no last.ckpt to resume.",
            "Name another folder.",
        )
    print(
        f"note: the run in {folder} ended before its first checkpoint; it starts over",
        file=sys.stderr,
    )


def set_records_aside(folder: Path, *, replaced: Iterable[str], ended: Iterable[str]) -> None:
    """Keep records of a run as ``config.1.yaml`` and so on.

    Args:
        folder: The run folder.
        replaced: Records that stay until new ones replace them, so that the folder always has one.
        ended: Records that are not true any more.
    """
    number = 1
    while (folder / f"config.{number}.yaml").exists():
        number += 1
    for name in (*replaced, *ended):
        file = folder / name
        archived = file.with_suffix(f".{number}{file.suffix}")
        if file.exists() and name in replaced:
            shutil.copy2(file, archived)
        elif file.exists():
            file.rename(archived)


class RunLock:
    """Keeps a second training out of a run folder, as long as the process of the first lives.

    Where there are no locks (some network folders, Windows) none is kept out.

    Args:
        folder: The run folder.

    Raises:
        ConfigError: Another process trains there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        while True:
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
            self._take(folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    break
            self._file.close()  # its owner removed it after it was opened here
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __deepcopy__(self, _: object) -> RunLock:
        """Return the lock itself: a copy of a model reaches it through its trainer."""
        return self

    def _take(self, folder: Path) -> None:
        if os.name != "posix":
            return
        import fcntl

        try:
            # not `flock`, which a killed process's orphaned workers would go on holding
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConfigError(
                f"Another process (PID {owner}) trains in {folder}.",
                "Wait for it, or name another folder with --run.dir.",
            ) from error
        except OSError:
            return

    def release(self) -> None:
        """Let others train there."""
        if not self._file.closed:
            with suppress(OSError):
                self.path.unlink()
            self._file.close()


# --- which run, which checkpoint ------------------------------------------------------------------


def run_folder_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None."""
    for folder in Path(checkpoint).resolve().parents:
        if holds_run(folder):
            return folder
    return None


def _order(folder: Path) -> tuple[str, int, str]:
    """Sorts runs by time, and those of one second by their number."""
    time_of_start = re.fullmatch(r"(\d{8}-\d{6})(?:-(\d+))?", folder.name)
    if time_of_start is None:
        return "", 0, folder.name
    return time_of_start[1], int(time_of_start[2] or 1), folder.name


def _fits(options: RunOptions) -> list[Path]:
    """The trainings of a name, newest first."""
    folders = [folder for folder in options.parent.glob("*") if holds_run(folder)]
    fits = [f for f in folders if recorded_environment(f).get("command", "fit") == "fit"]
    return sorted(fits, key=_order, reverse=True)


def _find_run_of_record(config: Path | None) -> Path | None:
    """The run whose record a configuration is.

    Raises:
        CheckpointError: The record is of an evaluation whose checkpoint is not known.
    """
    if config is None or not re.fullmatch(r"config(\.\d+)?\.yaml", config.name):
        return None
    folder = config.parent
    if not holds_run(folder):
        return None
    facts = recorded_environment(folder)
    if facts.get("command", "fit") == "fit":
        return folder
    evaluated = (facts.get("checkpoint") or {}).get("path")
    if evaluated and (run := run_folder_of(evaluated)):
        return run
    raise CheckpointError(
        f"{config} is the record of `fulgurite {facts.get('command')}`, not of a training.",
        "Name the run with --run.dir, or give the path of a checkpoint.",
    )


def find_run(
    options: RunOptions, which: str, now: Mapping[str, Any], config: Path | None = None
) -> Path:
    """The run that ``--ckpt_path=last`` or ``best`` belongs to.

    It is the run that ``--run.dir`` or the configuration's own folder names, else the newest
    training of the same name, model, data and seed.

    Args:
        options: Where runs are.
        which: ``last`` or ``best``.
        now: The resolved configuration of this command.
        config: The first configuration file of the command line.

    Raises:
        CheckpointError: There is no such run, or the newest one has no such checkpoint.
    """
    if options.dir is not None:
        return Path(options.dir)
    if named := _find_run_of_record(config):
        return named
    option = f"--ckpt_path={which}"
    fits = _fits(options)
    if not fits:
        raise CheckpointError(
            f"{option}: there is no run in '{options.parent}'.",
            "Run `fulgurite fit` with this configuration first, or give the path of a checkpoint.",
        )
    others: list[tuple[Path, list[Difference]]] = []
    same = None
    for folder in fits:
        if not (differing := identity_differences(recorded_config(folder), now)):
            same = folder
            break
        others.append((folder, differing))
    if same is None:
        folder, differing = others[0]
        raise CheckpointError(
            f"{option}: no run in '{options.parent}' has this model, data and seed; in the newest, "
            f"{folder}, {describe(differing)}.",
            f"Name a run: --run.dir={folder}, or --ckpt_path={folder / LAST}.",
        )
    if others:
        folder, differing = others[0]
        print(
            f"note: {option} is of {same}; in the newer {folder} {describe(differing)}",
            file=sys.stderr,
        )
    if not _checkpoint(same, which).is_file():
        older = next(
            (
                folder
                for folder in fits[fits.index(same) + 1 :]
                if _checkpoint(folder, which).is_file()
                and not identity_differences(recorded_config(folder), now)
            ),
            None,
        )
        checkpoints = ", ".join(sorted(map(str, same.glob("checkpoints/*.ckpt"))))
        hint = f"There is {checkpoints}" if checkpoints else f"Start it over with --run.dir={same}"
        raise CheckpointError(
            f"{option}: the newest run, {same}, has no checkpoint '{which}.ckpt'.",
            f"{hint}, or name an older one: --run.dir={older}." if older else f"{hint}.",
        )
    return same


def _checkpoint(folder: Path, which: str) -> Path:
    return folder / "checkpoints" / f"{which}.ckpt"


def find_checkpoint(folder: Path, which: str) -> Path:
    """The ``last`` or ``best`` checkpoint of a run.

    Raises:
        CheckpointError: The run has no such checkpoint.
    """
    file = _checkpoint(folder, which)
    if file.is_file():
        return file
    problem = f"--ckpt_path={which}: the run in '{folder}' has no checkpoint '{which}.ckpt'."
    if not holds_run(folder):
        raise CheckpointError(
            f"--ckpt_path={which}: there is no run in '{folder}'.",
            "Run `fulgurite fit` with this configuration first, or give the path of a checkpoint.",
        )
    checkpoints = sorted(folder.glob("checkpoints/*.ckpt"))
    if checkpoints:
        raise CheckpointError(problem, f"There is: {', '.join(map(str, checkpoints))}.")
    raise CheckpointError(
        problem,
        f"It ended before its first one: `fulgurite fit --run.dir={folder}` without --ckpt_path "
        "starts it over.",
    )


# --- records --------------------------------------------------------------------------------------


def environment(
    seed: int | bool | None, command: str, argv: list[str] | None = None
) -> dict[str, Any]:
    """What is needed to say under which conditions a run was made."""
    import torch

    names = ("fulgurite", "torch", "lightning", "torchmetrics", "jsonargparse", "numpy", "wandb")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "argv": sys.argv[1:] if argv is None else argv,
        "seed": seed,
        "python": platform.python_version(),
        "system": platform.platform(),
        # torch's own version says which build it is
        "versions": {n: metadata.version(n) for n in names} | {"torch": torch.__version__},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
