"""Failures of the command line as one error: jsonargparse's messages, disks, other processes."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import linecache
import os
import pkgutil
import re
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from fulgurite.commands import DISK_ERRORS
from fulgurite.errors import CheckpointError, ConfigError, FulguriteError, RunError, near_miss
from fulgurite.foreign.reading import describe_error
from fulgurite.run_folders import RunOptions
from fulgurite.systems import RUN_COMMANDS

__all__ = ["as_our_error"]

_RESTORING = "lightning.pytorch.trainer.connectors.checkpoint_connector"


def as_our_error(error: Exception) -> FulguriteError | None:
    """The error that says in one line what a failure means to a user; None for a defect of ours.

    Args:
        error: What ended the command.
    """
    if ours := _find_own(error):
        return ours
    if isinstance(error, ArgumentError) or _UNION in str(error):
        return ConfigError(_one_line(str(error)))
    if isinstance(error, MisconfigurationException):
        return ConfigError(" ".join(str(error).split()))
    if outside := _outside(error):
        return outside
    if type(error).__module__.partition(".")[0] == "wandb":  # a name, a key, or no connection
        return ConfigError(
            f"Weights & Biases refuses the run: {_one_line(str(error))}",
            "Correct trainer.logger, or set WANDB_MODE=offline.",
        )
    if "no `dataloader_idx` argument" in str(error):  # of a model that has one loader in mind
        return ConfigError(" ".join(str(error).split()))
    if "Error(s) in loading state_dict" in str(error):
        problem = " ".join(str(error).split())
        return CheckpointError(
            f"The checkpoint does not fit the model: {problem[:300]}",
            "Use the model.* options of the run that wrote it.",
        )
    if type(error) in (RuntimeError, ValueError) and _PRECISIONS.search(str(error)):
        return ConfigError(
            f"The model meets numbers of another precision than its own: {_one_line(str(error))}.",
            "Convert it where it is made (network.float()), or train in its precision "
            "(--trainer.precision=bf16-true or 16-true). --debug shows the layer.",
        )
    if isinstance(error, _FORGED) and _raised_while_restoring(error):
        return CheckpointError(
            f"The checkpoint cannot be taken up ({type(error).__name__}: {describe_error(error)}).",
            "It is damaged, or of another program; --debug shows where.",
        )
    if _reported_by_lightning(error):
        return ConfigError(" ".join(str(error).split()))
    return None


# torch's words of layers whose inputs and weights differ in their floating point type
_PRECISIONS = re.compile(
    r"Input type \(.*\) and (?:weight|bias) type \(.*\) should be the same"
    r"|must have the same dtype|mixed dtype \(CPU\)|input dtype .* does not match weight dtype"
    r"|expected scalar type (?:Float|Half|BFloat16|Double) but found"
)

# what loops, callbacks and optimizers raise at states that are none of theirs
_FORGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _raised_while_restoring(error: Exception) -> bool:
    """Whether Lightning was restoring a checkpoint when an error was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == _RESTORING for frame in frames)


def _reported_by_lightning(error: Exception) -> bool:
    """Whether Lightning refuses something itself, and is not where other code has failed."""
    frames = [*traceback.walk_tb(error.__traceback__)]
    if not frames or not isinstance(
        error, NotImplementedError | RuntimeError | TypeError | ValueError
    ):
        return False
    frame, line = frames[-1]
    code = linecache.getline(frame.f_code.co_filename, line).lstrip()
    return frame.f_globals.get("__name__", "").startswith("lightning.") and code.startswith(
        "raise "
    )


def _parameters(class_path: str) -> list[str]:
    """Names of the constructor arguments of a class given by its path."""
    module, _, name = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in parameters.items() if parameter.kind not in several]


