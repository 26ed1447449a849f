"""Every packaged configuration goes through the real command line."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from fulgurite.cli import parse
from fulgurite.compare import define_trials, read_plan
from fulgurite.errors import ConfigError
from fulgurite.systems import config_path, packaged_configs, resolve_config, systems

ALL = [name for system in systems().values() for name in packaged_configs(system)]
TEXTS = {name: Path(config_path(name)).read_text() for name in ALL}
# by their lines: to parse all of them takes half a second, in each process that collects tests
RUNS = [name for name, text in TEXTS.items() if "\ntrainer:" in f"\n{text}"]
SLOW = pytest.mark.slow  # a second for each method
COMPARISONS = [name for name, text in TEXTS.items() if "\nmethods:" in f"\n{text}"]


def mark_slow(names, quick):
    """Mark all but some slow; tests/platform/test_editors.py holds every run to the schema."""
    return [pytest.param(n, marks=[] if Path(n).stem in quick else SLOW) for n in names]


def test_each_system_has_every_size():
    for system in systems():
        assert {f"{system}/smoke.yaml", f"{system}/paper.yaml", f"{system}/compare.yaml"} <= {*ALL}
        assert f"{system}/sweep.yaml" in ALL


@pytest.mark.parametrize("name", mark_slow(RUNS, quick=("smoke", "paper")))
def test_it_parses_to_what_it_says(name):
    config = parse(["fit", "--config", name])
    content = yaml.safe_load(TEXTS[name])
    assert config.model.class_path == content["model"]["class_path"]
    for name, value in content["data"]["init_args"].items():
        if not isinstance(value, dict):
            assert config.data.init_args[name] == value
    assert config.trainer.max_epochs == content["trainer"]["max_epochs"]


def select_cells(name, quick):
    """One cell of each method: methods differ in keys, settings and seeds only in numbers."""
    plan = read_plan(name, quick=quick)
    cells = define_trials(plan)
    for cell in cells:  # grows by what only serves others
        if cell.origin:
            cells.append(cell.origin)
    one_each = {cell.method: cell for cell in cells}
    assert one_each.keys() == plan.methods.keys()
    assert plan.baseline in one_each
    return one_each


def check_cell(cell):
    training = cell.trainings[0]
    assert parse(["fit", *training.fit]).model.class_path
    if training.predict is not None:
        assert parse(["predict", *training.predict]).model.class_path


@pytest.mark.parametrize("name", mark_slow(COMPARISONS, quick=("compare",)))
def test_the_longest_cell_of_a_comparison_parses(name):
    """That of the method with the most options."""
    one_each = select_cells(name, quick=True)
    check_cell(max(one_each.values(), key=lambda cell: len(cell.trainings[0].fit)))


def test_every_comparison_has_cells():
    """Most of their options are parsed in slow tests alone."""
    for name in COMPARISONS:
        assert select_cells(name, quick=True)


@SLOW
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", COMPARISONS)
def test_every_cell_of_a_comparison_parses(name, quick):
    for cell in select_cells(name, quick).values():
        check_cell(cell)


def test_the_smallest_configuration_fits_tests_and_predicts(fit):
    cli = fit("--run.dir=run")
    assert cli.trainer.current_epoch == 4
    fit("--run.dir=run", "--ckpt_path=last", command="test")
    fit("--run.dir=run", "--ckpt_path=best", command="predict")
    assert Path("run/test_metrics.json").is_file()
    assert Path("run/predict/predictions.npz").is_file()


@pytest.mark.slow  # tests/platform/test_bolts.py has its parts
@pytest.mark.skipif(not importlib.util.find_spec("pl_bolts"), reason="lightning-bolts is absent")
def test_the_configuration_with_bolts_learns(fit):
    cli = fit("--trainer.max_epochs=3", config="fedsir/digits_lars.yaml")
    assert cli.trainer.callback_metrics["val/acc"] > 0.5  # chance is 0.1


@pytest.mark.realdata
@pytest.mark.slow
def test_real_images_train(fit):
    cli = fit("--trainer.max_epochs=2", config="fedsir/cifar10.yaml")
    assert cli.trainer.callback_metrics["val/acc"] > 0.12


def test_an_unknown_configuration_names_the_nearest(fulgurite):
    status, _, error = fulgurite("fit", "--config", "fedsir/digit.yaml")
    assert status == 2
    assert "fedsir/digits.yaml" in error
    assert resolve_config("fedsir/digits.yaml").is_file()
    with pytest.raises(ConfigError, match=r"no installed system is called 'my_paper'") as refused:
        resolve_config("my_paper/default.yaml")
    assert "pip install -e" in refused.value.hint
