"""Configurations from Python: the same objects as the command line's."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from fakes.repository import ROOT
from fakes.runs import read_weights
from lightning.pytorch.callbacks import EarlyStopping

import fulgurite
from fulgurite.errors import ConfigError

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


pytestmark = pytest.mark.usefixtures("workdir")


def test_training_from_python_equals_the_command_line(tmp_path):
    """Six lines, and the weights of ``fulgurite fit``."""
    smoke = fulgurite.load("fedsir/smoke", trainer={"max_epochs": 1})
    trainer = smoke.make_trainer(**QUIET)
    trainer.fit(smoke.model, smoke.data)
    ours = {k: v.clone() for k, v in smoke.model.state_dict().items()}

    from fulgurite.cli import run

    run(["fit", "--config", "fedsir/smoke.yaml", "--trainer.max_epochs=1", "--run.dir=run"])
    theirs = read_weights("run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert smoke.config == yaml.safe_load(Path("run/config.yaml").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # loading leaves nothing


def find_undescribed(metrics, system):
    """Those of metrics that ``docs/reference/metrics.md`` does not name, as it writes names."""
    page = ROOT / "docs" / "reference" / "metrics.md"
    if not page.is_file():  # an installed copy
        return []
    sections = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    tables = dict(zip(sections[::2], sections[1::2], strict=True))
    rows = re.findall(r"^\| (`[^|]+) \|", tables["All systems"] + tables[system], re.MULTILINE)
    described = {
        re.sub("^(STAGE|val|test)/", "", n) for r in rows for n in re.findall("`(.+?)`", r)
    }
    missing = []
    for metric in sorted(metrics):
        short = re.sub(r"^(train|val|test)/((in_domain|new_\w+)/)?", "", metric)
        short = re.sub("_(mae|bias|coverage90|width90)$", "_rmse", short)
        short = re.sub(r"^(probe/\w+)_\d+$", r"\1_T", re.sub(r"^layer\d+", "layer01", short))
        if not {metric, short} & described:
            missing.append(metric)
    return missing


@pytest.mark.parametrize(
    "name",
    [
        "fedsir/smoke",
        "number_probing/smoke",
        *(
            pytest.param(f"{name}/smoke", marks=pytest.mark.slow)
            for name in ("cs_arm_bn", "stream_cqsa", "ice_layers")
        ),
    ],
)
def test_every_system_runs_in_six_lines(name):
    from fulgurite import load

    system = load(name)
    trainer = system.make_trainer(**QUIET, max_epochs=1)
    trainer.fit(system.model, system.data)
    names = {*trainer.callback_metrics}
    trainer.test(system.model, system.data)
    assert trainer.callback_metrics
    assert find_undescribed(names | {*trainer.callback_metrics}, name.partition("/")[0]) == []
    assert all(torch.isfinite(v) for k, v in trainer.callback_metrics.items() if k.endswith("loss"))


def test_overrides_are_those_of_the_command_line():
    loaded = fulgurite.load(
        "fedsir/digits.yaml",
        model={
            "method.relabeling.every": 3,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
        },
        data={"noise.rate": 0.8},
        trainer={"max_epochs": 3, "callbacks": None},
        seed_everything=7,
    )
    model, data = (loaded.config[key]["init_args"] for key in ("model", "data"))
    assert model["method"]["init_args"]["relabeling"]["every"] == 3
    assert model["optimizer"]["class_path"] == "torch.optim.SGD"
    assert data["noise"]["init_args"]["rate"] == 0.8
    assert loaded.config["seed_everything"] == 7
    assert loaded.trainer_arguments["max_epochs"] == 3
    assert "callbacks" not in loaded.trainer_arguments


def test_callbacks_of_the_caller_are_added():
    smoke = fulgurite.load("fedsir/smoke")
    trainer = smoke.make_trainer(**QUIET, callbacks=EarlyStopping("val/loss"))
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert {"FederatedRounds", "EarlyStopping"} <= set(names)
    with pytest.raises(TypeError, match="max_epoch"):
        smoke.make_trainer(max_epoch=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fedsir/digit"}, "fedsir/digit.yaml"),
        ({"name": "fedsir/compare"}, "describes a comparison"),
        ({"name": "fedsir/smoke", "model": {"methods": 1}}, "'methods'"),
        ({"name": "fedsir/smoke", "trainer": {"max_epochs": "many"}}, "max_epochs"),
        ({"name": "fedsir/smoke", "trainer": {"max_epoch": 2}}, "'trainer.max_epochs'"),
        ({"name": "fedsir/smoke", "model": {"method.relabelling.every": 2}}, "'relabeling'"),
        ({"name": "fedsir/smoke", "model": {"method.relabeling.evry": 2}}, "'relabeling.every'"),
        ({"name": "fedsir/smoke", "model": {"network": torch.nn.Linear(1, 1)}}, "no configuration"),
        ({"name": "fedsir/smoke", "data": {"noise.rate": float("nan")}}, "no configuration"),
    ],
)
def test_what_no_configuration_holds_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        fulgurite.load(**arguments)


def test_importing_the_package_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, fulgurite; print('torch' in sys.modules, fulgurite.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", fulgurite.__version__]
    with pytest.raises(AttributeError, match="nothing"):
        fulgurite.nothing  # noqa: B018