def _nearest_nested(owner: str, name: str) -> str:
    """A hint for an option inside options of a class, such as ``episodes.query``.

    Args:
        owner: The path of the class.
        name: The option, with dots between its parts.

    Returns:
        The nearest option, or those beside it; empty where the class is unknown or has the option.
    """
    options: Any = None
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        options = pkgutil.resolve_name(owner)
    parents: list[str] = []
    for part in name.split("."):
        try:
            annotations = get_type_hints(options.__init__)
        except (AttributeError, NameError, TypeError):
            return ""
        choices = [key for key in annotations if key != "return"]
        if part not in choices:
            near = difflib.get_close_matches(part, choices, n=1, cutoff=0.5)
            if near:
                return f"Did you mean '{'.'.join([*parents, *near])}'?"
            return f"{'.'.join(parents) or 'It'} has: {', '.join(choices)}." if choices else ""
        parents.append(part)
        records = [kind for kind in _alternatives(annotations[part]) if is_dataclass(kind)]
        options = records[0] if records else None
    return ""


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself where it is none."""
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


# jsonargparse reports the whole tree of types it tried; these lines of it say nothing to a user
_NOISE = re.compile(
    r"(Parser key|Given value|Does not validate|Subtypes:|Errors:|Problem with given class_path"
    r"|Expected a <class 'NoneType'>)"
)
_ALTERNATIVES = ("Expected a <class 'collections.abc.Iterable'>", "Expected a <class 'bool'>")
_LAZY = re.compile(r"No ([\w.]+) attribute (\w+)")  # lazy_loader's words of an absent name
# such as 20120330_01, in which YAML leaves the underscore out
_READ_AS_NUMBER = re.compile(r"Expected a <class 'str'>\. Got value: (-?[\d.]+(?:e[+-]?\d+)?)$")
_UNION = "Does not validate against any of the Union subtypes"


def _one_line(message: str) -> str:
    """The innermost reason in jsonargparse's message, with the nearest name to a wrong one."""
    message = _LAZY.sub(r"module '\1' has no attribute '\2'", message)
    keys = ["seed_everything", "ckpt_path", "config", "model", "data", "input"]
    keys += [f"trainer.{p}" for p in inspect.signature(Trainer.__init__).parameters]
    keys += [f"run.{p}" for p in inspect.signature(RunOptions).parameters]
    key = re.search(r'(?:Parser key|Key) "([^"]+)"', message)
    prefix = f"{key[1]}: " if key else ""
    classes = re.findall(r"class_path '([^']+)'", message)
    owner = classes[-1] if classes else ""
    if wrong := re.search(r"Option '([^']+)' is not accepted", message):
        if not classes:  # a key of a configuration, on its first level
            return _no_such_option(wrong[1], keys)
        refusing = re.search(r"class_path '([^']+)':\s+Option '", message)
        owner = refusing[1] if refusing else owner
        choices = _parameters(owner)
        near = difflib.get_close_matches(wrong[1], choices, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"It has: {', '.join(choices)}."
        hint = hint if choices else "It has no options of its own."
        return f"{prefix}{owner} has no option '{wrong[1]}'. {hint}"
    if group := re.search(r"Group '([\w.]+)' does not accept option '([^']+)'", message):
        if group[1] in RUN_COMMANDS:
            return (
                f"There is no option '{group[1]}.{group[2]}'. Move what is below `{group[1]}:` to "
                "the first level of the file: one configuration is for all commands."
            )
        if not owner:  # a key of a configuration
            return _no_such_option(f"{group[1]}.{group[2]}", keys)
        nested = _nearest_nested(owner, f"{group[1]}.{group[2]}")
        return f"{prefix}{owner}: {group[1]} has no option '{group[2]}'. {nested}".rstrip()
    if unknown := re.search(r"(?:[Uu]nrecognized arguments: --|[Kk]ey ')([\w.]+)", message):
        if unknown[1] == "input":
            return "There is no option 'input' here. It is of `fulgurite predict` alone."
        if nested := _nearest_nested(owner, unknown[1]):
            return f"{prefix}{owner} has no option '{unknown[1]}'. {nested}"
        return _no_such_option(unknown[1], keys)
    if named := re.search(r"trainer\.strategy[\s\S]*import path string: (\w+)", message):
        return (
            f"The strategy '{named[1]}' is given by its name, which takes no options. Use "
            "--trainer.strategy.class_path=... and --trainer.strategy.init_args.OPTION=...; "
            "`fulgurite fit --trainer.strategy.help CLASS` lists them."
        )
    if absent := re.search(
        r"module '[^']+' has no attribute '[^']+'|No module named [^\n]+", message
    ):
        places = ""
        if absent[0].startswith("No module"):
            places = ": modules of the current folder and installed packages are found"
        hint = f"Check the class path{_near_class(message)}{places}."
        return f"{prefix}{absent[0].strip()}. {hint}"
    lines = [line.strip(" -") for line in message.splitlines()]
    if short := re.search(r"Expected a dot import path string: (\w+)$", message, re.MULTILINE):
        lines = [
            f"'{short[1]}' is no class that is known by its name alone; give its path, such as "
            f"package.module.{short[1]}"
        ]
    if "Given value: Namespace(class_path=" in message:  # the class was found and refused
        lines = [line for line in lines if line != "Expected a <class 'str'>"]
    reasons = dict.fromkeys(line for line in lines if line and not _NOISE.match(line))
    # what else a logger or a callback may be tells nothing where there is another reason
    telling = [line for line in reasons if line not in _ALTERNATIVES]
    reasons = dict.fromkeys(telling) or reasons
    refused = re.search(r"key='([\w.]+)', val=('[^']*'|[^)]*)\)", message)
    value = f" (given: {refused[1]}={refused[2]})" if refused else ""
    if not refused and (plain := re.findall(r"Given value: (\S+)$", message, re.MULTILINE)):
        value = f" (given: {plain[-1]})"
    inside = f"{owner}: " if owner else ""
    quotes = ""
    if number := _READ_AS_NUMBER.search("; ".join(reasons)):
        quotes = f". YAML reads a number, {number[1]}; put the text in quotes, such as \"['001']\""
    return f"{prefix}{inside}{'; '.join(reasons) or message}{value}{quotes}"


def _no_such_option(name: str, options: Sequence[str]) -> str:
    hint = near_miss(name, options) or "See `fulgurite fit --help`."
    return f"There is no option '{name}'. {hint}"


def _near_class(message: str) -> str:
    absent = re.search(r"module '([^']+)' has no attribute '([^']+)'", message)
    if not absent:
        return ""
    module = importlib.import_module(absent[1])
    if module.__file__ is None and (folders := list(getattr(module, "__path__", ()))):
        return f": '{absent[1]}' is the folder {folders[0]}, which holds no package of that name"
    near = difflib.get_close_matches(absent[2], dir(module), n=1, cutoff=0.5)
    return f" (did you mean '{absent[1]}.{near[0]}'?)" if near else ""


_DISTRIBUTED = re.compile(
    r"gloo|ProcessGroup|NCCL|EADDRINUSE|address already in use|TCPStore|Connection (reset|closed)",
    re.IGNORECASE,
)


def _outside(error: BaseException | None) -> RunError | None:
    """A failure of a disk or of another process, as one line."""
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, torch.distributed.DistError) or (
            type(error) is RuntimeError and _DISTRIBUTED.search(text)
        ):
            if re.search("EADDRINUSE|address already in use", text, re.IGNORECASE):
                return RunError(
                    f"The port of the process group is taken ({text[:160]}).",
                    "Set MASTER_PORT to a free one, or leave it out.",
                )
            return RunError(
                f"The processes of the run have lost each other ({text[:160]}).",
                "See what the others printed before; a fit goes on with --ckpt_path=last.",
            )
        if isinstance(error, OSError) and _number_of(error) in DISK_ERRORS:
            file = error.filename or "a file"
            return RunError(
                f"{file} cannot be written or read ({os.strerror(_number_of(error))}).",
                "Make room, or name another folder with --run.dir (FULGURITE_CACHE for the cache); "
                "checkpoints are as they were.",
            )
        error = error.__cause__ or error.__context__
    return None


def _number_of(error: OSError) -> int:
    """The number of an error; workers of a DataLoader leave it in a text alone."""
    if error.errno is not None:
        return error.errno
    numbers = re.findall(r"\[Errno (\d+)\]", str(error))
    return int(numbers[-1]) if numbers else 0


def _find_own(error: BaseException | None) -> FulguriteError | None:
    """Our own error in a chain of exceptions: jsonargparse wraps those of constructors."""
    while error is not None:
        if isinstance(error, FulguriteError):
            return error
        error = error.__cause__ or error.__context__
    return None
