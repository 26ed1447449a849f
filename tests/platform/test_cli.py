"""The command line as a user meets it: help, errors, run folders, loggers, own modules."""

import csv
import errno
import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from fakes.fedsir import FEDAVG
from fakes.options import QUIET
from fakes.runs import read_weights
from torch import nn

from fulgurite.commands import run_command

SMOKE = ("--config", "fedsir/smoke.yaml")
SHORT = (*SMOKE, *QUIET, FEDAVG, "--trainer.max_epochs=1")
PARTITION = "--data.init_args.partition"


@pytest.mark.parametrize("command", [["--help"], ["systems"], ["--version"]])
def test_light_commands_import_nothing_heavy(command):
    code = (
        "import sys; from fulgurite.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_systems_lists_papers_and_configurations(fulgurite):
    _, out, _ = fulgurite("systems")
    assert "FedSIR: Spectral Client Identification" in out
    assert "fedsir/digits.yaml" in out


def test_doctor_names_versions(fulgurite):
    status, out, _ = fulgurite("doctor")
    assert status == 0, out
    assert f"torch {torch.__version__}" in out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--inptu=images"], ["'inptu'", "Did you mean 'input'?"]),
        (["--trainer.max_epochss=3"], ["trainer.max_epochss", "'trainer.max_epochs'"]),
        (["--trainer.max_epoch=3"], ["'trainer.max_epoch'", "'trainer.max_epochs'"]),  # not short
        (["--model.init_args.methd=3"], ["'methd'", "Did you mean 'method'"]),
        (["--model.init_args.method=fulgurite.models.fedsir.methods.FedAvgg"], ["FedAvg'?"]),
        pytest.param(["--model.init_args.method=FedNope"], ["FedNope"], marks=pytest.mark.slow),
        (  # of packages whose parts are imported on first use
            ["--model.init_args.network=fulgurite.models.fedsir.ResNet81"],
            ["'fulgurite.models.fedsir' has no attribute 'ResNet81'", "fedsir.ResNet18'?"],
        ),
        pytest.param(
            ["--data.init_args.source=fulgurite.datamodules.fedsir.Digit"],
            ["has no attribute 'Digit'", "fedsir.Digits'?"],
            marks=pytest.mark.slow,
        ),
        (["--trainer.max_epochs=abc"], ["trainer.max_epochs", "abc", "int"]),
        (
            ["--model.init_args.method.relabeling.distil_on=foo"],
            ["'disagree', 'all', 'none'", "foo"],
        ),
        (["--model.init_args.local.batch_size=0"], ["local.batch_size", "v>0"]),
        pytest.param(
            ["--model.init_args.network=torch.nn.Flatten"], ["Flatten"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--data.init_args.noise.init_args.rate=1.5"],
            ["1.5", "noise.init_args.rate"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--data.init_args.noise.init_args.rate=[0.5,-1]"],
            ["noise.init_args.rate"],
            marks=pytest.mark.slow,
        ),
        (["--data.init_args.clients=100000"], ["100000 clients", "data.init_args.clients"]),
        pytest.param(
            ["--data.init_args.clients=150", f"{PARTITION}=Dirichlet", f"{PARTITION}.alpha=0.02"],
            ["left client", "without samples"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--data.init_args.noise.init_args.count=9"], ["9 of 4 clients"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--data.init_args.evaluation.val_fraction=1"], ["val_fraction"], marks=pytest.mark.slow
        ),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "not a file"]),
        (["--ckpt_path=last", "--run.root=nowhere"], ["ckpt_path=last", "nowhere/fedsir/smoke"]),
    ],
)
def test_an_error_is_one_line_that_names_the_mend(fulgurite, options, parts):
    check_refused(fulgurite, [*SMOKE, *options], parts)


def test_text_that_yaml_reads_as_a_number_asks_for_quotes(fulgurite):
    segments = "--data.init_args.source.init_args.selection.segments=[20120330_01]"
    options = ["--config", "ice_layers/own.yaml", segments]
    check_refused(fulgurite, options, ["selection.segments", "2012033001", "in quotes"])


