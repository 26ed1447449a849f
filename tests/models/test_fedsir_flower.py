"""A federation over Flower's grid is its simulation, bit for bit; only messages leave clients."""

import copy
import dataclasses
import json
import tomllib
from contextlib import nullcontext

import pytest
import torch
import yaml
from fakes.fedsir import METHODS
from fakes.trainers import quiet_trainer
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("flwr", exc_type=ImportError)

from fakes.flower import (
    FakeGrid,
    class_of,
    envelope_of,
    identify_task,
    make_context,
    tensors_of,
)
from lightning import seed_everything

from fulgurite.__main__ import main
from fulgurite.datamodules.fedsir import ServerDataModule
from fulgurite.errors import ConfigError, DataError, RunError
from fulgurite.models.fedsir.command import write_app
from fulgurite.models.fedsir.federation import (
    Question,
    Reply,
    Request,
    TrainReply,
    TrainRequest,
    connect_clients,
)
from fulgurite.models.fedsir.federation.states import FlatState
from fulgurite.models.fedsir.flower import make_client_app
from fulgurite.models.fedsir.flower.client import NodeOptions, describe_client, load_app
from fulgurite.models.fedsir.flower.client_state import (
    ClientState,
    Snapshot,
    read_state,
    write_state,
)
from fulgurite.models.fedsir.flower.link import ClientFacts, GridClients, LinkOptions
from fulgurite.models.fedsir.flower.records import (
    class_name,
    flatten_message,
    message_class,
    restore_message,
)
from fulgurite.models.fedsir.flower.server import RunRecord, run_server
from fulgurite.models.fedsir.flower.wire import pack
from fulgurite.models.fedsir.methods.fedsir import RelabelRequest
from fulgurite.models.fedsir.methods.noise_aware import NoiseAwareTrainRequest
from fulgurite.models.fedsir.relabeling import References

CLIENTS, ROUNDS = 3, 3


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The package of an app: FedSIR with three clients."""
    folder = tmp_path_factory.mktemp("federation") / "three"
    write_app("fedsir/smoke.yaml", folder, overrides={"data": {"clients": CLIENTS}})
    return folder / "three"


@pytest.fixture
def grid(app, tmp_path, monkeypatch):
    """Three nodes, each with a part of the data."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    identify_task()
    return FakeGrid(make_client_app(app), {100 + k: {"partition-id": k} for k in range(CLIENTS)})


def with_method(app, folder, name):
    """The package of the same app with another method."""
    config = yaml.safe_load((app / "config.yaml").read_text())
    if name != "FedSIR":
        config["model"]["init_args"]["method"] = {"class_path": f"{METHODS}.{name}"}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def join(grid, *, session=1, names=(), **options):
    """The server's link, after its clients have joined."""
    facts = ClientFacts(tuple(map(str, range(10))), 1, (8, 8))
    limits = {"start_timeout": 0.5, "round_timeout": 5.0} | options
    clients = GridClients(
        grid, facts, LinkOptions(CLIENTS, **limits), run="run", session=session, names=list(names)
    )
    clients.gather_clients()
    return clients


def server_data(data, clients):
    """The server's data of a client's configuration."""
    return ServerDataModule(
        data.source,
        data.partition,
        data.noise,
        clients,
        evaluation=data.evaluation_options,
        images=data.image_options,
        seed=data.seed,
    )


def train(app, clients=None, *, rounds=ROUNDS, checkpoint=None, save=None):
    """The global model after some rounds, and the trainer; a simulation without clients."""
    loaded, data = load_app(app)
    model, callbacks = copy.deepcopy((loaded.model, loaded.trainer_arguments["callbacks"]))
    if clients is not None:
        data = server_data(data, len(clients.names))
        model.local = dataclasses.replace(model.local, vectorize=len(clients.names))
    else:
        data.labels.write(torch.arange(len(data.labels)), data.labels.given)
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=rounds, callbacks=callbacks, num_sanity_val_steps=2)
    with connect_clients(clients) if clients is not None else nullcontext():
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return FlatState(model.network).read(), trainer


@pytest.mark.parametrize(
    "method",
    ["FedSIR", *(pytest.param(m, marks=pytest.mark.slow) for m in ("FedAvg", "FedCorr", "RoFL"))],
)
def test_weights_are_those_of_the_simulation(app, grid, tmp_path, method):
    package = with_method(app, tmp_path / "app", method)
    grid.app = make_client_app(package)
    simulated, _ = train(package)
    federated, trainer = train(package, join(grid))
    assert torch.equal(federated, simulated)
    assert trainer.callback_metrics["cost/bytes_up"] > 0
    check_messages(grid, package)
    check_number_of_messages(grid)


