"""The context around each step, adaptation to a plate, and what is written of it."""

import json
import os
import signal
import time
import warnings
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes.cs_arm_bn import small_classifier
from fakes.trainers import quiet_trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from fulgurite.callbacks.cs_arm_bn import ControlContext
from fulgurite.domains.cs_arm_bn import MIXED, PlateBatch
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.models.cs_arm_bn import (
    ARMBN,
    ARMCML,
    ARMLL,
    CSARMBN,
    ERM,
    TENT,
    TVN,
    AdaBN,
    AdaptationOptions,
    AdaptiveWeight,
    ControlsOnly,
)
from fulgurite.models.cs_arm_bn.batchnorm import context_layers
from fulgurite.models.cs_arm_bn.modes import compare_modes
from fulgurite.models.cs_arm_bn.profiles import outlier_score, plate_profile
from fulgurite.models.cs_arm_bn.references import reference_state
from fulgurite.models.cs_arm_bn.statistics_files import locate_statistics, read_statistics
from fulgurite.testing.plates import select_rows
from fulgurite.testing.survival import find_free_port, start_call, start_forked

L, N, K = 8, 6, 4
ROWS = ("images", "label", "row", "well", "counted", "query_domain")  # columns of queries
SMOKE = str(resources.files("fulgurite.configs.cs_arm_bn") / "smoke.yaml")


def make_plate(number, seed=0, queries=L, controls=N, gain=None):
    """Class k has stripes along one axis or the other, or more contrast, on a plate of its own."""
    g = torch.Generator().manual_seed(100 * number + seed)
    label = torch.arange(queries) % K
    wave = torch.sin(torch.arange(12.0) * 1.5)
    query = 0.3 * torch.randn(queries, 2, 12, 12, generator=g)
    query += torch.where((label % 2 == 0)[:, None, None, None], wave, wave[:, None])
    query *= torch.where(label < 2, 0.7, 1.6)[:, None, None, None]
    control = 0.8 * torch.randn(controls, 2, 12, 12, generator=g)
    own = torch.Generator().manual_seed(number)
    gain = 0.7 + 0.6 * torch.rand(1, 2, 1, 1, generator=own) if gain is None else gain
    offset = 0.3 * torch.randn(1, 2, 1, 1, generator=own)
    batch = PlateBatch.from_images(gain * query + offset, gain * control + offset, label, number)
    return batch._replace(
        row=1000 * number + torch.arange(queries),
        control_row=1000 * number + 500 + torch.arange(controls),
        well=100 * number + torch.arange(queries) // 2,
    )


def cut(plate, start, stop, controls):
    return select_rows(plate, slice(start, stop), slice(controls))


class Plates(LightningDataModule):
    """Five training plates, two others; prediction in chunks, controls in the first."""

    num_classes, in_channels = K, 2
    test_sets = ("near", "far")

    def __init__(self, change=None, chunk=3):
        super().__init__()
        self.change, self.chunk = change, chunk
        self.domains = [f"lab|batch {i}|plate/{i}" for i in range(8)]

    def loader(self, batches):
        changed = [self.change(b) if self.change else b for b in batches]
        return DataLoader(changed, batch_size=None)

    def train_dataloader(self):
        return self.loader([make_plate(i, seed) for seed in range(4) for i in range(5)])

    def val_dataloader(self):
        return self.loader([make_plate(5)])

    def test_dataloader(self):
        return [self.loader([make_plate(6)]), self.loader([make_plate(7)])]

    def predict_dataloader(self):
        return self.loader(
            cut(make_plate(i), start, start + self.chunk, N if start == 0 else 0)
            for i in (6, 7)
            for start in range(0, L, self.chunk)
        )


def make_module(method=None, **adaptation):
    return small_classifier(
        method, classes=K, channels=2, optimizer=lambda p: torch.optim.Adam(p, 0.02),
        adaptation=AdaptationOptions(**adaptation),
    )  # fmt: skip


def make_trainer(folder, *callbacks, **options):
    logger = CSVLogger(str(folder), name="", version="run")
    defaults = {"max_epochs": 3, "log_every_n_steps": 1}
    return quiet_trainer(logger=logger, callbacks=[*callbacks], **defaults | options)


