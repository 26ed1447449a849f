"""A client of a Flower federation: it answers the server from its own samples.

Axes: N_k samples of the client, K clients, P flat state size.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from torch import Tensor

from fulgurite.compare.yaml_file import read_yaml
from fulgurite.errors import ConfigError, FulguriteError
from fulgurite.foreign import describe_error
from fulgurite.loading import LoadedConfig, load
from fulgurite.models.fedsir.federation import Federation, Reply, Request, VisibleData
from fulgurite.models.fedsir.flower.client_state import (
    ClientState,
    Snapshot,
    read_state,
    write_state,
)
from fulgurite.models.fedsir.flower.records import (
    FlatRecord,
    class_name,
    flatten_message,
    message_class,
    restore_message,
)
from fulgurite.models.fedsir.flower.wire import pack, unpack
from fulgurite.models.fedsir.module import FederatedClassifier

__all__ = ["NodeOptions", "answer_message", "describe_client", "load_app"]

_CONFIG = "config.yaml"
_LONGEST_NAME = 100  # of a client, which a file is called after [bytes]


@dataclass(frozen=True)
class NodeOptions:
    """What the owner of a node says in ``flower-supernode --node-config``.

    Attributes:
        name: Name of the client, by which it comes back.
        partition: Number of its part of the configuration's data; None with data of its own.
        data: A YAML file with options of the data module, for data of its own.
        state: Folder in which the client keeps its labels between messages.
        device: Where it trains.
        partitions: Number of parts as Flower's simulation counts them; that of the configuration.
    """

    name: str
    partition: int | None = None
    data: str | None = None
    state: Path = Path("~/.flwr/fulgurite")
    device: str = "cpu"
    partitions: int | None = None

    @staticmethod
    def read(config: Mapping[str, Any]) -> NodeOptions:
        """Read a node's configuration.

        Raises:
            ConfigError: A key is unknown, or it says neither ``partition-id`` nor ``data``.
        """
        known = ("partition-id", "num-partitions", "client", "data", "state", "device")
        if unknown := sorted(set(config) - set(known)):
            raise ConfigError(
                f"The node's configuration has the unknown key {unknown[0]!r}.",
                f"The keys are {', '.join(known)}.",
            )
        partition, data = config.get("partition-id"), config.get("data")
        if (partition is None) == (data is None):
            raise ConfigError(
                "A client has either a part of the configuration's data or data of its own.",
                "Give --node-config 'partition-id=0', or 'data=\"own.yaml\" client=\"a-name\"'.",
            )
        if partition is not None and type(partition) is not int:
            raise ConfigError(f"partition-id is {partition!r}.", "Give a number from 0.")
        name = config.get("client", None if partition is None else str(partition))
        plain = str(name).replace("-", "").replace("_", "")
        if name is None or not plain.isalnum() or len(str(name).encode()) > _LONGEST_NAME:
            raise ConfigError(
                f"{name!r} is no name of a client.",
                f"Give --node-config 'client=\"a-name\"' of letters, digits, - and _, of at most "
                f"{_LONGEST_NAME} bytes.",
            )
        home = Path(os.environ.get("FLWR_HOME", "~/.flwr"))
        state = Path(str(config.get("state", home / "fulgurite"))).expanduser()
        device = str(config.get("device", "cpu"))
        return NodeOptions(
            str(name),
            partition,
            None if data is None else str(data),
            state=state,
            device=device,
            partitions=config.get("num-partitions") if data is None else None,
        )


class OneClient(VisibleData):
    """View of a DataModule as the samples of one client; the others have none here.

    Args:
        data: The DataModule, set up.
        part: The client's number in the DataModule.
        number: Its number in the federation.
        num_clients: Number K of clients of the federation.
    """

    def __init__(self, data: Any, *, part: int, number: int, num_clients: int) -> None:
        super().__init__(data)
        self.num_clients = num_clients
        end = {number: None}  # of the others, nothing
        self.client_index = lambda client: data.client_index(part)[: end.get(client, 0)]
        self.client_images = lambda client: data.client_images(part)[: end.get(client, 0)]


def load_app(folder: Path, data_file: str | None = None) -> tuple[LoadedConfig, Any]:
    """Make module and data of an app, the data set up; the last are kept for further messages.

    Args:
        folder: The app.
        data_file: YAML file of a client's own data.

    Raises:
        ConfigError: The file does not fit the app.
    """
    return _load_app(folder, data_file)


@functools.lru_cache(maxsize=4)
def _load_app(folder: Path, data_file: str | None) -> tuple[LoadedConfig, Any]:
    own = {} if data_file is None else _read_own_data(data_file)
    loaded = load(str(folder / _CONFIG), data=own)
    data: Any = loaded.data
    if data_file is not None and None in (data.image_options.mean, data.image_options.std):
        raise ConfigError(
            "Clients with data of their own would each measure another normalisation.",
            "Give the app `data.init_args.images.mean` and `std`, one number for each channel.",
        )
    data.prepare_data()
    data.setup("fit")
    return loaded, data


def _read_own_data(path: str) -> dict[str, Any]:
    """Read the options of a client's own data, all of which is the client's.

    Raises:
        ConfigError: The file is missing, or is no mapping of options.
    """
    content = read_yaml(Path(path).expanduser())
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content) or not content:
        raise ConfigError(
            f"The file {path} of the node's `data` has no options.",
            "Give a YAML file of options of the data module, such as `source: …`.",
        )
    fixed = {"clients": 1, "partition": {"class_path": "fulgurite.datamodules.fedsir.Iid"}}
    common = {*fixed, "images", "evaluation", "init_args", "class_path"}
    if taken := sorted(key for key in content if key.partition(".")[0] in common):
        raise ConfigError(
            f"{path} sets {taken[0]!r}, which all nodes have in common.",
            "Leave it out: all training images of the file are this client's.",
        )
    return {**fixed, "noise": None, "evaluation": {"val_fraction": 0.0}, **content}


def describe_client(context: Context, folder: Path) -> dict[str, Any]:
    """What the server must know of a client before it takes part: name, sizes and classes.

    Args:
        context: The node's context.
        folder: The app.

    Returns:
        The envelope of the reply; with ``error`` where the client cannot take part.
    """
    try:
        options = NodeOptions.read(context.node_config)
        _, data = load_app(folder, options.data)
        part = _check_partition(options, data.num_clients)
        _check_node(options)
        return {
            "name": options.name,
            "samples": len(data.client_index(part)),
            "classes": "\n".join(data.class_names),
            "channels": int(data.in_channels),
            "height": int(data.image_size[0]),
            "width": int(data.image_size[1]),
        }
    except FulguriteError as error:
        name = context.node_config.get("client", context.node_config.get("partition-id", "?"))
        return {"name": str(name), "error": str(error)}


def _check_node(options: NodeOptions) -> None:
    """Refuse a device or folder that would fail at the first message.

    Raises:
        ConfigError: There is no such device here, or the folder cannot be written.
    """
    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError and others
        raise ConfigError(
            f"The node cannot train on the device {options.device!r} ({describe_error(error)}).",
            "Give --node-config 'device=\"cpu\"', or a device of this machine.",
        ) from error
    try:
        options.state.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.state):
            pass
    except OSError as error:
        raise ConfigError(
            f"The node's folder `state`, {options.state}, cannot be written ({error.strerror}).",
            "Give --node-config 'state=\"FOLDER\"', one that the node may write into.",
        ) from error


def _check_partition(options: NodeOptions, parts: int) -> int:
    if options.partition is None:
        return 0
    if not 0 <= options.partition < parts:
        raise ConfigError(
            f"partition-id is {options.partition}, and the configuration has {parts} clients.",
            f"Give a number from 0 to {parts - 1}, or an app with more data.init_args.clients.",
        )
    if options.partitions not in (None, parts):
        raise ConfigError(
            f"num-partitions is {options.partitions}, and the configuration has {parts} clients.",
            f"Leave it out, or write the app with --data.clients={options.partitions}.",
        )
    return options.partition


def answer_message(message: Message, context: Context, folder: Path) -> Message:
    """Answer a message of the server.

    Args:
        message: The question.
        context: The node's context.
        folder: The app.

    Returns:
        The reply. Its envelope has ``needs_model`` where the client lacks the global model that the
        server believes it has, and ``error`` where the client cannot answer.
    """
    try:
        content = _answer(message, context, folder)
    except FulguriteError as error:
        content = pack({"error": str(error)})
    return Message(content, reply_to=message)


def _answer(message: Message, context: Context, folder: Path) -> Any:
    envelope, kind, flat = unpack(message.content)
    options = NodeOptions.read(context.node_config)
    path = options.state / str(envelope["run"]) / f"{options.name}.safetensors"
    stored = read_state(path)
    state = stored or ClientState(session=int(envelope["session"]))
    state.enter(int(envelope["round"]), int(envelope["session"]))
    if state.question != envelope["question"]:
        state.question = str(envelope["question"])
        if not _take_model(state, envelope, flat):
            return pack({"needs_model": True})
        _compute_reply(
            state, envelope, kind, flat, sides=_make_federation(options, envelope, folder)
        )
        write_state(path, state)
    facts = {"is_new": stored is None}
    if state.loss is not None:
        facts["loss"] = state.loss  # type: ignore[assignment]
    return pack(facts, state.kind, state.reply)


def _take_model(state: ClientState, envelope: Mapping[str, Any], flat: FlatRecord) -> bool:
    """Take a global model from the message, or put the stored one into it where it is left out.

    Returns:
        Whether the message has its model now.
    """
    name = envelope.get("model_hash")
    if name is None:
        return True
    if "model" in flat.tensors:
        state.model, state.model_hash = flat.tensors["model"], str(name)
    if state.model is None or state.model_hash != name:
        return False
    flat.tensors["model"] = state.model
    return True


def _make_federation(
    options: NodeOptions, envelope: Mapping[str, Any], folder: Path
) -> tuple[Federation, Any]:
    """Make a federation in which this client alone has samples, and the method's client side."""
    loaded, data = load_app(folder, options.data)
    model = loaded.model
    if not isinstance(model, FederatedClassifier):
        raise ConfigError(
            f"The app trains a {type(model).__name__}, which is not federated.",
            "Use model.class_path=fulgurite.models.fedsir.FederatedClassifier.",
        )
    view = OneClient(
        data,
        part=_check_partition(options, data.num_clients),
        number=int(envelope["number"]),
        num_clients=int(envelope["clients"]),
    )
    federation = Federation(
        view,
        model.network.to(options.device),
        model.optimizer,
        seed=int(envelope["seed"]),
        batch_size=model.local.batch_size,
        local_epochs=model.local.epochs,
        autocast=nullcontext,
        resident=model.local.resident,
    )
    return federation, model.method.client_side


def _compute_reply(
    state: ClientState,
    envelope: Mapping[str, Any],
    kind: str,
    flat: FlatRecord,
    *,
    sides: tuple[Federation, Any],
) -> None:
    """Let the client answer, and store the reply and what it keeps in ``state``."""
    federation, side = sides
    request_class = message_class(kind, Request)
    request = restore_message(request_class, _move(flat, federation.device))
    number = int(envelope["number"])
    client = federation.clients[number]
    state.current.restore(client)
    reply: Reply = federation.answer(side, {number: request})[number]
    loss = float(federation.loss_sum[number])
    state.loss = loss if request.epochs else None
    state.kind, state.reply = class_name(type(reply)), flatten_message(reply)
    state.current = Snapshot.of(client)


def _move(flat: FlatRecord, device: torch.device) -> FlatRecord:
    """Move the flat model to a device; class statistics stay on the CPU, as in a simulation."""
    moved: dict[str, Tensor] = {
        name: value.to(device) if name == "model" else value for name, value in flat.tensors.items()
    }
    return replace(flat, tensors=moved)