def check_messages(grid, package):
    """No image, label or vector over samples is in a message, by the sizes of what is sent."""
    loaded, data = load_app(package)
    sizes = {len(data.client_index(k)) for k in range(CLIENTS)}
    # axes: flat state, classes, feature dimension, the two scores, residual rows
    allowed = {FlatState(loaded.model.network).size, 10, 64, 2, 12}
    assert not sizes & allowed
    for message in (message for pair in grid.exchanged for message in pair):
        for name, tensor in tensors_of(message).items():
            assert set(tensor.shape) <= allowed, (class_of(message), name, tensor.shape)
        scalars = {**message.content.config_records["message"], **envelope_of(message)}
        assert not any(isinstance(value, list | bytes) for value in scalars.values())


def check_number_of_messages(grid):
    """At most two questions to a client in a round."""
    counts = {}
    for question, _ in grid.exchanged:
        if envelope_of(question).get("round", -1) >= 0:
            key = envelope_of(question)["round"], envelope_of(question)["number"]
            counts[key] = counts.get(key, 0) + 1
    assert len(counts) == CLIENTS * ROUNDS
    assert max(counts.values()) <= 2


def test_a_node_that_dies_is_a_dropout_of_its_round_and_comes_back(app, grid):
    def kill_in_round_one(message, node):
        envelope = envelope_of(message)
        if class_of(message) != "NoiseAwareTrainRequest":
            return None
        if (envelope["number"], envelope["round"]) != (2, 1):
            return None
        grid.nodes.pop(node)
        grid.nodes[999] = {"partition-id": 2}  # started again: another number
        return "killed"

    grid.before_reply = kill_in_round_one
    _, trainer = train(app, join(grid))
    history = next(c for c in trainer.callbacks if hasattr(c, "history")).history
    assert [r["clients"] for r in history] == [[0, 1, 2], [0, 1], [0, 1, 2]]
    assert history[1]["weights"][2] == 0


def test_a_client_that_identification_needs_ends_the_run_by_name(app, grid):
    grid.before_reply = lambda message, node: "killed" if "number" in envelope_of(message) else None
    with pytest.raises(RunError, match="Client 0, 1, 2 did not answer in 1 s"):
        train(app, join(grid, round_timeout=1.0))


def test_a_server_that_was_killed_within_a_round_repeats_it(app, grid, tmp_path):
    undisturbed, _ = train(app)
    checkpoint = tmp_path / "after_round_1.ckpt"
    train(app, join(grid), rounds=2, save=checkpoint)

    def die(message, node):  # after two clients have relabeled and trained
        if envelope_of(message).get("round") == 2 and envelope_of(message)["number"] == 2:
            raise KeyboardInterrupt
        return

    grid.before_reply = die
    with pytest.raises(SystemExit):  # what Lightning makes of it
        train(app, join(grid, session=2, names="012"), checkpoint=checkpoint)
    grid.before_reply = None
    resumed, _ = train(app, join(grid, session=3, names="012"), checkpoint=checkpoint)
    assert torch.equal(resumed, undisturbed)


def test_a_question_that_comes_twice_is_answered_once(app, grid):
    train(app, join(grid), rounds=1)
    question, reply = next(
        pair for pair in grid.exchanged if class_of(pair[0]) == "NoiseAwareTrainRequest"
    )
    again = grid.app(question, make_context({"partition-id": envelope_of(question)["number"]}))
    assert (tensors_of(again)["model"] == tensors_of(reply)["model"]).all()


def test_a_model_goes_down_once_and_again_to_a_client_that_lost_it(app, grid, tmp_path):
    clients = join(grid)
    model = FlatState(load_app(app)[0].model.network).read()
    request = NoiseAwareTrainRequest(model=model, epochs=1, round=0, is_clean=True)

    def ask(has_model):
        question = Question(request=request, seed=0, round=0, has_model=has_model)
        return clients.ask({0: question})[0].reply.model

    first = ask(has_model=False)
    again = ask(has_model=True)
    assert torch.equal(again, first)
    assert "model" not in tensors_of(grid.exchanged[-1][0])
    path = next((tmp_path / "flower").rglob("0.safetensors"))
    state = read_state(path)
    state.model = None
    write_state(path, state)
    assert torch.equal(ask(has_model=True), first)
    (_, refusal), (repeated, _) = grid.exchanged[-2:]
    assert envelope_of(refusal)["needs_model"]
    assert "model" in tensors_of(repeated)


