"""The rounds engine: schedule, ranks, kill and resume, no leak, participation."""

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from fakes.fedsir import METHODS
from fakes.options import QUIET
from fakes.trainers import quiet_trainer
from hypothesis import example, given
from hypothesis import strategies as st

from fulgurite.callbacks.fedsir import FederatedRounds
from fulgurite.datamodules.fedsir import Digits, FederatedDataModule, Iid
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir import DigitsNet, FederatedClassifier
from fulgurite.models.fedsir.engine import RoundEngine
from fulgurite.models.fedsir.federation import (
    balanced_assignment,
    exact_average,
    keyed_generator,
    mini_batches,
)
from fulgurite.models.fedsir.methods import FedAvg, FedSIR
from fulgurite.models.fedsir.methods.options import RelabelingOptions
from fulgurite.models.fedsir.options import RoundOptions

LAST = "checkpoints/last.ckpt"


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- arithmetic --------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_average_is_the_weighted_sum_in_any_order(clients, seed):
    generator = torch.Generator().manual_seed(seed)
    states = {
        k: torch.randn(30, generator=generator) * 10 ** float(k % 4 - 2) for k in range(clients)
    }
    weights = torch.rand(clients, generator=generator).double()
    weights = dict(enumerate((weights / weights.sum()).tolist()))
    average = exact_average(states, weights, [10, 20], device=torch.device("cpu"))
    backwards = dict(reversed(states.items()))
    again = exact_average(backwards, weights, [10, 20], device=torch.device("cpu"))
    assert torch.equal(average, again)
    expected = sum(weights[k] * states[k].double() for k in states)
    assert torch.allclose(average.double(), expected, rtol=1e-6, atol=1e-6)


def test_average_of_one_is_itself_and_a_diverged_client_is_named():
    state = torch.randn(50)
    device = torch.device("cpu")
    assert torch.equal(exact_average({3: state}, {3: 1.0}, [50], device=device), state)
    with pytest.raises(ConfigError, match="client 1 diverged"):
        exact_average({1: state / 0}, {1: 1.0}, [50], device=device)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 5))
def test_assignment_deals_every_client_to_one_rank_in_equal_counts(sizes, ranks):
    groups = balanced_assignment(dict(enumerate(sizes)), ranks)
    assert sorted(k for group in groups for k in group) == list(range(len(sizes)))
    assert max(map(len, groups)) == -(-len(sizes) // ranks)


@given(st.integers(1, 40), st.integers(2, 9))
def test_mini_batches_cover_all_samples_and_leave_no_single_one(samples, size):
    batches = mini_batches(samples, size, keyed_generator("test", samples, size))
    assert sorted(torch.cat(batches).tolist()) == list(range(samples))
    assert samples == 1 or min(map(len, batches)) > 1


def test_relabeling_follows_the_paper_schedule(monkeypatch):
    method, rounds = FedSIR(relabeling=RelabelingOptions(every=20)), []
    monkeypatch.setattr(method, "relabel_noisy_clients", lambda fed, round: rounds.append(round))
    for r in range(100):
        method.before_round(None, r)
    assert rounds == [20, 40, 60, 80]


# --- whole runs --------------------------------------------------------------------------------


@pytest.fixture
def final(fit, weights):
    """Final weights of a smoke run with options."""

    def call(name, *options):
        fit(f"--run.dir={name}", *options)
        return weights(f"{name}/{LAST}")

    return call


@pytest.fixture(scope="module")
def trained(train_once):
    """The CLI and the folder of a smoke run without further options."""
    cli, folder = train_once("fit", "--config", "fedsir/smoke.yaml", "--run.dir=run")
    return cli, folder / "run"


@pytest.fixture
def default_run(trained):
    """The folder of that run."""
    return trained[1]


@pytest.fixture
def default(default_run, weights):
    """Final weights of that run."""
    return weights(default_run / LAST)


@pytest.mark.slow  # the next two have the same seed, the third has another
def test_same_seed_same_weights_and_another_seed_others(default, final):
    one = default
    assert equal(one, final("two"))
    assert not equal(one, final("three", "--seed_everything=1"))


def test_the_callback_does_not_change_the_weights(default, final):
    assert equal(default, final("plain", "--trainer.callbacks=[]"))


def train_average(options, *, callbacks=(), clients=4, epochs=1, seed=3):
    """A model of FedAvg after some rounds, without a command line."""
    lightning.seed_everything(seed)
    data = FederatedDataModule(Digits(copies=1), Iid(), clients=clients)
    adam = partial(torch.optim.Adam, lr=0.01)
    model = FederatedClassifier(DigitsNet, adam, method=FedAvg(), rounds=options)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks], num_sanity_val_steps=2)
    trainer.fit(model, datamodule=data)
    assert model.engine.round == epochs
    return model


