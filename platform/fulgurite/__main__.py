"""The command ``fulgurite``. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Callable

from fulgurite import __version__
from fulgurite.commands import check_filled, find_local_modules, run_command
from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.systems import (
    RUN_COMMANDS,
    config_path,
    kind_of,
    packaged_configs,
    read_keys,
    systems,
    warn_of_broken_plug_ins,
)

HELP = """fulgurite {version}: research papers as plug-ins of one PyTorch Lightning trainer.

usage: fulgurite <command> [options]

run one system:
  fit        train            fulgurite fit --config fedsir/digits.yaml
  validate   evaluate on validation data
  test       evaluate on test data      fulgurite test --config fedsir/digits.yaml --ckpt_path last
  predict    write predictions

compare and look:
  compare    methods x settings x seeds  fulgurite compare fedsir/compare.yaml --quick
  sweep      a W&B sweep file without a server   fulgurite sweep fedsir/sweep.yaml --trials 8
  report     render a comparison or a run folder again
  export     write a trained network as ONNX, safetensors or torch.export
             fulgurite export runs/fedsir/digits/20260101-120000 --to onnx
  new        write the package of another paper, which runs at once   fulgurite new my_paper
  systems    list the installed systems, their papers and configurations
  doctor     versions, devices and known faults of this installation
  schema     a JSON schema of configurations, by which editors complete and check them
  completion what completes commands and options in a shell
             eval "$(fulgurite completion bash)"
{commands}
`fulgurite <command> --help` lists the options of a command. An option overrides the
configuration before it: --config first, then e.g. --trainer.max_epochs=5.
--debug shows the traceback of an error instead of one line.
"""


def help_text() -> str:
    """What ``fulgurite --help`` prints."""
    system_commands = [command for system in systems().values() for command in system.commands]
    lines = "".join(f"  {command.name:<10} {command.help}\n" for command in system_commands)
    return HELP.format(
        version=__version__, commands=f"\nof one system:\n{lines}" if system_commands else ""
    )


def list_systems() -> int:
    """Print the installed systems with their papers and configurations."""
    for system in systems().values():
        print(f"{system.name}: {system.title}\n  {system.paper}\n  {system.url}")
        for name in packaged_configs(system):
            path = config_path(name)
            kind = kind_of(read_keys(path)) if path else None
            if kind == "sweep":  # wandb needs the path
                print(f"    {name} (sweep: fulgurite sweep {name}, or wandb sweep {path})")
            else:
                print(f"    {name}{' (compare)' if kind == 'comparison' else ''}")
    return 0


def _sweep_main() -> Callable[[list[str]], int]:
    """The command line of sweeps, which need Optuna.

    Raises:
        MissingExtraError: A package that the command needs is not installed.
    """
    optional_import("optuna", "sweeps", "`fulgurite sweep`")
    from fulgurite import sweep

    return sweep.main


def system_command(name: str) -> Callable[[list[str]], int] | None:
    """The function behind a command that a system adds, or None."""
    for system in systems().values():
        for command in system.commands:
            if command.name == name:
                try:
                    function: Callable[[list[str]], int] = pkgutil.resolve_name(command.main)
                except Exception as error:  # the import of foreign code raises anything
                    raise ConfigError(
                        f"The command '{name}' of the system '{system.name}' cannot be loaded "
                        f"({type(error).__name__}: {error}).",
                        f"Repair {command.main}, or install what it needs.",
                    ) from error
                return function
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    return run_command([*(sys.argv[1:] if argv is None else argv)], _dispatch)


def _refuse_words(command: str, description: str, words: list[str]) -> None:
    """Refuse words behind a command that has no options but ``--help``."""
    parser = argparse.ArgumentParser(f"fulgurite {command}", description=description)
    parser.parse_args(words)


def _dispatch(argv: list[str]) -> int:
    """Run the command that the first word names."""
    command = argv[0] if argv else "--help"
    if command == "--version":
        print(__version__)
        return 0
    if command != "doctor":  # which lists all plug-ins
        warn_of_broken_plug_ins()
    if command in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if command == "systems":
        _refuse_words("systems", "List the installed systems and their configurations.", argv[1:])
        return list_systems()
    find_local_modules()
    if command not in (*RUN_COMMANDS, "completion"):  # runs have options whose value is a text
        check_filled(argv[1:])
    if command in ("compare", "report"):
        from fulgurite import compare

        return (compare.main if command == "compare" else compare.report_main)(argv[1:])
    if command == "sweep":
        return _sweep_main()(argv[1:])
    if command == "new":
        from fulgurite.scaffold import main as create

        return create(argv[1:])
    if command == "export":
        from fulgurite.export.command import main as export

        return export(argv[1:])
    if command == "schema":
        from fulgurite.schema.command import main as write_schema

        return write_schema(argv[1:])
    if command == "completion":
        from fulgurite.completion import main as complete

        return complete(argv[1:], _dispatch)
    if command == "doctor":
        from fulgurite.doctor import doctor

        _refuse_words("doctor", "Print versions, devices and known faults.", argv[1:])
        return doctor()
    if run_system_command := system_command(command):
        return run_system_command(argv[1:])
    from fulgurite.cli import run

    run(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