def own_data(folder, classes="0123456789", side=8):
    """A folder of images as a client's own, and the file that names it."""
    from PIL import Image

    for name in classes:
        (folder / "images" / "train" / name).mkdir(parents=True)
        (folder / "images" / "test" / name).mkdir(parents=True)
        for split, count in (("train", 4), ("test", 1)):
            for i in range(count):
                image = Image.new("L", (side, side), 20 * int(name) + i)
                image.save(folder / "images" / split / name / f"{i}.png")
    file = folder / "own.yaml"
    source = {
        "class_path": "fulgurite.datamodules.fedsir.ImageFolder",
        "init_args": {"path": str(folder / "images"), "channels": 1},
    }
    file.write_text(yaml.safe_dump({"source": source}))
    return str(file)


@pytest.mark.slow  # the next but one loses a client too
def test_clients_that_do_not_fit_are_refused_by_name_and_the_others_go_on(
    app, grid, tmp_path, workdir, log
):
    package = tmp_path / "app"
    package.mkdir()
    config = yaml.safe_load((app / "config.yaml").read_text())
    config["data"]["init_args"]["images"] |= {"mean": [0.3], "std": [0.3]}
    (package / "config.yaml").write_text(yaml.safe_dump(config))
    grid.app = make_client_app(package)
    grid.nodes = {
        1: {"partition-id": 0},
        2: {"client": "few-classes", "data": own_data(tmp_path / "few", "0123")},
        3: {"client": "large", "data": own_data(tmp_path / "large", side=9)},
        4: {"client": "own", "data": own_data(tmp_path / "own")},
        5: {"partition-id": 7},
        6: {"partition-id": 0},
        7: {"partition": 0},
    }
    clients = join(grid, min_clients=2)
    assert clients.names == ["0", "own"]
    assert clients.sizes.tolist()[1] == 40
    why = clients.refused
    assert "its classes are 0, 1, 2, 3, and the server's 0, 1" in why["few-classes"]
    assert "(1, 9, 9), and the server's (1, 8, 8)" in why["large"]
    assert "partition-id is 7, and the configuration has 3 clients" in why["7"]
    assert "there is a client of this name already" in why["0 (node 6)"]
    assert "unknown key 'partition'" in why["?"]
    assert "Client large is refused" in log.text


def test_own_data_need_a_normalisation_in_common(app, grid, tmp_path, workdir):
    grid.nodes = {1: {"client": "own", "data": own_data(tmp_path / "own")}}
    with pytest.raises(RunError, match="0 of 3 clients have come"):
        join(grid)
    reply = grid.exchanged[0][1]
    assert "would each measure another normalisation" in envelope_of(reply)["error"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "either a part of the configuration's data or data of its own"),
        ({"partition-id": 0, "data": "x"}, "either a part"),
        ({"partition-id": True}, "partition-id is True"),
        ({"partition-id": 0, "part": 1}, "unknown key 'part'"),
        ({"data": "x"}, "is no name of a client"),
        ({"data": "x", "client": "../x"}, "is no name of a client"),
        ({"data": "x", "client": "x" * 300}, "is no name of a client"),
    ],
)
def test_a_node_says_what_it_has(config, words):
    with pytest.raises(ConfigError, match=words):
        NodeOptions.read(config)


@pytest.mark.slow  # test_weights_are_those_of_the_simulation trains over the grid, too
def test_the_server_fits_and_tests_and_knows_its_clients_again(app, grid, tmp_path, workdir):
    folder = tmp_path / "run"
    run_config = {"run-dir": str(folder), "start-timeout": 1.0, "round-timeout": 20.0}
    run_server(grid, make_context(run_config=run_config), app)
    record = RunRecord.read(folder)
    assert record.clients == ["0", "1", "2"]
    assert json.loads((folder / "federation.json").read_text())["session"] == 1
    assert (folder / "test" / "metrics.csv").is_file() or list(folder.rglob("test*"))
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    simulated, _ = train(app, rounds=4)
    network = copy.deepcopy(load_app(app)[0].model)
    network.load_state_dict(state["state_dict"])
    assert torch.equal(FlatState(network.network).read(), simulated)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 3}, "unknown option 'rounds'"),
        ({"clients": -1}, "clients is -1"),
        ({"min-clients": "two"}, "min-clients is 'two'"),
        ({"start-timeout": float("nan")}, "start-timeout is nan"),
        ({"min-clients": 4}, "min-clients is 4, and the server waits for 3"),
    ],
)
def test_options_of_the_app_are_checked(app, grid, options, words):
    with pytest.raises(ConfigError, match=words):
        run_server(grid, make_context(run_config=options), app)