class Spy(Callback):
    """Notes where statistics come from during each step."""

    def __init__(self):
        self.seen = set()

    def note(self, stage, module):
        self.seen.add((stage, module.context.source, module.context.weight))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note("train", pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.note("val", pl_module)

    def on_test_batch_end(self, trainer, pl_module, *_):
        self.note("test", pl_module)

    def on_predict_batch_end(self, trainer, pl_module, *_):
        self.note("predict", pl_module)


@pytest.fixture
def trained(tmp_path):
    """Trains a method on the plates for an epoch; gives trainer, module and callback."""

    def call(method=None, data=None, epochs=1, **adaptation):
        module, callback = make_module(method, **adaptation), ControlContext()
        trainer = make_trainer(tmp_path, callback, max_epochs=epochs)
        trainer.fit(module, data or Plates())
        return trainer, module, callback

    return call


@pytest.mark.parametrize(
    ("method", "train", "test", "predict"),
    [
        (ERM, ("ordinary", None), ("source", None), ("source", None)),
        pytest.param(
            ARMBN, ("batch", None), ("batch", None), ("batch", None), marks=pytest.mark.slow
        ),
        pytest.param(
            CSARMBN, ("union", None), ("union", None), ("stored", None), marks=pytest.mark.slow
        ),
        (AdaptiveWeight, ("union", None), ("union", "adaptive"), ("stored", "adaptive")),
        pytest.param(
            ControlsOnly,
            ("controls", None),
            ("controls", None),
            ("stored", None),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_stage_has_the_context_of_the_method(tmp_path, method, train, test, predict):
    module, spy = make_module(method()), Spy()
    trainer = make_trainer(tmp_path, ControlContext(), spy, max_epochs=1)
    data = Plates()
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert spy.seen == {
        ("train", *train), ("val", *test), ("test", *test), ("predict", *predict)
    }  # fmt: skip
    assert all(layer.context is None for layer in context_layers(module.network).values())
    assert module.context is None
    assert int(module.network.bn1.num_batches_tracked) == (20 if method is ERM else 0)


@pytest.mark.figures
def test_it_learns_and_reports_each_test_set(trained, tmp_path):
    trainer, module, _ = trained(epochs=3)
    assert trainer.callback_metrics["val/acc"] > 0.7  # chance is 0.25
    trainer.test(module, Plates(), verbose=False)
    found = trainer.callback_metrics
    for name in ("near", "far"):
        for metric in ("loss", "acc", "macro_acc", "well_acc", "plate_acc", "worst_plate_acc"):
            assert f"test/{name}/{metric}" in found
        assert 0 <= found[f"test/{name}/query_weight"] <= 1
        assert (tmp_path / "run" / "figures" / f"test_{name}.png").stat().st_size > 1000


def test_an_error_leaves_no_context_behind(tmp_path):
    module = make_module()

    class Stop(Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, ControlContext(), Stop()).fit(module, Plates())
    assert all(layer.context is None for layer in context_layers(module.network).values())


@pytest.mark.parametrize(
    "method",
    [ControlsOnly, *(pytest.param(m, marks=pytest.mark.slow) for m in (AdaptiveWeight, ERM))],
)
def test_a_plain_trainer_gives_the_same_as_with_the_callback(tmp_path, method):
    """Training, validation, test and prediction, bit for bit."""
    results = []
    for name, callbacks in (("with", [ControlContext()]), ("without", [])):
        module = make_module(method())
        trainer = make_trainer(tmp_path / name, *callbacks, max_epochs=2)
        trainer.fit(module, Plates())
        tested = trainer.test(module, Plates(), verbose=False)
        metrics = [{k: v for k, v in d.items() if "query_weight" not in k} for d in tested]
        arrays = predicted(trainer, module, Plates())
        results.append((module.state_dict(), reference_state(module.network), metrics, arrays))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- what is refused ------------------------------------------------------------------------------


def foreign(batch):
    other = batch.control_domain.clone()
    other[:2] += 1
    return batch._replace(control_domain=other)


def test_controls_of_another_plate_are_refused_unless_they_are_meant(trained):
    with pytest.raises(DataError, match=r"2 of the 6 controls.*not of its plate"):
        trained(data=Plates(foreign))
    trained(data=Plates(foreign), foreign_controls=True)


def test_batches_without_controls(trained):
    def without(batch):
        return cut(batch, 0, L, 0)

    with pytest.raises(DataError, match="ControlsOnly was given a batch without controls"):
        trained(ControlsOnly(), data=Plates(without))
    with pytest.raises(DataError, match=r"TVN was given 0 control"):
        trained(TVN(), data=Plates(without))
    trained(CSARMBN(), data=Plates(without))  # all that is left is ARM-BN


def test_batches_of_other_data_are_refused(trained):
    with pytest.raises(DataError, match="A batch is a dict, not a PlateBatch"):
        trained(data=Plates(lambda batch: batch._asdict()))


@pytest.mark.parametrize(
    "wrong",
    [{"predict_with": "queries"}, {"chunk": 0}, {"record_fraction": 2.0}, {"min_recorded": -1}],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"model.init_args.adaptation.{next(iter(wrong))}"):
        AdaptationOptions(**wrong)
    with pytest.raises(ConfigError, match="outlier_above"):
        ControlContext(outlier_above=-1)


def test_synchronised_batchnorm_is_refused(tmp_path):
    module = make_module()
    module.trainer = make_trainer(tmp_path, strategy="ddp", sync_batchnorm=True)
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        module.setup("fit")
    module = make_module()
    module.network.bn1 = nn.SyncBatchNorm(4)
    module.trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        module.setup("fit")


# --- prediction -----------------------------------------------------------------------------------


def predicted(trainer, module, data):
    batches = trainer.predict(module, data)
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(CSARMBN, marks=pytest.mark.slow),
        AdaptiveWeight,
        pytest.param(ControlsOnly, marks=pytest.mark.slow),
    ],
)
def test_prediction_adapts_once_and_does_not_depend_on_chunks(trained, method):
    trainer, module, _ = trained(method())
    found = [predicted(trainer, module, Plates(chunk=chunk)) for chunk in (1, 3, L)]
    assert len(found[0]["index"]) == 2 * L
    for other in found[1:]:
        assert torch.equal(other["index"], found[0]["index"])
        torch.testing.assert_close(
            other["probabilities"], found[0]["probabilities"], atol=1e-6, rtol=0
        )


def test_statistics_of_plates_with_names_alike_are_two_files(tmp_path):
    first = locate_statistics(tmp_path, "lab|1|a/b")
    assert first == tmp_path / "lab_1_a_b"
    first.with_suffix(".json").write_text(json.dumps({"plate": "lab|1|a/b"}))
    assert locate_statistics(tmp_path, "lab|1|a/b") == first
    assert locate_statistics(tmp_path, "lab|1|a_b") != first
    with pytest.raises(CheckpointError, match=r"none of plate lab\|1\|a_b"):
        read_statistics(tmp_path, "lab|1|a_b")


def test_statistics_are_written_with_their_provenance_and_read_again(trained, tmp_path):
    trainer, module, callback = trained(chunk=4)  # several chunks of controls
    first = predicted(trainer, module, Plates())
    folder = tmp_path / "run" / "statistics"
    facts = json.loads((folder / "lab_batch_6_plate_6.json").read_text())
    assert facts["plate"] == "lab|batch 6|plate/6"
    assert facts["controls"] == N
    assert facts["control_index"] == [6500 + i for i in range(N)]
    assert facts["method"] == "AdaptiveWeight"
    tensors = torch.load(folder / "lab_batch_6_plate_6.pt", weights_only=True)
    assert tensors["bn1.mean"].shape == (4,)
    for layer in context_layers(module.network).values():
        layer.stored.clear()

    def without(batch):
        return cut(batch, 0, L, 0)

    with pytest.raises(DataError, match="plate/6 came before its controls"):
        predicted(trainer, module, Plates(without))
    callback.statistics = str(folder)
    again = predicted(trainer, module, Plates(without))
    torch.testing.assert_close(again["probabilities"], first["probabilities"])
    (folder / "lab_batch_6_plate_6.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        predicted(trainer, module, Plates(without))
    (folder / "lab_batch_6_plate_6.pt").unlink()
    with pytest.raises(CheckpointError, match="none of plate lab"):
        predicted(trainer, module, Plates(without))


def test_prediction_as_in_the_test_keeps_the_controls_of_a_plate(trained):
    trainer, module, _ = trained(CSARMBN(), predict_with="test")
    found = predicted(trainer, module, Plates(chunk=3))
    with torch.no_grad():
        images = cut(make_plate(6), 3, 6, N).images
        network = module.network.eval()
        from fulgurite.models.cs_arm_bn import context

        with context(network, "union", n_query=3):
            expected = network(images)[:3].softmax(1)
    torch.testing.assert_close(found["probabilities"][3:6], expected)


def test_padding_and_unlabelled_queries(trained):
    trainer, module, _ = trained()

    def unlabelled(batch):
        counted = batch.counted.clone()
        counted[-1] = False
        return batch._replace(label=torch.full_like(batch.label, -1), counted=counted)

    found = predicted(trainer, module, Plates(unlabelled, chunk=4))
    assert len(found["index"]) == 2 * (L - 2)
    assert (found["label"] == -1).all()


@pytest.mark.parametrize("method", [ARMLL, TENT])
def test_methods_with_gradients_of_their_own_refuse_half_precision(method):
    trainer = SimpleNamespace(strategy=None, precision="16-mixed", world_size=1)

    def set_up(method):
        module = make_module(method)
        module.trainer = trainer
        module.setup("fit")

    with pytest.raises(ConfigError, match=r"16-mixed: nothing scales them\. Use bf16-mixed"):
        set_up(method())
    set_up(None)
    trainer.precision = "bf16-mixed"
    set_up(method())


# --- state ----------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_that_evaluation_needs(trained, tmp_path):
    trainer, module, callback = trained()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["context_reference"].keys() == context_layers(module.network).keys()
    metrics = trainer.test(module, Plates(), verbose=False)
    fresh, other = make_module(), ControlContext()
    again = make_trainer(tmp_path / "again", other).test(
        fresh, Plates(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
    )
    assert again == metrics
    assert other.profiles.keys() == callback.profiles.keys() == set(Plates().domains[:5])


@pytest.mark.parametrize(
    "every", [20, pytest.param(7, marks=pytest.mark.slow)]
)  # at the end of an epoch, and within one
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, every):
    save = {"every_n_train_steps": every, "save_top_k": -1, "filename": "{step}"}
    ends = []
    for name, start in (("whole", None), ("resumed", tmp_path / "whole" / f"step={every}.ckpt")):
        module = make_module()
        callbacks = [ControlContext(), ModelCheckpoint(tmp_path / name, **save)]
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=True)
        trainer.fit(module, Plates(), ckpt_path=start and str(start))
        ends.append((module.state_dict(), reference_state(module.network)))
        assert trainer.global_step == 40
    if every == 20:  # within an epoch, a plain DataLoader starts anew
        torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        pytest.param({}, 20, marks=pytest.mark.slow),
        ({"min_recorded": 0}, 3),
        pytest.param({"min_recorded": 5}, 5, marks=pytest.mark.slow),
    ],
)
def test_the_reference_is_learned_from_the_last_episodes(tmp_path, settings, epoch):
    """Epochs have 20 episodes; what came before an epoch counts as two of them."""
    module = make_module(**settings)
    make_trainer(tmp_path, ControlContext(), max_epochs=2).fit(module, Plates())
    for layer in context_layers(module.network).values():
        assert int(layer.reference.plates) == 2 + epoch


