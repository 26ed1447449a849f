"""Which systems are installed: ours, and those that other packages announce.

A package adds a system with an entry point in the group ``fulgurite.systems`` whose value is a
:class:`System`; its configurations are the YAML files of ``System.configs``, a package.
Nothing here imports torch: ``fulgurite systems`` answers at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from fulgurite.errors import ConfigError

__all__ = [
    "Command",
    "System",
    "config_path",
    "packaged_configs",
    "resolve_config",
    "system_of_config",
    "systems",
]


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
    ),
    System(
        "cs_arm_bn",
        "plate images: BatchNorm adapted to each plate by its control samples",
        "Closing the Domain Gap in Biomedical Imaging by In-Context Control Samples",
        "https://arxiv.org/abs/2604.20824",
        "fulgurite.configs.cs_arm_bn",
    ),
    System(
        "stream_cqsa",
        "exact attention in any memory budget, for any model, as a strategy",
        "Stream-CQSA: exact attention in any memory budget by cyclic quorum sets",
        "https://arxiv.org/abs/2604.20819",
        "fulgurite.configs.stream_cqsa",
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
                "fulgurite.models.number_probing.command:main",
            ),
            Command(
                "probe-history",
                "what ModularProbe saw of runs, or of a comparison, against the steps",
                "fulgurite.models.number_probing.history:main",
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


def systems() -> dict[str, System]:
    """All installed systems by name.

    Raises:
        ConfigError: If two packages announce the same name, or an entry point is no ``System``.
    """
    found = {system.name: system for system in OURS}
    for entry in metadata.entry_points(group="fulgurite.systems"):
        system = entry.load()
        if not isinstance(system, System):
            raise ConfigError(
                f"The entry point '{entry.name}' of group fulgurite.systems is no "
                "fulgurite.systems.System.",
                f"Mend or uninstall the package behind '{entry.value}'.",
            )
        if system.name in found:
            raise ConfigError(
                f"Two packages announce a system named '{system.name}'.",
                f"Rename one of them; the second is '{entry.value}'.",
            )
        found[system.name] = system
    return found


def packaged_configs(system: System) -> Iterator[str]:
    """Names such as ``fedsir/digits.yaml`` of the system's packaged configurations."""
    for file in sorted(resources.files(system.configs).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            yield f"{system.name}/{file.name}"


def config_path(name: str) -> Path | None:
    """The file behind a packaged name (``fedsir/digits.yaml``), or None if there is none."""
    folder, _, file = name.partition("/")
    system = systems().get(folder)
    if system is None or not file:
        return None
    path = Path(str(resources.files(system.configs))) / file
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
        if Path(str(resources.files(system.configs))).resolve() == folder:
            return system.name
    return None


def resolve_config(name: str) -> Path:
    """A configuration by path or packaged name.

    Raises:
        ConfigError: If there is neither; the message names the nearest packaged ones.
    """
    if Path(name).is_file():
        return Path(name)
    if packaged := config_path(name):
        return packaged
    known = [c for system in systems().values() for c in packaged_configs(system)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}." if near else "`fulgurite systems` lists them."
    raise ConfigError(f"There is no configuration '{name}', neither a file nor packaged.", hint)