def test_the_server_holds_no_training_image(app):
    whole = load_app(app)[1]
    server = server_data(whole, CLIENTS)
    server.prepare_data()
    server.setup("fit")
    assert len(server.client_images(0)) == len(server.client_index(0)) == len(server.labels) == 0
    assert server.evaluation is None
    for loader in ("val_dataloader", "test_dataloader"):
        batches = zip(getattr(server, loader)(), getattr(whole, loader)(), strict=True)
        for ours, theirs in batches:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- messages ------------------------------------------------------------------------------------


def all_messages(base):
    pending = [base]
    while pending:
        kind = pending.pop()
        yield kind
        pending += kind.__subclasses__()


@given(st.integers(0, 10**6), st.floats(allow_nan=False), st.integers(1, 5))
def test_messages_come_back_as_they_were(epochs, number, size):
    request = RelabelRequest(
        model=torch.full((size,), number, dtype=torch.float64),
        epochs=epochs,
        references=References(
            direction=torch.rand(2, size, dtype=torch.float64),
            residual=torch.rand(2, 3, size),
            rows=torch.tensor([1, 3]),
            valid=torch.tensor([True, False]),
        ),
    )
    flat = flatten_message(request)
    restored = restore_message(message_class(class_name(RelabelRequest), Request), flat)
    assert type(restored) is RelabelRequest
    assert restored.epochs == epochs
    assert torch.equal(restored.model, request.model)
    for entry in dataclasses.fields(References):
        ours, theirs = (
            getattr(restored.references, entry.name),
            getattr(request.references, entry.name),
        )
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_every_class_of_messages_can_be_sent():
    names = {class_name(kind) for base in (Request, Reply) for kind in all_messages(base)}
    assert len(names) > 20
    for base in (Request, Reply):
        for kind in all_messages(base):
            assert message_class(class_name(kind), base) is kind


def test_messages_that_are_not_understood_are_refused():
    with pytest.raises(DataError, match=r"os\.system, which is no Request"):
        message_class("os.system", Request)
    flat = flatten_message(TrainRequest(model=torch.zeros(2), epochs=1, round=0))
    flat.scalars["more"] = 1
    with pytest.raises(DataError, match="unknown field 'more'"):
        restore_message(TrainRequest, flat)
    del flat.scalars["more"], flat.scalars["round"]
    with pytest.raises(DataError, match="lacks the field 'round'"):
        restore_message(TrainRequest, flat)
    flat.scalars["round"] = "first"
    with pytest.raises(DataError, match="has a str as 'round'"):
        restore_message(TrainRequest, flat)


def test_a_message_of_another_app_is_answered_by_an_error(app, grid):
    from flwr.app import ConfigRecord, Message, RecordDict

    content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    message = Message(content, dst_node_id=100, message_type="train")
    assert "without the record" in envelope_of(grid.answer(message))["error"]


# --- state of a client ---------------------------------------------------------------------------


def test_a_clients_state_comes_back_from_its_file(tmp_path):
    state = ClientState(
        round=3, session=2, question="2.9", kind="x", loss=0.5, model_hash="h",
        begin=Snapshot({"labels": torch.tensor([1, 2])}),
        current=Snapshot({"labels": torch.tensor([2, 2]), "memory.distil": torch.tensor([True])}),
        model=torch.rand(4),
    )  # fmt: skip
    write_state(tmp_path / "a.safetensors", state)
    again = read_state(tmp_path / "a.safetensors")
    assert (again.round, again.session, again.question, again.loss) == (3, 2, "2.9", 0.5)
    assert torch.equal(again.current.tensors["memory.distil"], torch.tensor([True]))
    assert torch.equal(again.begin.tensors["labels"], torch.tensor([1, 2]))
    assert torch.equal(again.model, state.model)
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is no state of a client"):
        read_state(tmp_path / "a.safetensors")