@pytest.mark.slow  # tests/survival does it in the default suite, by kills
def test_a_run_killed_within_an_epoch_resumes_to_the_same_weights_and_reference(fit):
    """The reference is recorded in steps 6 to 8 of an epoch; the run is taken up at step 7."""
    options = (
        "--data.init_args.episodes.steps_per_epoch=8", "--trainer.max_epochs=5",
        "--model.init_args.adaptation.record_fraction=0.375",
        "--model.init_args.adaptation.min_recorded=0",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=15", "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename={step}",
    )  # fmt: skip
    process = start_forked([
        "fit", "--config", SMOKE, "--run.dir=killed", *options,
        "--trainer.callbacks.dirpath=killed/steps", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    fit("--run.dir=whole", *options, "--trainer.callbacks.dirpath=whole/steps", config=SMOKE)
    kept, later = (Path(f"killed/steps/step={step}.ckpt") for step in (15, 30))
    deadline = time.monotonic() + 120
    while not later.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = ("--run.dir=resumed", f"--ckpt_path={kept}")
    fit(*resumed, *options, "--trainer.callbacks.dirpath=resumed/steps", config=SMOKE)
    whole, rest = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)
        for run in ("whole", "resumed")
    )
    for part in ("state_dict", "context_reference", "optimizer_states"):
        torch.testing.assert_close(rest[part], whole[part], rtol=0, atol=0)
    assert rest["global_step"] == whole["global_step"] == 40


