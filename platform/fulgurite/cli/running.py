"""Runs the commands ``fit``, ``validate``, ``test`` and ``predict``, or only parses them."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fulgurite.cli.arguments import prepare_arguments
from fulgurite.cli.lightning_cli import FulguriteCLI, Parsed
from fulgurite.cli.messages import as_our_error
from fulgurite.commands import find_local_modules, run_command
from fulgurite.errors import ConfigError, Terminated, near_miss
from fulgurite.run_folders import CHECKPOINT_VARIABLE, LAST, RUN_DIR_VARIABLE, holds_run
from fulgurite.systems import RUN_COMMANDS, warn_of_broken_plug_ins

__all__ = ["construct", "main", "parse", "run"]


def run(argv: Sequence[str]) -> FulguriteCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` in this process.

    Raises:
        FulguriteError: If the configuration, the data or a checkpoint is wrong.
    """
    if not argv or argv[0] not in RUN_COMMANDS:
        command = argv[0] if argv else ""
        raise ConfigError(
            f"There is no command '{command}'.",
            near_miss(command, RUN_COMMANDS) or "`fulgurite --help` lists the commands.",
        )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    program, before = sys.argv, os.environ.get(RUN_DIR_VARIABLE)
    # a strategy that launches processes gives them sys.argv
    sys.argv = [program[0], *argv]
    try:
        with _signals():
            return construct(prepare_arguments(argv))
    except Terminated:
        raise Terminated(f"terminated{_way_on(argv[0])}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_way_on(argv[0])}") from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends with status 1
            raise KeyboardInterrupt(f"interrupted{_way_on(argv[0])}") from None
        raise
    finally:
        sys.argv = program
        os.environ.pop(CHECKPOINT_VARIABLE, None)
        if before is None and (run_dir := os.environ.pop(RUN_DIR_VARIABLE, None)):
            with suppress(OSError):  # a run that failed before it wrote anything leaves no folder
                Path(run_dir).rmdir()


@contextmanager
def _signals() -> Iterator[None]:
    """End at SIGTERM as orderly as at Ctrl-C; afterwards handlers are what they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = os.getpid()

    def leave(number: int, frame: Any) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked process ends as it would without us
        os.kill(os.getpid(), number)

    if before[signal.SIGTERM] == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _way_on(command: str) -> str:
    """How to go on with the fit that was just stopped."""
    folder = Path(os.environ.get(RUN_DIR_VARIABLE, ""))
    if command != "fit" or not holds_run(folder):
        return ""
    with suppress(ValueError):
        folder = folder.relative_to(Path.cwd().resolve())
    again = f"fulgurite fit --config {shlex.quote(str(folder / 'config.yaml'))}"
    if (folder / LAST).is_file():
        return f"; go on with `{again} --ckpt_path last`"
    where = shlex.quote(str(folder))
    return f" before the first checkpoint; start over with `{again} --run.dir {where}`"


def _no_advertisement(record: logging.LogRecord) -> bool:
    # Lightning 2.6 recommends services each time
    return not any(service in record.getMessage() for service in ("litlogger", "litmodels"))


def construct(
    argv: list[str], kind: type[FulguriteCLI] = FulguriteCLI, *, only_parse: bool = False
) -> FulguriteCLI:
    """Make a CLI, which runs its command; errors of options become one line.

    Args:
        argv: The command line, prepared by :func:`prepare_arguments`.
        kind: What to make.
        only_parse: Whether to stop after parsing.

    Raises:
        FulguriteError: If the configuration, the data or a checkpoint is wrong.
    """
    program = sys.argv
    # the CLI reads sys.argv, and warns where it is given arguments beside it
    sys.argv = program[:1] if only_parse else [program[0], *argv]
    try:
        with warnings.catch_warnings():
            # evaluation loaders hold whole batches in memory; workers would only copy them
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            # Lightning 2.6's combined loader uses a name that torch 2.13 deprecates
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            if argv[0] != "fit":  # an evaluation has a folder of its own and writes no checkpoints
                warnings.filterwarnings("ignore", "The dirpath has changed")
            # defaults that are objects; the record leaves them out
            warnings.filterwarnings("ignore", r"(?s).*Unable to serialize instance")
            # Lightning 2.6 calls jsonargparse by names that 4.49 deprecates
            jsonargparse = r"(?s).*(was deprecated in v4\.|JsonargparseDeprecationWarning)"
            warnings.filterwarnings("ignore", jsonargparse)
            return kind(argv, only_parse=only_parse)
    except Exception as error:
        ours = as_our_error(error)
        if ours is None:
            raise
        raise ours from (None if ours in _causes(error) else error)
    finally:
        sys.argv = program


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def parse(argv: Sequence[str]) -> Namespace:
    """The parsed configuration of a command line, without running it.

    Raises:
        ConfigError: The command line or the configuration is wrong.
    """
    try:
        construct(prepare_arguments(argv), only_parse=True)
    except Parsed as done:
        return done.args[0]  # type: ignore[no-any-return]
    raise AssertionError("parsing ended without a result")


def main(argv: Sequence[str]) -> int:
    """As ``fulgurite fit`` and the like, in this process: errors become a line and a status."""
    return run_command([*argv], _execute)


def _execute(argv: list[str]) -> int:
    warn_of_broken_plug_ins()
    find_local_modules()
    run(argv)
    return 0
