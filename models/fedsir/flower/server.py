"""The server of a Flower federation: ``fulgurite fit`` whose clients are elsewhere."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from flwr.serverapp import Grid

from fulgurite.errors import ConfigError, RunError
from fulgurite.io import write_text
from fulgurite.loading import load
from fulgurite.models.fedsir.federation import connect_clients
from fulgurite.models.fedsir.flower.checks import check_federation
from fulgurite.models.fedsir.flower.link import ClientFacts, GridClients, LinkOptions

__all__ = ["RUN_CONFIG", "RunRecord", "run_server"]

log = logging.getLogger(__name__)

#: The app's options and their defaults, which ``flwr run --run-config`` overrides. 0 clients are
#: those of the configuration; an empty folder is that of the app's name.
RUN_CONFIG: dict[str, int | float | str] = {
    "run-dir": "",
    "clients": 0,
    "min-clients": 1,
    "start-timeout": 600.0,
    "round-timeout": 600.0,
}

_DATA = "fulgurite.datamodules.fedsir.ServerDataModule"
_RECORD = "federation.json"


@dataclass
class RunRecord:
    """What a server that is started again must know: ``federation.json`` of the run folder.

    Attributes:
        run: Name of the run, under which clients keep their state.
        session: Number of starts so far.
        clients: Names of the clients, in the order of their numbers.
        refused: Why others were refused, by name.
        samples: Number of samples of each client, by name.
    """

    run: str
    session: int = 0
    clients: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> RunRecord:
        """Read the record of a run folder, or begin one.

        Raises:
            RunError: The file is damaged.
        """
        file = folder / _RECORD
        if not file.is_file():
            return RunRecord(uuid.uuid4().hex)
        try:
            return RunRecord(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{file} is no record of a federation ({error}).",
                "Begin another run, in another `run-dir`.",
            ) from error

    def write(self, folder: Path) -> None:
        """Write the record."""
        write_text(folder / _RECORD, json.dumps(asdict(self), indent=2) + "\n")


def run_server(grid: Grid, context: Context, folder: Path) -> None:
    """Train, validate and test the app's configuration with the clients of the grid.

    A run folder with a checkpoint goes on from it: the rounds are those of an undisturbed run.

    Args:
        grid: Carries messages to nodes.
        context: The run's context.
        folder: The app.

    Raises:
        ConfigError: An option of the app is unknown or out of range.
        RunError: The training failed.
    """
    options = _read_options(context.run_config)
    run_dir = Path(str(options["run-dir"]) or f"runs/fedsir/{folder.name}/federation")
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / f"{folder.name}.yaml"
        _write_server_config(folder / "config.yaml", config)
        clients = _gather_clients(grid, config, options, run_dir)
        with connect_clients(clients):
            _run_commands(config, run_dir, len(clients.names))


def _write_server_config(source: Path, target: Path) -> None:
    """Write the app's configuration with the server's data in place of the clients'.

    Raises:
        ConfigError: It has been edited since the app was written, into no federation.
    """
    loaded = load(str(source))
    check_federation(loaded.model, loaded.data, loaded.config)
    config = dict(loaded.config)
    config["data"]["class_path"] = _DATA
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _gather_clients(
    grid: Grid, config: Path, options: Mapping[str, Any], run_dir: Path
) -> GridClients:
    """Wait for the clients, and record who they are."""
    loaded = load(str(config))
    data: Any = loaded.data
    data.prepare_data()
    data.setup("fit")
    record = RunRecord.read(run_dir)
    record.session += 1
    expected = len(record.clients) or int(options["clients"]) or int(data.num_clients)
    if int(options["min-clients"]) > expected:
        raise ConfigError(
            f"min-clients is {options['min-clients']}, and the server waits for {expected} "
            "clients.",
            "Give a smaller number, or set `clients`.",
        )
    clients = GridClients(
        grid,
        ClientFacts(tuple(data.class_names), int(data.in_channels), tuple(data.image_size)),
        LinkOptions(
            clients=expected,
            min_clients=int(options["min-clients"]),
            start_timeout=float(options["start-timeout"]),
            round_timeout=float(options["round-timeout"]),
        ),
        run=record.run,
        session=record.session,
        names=list(record.clients),
    )
    clients.samples.update(record.samples)
    clients.gather_clients()
    record.clients, record.refused = clients.names, clients.refused
    record.samples = {name: clients.samples[name] for name in clients.names}
    record.write(run_dir)
    return clients


def _run_commands(config: Path, run_dir: Path, clients: int) -> None:
    """Fit, or go on with it, and test the last model.

    Raises:
        RunError: One of them failed, and has said why.
    """
    from fulgurite.__main__ import main

    options = [
        f"--config={config}",
        f"--data.init_args.clients={clients}",
        # all clients of a round train at once, each on its own machine
        f"--model.init_args.local.vectorize={clients}",
        f"--run.dir={run_dir}",
        "--trainer.enable_progress_bar=false",
    ]
    last = ["--ckpt_path=last"] if (run_dir / "checkpoints" / "last.ckpt").is_file() else []
    for command in (["fit", *options, *last], ["test", *options, "--ckpt_path=last"]):
        if main(command) != 0:
            raise RunError(
                f"`fulgurite {command[0]}` of the server failed in {run_dir}.",
                "Its last line says why; run the app again to go on.",
            )


def _read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check the run's options.

    Raises:
        ConfigError: One is unknown, of the wrong type, negative or not finite.
    """
    if unknown := sorted(set(config) - set(RUN_CONFIG)):
        raise ConfigError(
            f"The app has the unknown option {unknown[0]!r}.",
            f"The options are {', '.join(RUN_CONFIG)}.",
        )
    options = {**RUN_CONFIG, **config}
    for name, default in RUN_CONFIG.items():
        value = options[name]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ConfigError(f"{name} is {value!r}.", f"Give a {type(default).__name__}.")
        if not isinstance(value, str) and not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value!r}.", "Give a number that is not negative.")
    return options
