"""Which systems are installed: ours, and those that other packages announce.

A package adds a system with an entry point in the group ``fulgurite.systems`` whose value is a
:class:`System`; its configurations are the YAML files of ``System.configs``, a package.
Nothing here imports torch: ``fulgurite systems`` answers at once.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from fulgurite.errors import ConfigError, Terminated

__all__ = [
    "ENTRY_POINTS",
    "RESERVED_COMMANDS",
    "RUN_COMMANDS",
    "Command",
    "PlugIn",
    "System",
    "check_kind",
    "config_path",
    "kind_of",
    "list_configs",
    "name_system",
    "packaged_configs",
    "plug_ins",
    "read_keys",
    "resolve_config",
    "system_of_config",
    "systems",
    "warn_of_broken_plug_ins",
]

#: Group of entry points in which other packages announce their systems.
ENTRY_POINTS = "fulgurite.systems"

#: Commands that run a configuration.
RUN_COMMANDS = ("fit", "validate", "test", "predict")

_WORD = r"\w[\w.-]*"
_TEXTS = ("name", "title", "paper", "url", "configs")

#: Words of ``fulgurite`` itself, which no system may take.
RESERVED_COMMANDS = frozenset(
    (
        *RUN_COMMANDS,
        "compare",
        "report",
        "systems",
        "doctor",
        "sweep",
        "new",
        "export",
        "schema",
        "completion",
        "help",
    )
)


@dataclass(frozen=True)
class Command:
    """A command that a system adds to ``fulgurite``.

    Args:
        name: Word on the command line.
        help: What it does, a few words, for ``fulgurite --help``.
        main: ``module:function`` that takes the arguments and returns the exit status.
    """

    name: str
    help: str
    main: str


@dataclass(frozen=True)
class System:
    """One paper as a plug-in.

    Args:
        name: The word that names its folders and its configurations.
        title: What it does, one line.
        paper: The paper's title.
        url: Where the paper is.
        configs: Import name of the package that holds its YAML files.
        commands: Commands of its own.
    """

    name: str
    title: str
    paper: str
    url: str
    configs: str
    commands: tuple[Command, ...] = ()


OURS = (
    System(
        "fedsir",
        "federated learning with noisy labels: spectral identification and relabeling",
        "FedSIR: Spectral Client Identification and Relabeling for Federated Learning with "
        "Noisy Labels",
        "https://arxiv.org/abs/2604.20825",
        "fulgurite.configs.fedsir",
        (
            Command(
                "federate",
                "a Flower app of a configuration: the same rounds over a network",
                "fulgurite.models.fedsir.command:main",
            ),
        ),
    ),
    System(
        "cs_arm_bn",
        "plate images: BatchNorm adapted to each plate by its control samples",
        "Closing the Domain Gap in Biomedical Imaging by In-Context Control Samples",
        "https://arxiv.org/abs/2604.20824",
        "fulgurite.configs.cs_arm_bn",
        (
            Command(
                "plates",
                "a table of plates of your own: a template, and a check",
                "fulgurite.datamodules.cs_arm_bn.command:main",
            ),
        ),
    ),
    System(
        "stream_cqsa",
        "exact attention in any memory budget, for any model, as a strategy",
        "Stream-CQSA: exact attention in any memory budget by cyclic quorum sets",
        "https://arxiv.org/abs/2604.20819",
        "fulgurite.configs.stream_cqsa",
        (
            Command(
                "attend",
                "attention over tensors in files, by processes or the nodes of a cluster",
                "fulgurite.attention.command:main",
            ),
        ),
    ),
    System(
        "number_probing",
        "language models: Fourier spectra and mod-T probes of their number embeddings",
        "Convergent Evolution: How Different Language Models Learn Similar Number Representations",
        "https://arxiv.org/abs/2604.20817",
        "fulgurite.configs.number_probing",
        (
            Command(
                "probe",
                "periods in any table of number embeddings: glove, minilm, a folder or a file",
                "fulgurite.models.number_probing.reports.command:main",
            ),
            Command(
                "probe-history",
                "what ModularProbe saw of runs, or of a comparison, against the steps",
                "fulgurite.models.number_probing.reports.history:main",
            ),
        ),
    ),
    System(
        "ice_layers",
        "snow-radar layers: broken and absent ones completed, conditioned on climate physics",
        "Physics-Conditioned Synthesis of Internal Ice-Layer Thickness for Incomplete Layer Traces",
        "https://arxiv.org/abs/2604.20783",
        "fulgurite.configs.ice_layers",
    ),
)


@dataclass(frozen=True)
class PlugIn:
    """A system that another package announces, or why it cannot be used.

    Args:
        name: Name of the entry point.
        origin: Where it is: the entry point's value and the package that announces it.
        system: What was announced; None where it cannot be used.
        fault: Why not; empty where it can.
    """

    name: str
    origin: str
    system: System | None = None
    fault: str = ""

    def __str__(self) -> str:
        state = f" cannot be used: {self.fault}" if self.fault else ""
        return f"the plug-in '{self.name}' ({self.origin}){state}"


@functools.cache
def plug_ins() -> tuple[PlugIn, ...]:
    """What other packages announce; one that is broken carries its fault and stops nothing else."""
    accepted = {system.name: system for system in OURS}
    announced: list[PlugIn] = []
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        package = f", of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
        origin = f"{entry.value}{package}"
        try:
            with redirect_stdout(sys.stderr):  # what commands print may be read by programs
                system = entry.load()
            if fault := _fault_of(system, accepted):
                raise ConfigError(fault)
            accepted[system.name] = system
            announced.append(PlugIn(entry.name, origin, system))
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:  # the import of foreign code raises anything
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            fault = " ".join(f"{kind}{error}".split())
            announced.append(PlugIn(entry.name, origin, fault=fault.rstrip(".: ") + "."))
    return tuple(announced)


def _fault_of(system: Any, accepted: Mapping[str, System]) -> str:
    """Why an announced object is no system that can be added to the accepted ones, or nothing."""
    if not isinstance(system, System):
        return f"it is a {type(system).__name__}, not a fulgurite.systems.System"
    if wrong := [name for name in _TEXTS if not isinstance(getattr(system, name), str)]:
        return f"its {wrong[0]} is {getattr(system, wrong[0])!r}, not a text"
    if not re.fullmatch(_WORD, system.name):
        return f"its name {system.name!r} is no word of letters, digits, '_', '.' and '-'"
    if system.name in accepted:
        return f"there is a system named '{system.name}' already"
    taken = {command.name for other in accepted.values() for command in other.commands}
    for command in system.commands:
        if command.name in taken | RESERVED_COMMANDS:
            return f"there is a command '{command.name}' already"
        if not re.fullmatch(_WORD, command.name):
            return f"its command {command.name!r} is no word of letters, digits, '_', '.' and '-'"
        taken.add(command.name)
    list(packaged_configs(system))  # raises where there is no such package
    return ""


def warn_of_broken_plug_ins() -> None:
    """Say on stderr, in a line each, which plug-ins cannot be used and why."""
    for plug_in in plug_ins():
        if plug_in.fault:
            print(
                f"fulgurite: warning: {plug_in} Repair or uninstall it.",
                file=sys.stderr,
                flush=True,
            )


def systems() -> dict[str, System]:
    """All installed systems by name, without the plug-ins that are broken."""
    announced = (plug_in.system for plug_in in plug_ins())
    return {system.name: system for system in (*OURS, *announced) if system is not None}


#: What fulgurite does with a kind of file, for errors and for ``fulgurite systems``.
KINDS = {
    "run": "fulgurite fit --config {name}",
    "comparison": "fulgurite compare {name}",
    "sweep": "fulgurite sweep {name}",
}


def read_keys(path: Path) -> list[str]:
    """The keys of the first level of a YAML file, without parsing it: that takes much longer."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # who reads all of it says what is wrong
        return []
    return re.findall(r"^([A-Za-z_]\w*)\s*:(?=\s|$)", text, re.MULTILINE)


