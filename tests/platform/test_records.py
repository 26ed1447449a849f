"""A recorded configuration runs again, whatever callbacks are in it."""

from pathlib import Path

import pytest
import yaml
from fakes.options import QUIET

from fulgurite.cli import parse, run

CALLBACKS = "lightning.pytorch.callbacks"


class _Recorded(Exception):
    """Ends a run once its record is made."""


@pytest.fixture
def record(workdir, monkeypatch):
    """The configuration that a run records, without running it."""
    from fulgurite.cli import FulguriteCLI

    def stop(self, **kwargs):
        raise _Recorded(self.record)

    monkeypatch.setattr(FulguriteCLI, "instantiate_trainer", stop)

    def call(*options):
        with pytest.raises(_Recorded) as caught:
            run(["fit", *options])
        return caught.value.args[0]

    return call


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "system",
    [
        "number_probing",
        *(pytest.param(name, marks=SLOW) for name in ("fedsir", "cs_arm_bn", "stream_cqsa")),
        pytest.param("ice_layers", marks=SLOW),
    ],
)
def test_the_record_of_each_system_runs_again(record, system):
    callbacks = [
        {"class_path": f"{CALLBACKS}.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.01}},
        {"class_path": f"{CALLBACKS}.Timer", "init_args": {"duration": {"days": 1}}},
        {"class_path": f"{CALLBACKS}.ModelPruning", "init_args": {"pruning_fn": "l1_unstructured"}},
        {"class_path": f"{CALLBACKS}.RichProgressBar"},
        {"class_path": f"{CALLBACKS}.EMAWeightAveraging"},
        {"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": {"monitor": "val/loss"}},
    ]
    options = [
        f"--trainer.callbacks+={yaml.safe_dump(c, default_flow_style=True)}" for c in callbacks
    ]
    first = record("--config", f"{system}/smoke.yaml", *options)
    assert "Unable to serialize" not in first
    Path("again.yaml").write_text(first)
    second = record("--config", "again.yaml")
    assert yaml.safe_load(first) | {"run": None} == yaml.safe_load(second) | {"run": None}
    pruning = yaml.safe_load(first)["trainer"]["callbacks"][-4]
    assert pruning["init_args"]["pruning_fn"] == "l1_unstructured"


@pytest.mark.slow
def test_a_run_with_averaged_weights_is_repeated_from_its_record(fit, weights):
    swa = f"--trainer.callbacks+={CALLBACKS}.StochasticWeightAveraging"
    smoke = "number_probing/smoke.yaml"
    fit(
        swa,
        "--trainer.callbacks.swa_lrs=0.01",
        "--trainer.callbacks.swa_epoch_start=1",
        "--run.dir=one",
        config=smoke,
    )
    fit("--run.dir=two", config="one/config.yaml")
    one, two = (Path(f"{name}/summary.json").read_text() for name in ("one", "two"))
    kept = [[line for line in text.splitlines() if "per_s" not in line] for text in (one, two)]
    assert kept[0] == kept[1]
    assert not [
        line for line in Path("one/config.yaml").read_text().splitlines() if "Unable" in line
    ]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param(
            ["--trainer.strategy=ddp_spawn", "--trainer.devices=2", "--trainer.accelerator=cpu"],
            ["strategy=ddp_spawn", "Use --trainer.strategy=ddp"],
            marks=pytest.mark.slow,
        ),
        (
            ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy",
             "--trainer.strategy.start_method=spawn", "--trainer.accelerator=cpu"],
            ["strategy=spawn", "Use --trainer.strategy=ddp"],
        ),
        (
            [f"--trainer.callbacks+={CALLBACKS}.LearningRateFinder"],
            ["LearningRateFinder sets an attribute", "optimizer.init_args.lr"],
        ),
        pytest.param(
            [f"--trainer.callbacks+={CALLBACKS}.StochasticWeightAveraging",
             "--trainer.callbacks.swa_lrs=0.1"],
            ["StochasticWeightAveraging anneals", "EMAWeightAveraging"],
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(fulgurite, options, parts):
    status, _, error = fulgurite("fit", "--config", "fedsir/smoke.yaml", *QUIET, *options)
    lines = [line for line in error.splitlines() if line.startswith("fulgurite: error:")]
    assert status == 2, error
    assert len(lines) == 1, error
    for part in parts:
        assert part in lines[0]


def test_the_parsed_configuration_names_enumerations_as_text(workdir):
    timer = f"--trainer.callbacks+={CALLBACKS}.Timer"
    config = parse(["fit", "--config", "fedsir/smoke.yaml", timer])
    assert config.trainer.callbacks[-1].init_args.interval == "step"