def test_a_plate_with_strange_controls_is_named(trained):
    trainer, module, _ = trained()

    def broken(batch):
        return make_plate(7, gain=0.01) if int(batch.domain) == 7 else batch

    with pytest.warns(UserWarning, match=r"plate/7 are unlike those of all training plates"):
        trainer.test(module, Plates(broken), verbose=False)


def test_ordinary_plates_give_no_warning(trained):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module, _ = trained()
        trainer.test(module, Plates(), verbose=False)
    assert not [warning for warning in caught if "unlike those of all" in str(warning.message)]


def test_a_profile_sees_brightness_contrast_and_sharpness():
    images = torch.randn(20, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1)
    blurred *= images.std() / blurred.std()
    mean, std, sharp = plate_profile(images).view(3, 2)
    other = plate_profile(blurred).view(3, 2)
    assert (sharp - other[2] > 0.3).all()
    torch.testing.assert_close(other[1], std, atol=0.05, rtol=0)
    torch.testing.assert_close(plate_profile(images + 2).view(3, 2)[0], mean + 2)
    known = torch.stack([plate_profile(images + 0.1 * i) for i in range(6)])
    assert outlier_score(plate_profile(images + 0.25), known) < 2
    assert outlier_score(plate_profile(images + 9), known) > 8


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/callbacks/test_fedsir_rounds.py has two ranks in the default suite
def test_two_processes_train_validate_and_predict_as_one(fit, run_two, weights):
    """Two ranks that accumulate two episodes are one rank that accumulates four."""
    common = [
        "--model.init_args.method=fulgurite.models.cs_arm_bn.CSARMBN",
        "--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.lr=0.1",
    ]  # fmt: skip
    accumulate = "--trainer.accumulate_grad_batches=2"

    def on_two(command, *options):
        run_two(command, "--config", SMOKE, *common, accumulate, *options)

    def read(file):
        return json.loads(Path(file).read_text())

    fit(*common, "--trainer.accumulate_grad_batches=4", "--run.dir=one", config=SMOKE)
    on_two("fit", "--run.dir=two")
    one, two = (weights(f"{run}/checkpoints/last.ckpt") for run in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4)
    # the same checkpoint: the same metrics, predictions and statistics
    last = "--ckpt_path=two/checkpoints/last.ckpt"
    fit(*common, "--run.dir=one", last, command="validate", config=SMOKE)
    alone, both = read("one/validate_metrics.json"), read("two/summary.json")
    for key in alone:
        assert both[key] == pytest.approx(alone[key], abs=1e-6), key
    fit(*common, "--run.dir=one", last, command="predict", config=SMOKE)
    on_two("predict", "--run.dir=two", last)
    files = sorted(Path("one/predict/statistics").glob("*.pt"))
    assert len(files) == len([*Path("two/predict/statistics").glob("*.pt")]) > 1
    for file in files:
        tensors = torch.load(file, weights_only=True)
        same = torch.load(f"two/predict/statistics/{file.name}", weights_only=True)
        for key in tensors:
            torch.testing.assert_close(same[key], tensors[key], atol=1e-6, rtol=0)
    arrays = [np.load(f) for f in sorted(Path("two/predict").glob("predictions-*.npz"))]
    found = {key: np.concatenate([a[key] for a in arrays]) for key in ("index", "probabilities")}
    expected = np.load("one/predict/predictions.npz")
    order, other = np.argsort(found["index"]), np.argsort(expected["index"])
    np.testing.assert_array_equal(found["index"][order], expected["index"][other])
    np.testing.assert_allclose(
        found["probabilities"][order], expected["probabilities"][other], atol=1e-6
    )