def kind_of(keys: Iterable[str]) -> str | None:
    """What a file with these keys of the first level describes, where they tell.

    Example:
        >>> kind_of(["config", "methods", "seeds"]), kind_of(["trainer", "model"])
        ('comparison', 'run')
        >>> kind_of(["method", "metric", "parameters"]), kind_of(["title"])
        ('sweep', None)
    """
    names = {*keys}
    if "parameters" in names and names & {"method", "metric", "command"}:
        return "sweep"
    if "methods" in names and not names & {"model", "data", "trainer"}:
        return "comparison"
    return "run" if names & {"model", "data", "trainer"} and "methods" not in names else None


def check_kind(name: str, keys: Iterable[str], kind: str) -> None:
    """Refuse a file that is meant for another command.

    Args:
        name: As it was given.
        keys: Its keys of the first level.
        kind: What is expected: ``run``, ``comparison`` or ``sweep``.

    Raises:
        ConfigError: The file describes another kind.
    """
    other = kind_of(keys)
    if other is not None and other != kind:
        command = KINDS[other].format(name=name, path=config_path(name) or name)
        raise ConfigError(f"'{name}' describes a {other}, not a {kind}.", f"Use `{command}`.")


def packaged_configs(system: System) -> Iterator[str]:
    """Names such as ``fedsir/digits.yaml`` of the system's packaged configurations."""
    for file in sorted(resources.files(system.configs).iterdir(), key=lambda f: f.name):
        if file.name.endswith((".yaml", ".yml")):
            yield f"{system.name}/{file.name}"


