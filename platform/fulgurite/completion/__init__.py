"""Completion of command lines in bash, zsh and fish.

The shell asks ``fulgurite completion --line LINE`` for candidates. Options of runs come from the
schema that :mod:`fulgurite.schema` describes, for the classes that the line and its configurations
name; it is kept in the cache, since to make it takes all systems' imports, and nothing else here
imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fulgurite.completion.candidates import list_candidates
from fulgurite.completion.options import RunCommand
from fulgurite.completion.scripts import SCRIPTS

__all__ = ["list_candidates", "main"]


def main(argv: Sequence[str], run_command: RunCommand) -> int:
    """The command line of ``fulgurite completion``.

    Args:
        argv: Its words.
        run_command: Runs the other commands, whose help says which options they have.
    """
    parser = argparse.ArgumentParser(
        "fulgurite completion",
        description="Print what completes fulgurite's commands, configurations and options in a "
        'shell. bash: eval "$(fulgurite completion bash)" in ~/.bashrc; zsh: the same with zsh in '
        "~/.zshrc, after compinit; fish: fulgurite completion fish | source in config.fish.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("shell", nargs="?", choices=[*SCRIPTS])
    what.add_argument("--line", help="print candidates for the last word of a command line")
    options = parser.parse_args(argv)
    if options.shell:
        print(SCRIPTS[options.shell], end="")
    else:
        for candidate in list_candidates(options.line, run_command):
            print(candidate)
    return 0
