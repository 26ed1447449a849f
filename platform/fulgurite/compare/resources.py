"""What a task of a comparison reserves on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

from fulgurite.compare.schema import check_mapping, read_count, read_section, reader
from fulgurite.errors import ConfigError

__all__ = ["Resources", "read_resources"]


def _read_gpus(value: object, key_path: str) -> int | None:
    return None if value is None else read_count(value, key_path)


@dataclass(frozen=True)
class Resources:
    """What a task of a cluster reserves.

    Args:
        cpus: Number of cores.
        gpus: Number of GPUs; None for as many as the configurations take, where there are some.
    """

    cpus: int = field(default=1, metadata=reader(read_count))
    gpus: int | None = field(default=None, metadata=reader(_read_gpus))


def read_resources(value: object, key_path: str) -> Resources | None:
    """What a task of a cluster reserves, as the file says it; None where it says nothing.

    Raises:
        ConfigError: A key or a value is wrong.
    """
    if value is None:
        return None
    resources = Resources(**read_section(Resources, check_mapping(value, key_path), key_path))
    if resources.cpus < 1:
        raise ConfigError(f"{key_path}.cpus is {resources.cpus}.", "Give 1 or more.")
    return resources