def list_configs(kind: str) -> list[str]:
    """Names of the packaged configurations of one kind: ``run``, ``comparison`` or ``sweep``.

    Example:
        >>> "fedsir/compare.yaml" in list_configs("comparison")
        True
    """
    names = [name for system in systems().values() for name in packaged_configs(system)]
    paths = {name: config_path(name) for name in names}
    return [name for name, path in paths.items() if path and kind_of(read_keys(path)) == kind]


def config_path(name: str) -> Path | None:
    """The file behind a packaged name (``fedsir/digits.yaml``), or None if there is none."""
    folder, _, file = name.partition("/")
    system = systems().get(folder)
    if system is None or not file:
        return None
    path = Path(str(resources.files(system.configs).joinpath(file)))
    return path if path.is_file() else None


def system_of_config(path: str | Path) -> str | None:
    """The name of the system that a configuration file is packaged with, or None for other files.

    The name of its folder does not say it: a plug-in's is mostly called ``configs``.

    Example:
        >>> system_of_config(resolve_config("fedsir/digits.yaml"))
        'fedsir'
        >>> system_of_config("mine.yaml") is None
        True
    """
    folder = Path(path).resolve().parent
    for system in systems().values():
        configs = resources.files(system.configs).iterdir()
        if any(Path(str(file)).parent.resolve() == folder for file in configs):
            return system.name
    return None


def name_system(path: Path) -> str:
    """The system of a configuration file, or the name of its folder where it has none."""
    return system_of_config(path) or path.resolve().parent.name


def resolve_config(name: str) -> Path:
    """A configuration by path or packaged name.

    Raises:
        ConfigError: If there is neither; the message names the nearest packaged ones.
    """
    if Path(name).is_file():
        return Path(name)
    if packaged := config_path(name):
        return packaged
    configs = [c for system in systems().values() for c in packaged_configs(system)]
    for plug_in in plug_ins():
        if plug_in.fault and plug_in.name == name.partition("/")[0]:
            raise ConfigError(f"The configuration '{name}' is out of reach: {plug_in}")
    near = difflib.get_close_matches(name, configs, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}." if near else "`fulgurite systems` lists them."
    system = name.partition("/")[0]
    if "/" in name and not difflib.get_close_matches(system, systems()):
        hint = (
            f"There is no such file in {Path.cwd()}, and no installed system is called '{system}' "
            "(`fulgurite systems` lists them): a package of yours is installed by "
            "`pip install -e FOLDER`."
        )
    raise ConfigError(f"There is no configuration '{name}', neither a file nor packaged.", hint)