class TwoPlates(Plates):
    """A test set of fewer plates than there are ranks."""

    test_sets = ("both",)

    def test_dataloader(self):
        return self.loader([make_plate(6), make_plate(7, controls=3)])


def test_plates_count_once_over_three_ranks(tmp_path):
    def measure(**options):
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[ControlContext(figures=False)], **options)
        (metrics,) = trainer.test(make_module(AdaptiveWeight()), TwoPlates(), verbose=False)
        return metrics

    port = str(find_free_port())

    def join(rank):
        def work():
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="3", **address)
            metrics = measure(strategy="ddp", devices=3)
            (tmp_path / f"{rank}.json").write_text(json.dumps(metrics))

        return work

    forks = [start_call(join(rank), tmp_path) for rank in range(3)]
    alone = measure()
    for rank, fork in enumerate(forks):
        ended = fork.wait()
        assert ended.status == 0, ended.output
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics == pytest.approx(alone, abs=1e-6)
    assert alone["test/query_weight"] > 0


# --- training mode against test mode --------------------------------------------------------------


class ManyPlates(Plates):
    """Enough batches for running statistics; ``mixed`` has queries of all plates in each."""

    def __init__(self, mixed=False):
        super().__init__()
        self.mixed = mixed

    def train_dataloader(self):
        g = torch.Generator().manual_seed(0)
        plates = [make_plate(i, seed, gain=0.3 + 0.5 * i) for seed in range(4) for i in range(5)]
        if not self.mixed:
            return self.loader(plates * 3)
        plates = [cut(plate, 0, L, 0) for plate in plates]
        whole = {name: torch.cat([getattr(plate, name) for plate in plates]) for name in ROWS}
        whole = plates[0]._replace(**whole, n_query=len(plates) * L, domain=MIXED)
        draws = [torch.randperm(whole.n_query, generator=g)[:16] for _ in range(60)]
        return self.loader([select_rows(whole, rows) for rows in draws])


