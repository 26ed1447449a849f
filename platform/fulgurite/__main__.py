"""The command ``fulgurite``. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable

from fulgurite import __version__
from fulgurite.errors import FulguriteError, RunError, Terminated

HELP = """fulgurite {version}: research papers as plug-ins of one PyTorch Lightning trainer.

usage: fulgurite <command> [options]

run one system:
  fit        train            fulgurite fit --config fedsir/digits.yaml
  validate   evaluate on validation data
  test       evaluate on test data      fulgurite test --config fedsir/digits.yaml --ckpt_path last
  predict    write predictions

compare and look:
  compare    methods x settings x seeds  fulgurite compare fedsir/compare.yaml --quick
  report     render a comparison or a run folder again
  systems    list the installed systems, their papers and configurations
  doctor     versions, devices and known faults of this installation
{commands}
`fulgurite <command> --help` lists the options of a command. An option overrides the
configuration before it: --config first, then e.g. --trainer.max_epochs=5.
--debug shows the traceback of an error instead of one line.
"""


def help_text() -> str:
    """What ``fulgurite --help`` prints."""
    from fulgurite.systems import systems

    own = [command for system in systems().values() for command in system.commands]
    lines = "".join(f"  {command.name:<10} {command.help}\n" for command in own)
    return HELP.format(version=__version__, commands=f"\nof one system:\n{lines}" if own else "")


def list_systems() -> int:
    """Print the installed systems with their papers and configurations."""
    from fulgurite.systems import packaged_configs, systems

    for system in systems().values():
        print(f"{system.name}: {system.title}\n  {system.paper}\n  {system.url}")
        for name in packaged_configs(system):
            print(f"    {name}")
    return 0


def system_command(name: str) -> Callable[[list[str]], int] | None:
    """The function behind a command that a system adds, or None."""
    from fulgurite.systems import systems

    for system in systems().values():
        for command in system.commands:
            if command.name == name:
                function: Callable[[list[str]], int] = pkgutil.resolve_name(command.main)
                return function
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    debug = "--debug" in argv or bool(os.environ.get("FULGURITE_DEBUG"))
    argv = [a for a in argv if a != "--debug"]
    try:
        if command in ("-h", "--help", "help"):
            print(help_text(), end="")
            return 0
        if command == "--version":
            print(__version__)
            return 0
        if command == "systems":
            return list_systems()
        if command in ("compare", "report"):
            from fulgurite import compare

            return (compare.main if command == "compare" else compare.report_main)(argv[1:])
        if command == "doctor":
            from fulgurite.doctor import doctor

            return doctor()
        if own := system_command(command):
            return own(argv[1:])
        from fulgurite.cli import run

        run(argv)
    except FulguriteError as error:
        if debug:
            raise
        print(f"fulgurite: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt as error:
        print(f"fulgurite: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"fulgurite: {error.message}", file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