def test_a_plain_trainer_trains_the_weights_of_one_with_the_callback(workdir):
    def train(**options):
        return train_average(RoundOptions(dropout=0.3), epochs=2, **options).network.state_dict()

    plain = train()
    assert equal(plain, train(callbacks=[FederatedRounds(figures=False)]))
    assert not equal(plain, train(seed=4))


def test_only_noisy_clients_are_relabeled_and_their_labels_get_better(trained):
    cli, folder = trained
    data, rounds = cli.datamodule, cli.trainer.callbacks[0]
    for callback in cli.trainer.callbacks:
        if isinstance(callback, FederatedRounds):
            rounds = callback
    method = rounds.engine.method
    assert method.relabel_rounds == [2]
    changed = data.labels.current != data.labels.given
    for client in range(data.num_clients):
        touched = bool(changed[data.client_index(client)].any())
        assert touched == (not bool(method.clean[client]))
    before, after = rounds.history[0]["noise"], rounds.history[-1]["noise"]
    assert sum(after) < 0.8 * sum(before)
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["cost/rounds"]]
    _check_costs(rows, rounds)
    assert {"clients.png", "rounds.png", "similarities.png"} <= set(os.listdir(folder / "figures"))


def _check_costs(rows, rounds):
    """Of FedSIR on 4 clients: Stage I, a relabeling before round 2, and 4 rounds."""
    fed, clean = rounds.engine.fed, int(rounds.engine.method.clean.sum())
    noisy = 4 - clean
    model, per_class = fed.state_bytes, 13 * 64 * 4  # a direction and 12 rows of 64 features
    references = fed.num_classes * per_class
    up = [4 * 8 + clean * model + 4 * model * (r + 1) for r in range(4)]  # 8: two statistics
    down = [4 * model + 4 * model * (r + 1) for r in range(4)]
    for r in (2, 3):  # the clean clients' average reaches all, as clean ones make references of it
        up[r] += clean * references
        down[r] += noisy * references + 4 * model
    for r, row in enumerate(rows):
        assert float(row["cost/rounds"]) == r + 1
        assert float(row["cost/client_epochs"]) == 4 * 5 + 4 * (r + 1)
        assert float(row["cost/bytes_up"]) == pytest.approx(up[r], rel=1e-6)  # float32 in the log
        assert float(row["cost/bytes_down"]) == pytest.approx(down[r], rel=1e-6)
    assert (fed.costs.bytes_up, fed.costs.bytes_down) == (up[-1], down[-1])


CLEAN_ONLY = (
    f"--model.init_args.method={METHODS}.CleanOnly",
    "--model.init_args.method.identification.epochs=5",
    "--model.init_args.method.identification.min_count=5",
    "--model.init_args.method.identification.always_split=true",
    "--trainer.max_epochs=50",
)


def test_training_ends_within_the_budget_of_client_epochs(fit, weights):
    cli = fit(*CLEAN_ONLY, "--model.init_args.rounds.max_client_epochs=27", "--run.dir=run")
    (rounds,) = (c for c in cli.trainer.callbacks if isinstance(c, FederatedRounds))
    clean = int(rounds.engine.method.clean.sum())
    assert clean < 4
    number = (27 - 4 * 5) // clean
    assert rounds.engine.fed.costs.rounds == number
    assert rounds.engine.fed.costs.client_epochs == 20 + number * clean
    plain = fit(*CLEAN_ONLY, f"--trainer.max_epochs={number}", "--run.dir=plain")
    assert plain.trainer.current_epoch == cli.trainer.current_epoch == number
    assert equal(weights(f"run/{LAST}"), weights(f"plain/{LAST}"))