@pytest.mark.parametrize(
    ("method", "mixed", "apart"),
    [
        (lambda: ARMCML(4, 4, adapt_bn=False), False, True),
        (lambda: ARMCML(4, 4), False, False),
        (ERM, True, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (ERM, False, True),
                (AdaBN, False, False),
                (ARMBN, False, False),
                (ControlsOnly, False, False),
                (AdaptiveWeight, False, False),
                (TENT, True, False),
            )
        ),
    ],
)
def test_a_loss_that_differs_between_training_and_test_mode_is_named(
    tmp_path, method, mixed, apart
):
    callback, module = ControlContext(figures=False), make_module(method())
    trainer = make_trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ManyPlates(mixed))
    said = [str(w.message) for w in caught if "what is tested is not what" in str(w.message)]
    assert len(said) == apart, callback.mode_losses
    if apart:
        training, test = callback.mode_losses
        assert test > 3 * training
        assert f"{training:.2g} in training mode" in said[0]
        assert f"{test:.2g} in test mode" in said[0]


def test_comparing_modes_changes_nothing():
    module = make_module(ERM()).train()
    module.network.blocks[0].eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    modes, random = [m.training for m in module.modules()], torch.get_rng_state()
    compare_modes(module, make_plate(0))
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert module.context is None


def test_short_trainings_are_not_compared(tmp_path):
    callback = ControlContext(figures=False)
    make_trainer(tmp_path, callback, max_epochs=1).fit(make_module(ERM()), Plates())
    assert callback.mode_losses is None


def test_scores_of_classes_are_written(tmp_path):
    trainer = make_trainer(tmp_path, ControlContext(figures=False))
    trainer.test(make_module(), Plates(), verbose=False)
    rows = (tmp_path / "run" / "classes_near.csv").read_text().splitlines()
    assert rows[0] == "class,images,precision,recall,f1"
    assert [row.split(",")[1] for row in rows[1:]] == ["2"] * K
    values = [float(row.split(",")[4]) for row in rows[1:]]
    macro = float(trainer.callback_metrics["test/near/macro_f1"])
    assert macro == pytest.approx(sum(values) / K, abs=1e-6)