def test_a_client_ahead_of_its_server_says_so():
    with pytest.raises(DataError, match="in round 1, and this client was in round 3"):
        ClientState(round=3, session=1).enter(1, 2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"device": "meta"}, "cannot train on the device 'meta'"),
        ({"device": "none"}, "cannot train on the device 'none'"),
        ({"state": "/proc/fulgurite"}, "`state`, /proc/fulgurite, cannot be written"),
        ({"num-partitions": 5}, "num-partitions is 5, and the configuration has 3"),
    ],
)
def test_a_node_that_could_not_answer_does_not_join(app, config, words):
    context = make_context({"partition-id": 0, **config})
    assert words in describe_client(context, app)["error"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source: {a: 1}\nsource: {a: 2}", "own.yaml, line 2: this gives the key"),
        ("a: \xe9".encode("latin-1"), "no text in UTF-8"),
        ("source: {a: 1}\nevaluation: {batch_size: 7}", "sets 'evaluation'"),
        ("source: {a: 1}\nimages.mean: [0.5]", "sets 'images.mean'"),
        ("1: 2", "has no options"),
    ],
)
def test_options_of_a_nodes_own_data_are_its_own(app, tmp_path, text, words):
    file = tmp_path / "own.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    context = make_context({"client": "own", "data": str(file)})
    error = describe_client(context, app)["error"]
    assert words in error
    assert "holds a value that cannot be read" not in error


# --- the app -------------------------------------------------------------------------------------


def test_an_app_is_written_by_the_command_line(tmp_path, workdir, capsys):
    command = ["federate", "app", "fedsir/smoke.yaml", "--out=small", "--data.clients=2"]
    assert main(command) == 0
    assert "flwr run small" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "small" / "small" / "config.yaml").read_text())
    assert config["data"]["init_args"]["clients"] == 2
    assert "round-timeout = 600.0" in (tmp_path / "small" / "pyproject.toml").read_text()
    assert main(command) == 2
    assert "small is there already" in capsys.readouterr().err


def test_an_app_is_toml_whatever_its_publisher_is_called(tmp_path, app):
    config = tmp_path / 'a "b".yaml'
    config.write_text((app / "config.yaml").read_text())
    write_app(str(config), tmp_path / "quoted", publisher='"x" \\ ü')
    described = tomllib.loads((tmp_path / "quoted" / "pyproject.toml").read_text())
    assert described["tool"]["flwr"]["app"]["publisher"] == '"x" \\ ü'
    assert described["project"]["description"] == f"Federation of {config}"


@pytest.mark.parametrize(("name", "words"), [("class", "word of Python"), ("Json", "would hide")])
def test_an_app_has_a_name_that_can_be_imported(tmp_path, name, words):
    with pytest.raises(ConfigError, match=words):
        write_app("fedsir/smoke.yaml", tmp_path / name)


def test_what_no_federation_can_do_is_refused_after_an_edit_too(app, grid, tmp_path):
    config = yaml.safe_load((app / "config.yaml").read_text())
    config["trainer"]["precision"] = "bf16-mixed"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="train in 32 bits"):
        run_server(grid, make_context(), tmp_path)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("fedsir/smoke.yaml", ["--trainer.precision=bf16-mixed"], "precision is bf16-mixed"),
        pytest.param(
            "fedsir/smoke.yaml",
            ["--model.local.vectorize=2"],
            "vectorize is 2",
            marks=pytest.mark.slow,
        ),
        ("fedsir/smoke.yaml", ["--rounds=3"], "has no option --rounds=3"),
        pytest.param(
            "fedsir/smoke.yaml",
            ["--trainer.devices=2", "--trainer.strategy=federated"],
            "devices is 2",
            marks=pytest.mark.slow,
        ),
        pytest.param("fedsir/smoke.yaml", ["--data.clints=3"], "clints", marks=pytest.mark.slow),
        ("cs_arm_bn/smoke.yaml", [], "is not federated"),
    ],
)
def test_what_no_federation_can_do_is_refused(workdir, capsys, config, options, words):
    assert main(["federate", "app", config, "--out=app", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (workdir / "app").exists()


def test_a_reply_that_lacks_its_model_is_refused():
    with pytest.raises(DataError, match="lacks the field 'model'"):
        restore_message(TrainReply, flatten_message(Reply()))
    assert class_of_content(pack({}, "x.Y")) == "x.Y"


def class_of_content(content):
    return content.config_records["message"]["class"]