@pytest.mark.slow
def test_a_resumed_training_keeps_the_budget(fit, fulgurite, weights):
    budget = (*CLEAN_ONLY, "--model.init_args.rounds.max_client_epochs=26")
    fit(*budget, "--run.dir=whole")
    fit(*budget, "--run.dir=run", "--trainer.max_epochs=1")
    options = (*budget, "--run.dir=run", "--ckpt_path=last")
    cli = fit(*options)
    assert equal(weights("run/" + LAST), weights("whole/" + LAST))
    assert cli.trainer.current_epoch > 1
    status, _, _ = fulgurite("fit", "--config", "fedsir/smoke.yaml", *options)
    assert status == 0  # nothing is left
    assert equal(weights("run/" + LAST), weights("whole/" + LAST))
    os.remove("run/summary.json")  # as if killed right after the last checkpoint
    fit(*options)
    assert equal(weights("run/" + LAST), weights("whole/" + LAST))
    with open("run/summary.json") as one, open("whole/summary.json") as other:
        assert json.load(one) == json.load(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ("max_client_epochs=0",),
            "v>0 (given: rounds.max_client_epochs=",
            marks=pytest.mark.slow,
        ),
        (("max_client_epochs=20",), "20 client-epochs are spent before the first round. Give 24"),
        pytest.param(
            ("max_client_epochs=22",),
            "were spent before it, and it needs 4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_budget_that_does_not_suffice_is_refused(fulgurite, options, message):
    given = [f"--model.init_args.rounds.{option}" for option in options]
    status, _, error = fulgurite("fit", "--config", "fedsir/smoke.yaml", *given)
    assert status == 2
    assert message in error


def test_a_budget_that_the_trainer_would_exceed_is_refused(fulgurite):
    status, _, error = fulgurite(
        "fit", "--config", "fedsir/smoke.yaml", "--model.init_args.rounds.max_client_epochs=30",
        "--trainer.min_epochs=3",
    )  # fmt: skip
    assert status == 2
    assert "trainer.min_epochs" in error


def test_truth_is_out_of_reach_of_the_method(trained, final, monkeypatch):
    from fulgurite.datamodules.fedsir import FederatedDataModule

    cli, folder = trained
    (rounds,) = (c for c in cli.trainer.callbacks if isinstance(c, FederatedRounds))
    true = cli.datamodule.evaluation.true
    for name in vars(rounds.engine.fed.data):
        value = getattr(rounds.engine.fed.data, name)
        assert not (isinstance(value, torch.Tensor) and torch.equal(value, true)), name
    assert not hasattr(rounds.engine.fed.data, "evaluation")
    assert not hasattr(rounds.engine.fed.data, "samples")
    setup = FederatedDataModule.setup

    def blind(self, stage=None):
        setup(self, stage)
        self.evaluation, self.samples = None, None

    monkeypatch.setattr(FederatedDataModule, "setup", blind)
    blinded = final("blind")
    seen = torch.load(folder / LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(seen[k], v) for k, v in blinded.items())


@pytest.mark.parametrize(
    "options",
    [
        ("relabeling.every=0", "relabeling.distil_on=all"),
        pytest.param(
            ("aggregation.rule=size", "losses.prior=current", "relabeling.mode=sr"),
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.slow
def test_switches_change_the_weights(default, final, options):
    for i, option in enumerate(options):
        changed = final(f"run{i}", f"--model.init_args.method.init_args.{option}")
        assert not equal(default, changed), option


def test_participation_samples_clients_by_round(workdir):
    rounds = FederatedRounds(figures=False)
    train_average(RoundOptions(participation=0.5), callbacks=[rounds], clients=5, epochs=5)
    sampled = [tuple(r["clients"]) for r in rounds.history]
    assert sampled == [tuple(rounds.engine.sample_clients(r)) for r in range(5)]
    assert len(set(sampled)) > 1


def open_engine(options, clients):
    """An engine whose federation has a number of clients, and nothing else."""
    engine = RoundEngine(FedAvg(), options)
    engine.open(lambda seed: SimpleNamespace(seed=seed, num_clients=clients, local_epochs=1))
    return engine


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 10**6))
@example(4, 0.5, 0)
@example(5, 0.5, 0)
@example(10, 0.25, 0)
@example(3, 0.1, 0)
def test_a_share_of_the_clients_participates_but_at_least_one(clients, share, seed):
    engine = open_engine(RoundOptions(participation=share, seed=seed), clients)
    sampled = [engine.sample_clients(r) for r in range(3)]
    for one in sampled:
        assert one == sorted(set(one))
        assert set(one) <= set(range(clients))
        assert len(one) >= 1
        assert abs(len(one) - share * clients) <= 0.5 or len(one) == 1
    assert sampled == [engine.sample_clients(r) for r in range(3)]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True), st.integers(0, 50))
