"""The command ``fulgurite schema``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fulgurite.io import atomic_write, check_output
from fulgurite.schema.configurations import describe_run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite schema``."""
    parser = argparse.ArgumentParser(
        "fulgurite schema",
        description="Write a JSON schema of configurations of runs, by which editors complete and "
        "check them. It knows the systems and plug-ins that are installed. In a file, name it by: "
        "# yaml-language-server: $schema=FILE",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the standard output")
    options = parser.parse_args(argv)
    if options.out is not None:
        check_output(options.out, "--out", ".json")
    text = json.dumps(describe_run(), indent=1) + "\n"
    if options.out is None:
        print(text, end="")
        return 0
    with atomic_write(options.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"schema: written to {options.out}")
    return 0
