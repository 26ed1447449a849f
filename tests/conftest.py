import gc
import logging
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from fakes.options import QUIET

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


def pytest_configure(config):
    """Import what every test needs, but not in the process that only deals tests to workers."""
    if config.getoption("tx", default=None) and not hasattr(config, "workerinput"):
        return
    logging.getLogger().addHandler(logging.NullHandler())  # what none asks for is not printed
    gc.disable()  # until all is imported, none of which is garbage

    import lightning.pytorch  # noqa: F401  # now: its log handler keeps the stderr of its import
    import torch

    torch.set_num_threads(1)  # results must not depend on how many workers share the cores


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Look for doctests in the package alone; there are none in tests, which are many files."""
    collectors = yield
    return [node for node in collectors if type(node).__name__ != "DoctestModule"]


def pytest_collection_finish():
    """Search for garbage less often, and never in what was imported: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items):
    # the longest file first, so that no worker waits for it at the end
    items.sort(key=lambda item: item.path.name != "test_kills.py")
    if os.environ.get("FULGURITE_DATA"):
        return
    for item in items:
        if item.get_closest_marker("realdata"):
            item.add_marker(pytest.mark.skip(reason="FULGURITE_DATA is not set"))


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Leave the pictures of runs blank, since to draw them is a third of a short run's time.

    Tests that look at pictures, and those of the survival of runs, are marked ``figures``.
    """
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr(
            "fulgurite.plotting.save_figure", lambda figure, file: write_blank(file)
        )


def write_blank(file):
    """Write a picture of one pixel."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
            "0000000a49444154789c63600000000200010548afa40000000049454e44ae426082"
        )
    )


@pytest.fixture(autouse=True)
def finished_runs():
    """End the run at Weights & Biases that a test began, which the next one would log to."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


@pytest.fixture(autouse=True)
def forgotten_modules(tmp_path_factory):
    """Forget the modules that a test wrote and imported, so that no later test meets them."""
    last = next(reversed(sys.modules))
    yield
    if new := [*takewhile(lambda name: name != last, reversed(sys.modules))]:
        written = tmp_path_factory.getbasetemp()
        for name in new:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(written):
                del sys.modules[name]


class LogText(logging.Handler):
    """What was logged since the last :meth:`clear`."""

    def __init__(self):
        super().__init__()
        self.clear()

    def emit(self, record):
        self.text += self.format(record) + "\n"

    def clear(self):
        self.text = ""


@pytest.fixture
def log():
    """What the test logs.

    Pytest's own fixture for it comes with a plug-in that goes through all loggers before and after
    each part of each test, a hundredth of a second for each.
    """
    handler, root = LogText(), logging.getLogger()
    others = [x for x in root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    loggers = [root, *(logger for logger in others if not logger.propagate)]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """The cache of the tests of one process, which make the same data again and again."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def filled_cache(shared_cache):
    """The cache of the tests of one process, for fixtures of a module; gives its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULGURITE_CACHE", str(shared_cache))
        yield shared_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that nothing else uses; gives its folder, which is not there yet."""
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def workdir(tmp_path, monkeypatch, shared_cache):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FULGURITE_CACHE", str(shared_cache))
    return tmp_path


@pytest.fixture
def own_cache(workdir, cache):
    """A cache that nothing else uses, in the empty folder to run in."""
    return cache


@pytest.fixture
def fit(workdir):
    """Run ``fulgurite <command> --config fedsir/smoke.yaml`` with options, in this process."""
    from fulgurite.cli import run

    def call(*options, command="fit", config="fedsir/smoke.yaml"):
        return run([command, "--config", config, *QUIET, *options])

    return call


@pytest.fixture
def fulgurite(workdir, capsys):
    """Run the command in this process; gives its status and what it printed."""
    from fulgurite.__main__ import main

    def call(*argv):
        capsys.readouterr()
        status = main([*argv])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


@pytest.fixture
def start(workdir):
    """Start ``python -m fulgurite`` as a process of its own."""

    def call(*argv, **kwargs):
        return subprocess.Popen(
            [sys.executable, "-m", "fulgurite", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            **kwargs,
        )

    return call


@pytest.fixture(scope="session")
def train_once(tmp_path_factory, shared_cache):
    """Run a command in a new folder; gives its CLI and the folder.

    For fixtures of a module, whose tests share a training.
    """
    from fulgurite.cli import run

    def call(*argv):
        folder = tmp_path_factory.mktemp("trained")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("FULGURITE_CACHE", str(shared_cache))
            cli = run([*argv, *QUIET])
        return cli, folder

    return call


@pytest.fixture
def predict_split(fulgurite):
    """Predict the test split of a run with its last checkpoint; gives the predictions."""
    from fulgurite.predictions import read_predictions

    def call(run):
        status, _, err = fulgurite(
            "predict", "--config", str(run / "config.yaml"), f"--run.dir={run}", "--ckpt_path=last"
        )
        assert status == 0, err
        newest = max(run.glob("predict*"), key=lambda folder: folder.stat().st_mtime)
        return read_predictions(newest / "predictions.npz")

    return call


@pytest.fixture
def run_two(workdir):
    """Run a command on two ranks of the CPU, in forks that need not import everything again."""
    from fulgurite.testing.survival import run_ranks

    def call(*argv, strategy="--trainer.strategy=ddp"):
        devices = (strategy, "--trainer.devices=2", "--trainer.accelerator=cpu")
        for ended in run_ranks([*argv, *devices, "--trainer.enable_progress_bar=false"]):
            assert ended.status == 0, ended.output

    return call


@pytest.fixture
def weights():
    """The network's weights in a checkpoint, read without unpickling anything."""
    import torch

    def read(path):
        state = torch.load(path, weights_only=True)["state_dict"]
        return {k: v for k, v in state.items() if k.startswith("network.")}

    return read