def test_at_least_one_client_reports(clients, round):
    engine = open_engine(RoundOptions(dropout=0.9, seed=0), 100)
    reporting = engine.draw_reporting(clients, round)
    assert reporting
    assert set(reporting) <= set(clients)
    assert reporting == engine.draw_reporting(clients, round)


@pytest.mark.slow  # a second identification; all else of it runs above
def test_identification_can_be_repeated(fit):
    method = "--model.init_args.method.init_args"
    cli = fit(
        f"{method}.reidentify_every=3", f"{method}.relabeling.first=1", "--trainer.max_epochs=5"
    )
    (rounds,) = (c for c in cli.trainer.callbacks if isinstance(c, FederatedRounds))
    assert rounds.engine.method.relabel_rounds == [1, 3]
    assert torch.equal(~rounds.engine.method.clean, cli.datamodule.evaluation.noisy_clients)
    changed = cli.datamodule.labels.current != cli.datamodule.labels.given
    for client in torch.nonzero(rounds.engine.method.clean).flatten().tolist():
        assert not changed[cli.datamodule.client_index(client)].any()


def test_a_server_optimizer_sees_the_aggregate_as_a_gradient(workdir):
    def train(lr):
        return train_average(RoundOptions(server_optimizer=partial(torch.optim.SGD, lr=lr)))

    sgd, plain, half = train(1.0), train_average(RoundOptions()), train(0.5)
    for a, b, c in zip(sgd.parameters(), plain.parameters(), half.parameters(), strict=True):
        # lr 1 lands on the aggregate, lr 0.5 elsewhere
        assert torch.allclose(a, b, atol=1e-6)
        assert not torch.allclose(b, c, atol=1e-3)


def test_two_ranks_give_the_weights_of_one(default_run, run_two, weights):
    run_two(
        "fit", "--config", "fedsir/smoke.yaml", "--run.dir=ranks",
        strategy="--trainer.strategy=federated",
    )  # fmt: skip
    assert_equal_runs(default_run, weights)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_the_launcher_starts_give_the_weights_of_one(default_run, start, weights, ranks):
    process = start(
        "fit", "--config", "fedsir/smoke.yaml", "--run.dir=ranks", "--trainer.strategy=federated",
        "--trainer.accelerator=cpu", f"--trainer.devices={ranks}",
        "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert_equal_runs(default_run, weights)


def assert_equal_runs(alone_run, weights):
    """Check that the run ``ranks`` has the weights and metrics of one process."""
    assert equal(weights(alone_run / LAST), weights(f"ranks/{LAST}"))
    with open(alone_run / "summary.json") as one, open("ranks/summary.json") as many:
        one, many = json.load(one), json.load(many)
    assert one.keys() == many.keys()
    for key in one:  # every validation image counted once
        assert one[key] == pytest.approx(many[key], abs=1e-6), key


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.limit_train_batches=2"], "A round has 4 client groups"),
        pytest.param(
            ["--trainer.fast_dev_run=true"], "A round has 4 client groups", marks=pytest.mark.slow
        ),
        (["--model.init_args.optimizer.lr=-1"], "Invalid learning rate"),
        pytest.param(["--trainer.precision=64-true"], "precision=64-true", marks=pytest.mark.slow),
        (["--trainer.precision=16-true"], "precision=16-true. Use bf16-mixed"),
        pytest.param(
            ["--model.init_args.method.relabeling.residual_rows=0"],
            "relabeling.residual_rows",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.init_args.method.distillation.temperature=0"],
            "distillation.temperature",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--trainer.strategy=foo"], "strategy", marks=pytest.mark.slow),
    ],
)
def test_what_rounds_cannot_do_is_refused(fulgurite, options, message):
    status, _, error = fulgurite("fit", "--config", "fedsir/smoke.yaml", *QUIET, *options)
    assert status == 2, error
    assert message in error
    assert "Traceback" not in error