def test_a_folder_that_is_no_package_is_named(fulgurite):
    Path("outer_folder").mkdir()
    parts = ["'outer_folder' is the folder", "/outer_folder, which holds no package of that name"]
    check_refused(fulgurite, [*SMOKE, "--model.init_args.network=outer_folder.Net"], parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["init_args.memory_budget=0"], ["budget of 0 cannot be read", "2GiB"]),
        pytest.param(
            ["init_args.memory_budget=-1"], ["budget of -1 cannot be read"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["init_args.memory_budget=lots"], ["'lots' cannot be read"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["init_args.schedule=fast"],
            ["'auto', 'whole', 'heads', 'rect', 'cqs'", "fast"],
            marks=pytest.mark.slow,
        ),
        (["init_args.memory_budge=1MiB"], ["Did you mean 'memory_budget'"]),
        (
            ["=stream_cqsa", "memory_budget=1MiB"],
            ["'stream_cqsa'", "--trainer.strategy.class_path"],
        ),
        (["=stream_cqsaa"], ["'stream_cqsaa'", "Did you mean 'stream_cqsa'"]),
        pytest.param(
            ["=StreamCQSAStrategy"],
            ["class_path=fulgurite.strategies.StreamCQSAStrategy"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["=fulgurite.strategies.StreamCQSAStrategy"],
            [".class_path=fulgurite.strategies"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_strategy_that_is_misspelled_is_one_line(fulgurite, options, parts):
    given = [f"--trainer.strategy{x if x[0] == '=' else '.' + x}" for x in options]
    check_refused(fulgurite, ["--config", "stream_cqsa/smoke.yaml", *given], parts)


def check_refused(fulgurite, options, parts):
    status, _, error = fulgurite("fit", *options, *QUIET)
    lines = [line for line in error.splitlines() if line.startswith("fulgurite: error:")]
    assert status == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for part in parts:
        assert part in lines[0]
    assert not list(Path().glob("runs/*/*/*")), "a failed run left a folder"


def test_debug_shows_the_traceback(fulgurite):
    from fulgurite.errors import ConfigError

    with pytest.raises(ConfigError):
        fulgurite("fit", *SMOKE, "--trainer.max_epochs=abc", "--debug")


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fulgurite", "systems"]
    with os.fdopen(writer) as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_an_error():
    def execute(words):
        raise BrokenPipeError(32, "of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_command(["systems"], execute)


@pytest.mark.parametrize("words", [["--out="], ["--out", ""], ["", "--dry-run"]])
def test_an_empty_value_is_no_default(fulgurite, words):
    """As of a variable of the shell that is not set: `--out=$OUT`."""
    status, _, err = fulgurite("compare", "fedsir/compare_demo.yaml", *words)
    assert status == 2
    assert "is empty. Give a value, or leave it out." in err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_a_disk_that_refuses_is_one_line(number, capsys):
    def write(_):
        raise OSError(number, os.strerror(number), "here/a.txt")

    assert run_command(["new"], write) == 1
    assert capsys.readouterr().err.startswith("fulgurite: error: here/a.txt cannot be written")
    with pytest.raises(OSError, match="here"):
        run_command(["new", "--debug"], write)


def test_unknown_commands_get_the_nearest(fulgurite):
    status, _, error = fulgurite("fitt")
    assert status == 2
    assert "Did you mean 'fit'" in error


class Evil:
    """Makes a folder when a careless unpickler reads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def sources(workdir):
    """Bad data in real formats, and the options that name them."""
    import io
    import zipfile

    import numpy as np
    from PIL import Image

    from fulgurite.testing.files import write_cifar_archive

    source = "--data.init_args.source"
    package = "fulgurite.datamodules.fedsir"
    good = write_cifar_archive(workdir / "cifar.tar.gz")
    (workdir / "cut.tar.gz").write_bytes(good.read_bytes()[:2000])
    with zipfile.ZipFile(workdir / "mixed.zip", "w") as archive:
        for i, size in enumerate((8, 8, 9)):
            buffer = io.BytesIO()
            Image.new("RGB", (size, size)).save(buffer, "png")
            archive.writestr(f"train/a/{i}.png", buffer.getvalue())
            archive.writestr(f"train/b/{i}.png", buffer.getvalue())
            archive.writestr(f"test/a/{i}.png", buffer.getvalue())
    labels = np.arange(20) % 2
    images = np.zeros((20, 8, 8, 1), np.uint8)
    np.savez(workdir / "float.npz", train_images=images, train_labels=labels + 0.5,
             test_images=images, test_labels=labels)  # fmt: skip
    np.savez(workdir / "range.npz", train_images=images, train_labels=labels - 1,
             test_images=images, test_labels=labels)  # fmt: skip
    evil = pickle.dumps({b"data": Evil()}, protocol=2)
    write_cifar_archive(workdir / "evil.tar.gz", extra={"data_batch_1": evil})
    cifar = f"{source}={package}.CifarArchive"
    return {
        "truncated": [cifar, f"{source}.path={workdir}/cut.tar.gz", f"{source}.checksum=null"],
        "malicious": [cifar, f"{source}.path={workdir}/evil.tar.gz", f"{source}.checksum=null"],
        "checksum": [cifar, f"{source}.path={good}"],
        "absent": [cifar, f"{source}.path={workdir}/nothing.tar.gz"],
        "sizes": [f"{source}={package}.ImageFolder", f"{source}.path={workdir}/mixed.zip"],
        "integers": [f"{source}={package}.Npz", f"{source}.path={workdir}/float.npz"],
        "range": [f"{source}={package}.Npz", f"{source}.path={workdir}/range.npz"],
    }


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("truncated", "cut.tar.gz"),
        ("malicious", "evil.tar.gz"),
        ("checksum", "cifar.tar.gz"),
        ("absent", "nothing.tar.gz"),
        ("sizes", "mixed.zip"),
        ("integers", "float.npz"),
        ("range", "range.npz"),
    ],
)
def test_bad_data_is_one_line_that_names_the_file(fulgurite, sources, kind, file):
    status, _, error = fulgurite("fit", *SHORT, *sources[kind])
    lines = [line for line in error.splitlines() if line.startswith("fulgurite: error:")]
    assert status == 2, error
    assert len(lines) == 1, error
    assert file in lines[0]
    assert not Path("executed").exists()


_ALIASES = "".join(
    f"    {x}: &{x} [{','.join(10 * [f'*{y}'])}]\n" for y, x in zip("abcde", "bcdef", strict=True)
)
_BOMB = f"model:\n  class_path: torch.nn.Linear\n  init_args:\n    a: &a [1, 2]\n{_ALIASES}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_BOMB, "stands for more than 100,000 values by its aliases"),
        ("trainer: &a {max_epochs: 1, logger: *a}", "this holds itself"),
        (f"model: {'[' * 3000}{']' * 3000}", "nested"),
        (f"trainer: {{max_epochs: {'9' * 5000}}}", "5000 digits"),
    ],
)
def test_a_configuration_that_expands_is_one_line(fulgurite, workdir, content, words):
    Path("bomb.yaml").write_text(content)
    status, _, error = fulgurite("fit", "--config", "bomb.yaml")
    assert (status, error.count("\n")) == (2, 1), error
    assert words in error


def test_a_full_disk_in_a_worker_is_one_line():
    from fulgurite.cli.messages import as_our_error

    text = "Caught OSError in DataLoader worker process 0.\nOSError: [Errno 28] No space left"
    assert "written or read (No space left on device). Make room" in str(
        as_our_error(OSError(text))
    )
    assert as_our_error(OSError("a text alone")) is None


@pytest.mark.parametrize("kind", [nn.Linear, nn.GRU, partial(nn.Conv1d, kernel_size=1)])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_weights_of_another_precision_than_their_inputs_are_named(kind, dtype):
    from fulgurite.cli.messages import as_our_error

    with pytest.raises((RuntimeError, ValueError)) as raised:
        kind(2, 2).to(dtype)(torch.zeros(1, 2, 2))
    assert "--trainer.precision=bf16-true" in str(as_our_error(raised.value))
    assert as_our_error(RuntimeError("expected a float, found a string")) is None


def test_what_weights_and_biases_refuses_is_one_line():
    from fulgurite.cli.messages import as_our_error
    from fulgurite.errors import ConfigError

    # as wandb's own UsageError, whose package takes seconds to import
    refusal = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    error = as_our_error(refusal("api_key not configured (no-tty).\ncall wandb.login"))
    assert isinstance(error, ConfigError)
    assert "refuses the run: api_key not configured" in str(error)
    assert "WANDB_MODE=offline" in error.hint


def test_a_second_run_leaves_the_first_alone(fit):
    fit(*SHORT[2:])
    fit(*SHORT[2:])
    first, second = sorted(Path("runs/fedsir/smoke").iterdir())
    for folder in (first, second):
        assert {"config.yaml", "environment.json", "metrics.csv", "summary.json"} <= {
            *os.listdir(folder)
        }
        assert sorted(os.listdir(folder / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    facts = json.loads((first / "environment.json").read_text())
    assert facts["seed"] == 0
    assert facts["versions"]["torch"] == torch.__version__
    with (first / "metrics.csv").open() as file:
        assert any(row["val/acc"] for row in csv.DictReader(file))


def test_a_run_can_be_repeated_from_its_record(fit, weights):
    fit(*SHORT[2:], "--run.dir=one", "--seed_everything=7")
    fit("--run.dir=two", config="one/config.yaml")
    one, two = (weights(f"{name}/checkpoints/last.ckpt") for name in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_an_explicit_folder_is_not_overwritten(fulgurite):
    assert fulgurite("fit", *SHORT, "--run.dir=here")[0] == 0
    before = Path("here/metrics.csv").read_bytes()
    status, _, error = fulgurite("fit", *SHORT, "--run.dir=here")
    assert status == 2
    assert "already holds a run" in error
    assert Path("here/metrics.csv").read_bytes() == before


def test_last_and_best_are_those_of_the_newest_run(fit):
    fit(*SHORT[2:], "--run.root=r")
    cli = fit(*SHORT[2:], "--run.root=r", "--ckpt_path=last", command="test")
    assert Path(cli.section.ckpt_path).name == "last.ckpt"
    (folder,) = Path("r/fedsir/smoke").glob("*-test")
    assert "test/acc" in json.loads((folder / "test_metrics.json").read_text())


def test_the_command_line_beats_the_checkpoint_and_says_so(fit, capsys):
    fit(*SHORT[2:], "--run.dir=run")
    cli = fit(
        *SHORT[2:], "--run.dir=run", "--ckpt_path=last", "--model.init_args.local.batch_size=16",
        command="test",
    )  # fmt: skip
    assert cli.model.local.batch_size == 16
    assert "model.init_args.local.batch_size=32; this run uses 16" in capsys.readouterr().err


def test_print_config_shows_the_resolved_configuration(workdir, capsys):
    from fulgurite.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["fit", *SMOKE, "--print_config=skip_null"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "FederatedClassifier" in out
    yaml.safe_load(out[out.index("seed_everything") :])


FOLDER = "fulgurite.datamodules.fedsir.ImageFolder"
NPZ = "fulgurite.datamodules.fedsir.Npz"
SOURCE = "--data.init_args.source"


def parsed_source(*words):
    from fulgurite.cli import parse

    source = parse(["fit", *SMOKE, *words]).data.init_args.source
    return source.class_path.rpartition(".")[2], vars(source.init_args)


def write_source(file, class_path, **arguments):
    source = {"class_path": f"fulgurite.datamodules.fedsir.{class_path}", "init_args": arguments}
    file.write_text(yaml.safe_dump({"data": {"init_args": {"source": source}}}))
    return f"--config={file}"


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("file", marks=pytest.mark.slow),
        "words",
        pytest.param("object", marks=pytest.mark.slow),
    ],
)
def test_a_class_that_replaces_another_takes_none_of_its_arguments(workdir, way):
    before = write_source(
        workdir / "a.yaml", "ImageFolder", path="images", seed=7, test_limit=3, image_size=8
    )
    after = {
        "file": [write_source(workdir / "b.yaml", "Npz", path="a.npz")],
        "words": [f"{SOURCE}=fulgurite.datamodules.fedsir.Npz", f"{SOURCE}.init_args.path=a.npz"],
        "object": [f"{SOURCE}={json.dumps({'class_path': NPZ, 'init_args': {'path': 'a.npz'}})}"],
    }[way]
    own = {"path": "a.npz", "train_limit": None, "test_limit": None, "seed": 0}
    assert parsed_source(before, *after) == ("Npz", own)


def test_a_class_under_another_name_keeps_its_arguments(workdir):
    before = write_source(workdir / "a.yaml", "ImageFolder", path="images", seed=7)
    for name in (FOLDER, FOLDER.replace("ImageFolder", "folders.ImageFolder")):
        arguments = parsed_source(before, f"{SOURCE}={name}")[1]
        assert (arguments["path"], arguments["seed"]) == ("images", 7)


def test_a_required_argument_of_a_replaced_class_is_asked_for_anew(fulgurite, workdir):
    before = write_source(workdir / "a.yaml", "ImageFolder", path="images")
    check_refused(
        fulgurite, [*SMOKE, before, f"{SOURCE}=fulgurite.datamodules.fedsir.Npz"], ["path"]
    )


PARQUET = {"train": "a.parquet", "test": "b.parquet"}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([f"{SOURCE}.init_args.image_size=null"], marks=pytest.mark.slow),
        [f"{SOURCE}.init_args.image_size", "null"],
    ],
)
def test_null_unsets_an_argument_of_an_argument(workdir, words):
    before = write_source(workdir / "a.yaml", "ImageFolder", path="images", image_size=8, seed=7)
    arguments = parsed_source(before, *words)[1]
    assert (arguments["image_size"], arguments["path"], arguments["seed"]) == (None, "images", 7)
    before = write_source(workdir / "a.yaml", "Parquet", files=PARQUET)
    assert parsed_source(before, f"{SOURCE}.init_args.files.test=null")[1]["files"]["test"] is None


def test_null_unsets_an_argument_of_an_argument_of_the_trainer():
    from fulgurite.cli import parse

    strategy = ["--trainer.strategy=fulgurite.strategies.StreamCQSAStrategy"]
    offload = "--trainer.strategy.init_args.offload"
    words = [
        *strategy,
        f"{offload}.activations=host",
        f"{offload}.folder=x",
        f"{offload}.folder=null",
    ]
    strategy = parse(["fit", *SMOKE, *words]).trainer.strategy
    assert (strategy.init_args.offload.folder, strategy.init_args.offload.activations) == (
        None,
        "host",
    )
    probe = ["--trainer.callbacks=fulgurite.callbacks.number_probing.ModularProbe"]
    rows = "--trainer.callbacks.init_args.rows"
    words = [*probe, f"{rows}.first_row=3", f"{rows}.embedding=x", f"{rows}.embedding=null"]
    [callback] = parse(["fit", *SMOKE, *words]).trainer.callbacks
    assert (callback.init_args.rows.embedding, callback.init_args.rows.first_row) == (None, 3)


@pytest.mark.slow  # test_number_probing's other loggers get tables and figures, too
@pytest.mark.figures
def test_metrics_and_figures_reach_every_logger(fit):
    loggers = [
        {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "."},
        },
        {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True}},
    ]
    cli = fit(*SHORT[2:], f"--trainer.logger={json.dumps(loggers)}", "--run.dir=run")
    import wandb

    wandb.finish()
    assert [type(x).__name__ for x in cli.trainer.loggers] == [
        "MetricsLogger",
        "TensorBoardLogger",
        "WandbLogger",
    ]
    assert Path("run/metrics.csv").is_file()
    assert Path("run/figures/clients.png").stat().st_size > 1000
    assert list(Path("run").rglob("events.out.tfevents*"))
    assert list(Path("run/wandb").glob("offline-run-*/files/media/images/figures/*.png"))
    assert not Path("wandb").exists()


OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Data(LightningDataModule):
    num_classes = 3

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(3, (8,))), batch_size=4)


class Model(LightningModule):
    def __init__(self, num_classes: int, width: int = 4):
        super().__init__()
        self.layer = torch.nn.Linear(width, num_classes)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.mark.parametrize(
    ("data", "option", "words"),
    [
        ("Data", "--model.num_classes=5", "--model.num_classes is 5, and that of Data is 3."),
        ("LateData", "--model.width=4", "my_paper.Model needs num_classes, which LateData does"),
        ("DeafData", "--model.width=4", "DeafData.num_classes cannot be read before setup"),
    ],
)
def test_sizes_that_data_and_options_do_not_agree_on_are_named(
    fulgurite, workdir, monkeypatch, data, option, words
):
    (workdir / "my_paper.py").write_text(f"""{OWN}

class LateData(Data):
    num_classes = None

class DeafData(Data):
    num_classes = property(lambda self: 1 / 0)
""")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(sys.modules, "my_paper", raising=False)
    status, _, error = fulgurite(
        "fit", "--model=my_paper.Model", f"--data=my_paper.{data}", option, *QUIET
    )
    assert status == 2
    assert words in error


def test_a_size_that_only_the_user_says_is_recorded(fulgurite, workdir, monkeypatch):
    (workdir / "my_paper.py").write_text(OWN.replace("num_classes = 3", ""))
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(sys.modules, "my_paper", raising=False)
    options = ["--model=my_paper.Model", "--data=my_paper.Data", "--model.num_classes=3"]
    status, _, error = fulgurite("fit", *options, "--trainer.max_steps=1", "--run.dir=a", *QUIET)
    assert status == 0, error
    record = yaml.safe_load((workdir / "a/config.yaml").read_text())
    assert record["model"]["init_args"] == {"width": 4, "num_classes": 3}


def test_a_users_own_module_and_data_plug_in_by_class_path(fulgurite, workdir, monkeypatch):
    (workdir / "my_paper.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(workdir))
    status, _, error = fulgurite(
        "fit", "--model=my_paper.Model", "--data=my_paper.Data", "--trainer.max_epochs=1", *QUIET
    )
    assert status == 0, error
    (folder,) = Path("runs/custom/run").iterdir()
    state = read_weights(folder)
    assert state["layer.weight"].shape == (3, 4)  # classes linked from the data