def test_a_checkpoint_of_another_method_or_network_is_refused(default_run, fulgurite):
    shutil.copytree(default_run, "run")
    resume = ("fit", "--config", "fedsir/smoke.yaml", "--run.dir=run", "--ckpt_path=last")
    status, _, error = fulgurite(*resume, f"--model.init_args.method={METHODS}.FedAvg")
    assert status == 2
    assert f"model.init_args.method is {METHODS}.FedSIR there and {METHODS}.FedAvg here" in error
    status, _, error = fulgurite(*resume, "--model.init_args.network.hidden=32")
    assert status == 2
    assert "model.init_args.network.init_args.hidden is" in error
    new = (*resume, "--run.new=true", "--trainer.max_epochs=5")
    status, _, error = fulgurite(*new, f"--model.init_args.method={METHODS}.FedAvg")
    assert status == 2
    assert "of FedSIR, not of FedAvg" in error
    status, _, error = fulgurite(*new, "--model.init_args.network.hidden=32")
    assert status == 2
    assert "does not fit the model" in error


def test_a_partition_whose_file_changed_is_refused(fulgurite):
    rows = Digits(copies=1).load().samples().rows.tolist()
    parts = [rows[0::2], rows[1::2]]
    resume = (
        *("fit", "--config", "fedsir/smoke.yaml", "--run.dir=run", *QUIET),
        f"--model.init_args.method={METHODS}.FedAvg",
        "--data.init_args.noise=null",
        "--data.init_args.clients=2",
        "--data.init_args.partition=fulgurite.datamodules.fedsir.FilePartition",
        "--data.init_args.partition.init_args.path=clients.json",
    )
    Path("clients.json").write_text(json.dumps(parts))
    assert fulgurite(*resume, "--trainer.max_epochs=1")[0] == 0
    Path("clients.json").write_text(json.dumps(parts[::-1]))
    status, _, error = fulgurite(*resume, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert status == 2
    assert "clients of the checkpoint have other samples" in error
    Path("clients.json").write_text(json.dumps(parts))
    assert fulgurite(*resume, "--ckpt_path=last", "--trainer.max_epochs=2")[0] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.rounds.participation=0", "v>0 and v<=1"),
        pytest.param("--model.init_args.rounds.dropout=1", "v>=0 and v<1", marks=pytest.mark.slow),
    ],
)
def test_shares_out_of_range_are_refused(fulgurite, option, message):
    status, _, error = fulgurite("fit", "--config", "fedsir/smoke.yaml", option)
    assert status == 2
    assert message in error


def test_a_strategy_that_mixes_clients_is_refused(fulgurite, monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.setattr(Trainer, "world_size", 2)
    status, _, error = fulgurite("fit", "--config", "fedsir/smoke.yaml")
    assert status == 2
    assert "--trainer.strategy=federated" in error


@pytest.mark.slow
def test_participation_and_server_optimizer_arrive_from_the_command_line(fit):
    options = (f"--model.init_args.method={METHODS}.FedAvg", "--trainer.max_epochs=1")
    rounds = "--model.init_args.rounds"
    cli = fit(*options, "--data.init_args.clients=5", f"{rounds}.participation=0.5")
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, FederatedRounds))
    assert len(callback.history[0]["clients"]) < 5
    server = f"{rounds}.server_optimizer"
    sgd = fit(*options, f"{server}=torch.optim.SGD", f"{server}.lr=1.0").model
    plain = fit(*options).model
    for a, b in zip(sgd.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
